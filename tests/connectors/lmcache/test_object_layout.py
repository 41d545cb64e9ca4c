"""Layouts as text: what is written is read, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tq_connectors.lmcache.object_layout import ObjectLayout, parse_layout

DTYPES = st.sampled_from([torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.float32, None])
SHAPES = st.lists(st.integers(0, 10**9), min_size=1, max_size=8).map(tuple)
GROUPS = st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=5)


@given(groups=GROUPS)
def test_every_layout_is_read_as_it_was_written(groups):
    layout = ObjectLayout("KV_2LTD", tuple(shape for shape, _ in groups), tuple(dtype for _, dtype in groups))
    assert parse_layout(layout.text()) == layout


def test_bytes_of_a_layout():
    layout = ObjectLayout("KV_2LTD", ((2, 3, 4), (5,), (6, 0, 0, 0)), (torch.bfloat16, torch.uint8, None))
    assert layout.num_bytes == 48 + 5 + 6


@pytest.mark.parametrize(
    "text",
    [
        "",
        "KV_2LTD",
        "KV_2LTD ",
        "kv torch.uint8[1]",
        "KV_2LTD torch.uint8[]",
        "KV_2LTD torch.uint8[-1]",
        "KV_2LTD torch.uint8[1.5]",
        "KV_2LTD torch.complex64[1]",
        "KV_2LTD torch.uint8[1] junk",
        "KV_2LTD torch.uint8[1, 1, 1, 1, 1, 1, 1, 1, 1]",
        "KV_2LTD torch.uint8[9999999999999]",
        "KV_2LTD " + " ".join(["torch.uint8[1]"] * 65),
        "X" * 33 + " torch.uint8[1]",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="no layout"):
        parse_layout(text)


@given(text=st.text(max_size=100))
def test_no_text_does_anything_but_raise_a_value_error(text):
    try:
        parse_layout(text)
    except ValueError:
        return
