"""The Hopper kernels compile to what their design promises, and serve what they say they serve."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tq_kernels import PRESETS, PageLayout, hopper, hopper_quantize, preset
from tq_kernels.decode_plan import DecodePlan, Machine, plan_decode
from tq_kernels.device.hopper_operands import share_start
from tq_kernels.layout import WORD_FORMATS

CODED = [name for name in PRESETS if name not in ("fp8", "raw")]
COMPILE = Path(__file__).parent / "compile_hopper.py"
REGISTERS, SHARED_BYTES = 1 << 16, 228 << 10
"""Of a multiprocessor."""


def _layout(name: str, head_dim: int = 128, page_tokens: int = 128) -> PageLayout:
    return PageLayout(spec=preset(name), head_dim=head_dim, num_kv_heads=2, page_tokens=page_tokens)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Resources and instruction counts by case, from the assembler that Triton ships; no GPU is involved."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {case["case"]: case for case in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize(
    "case",
    [
        "tq4 128 128 1x4",
        "tq4 128 128 1x4 255",
        "tq3 64 64 1x7",
        "tq2 128 64 1x4",
        "k8v4 64 128 4x4",
        "tq4 256 128 1x4",
    ],
)
def test_nothing_passes_through_shared_memory(compiled: dict[str, dict[str, Any]], case: str) -> None:
    found = compiled[case]

    assert found["shared_bytes"] == 0
    assert found["LDS"] == found["STS"] == found["BAR"] == 0
    assert found["HMMA"] > 0
    assert found["MOVM"] > 0
    assert found["LDG.128"] > 0


def test_the_default_preset_widens_a_word_in_eleven_instructions(compiled: dict[str, dict[str, Any]]) -> None:
    found = compiled["tq4 128 128 1x4"]
    words = 32  # of keys and of values, a thread and strip

    assert found["F2FP"] >= 4 * words
    assert found["PRMT"] <= 2 * words + 24
    assert found["stack_bytes"] <= 32
    assert compiled["tq4 128 128 1x4 255"]["stack_bytes"] == 0  # with all registers nothing is spilled


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_rotation_reads_no_matrix(compiled: dict[str, dict[str, Any]], head_dim: int) -> None:
    """Five exchanges of lanes a channel of a thread and round; the launch before needs nothing else."""
    before, after = compiled[f"prepare {head_dim}"], compiled[f"merge {head_dim}"]

    assert before["SHFL"] == 2 * 5 * head_dim // 32
    assert after["SHFL"] >= 2 * 5 * head_dim // 32
    assert before["HMMA"] == after["HMMA"] == before["shared_bytes"] == 0
    assert before["stack_bytes"] == after["stack_bytes"] == 0


@pytest.mark.parametrize("case", ["append tq4 128", "append tq3 64", "append k3v2 256"])
def test_a_token_is_appended_within_a_warp(compiled: dict[str, dict[str, Any]], case: str) -> None:
    found = compiled[case]

    assert found["shared_bytes"] == found["LDS"] == found["STS"] == found["BAR"] == 0
    assert found["SHFL"] >= 2 * 2 * 5 * int(case.split()[-1]) // 32
    assert found["registers"] <= 128


@pytest.mark.parametrize(
    ("page_tokens", "head_dim", "kind", "programs", "stack_bytes"),
    [
        (64, 64, "step", 5, 0),
        (64, 128, "step", 3, 0),
        (128, 64, "step", 5, 48),
        (128, 128, "step", 3, 0),
        (64, 128, "balanced", 3, 24),
        (128, 128, "balanced", 3, 32),
        (128, 128, "layers", 3, 0),
    ],
)
def test_programs_that_quantize_share_a_multiprocessor(
    compiled: dict[str, dict[str, Any]],
    page_tokens: int,
    head_dim: int,
    kind: str,
    programs: int,
    stack_bytes: int,
) -> None:
    found, layout = (
        compiled[f"quantize {page_tokens} {head_dim} {kind}"],
        _layout("tq4", head_dim, page_tokens),
    )

    assert hopper_quantize.programs_per_processor(layout) == programs
    assert found["registers"] * 32 * hopper_quantize.WARPS * programs <= REGISTERS
    assert found["shared_bytes"] * programs <= SHARED_BYTES
    assert found["stack_bytes"] <= stack_bytes
    assert found["BAR"] <= 4


@pytest.mark.parametrize(
    "case",
    [
        "64 64 step",
        "64 128 step",
        "128 64 step",
        "128 128 step",
        "64 128 balanced",
        "128 128 balanced",
        "128 128 layers",
    ],
)
def test_look_ups_read_where_the_compiler_puts_the_table(
    compiled: dict[str, dict[str, Any]], case: str
) -> None:
    """Assembly adds the offset itself; the table is what the kernel allocates first."""
    found = compiled[f"quantize {case}"]

    assert len(found["table_told"]) == 1
    assert found["first_shared"] == found["table_told"]


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_warp_loads_every_word_of_a_strip_once(name: str, head_dim: int) -> None:
    layout = _layout(name, head_dim)
    fixed = hopper.constants(layout, rows=1, group=4, padded=8, tile_columns=8, window=False, softcap=False)
    words = head_dim // WORD_FORMATS[layout.spec.key].elements
    for found, shape in ((fixed["L_KEYS"], [16, words]), (fixed["L_VALUES"], [4, head_dim])):
        bases = [*found.reg_bases, *found.lane_bases]
        reached = {(0, 0)}
        for row, column in bases:
            reached |= {(r ^ row, c ^ column) for r, c in reached}
        assert list(found.shape) == shape
        assert len(reached) == 1 << len(bases) == shape[0] * shape[1]


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_tokens", [64, 128])
def test_coded_pages_of_powers_of_two_are_served(name: str, head_dim: int, page_tokens: int) -> None:
    assert hopper.serves(_layout(name, head_dim, page_tokens))


@pytest.mark.parametrize(
    ("name", "head_dim", "page_tokens"),
    [
        ("fp8", 128, 128),
        ("raw", 128, 128),
        ("tq4", 80, 128),
        ("tq4", 96, 64),
        ("tq4", 128, 16),
        ("tq4", 128, 48),
    ],
)
def test_other_pages_take_the_plain_kernel(name: str, head_dim: int, page_tokens: int) -> None:
    assert not hopper.serves(_layout(name, head_dim, page_tokens))


@pytest.mark.parametrize(
    ("name", "head_dim", "programs"),
    [("tq4", 128, 12), ("tq3", 128, 8), ("k8v4", 128, 8), ("tq4", 64, 16), ("tq3", 64, 12), ("tq4", 256, 8)],
)
def test_a_plan_fills_one_wave_of_warps(name: str, head_dim: int, programs: int) -> None:
    """Splits for 32 sequences of 8,192 tokens; what is resident follows from registers."""
    layout = _layout(name, head_dim)
    machine = Machine(capability=(9, 0), num_processors=132, gluon=True)
    plan = plan_decode(layout, machine, num_seqs=128, num_query_heads=8, max_pages=64)

    assert plan.variant == "hopper"
    assert hopper.resident_programs(plan.num_registers) == programs
    assert plan.num_splits == 132 * programs // (128 * 2)
    assert plan.num_warps == 1


def _plan(batch: int, context: int, **changes: Any) -> DecodePlan:
    """Of tq4 with 32 query heads and 8 KV heads, as the bars have them."""
    layout = PageLayout(
        **{"spec": preset("tq4"), "head_dim": 128, "num_kv_heads": 8, "page_tokens": 128} | changes
    )
    machine = Machine(capability=(9, 0), num_processors=132, gluon=True)
    max_pages = -(-context // layout.page_tokens)
    return plan_decode(
        layout, machine, num_seqs=batch, num_query_heads=4 * layout.num_kv_heads, max_pages=max_pages
    )


@pytest.mark.parametrize(
    ("batch", "context", "num_splits", "strips"),
    [
        (1, 131072, 196, 21),
        (1, 32768, 171, 6),
        (2, 32768, 94, 11),
        (8, 32768, 24, 43),
        (16, 8192, 12, 22),
        (32, 4096, 6, 22),
        (32, 8192, 6, 43),
        (32, 32768, 6, 171),
        (64, 8192, 3, 86),
        (1, 1024, 32, 1),
        (1, 4096, 64, 2),
    ],
)
def test_shares_fill_the_machine_and_are_even(batch: int, context: int, num_splits: int, strips: int) -> None:
    """In up to 1,584 programs, of so many strips of 32 tokens at most."""
    plan = _plan(batch, context)
    starts = [share_start.fn(i, plan.num_splits, context // 32) for i in range(plan.num_splits + 1)]

    assert (plan.num_splits, plan.num_registers) == (num_splits, 168)
    assert max(stop - start for start, stop in itertools.pairwise(starts)) == strips


@pytest.mark.parametrize("page_tokens", [64, 128])
@pytest.mark.parametrize(
    ("batch", "context", "num_splits"),
    [
        (4, 1024, 16),
        (8, 1024, 16),
        (16, 1024, 8),
        (32, 1024, 4),
        (4, 4096, 32),
        (8, 4096, 16),
        (16, 4096, 8),
        (4, 8192, 32),
        (8, 8192, 16),
    ],
)
def test_few_programs_with_all_registers_serve_small_decodes(
    batch: int, context: int, num_splits: int, page_tokens: int
) -> None:
    """A wave of up to 1,056, whose shares all divide pages or are whole ones."""
    plan = _plan(batch, context, page_tokens=page_tokens)
    share = context // num_splits

    assert (plan.num_splits, plan.num_registers) == (num_splits, 255)
    assert batch * 8 * num_splits <= 132 * 8
    assert share * num_splits == context
    assert page_tokens % share == 0 or share % page_tokens == 0


@pytest.mark.parametrize(
    ("batch", "context", "changes", "num_splits", "num_registers"),
    [
        (5, 4096, {}, 32, 168),
        (8, 1152, {}, 18, 168),
        (8, 40960, {}, 24, 168),
        (4, 16384, {"head_dim": 64, "num_kv_heads": 2}, 256, 128),
        (4, 4096, {"head_dim": 64, "num_kv_heads": 2}, 64, 128),
        (1, 16384, {"num_kv_heads": 2}, 256, 168),
        (8, 8192, {"spec": preset("tq3")}, 16, 255),
    ],
)
def test_decodes_that_no_such_wave_fits_keep_their_registers(
    batch: int, context: int, changes: dict[str, Any], num_splits: int, num_registers: int
) -> None:
    """Odd numbers of sequences or pages, an engine's whole context, other heads, presets that have all."""
    plan = _plan(batch, context, **changes)

    assert (plan.num_splits, plan.num_registers) == (num_splits, num_registers)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("page_tokens", [64, 128])
@pytest.mark.parametrize("num_splits", [1, 2, 5, 24, 196])
def test_shares_hold_every_token_once(name: str, page_tokens: int, num_splits: int) -> None:
    """Sequences of any length, from any page on (a window's first), fewer strips than splits among them."""
    layout = _layout(name, page_tokens=page_tokens)
    groups, strips = WORD_FORMATS[layout.spec.value].groups, page_tokens // hopper.strip_tokens(layout)
    for first_page, num_pages in ((0, 0), (0, 1), (3, 2), (0, 7), (11, 130)):
        starts = [share_start.fn(i, num_splits, num_pages * strips) for i in range(num_splits + 1)]
        sizes = [stop - start for start, stop in itertools.pairwise(starts)]
        tokens = [
            (first_page + strip // strips) * page_tokens
            + strip % strips * 16
            + group * (page_tokens // groups)
            + i
            for start, stop in itertools.pairwise(starts)
            for strip in range(start, stop)
            for group in range(groups)
            for i in range(16)
        ]

        assert max(sizes) - min(sizes) <= 1
        assert sorted(tokens) == list(range(first_page * page_tokens, (first_page + num_pages) * page_tokens))


def test_releases_of_triton_that_no_card_has_run_take_the_plain_kernel() -> None:
    assert hopper.compiles_with("3.6.0")
    assert not hopper.compiles_with("3.9.0")
    machine = Machine(capability=(9, 0), num_processors=132, gluon=False)
    assert plan_decode(_layout("tq4"), machine, num_seqs=1, num_query_heads=8, max_pages=1).variant == "plain"
