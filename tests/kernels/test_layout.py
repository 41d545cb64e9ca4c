"""Pages have the documented planes and sizes; sizes that cannot be packed are refused with a sentence."""

import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from tq_kernels import PRESETS, Code, CodecSpec, KeyCenter, PageLayout, preset
from tq_kernels.layout import WORD_FORMATS

from . import page_document

HEAD_DIMS = [16, 32, 64, 80, 96, 128, 160, 192, 256, 320, 512]
PAGE_TOKENS = [16, 32, 48, 64, 80, 128, 144, 256, 1024]


def _layout(name: str, head_dim: int, page_tokens: int, heads: int = 1) -> PageLayout:
    return PageLayout(spec=preset(name), head_dim=head_dim, page_tokens=page_tokens, num_kv_heads=heads)


@pytest.mark.parametrize("name", PRESETS)
def test_planes_are_disjoint_aligned_and_inside(name: str) -> None:
    for head_dim in HEAD_DIMS:
        for page_tokens in PAGE_TOKENS:
            layout = _layout(name, head_dim, page_tokens, heads=3)
            end = 0
            for plane in layout.planes:
                assert plane.offset == end, "planes touch and do not overlap"
                assert plane.offset % 16 == 0
                assert plane.num_bytes == plane.rows * plane.columns * plane.item_bytes > 0
                end = plane.offset + plane.num_bytes
            assert end <= layout.section_bytes < end + math.lcm(128, page_tokens)
            assert layout.section_bytes % 128 == 0
            assert layout.section_bytes == layout.slot_bytes * page_tokens
            assert layout.page_bytes == 3 * layout.section_bytes


@pytest.mark.parametrize("key", Code)
@pytest.mark.parametrize("value", Code)
def test_planes_are_the_documented_ones(key: Code, value: Code) -> None:
    for center in (KeyCenter.NONE, KeyCenter.PAGE)[: 1 + key.rotated]:
        for head_dim, page_tokens in ((64, 64), (80, 48), (128, 16), (256, 128)):
            spec = CodecSpec(key=key, value=value, key_center=center)
            layout = PageLayout(spec=spec, head_dim=head_dim, page_tokens=page_tokens, num_kv_heads=2)
            documented = page_document.planes(key.name, value.name, bool(center), head_dim, page_tokens)
            end = documented.pop("end")[0]

            real = {p.name: (p.offset, p.rows, p.columns, p.item_bytes) for p in layout.planes}
            assert real == documented
            assert list(real) == list(documented)
            assert layout.planes[-1].offset + layout.planes[-1].num_bytes == end
            assert layout.section_bytes == page_document.section_bytes(
                key.name, value.name, bool(center), head_dim, page_tokens
            )


def test_planes_hold_every_index_without_a_wasted_bit() -> None:
    for name, spec in PRESETS.items():
        layout = _layout(name, 128, 64)
        for side, code in (("key", spec.key), ("value", spec.value)):
            planes = [plane for plane in layout.planes if plane.name in (f"{side}_words", f"{side}_signs")]
            assert sum(plane.num_bytes for plane in planes) * 8 == code.bits * 128 * 64


@pytest.mark.parametrize("name", PRESETS)
def test_documented_sizes(name: str) -> None:
    rows = {row["preset"]: row for row in page_document.table("preset")}
    for column, size in rows[name].items():
        if column.startswith("d "):
            head_dim, page_tokens = (int(part.split()[1]) for part in column.split(","))
            assert _layout(name, head_dim, page_tokens).slot_bytes == int(size)
    assert set(rows) == set(PRESETS)


@pytest.mark.parametrize(
    ("name", "head_dim", "page_tokens", "slot_bytes"),
    [
        ("tq4", 64, 64, 70),
        ("tq4", 128, 128, 134),
        ("tq4", 128, 64, 136),
        ("tq4", 96, 64, 104),
        ("tq4", 80, 128, 86),
        ("tq3", 128, 128, 102),
        ("tq2", 128, 128, 70),
        ("k8v4", 128, 128, 198),
        ("fp8", 112, 64, 224),
        ("raw", 112, 64, 448),
    ],
)
def test_slot_bytes(name: str, head_dim: int, page_tokens: int, slot_bytes: int) -> None:
    assert _layout(name, head_dim, page_tokens).slot_bytes == slot_bytes


@pytest.mark.parametrize(
    ("head_dim", "page_tokens", "ratio"), [(64, 64, 3.6), (128, 64, 3.75), (128, 128, 3.8)]
)
def test_tq4_saves_what_is_promised_with_everything_counted(
    head_dim: int, page_tokens: int, ratio: float
) -> None:
    assert 4 * head_dim / _layout("tq4", head_dim, page_tokens).slot_bytes >= ratio


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 24}, "head_dim must be a positive multiple of 16, not 24"),
        ({"head_dim": 0}, "head_dim must be a positive multiple of 16, not 0"),
        ({"head_dim": -64}, "head_dim must be a positive multiple of 16, not -64"),
        ({"head_dim": 112}, "head_dim 112 cannot be rotated; .* presets fp8 and raw take any multiple of 16"),
        ({"head_dim": 112, "spec": CodecSpec(key=Code.BF16, value=Code.LM4)}, "112 cannot be rotated"),
        ({"head_dim": 144}, "head_dim 144 cannot be rotated"),
        ({"page_tokens": 24}, "page_tokens must be a positive multiple of 16, not 24"),
        ({"page_tokens": 0}, "page_tokens must be a positive multiple of 16, not 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, not 0"),
    ],
)
def test_sizes_that_cannot_be_packed_are_refused(changes: dict[str, object], message: str) -> None:
    arguments = {"spec": preset("tq4"), "head_dim": 64, "page_tokens": 64, "num_kv_heads": 1} | changes
    with pytest.raises(ValueError, match=message):
        PageLayout(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fp8", "raw"])
def test_unrotated_presets_take_any_multiple_of_16(name: str) -> None:
    for head_dim in (112, 144, 176, 576):
        assert _layout(name, head_dim, 64).slot_bytes == head_dim * (2 if name == "fp8" else 4)


def test_layouts_of_the_same_geometry_are_equal_and_others_are_not() -> None:
    layout = _layout("tq4", 64, 64)

    assert layout == _layout("tq4", 64, 64)
    assert hash(layout) == hash(_layout("tq4", 64, 64))
    others = [
        _layout("tq3", 64, 64),
        _layout("tq4", 128, 64),
        _layout("tq4", 64, 32),
        _layout("tq4", 64, 64, 2),
    ]
    assert len({layout, *others}) == 5


def test_a_plane_that_is_not_there_is_none() -> None:
    assert _layout("tq4", 64, 64).plane("key_signs") is None
    assert _layout("raw", 64, 64).plane("key_scales") is None
    assert _layout("raw", 64, 64).plane("key_center") is None


@pytest.mark.parametrize("code", Code)
def test_word_formats_are_the_documented_ones(code: Code) -> None:
    form, documented = WORD_FORMATS[code], page_document.WORDS[code.name]

    assert form.elements == documented.elements
    assert form.sign_plane == documented.sign_plane
    assert [list(group) for group in form.sign_shifts] == [group for group in documented.signs if group]
    spans = [
        [range(shift, shift + form.magnitude_bits) for shift in group] for group in form.magnitude_shifts
    ]
    assert spans == documented.magnitudes


def test_codes_are_the_documented_ones() -> None:
    for code in Code:
        documented = page_document.CODES[code.name]
        assert (code.value, code.bits, code.rotated) == (
            documented.number,
            documented.bits,
            documented.rotated,
        )
    assert set(page_document.CODES) == {code.name for code in Code}


_ELSEWHERE = """
import pickle, sys
from tq_kernels import PageLayout, preset
came = pickle.load(sys.stdin.buffer)
assert {came: 1}[PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=3)]
"""


def test_equal_layouts_are_one_key() -> None:
    layout = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=3)
    again = pickle.loads(pickle.dumps(layout))
    wider = replace(layout, num_kv_heads=4)

    assert again == layout
    assert {layout: 1}[again] == 1
    assert again.page_bytes == layout.page_bytes == 3 * layout.section_bytes
    assert (wider, hash(wider)) != (layout, hash(layout))
    for seed in "12":  # of hashes of names: engines send what they know to processes of their own
        environment = os.environ | {"PYTHONHASHSEED": seed}
        came = pickle.dumps(layout)
        subprocess.run([sys.executable, "-c", _ELSEWHERE], input=came, env=environment, check=True)
