"""Pages of pairs of layers, as rows of SGLang's."""

import pytest

from tq_connectors.engine.layouts import DTYPES, PAGE_TOKENS, layout_for
from tq_connectors.sglang.page_rows import SINK_SHARE, num_pairs, pair_of, row_bytes, sink_rows, token_bytes


@pytest.mark.parametrize("page_tokens", PAGE_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_page_are_the_page(dtype: str, page_tokens: int) -> None:
    layout = layout_for(dtype, head_dim=128, num_kv_heads=8, page_tokens=page_tokens)
    assert row_bytes(layout) * page_tokens == layout.page_bytes


def test_two_layers_make_one() -> None:
    assert [pair_of(layer) for layer in range(5)] == [0, 0, 1, 1, 2]
    assert [num_pairs(layers) for layers in (1, 2, 7, 32)] == [1, 1, 4, 16]


def test_a_token_pays_for_its_rows_and_a_share_of_the_sinks() -> None:
    layout = layout_for("tq4", head_dim=128, num_kv_heads=8, page_tokens=128)
    rows = 32 * row_bytes(layout)
    assert token_bytes(layout, 32) == rows + rows // SINK_SHARE
    assert token_bytes(layout, 31) == token_bytes(layout, 32)  # a spare half
    assert 512 * 8 * 32 / token_bytes(layout, 32) > 3.7  # over bf16


def test_sinks_take_what_was_set_aside_and_no_more_than_sequences_need() -> None:
    layout = layout_for("tq4", head_dim=128, num_kv_heads=8, page_tokens=64)
    of_row = 2 * 4 * 8 * 128 * 2
    many = sink_rows(layout, pool_tokens=1_000_000, max_seqs=4096, item_bytes=2)
    assert many * of_row <= 1_000_000 * row_bytes(layout) / SINK_SHARE < (many + 1) * of_row
    assert sink_rows(layout, pool_tokens=1_000_000, max_seqs=32, item_bytes=2) == 49
    assert (
        sink_rows(layout, pool_tokens=640, max_seqs=4096, item_bytes=2) == 97
    )  # a small pool still has some
