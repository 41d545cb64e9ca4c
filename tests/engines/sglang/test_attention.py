"""SGLang's classes with ours in them, without a model: attention, and rows that move."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import server_args
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins import load_plugins

from benchmarks.sglang_attention import LARGEST_ERROR, LAYERS, Engine, cases, check
from tq_connectors.codec import CacheGeometry, namespace_for
from tq_connectors.codec_state import CodecState, pack_state
from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.state import STATE_VARIABLE
from tq_connectors.sglang.attention_registration import add_backend
from tq_connectors.sglang.hooks.arguments import BACKEND
from tq_connectors.sglang.page_rows import row_bytes

HEADS = (4, 2, 32)


@pytest.fixture(autouse=True, scope="module")
def plugin() -> None:
    load_plugins()


def engine(dtype_name: str = "tq4", page_size: int = 64) -> Engine:
    return Engine(
        dtype_name,
        page_size=page_size,
        heads=HEADS,
        max_tokens=256,
        max_seqs=4,
        dtype=torch.float32,
        device="cpu",
    )


@pytest.mark.parametrize(("dtype_name", "page_size"), [("tq4", 64), ("k4v2", 128)])
def test_attention_is_that_over_what_the_pages_hold(dtype_name: str, page_size: int) -> None:
    row = check(dtype_name, page_size, HEADS, 300)
    for name, error in row["errors"].items():
        assert error["codes"] < LARGEST_ERROR, name
    assert row["errors"]["decode"]["exact"] > 0.05  # it did read codes


def test_keys_are_divided_by_the_codec_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = CacheGeometry(num_layers=LAYERS, num_kv_heads=2, head_dim=32, kv_dtype="float32")
    layout = layout_for("tq4", head_dim=32, num_kv_heads=2)
    numbers = torch.rand(LAYERS, 2, 32, generator=torch.Generator().manual_seed(4)) * 4 + 0.5
    state = CodecState(numbers.bfloat16().float())
    namespace = namespace_for(layout, geometry, model="m", revision="r")
    file = tmp_path / "state"
    file.write_bytes(pack_state(state, namespace, geometry))
    one = engine()
    one.run(ForwardMode.EXTEND, [(0, 0, 64)])
    monkeypatch.setenv(STATE_VARIABLE, str(file))
    other = engine()
    other.run(ForwardMode.EXTEND, [(0, 0, 64)])
    assert not torch.equal(one.pool.pages(0), other.pool.pages(0))
    for name, _, error in cases(other, 160):
        assert error < LARGEST_ERROR, name


def test_pages_move_as_rows_to_other_pages() -> None:
    """As the host pool, the store, the linker and transfers move them: rows, two layers at once."""
    one = engine()
    spans = [(0, 0, 200)]
    one.run(ForwardMode.EXTEND, spans)
    pool, layout = one.pool, one.pool.page_layout
    pointers, lengths, items = pool.get_contiguous_buf_infos()
    assert len(pointers) == 2 * -(-LAYERS // 2)
    assert set(items) == {layout.page_bytes}
    assert set(lengths) == {(pool.size + pool.page_size) * row_bytes(layout)}
    source, target = (one.req_to_token[row, :256].long() for row in (0, 1))
    for buffer in [*pool.k_buffer, *pool.v_buffer]:
        assert buffer.is_contiguous()
        buffer[target] = buffer[source]
    for layer in range(LAYERS):
        pages = pool.pages(layer)
        assert torch.equal(pages[target[::64] // 64], pages[source[::64] // 64])
        assert pages[source[::64] // 64].any()


def test_a_retracted_sequence_comes_back_into_other_pages() -> None:
    one = engine()
    one.run(ForwardMode.EXTEND, [(0, 0, 200)])
    slots, others = (one.req_to_token[row, :200].long() for row in (0, 2))
    pool = one.pool
    before = [pool.pages(layer)[slots[::64] // 64].clone() for layer in range(LAYERS)]
    copy = pool.get_cpu_copy(slots)
    pool.load_cpu_copy(copy, others)
    for layer, held in enumerate(before):
        assert torch.equal(pool.pages(layer)[others[::64] // 64], held)


class Counter:
    """SGLang's counter of layers that have been loaded."""

    def __init__(self) -> None:
        self.waited: list[int] = []

    def wait_until(self, layer: int) -> None:
        self.waited.append(layer)


def test_reads_wait_for_the_layer_pair_that_is_being_loaded() -> None:
    one = engine()
    counter = Counter()
    one.pool.register_layer_transfer_counter(counter)
    one.run(ForwardMode.EXTEND, [(0, 0, 70)])
    # sinks are looked up in the first layer before anything, and kept once it is written
    assert counter.waited == [0, 0, 0, 0, 1]
    assert one.pool.get_key_buffer(2).shape == (one.pool.size + 64, 2, one.pool.page_layout.slot_bytes)


def test_only_the_backend_writes() -> None:
    one = engine()
    with pytest.raises(NotImplementedError, match="turboquant alone"):
        one.pool.set_kv_buffer(None, None, None, None)
    with pytest.raises(ValueError, match="no whole number of pages"):
        type(one.pool)(100, 64, dtype_name="tq4", dtype=torch.uint8, head_num=2, head_dim=32, layer_num=1)


@pytest.mark.parametrize(
    ("layer", "given", "message"),
    [
        ({}, {"sinks": torch.zeros(4)}, "does not serve sinks"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, {}, "causal attention alone"),
        ({"is_cross_attention": True}, {}, "causal attention alone"),
    ],
)
def test_layers_that_are_not_served_are_refused(
    layer: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    one = engine()
    batch = one.batch(ForwardMode.EXTEND, [(0, 0, 3)])
    other = RadixAttention(4, 32, 0.2, 2, 0, **layer)
    query, side = torch.zeros(3, 128), torch.zeros(3, 2, 32)
    with pytest.raises(RuntimeError, match="before its metadata"):
        one.backend.forward_extend(query, side, side, other, batch)
    one.backend.init_forward_metadata(batch)
    with pytest.raises(NotImplementedError, match=message):
        one.backend.forward_extend(query, side, side, other, batch, **given)
    with pytest.raises(NotImplementedError, match="share keys"):
        one.backend.forward_extend(query, None, None, other, batch)


def test_kernels_are_compiled_for_every_window_and_cap_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[int | None, float | None]] = []

    def note(layers: Iterable[tuple[PagedAttention, Any]], **named: Any) -> None:
        compiled.extend((layer.sliding_window, layer.softcap) for layer, _ in layers)

    monkeypatch.setattr("tq_connectors.sglang.prefill.compile_kernels", note)
    masks: list[dict[str, Any]] = [{}, {"sliding_window_size": 15}, {"logit_cap": 30.0}]
    layers = [RadixAttention(4, 32, 0.2, 2, number, **mask) for number, mask in enumerate(masks)]
    engine().backend.compile_kernels(torch.nn.ModuleList([torch.nn.Identity(), *layers]), torch.float32)
    assert compiled == [(None, None), (16, None), (None, 30.0)]


def test_passes_that_are_not_served_are_refused() -> None:
    one = engine()
    batch = one.batch(ForwardMode.TARGET_VERIFY, [(0, 0, 3)])
    with pytest.raises(NotImplementedError, match="TARGET_VERIFY"):
        one.backend.init_forward_metadata(batch)
    batch.forward_mode = ForwardMode.IDLE
    one.backend.init_forward_metadata(batch)
    with pytest.raises(RuntimeError, match="comes first"):
        one.backend.init_forward_metadata_out_graph(batch)
    spans = [(0, 0, 1)]
    one.backend.init_forward_metadata(one.batch(ForwardMode.EXTEND, spans))
    with pytest.raises(RuntimeError, match="was not prepared"):
        one.forward(one.batch(ForwardMode.DECODE, spans), spans)


def test_a_layer_may_attend_without_writing() -> None:
    one = engine()
    batch = one.batch(ForwardMode.EXTEND, [(0, 0, 3)])
    one.backend.init_forward_metadata(batch)
    query, side = torch.ones(3, 128), torch.ones(3, 2, 32)
    out = one.backend.forward_extend(query, side, side, one.layers[0], batch, save_kv_cache=False)
    assert torch.allclose(out, torch.ones(3, 128))
    assert not one.pool.pages(0).any()


def test_a_pool_of_sglangs_own_is_refused() -> None:
    one = engine()
    with pytest.raises(ValueError, match="which keeps none"):
        ATTENTION_BACKENDS[BACKEND](SimpleNamespace(token_to_kv_pool=SimpleNamespace(), device="cpu"))
    assert one.backend.get_cuda_graph_seq_len_fill_value() == 1


def test_pages_of_heads_first_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    with pytest.raises(ValueError, match="rows of tokens, not hnd"):
        engine()


def test_the_backend_is_named_once() -> None:
    add_backend()
    assert server_args.ATTENTION_BACKEND_CHOICES.count(BACKEND) == 1
