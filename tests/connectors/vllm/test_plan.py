"""What becomes of an engine's chunks, and under which names."""

import pytest
import torch
from connectors.vllm.rows_of import facts, heads, page_layout

from tq_connectors.codec_state import CodecState
from tq_connectors.vllm.plan import Mode, plan_offload
from tq_connectors.vllm.rows import PageRows, RawRows
from tq_connectors.vllm.settings import StoreSettings, read_settings
from tq_kernels import preset
from tq_store.errors import ConfigError

SETTINGS = StoreSettings(revision="r")
SKIPS = StoreSettings(revision="r", skip_layers="0 1")
PACKED = {"dtype": "tq4", "block_tokens": (64,), "block_bytes": 2 * page_layout(2).page_bytes}


def plan(settings: StoreSettings = SETTINGS, **changed: object):
    return plan_offload(facts(**changed), settings, heads())


def test_a_cache_in_bf16_is_quantized():
    planned = plan()
    assert planned.mode is Mode.QUANTIZED
    assert planned.rows == PageRows(page_layout(2), 2, 2)
    assert planned.cell_bytes_per_block * 8 == planned.rows.cell_bytes
    assert planned.block is not None
    assert planned.block.dtype is torch.bfloat16
    assert planned.block.num_bytes * 2 == facts().block_bytes


def test_ranks_quantize_the_heads_that_they_have():
    planned = plan(tp_size=2, world_size=2, block_bytes=facts().block_bytes // 2)
    assert planned.rows.rank_layout.num_kv_heads == 1
    assert planned.cell_bytes_per_block * 2 == plan().cell_bytes_per_block


def test_a_packed_cache_moves_as_it_is():
    planned = plan(**PACKED)
    assert planned.mode is Mode.PAGES
    assert planned.rows == PageRows(page_layout(2), 2, 8)
    assert planned.cell_bytes_per_block == PACKED["block_bytes"]


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "fp8"},
        {**PACKED, "block_bytes": 99999, "settings": SKIPS},
        {**PACKED, "world_size": 2},
        {**PACKED, "num_layers": (2, 1), "block_tokens": (64, 64)},
        {"settings": StoreSettings(revision="r", preset="none")},
    ],
    ids=["fp8", "some layers in bf16", "pipeline", "groups", "preset none"],
)
def test_all_else_is_moved_as_bytes(changed):
    planned = plan(**changed)
    assert planned.mode is Mode.RAW
    assert isinstance(planned.rows, RawRows)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": (2, 1), "block_tokens": (16, 16)}, "groups of layers differ"),
        ({"world_size": 2}, "not all tensor-parallel"),
        ({"token_ranks": 2}, "spread over ranks"),
        ({"blocks_per_chunk": 1}, "chunks of 16 tokens are not whole pages of 64"),
        ({"block_bytes": 1000}, "a block of this engine has 1000 bytes"),
    ],
)
def test_a_cache_that_cannot_be_quantized_stops_the_start(changed, message):
    with pytest.raises(ConfigError, match=message):
        plan(**changed)


def test_the_operator_may_name_heads():
    given = StoreSettings(revision="r", num_kv_heads=2, head_dim=64)
    asked = plan_offload(facts(), given, lambda: pytest.fail("the model was asked"))
    assert asked.rows == plan().rows


def test_names_tell_apart_what_hashes_of_tokens_do_not():
    def key(planned, group: int = 0, seed: bytes = b"seed") -> bytes:
        return planned.names(group, lambda: seed).key(b"h" * 32)

    plain = key(plan())
    others = [
        key(plan(model="other")),
        key(plan(dtype="float16")),
        key(plan(blocks_per_chunk=4)),
        key(plan(StoreSettings(revision="s"))),
        key(plan(StoreSettings(revision="r", preset="tq3"))),
        key(plan(StoreSettings(revision="r", salt="s"))),
        key(plan(StoreSettings(revision="r", preset="none"))),
        key(plan(), group=1),
        key(plan(), seed=b"another"),
        plan().names(0, lambda: b"seed").key(b"i" * 32),
    ]
    assert len({plain, *others}) == len(others) + 1
    assert key(plan()) == plain
    divided = plan(tp_size=2, world_size=2, block_bytes=facts().block_bytes // 2)
    assert key(divided) == plain


def test_pages_of_another_state_have_other_names_and_ranks_take_their_heads():
    balance = torch.ones(2, 2, 64)
    balance[:, 1] = 2.0
    states = [CodecState(balance), CodecState(balance * 2)]
    planned = [plan_offload(facts(), SETTINGS, heads(), state) for state in (None, *states)]
    assert len({each.names(0, bytes).key(b"h") for each in planned}) == 3
    assert planned[0].balance(0) is None
    divided = facts(tp_size=2, world_size=2, block_bytes=facts().block_bytes // 2)
    second = plan_offload(divided, SETTINGS, heads(), states[0]).balance(1)
    assert torch.equal(second, torch.full((2, 1, 64), 2.0))
    with pytest.raises(ConfigError, match=r"the codec state is of \[3, 2, 64\]"):
        plan_offload(facts(), SETTINGS, heads(), CodecState(torch.ones(3, 2, 64)))


PIPELINE = {**PACKED, "world_size": 2}
SOME_LAYERS = {**PACKED, "block_bytes": 99999}


@pytest.mark.parametrize("changed", [PIPELINE, SOME_LAYERS], ids=["pipeline", "some layers"])
def test_packed_bytes_of_another_state_or_codec_have_other_names(changed):
    states = [None, CodecState(torch.ones(2, 2, 64)), CodecState(torch.full((2, 2, 64), 2.0))]
    planned = [plan_offload(facts(**changed), SKIPS, heads(), state) for state in states]
    assert {each.mode for each in planned} == {Mode.RAW}
    assert len({each.names(0, bytes).key(b"h") for each in planned}) == 3
    assert planned[0].namespace.codec_fingerprint == preset("tq4").fingerprint.hex()


def test_bytes_that_are_not_packed_have_no_state():
    state = CodecState(torch.ones(2, 2, 64))
    with_state, without = (
        plan_offload(facts(dtype="fp8"), SETTINGS, heads(), each) for each in (state, None)
    )
    assert with_state.namespace == without.namespace


def test_bytes_of_other_layers_or_platforms_are_told_apart():
    others = StoreSettings(revision="r", skip_layers="30 31")
    planned = [
        plan(SKIPS, **SOME_LAYERS),
        plan(others, **SOME_LAYERS),
        plan(SKIPS, **SOME_LAYERS, platform="cuda 9.0"),
    ]
    assert len({each.names(0, bytes).key(b"h") for each in planned}) == 3
    assert len({each.rows for each in planned}) == 3
    for changed in (SOME_LAYERS, SOME_LAYERS | PIPELINE | {"block_bytes": 99999}):
        with pytest.raises(ConfigError, match="set skip_layers to what --kv-cache-dtype-skip-layers has"):
            plan(**changed)


def test_ranks_that_hold_the_same_bytes_share_a_cell():
    mla = {"dtype": "fp8", "tp_size": 4, "world_size": 4}
    planned = plan(**mla, is_replicated=True)
    assert isinstance(planned.rows, RawRows)
    assert planned.rows.num_ranks == 1
    assert planned.names(0, bytes).key(b"h") != plan(**mla).names(0, bytes).key(b"h")
    with pytest.raises(ConfigError, match="its ranks all hold the same bytes: use preset none"):
        plan(tp_size=4, world_size=4, is_replicated=True)


def test_settings_are_checked():
    settings, connection = read_settings({"revision": "r", "preset": "k8v4", "address": "h:1"}, {})
    assert (settings.preset, connection.address, connection.transfer_timeout_s) == ("k8v4", "h:1", 10.0)
    for wrong, message in (
        ({}, "revision is missing"),
        ({"revision": ""}, "revision: '' is not understood"),
        ({"revision": "r", "preset": "tq9"}, "preset is 'tq9'"),
        ({"revision": "r", "preset": "tq3+tq4:0"}, "differs by layer, and an engine's pages have one size"),
        ({"revision": "r", "page_tokens": 0}, "page_tokens is 0"),
        ({"revision": "r", "adress": "h:1"}, "did you mean 'address'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_settings(wrong, {})
