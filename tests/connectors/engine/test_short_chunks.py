"""Short chunks together attend as each would alone, over the pages that hold them too."""

import pytest
import torch

from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.short_chunks import LONGEST_CHUNK, Chunk, short_chunks
from tq_kernels import reference

LAYOUT = layout_for("tq4", head_dim=64, num_kv_heads=2)
P = LAYOUT.page_tokens
SCALE, QUERY_HEADS = 0.125, 4


@pytest.fixture(autouse=True)
def reference_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def chunk(seq: int, first_token: int, num_new: int, prefix_len: int) -> Chunk:
    return Chunk(seq=seq, first_token=first_token, num_new=num_new, prefix_len=prefix_len)


@pytest.mark.parametrize(
    ("news", "is_run"),
    [((3, 1), False), ((40, 1, 16), False), ((64, 17), False), ((48, 16), True), ((4,), True)],
)
def test_every_token_sees_what_is_before_it(news: tuple[int, ...], is_run: bool) -> None:
    generator = torch.Generator().manual_seed(11)
    keys, values = torch.randn(2, 12 * P, 2, 64, generator=generator)
    pages = reference.quantize(keys, values, LAYOUT)
    held_keys, held_values = reference.dequantize(pages, LAYOUT)
    table = torch.tensor([[9, 9, 9], [0, 1, 2], [3, 4, 5], [6, 7, 8]], dtype=torch.int32)
    sinks = torch.randn(2, 5, 4, 2, 64, generator=generator).bfloat16()
    sink_rows = torch.tensor([-1, 2, -1, 4], dtype=torch.int32)
    attention = PagedAttention(layout=LAYOUT, softmax_scale=SCALE, sink_keys=sinks[0], sink_values=sinks[1])
    chunks, first = [chunk(0, 0, 7, 0)], 7
    for seq, new in enumerate(news, 1):
        chunks.append(chunk(seq, first, new, P + 9 * seq))
        first += new
    query = torch.randn(first + 2, QUERY_HEADS, 64, generator=generator)
    out = torch.full_like(query, 5.0)
    together = short_chunks(chunks, table, sink_rows, LAYOUT, num_query_heads=QUERY_HEADS)
    assert together is not None
    assert (together.run is not None) == is_run
    together.attend(attention, query, pages, out)
    assert (out[:7] == 5.0).all()
    assert (out[first:] == 5.0).all()
    for each in chunks[1:]:
        start = int(table[each.seq, 0]) * P
        for i in range(each.num_new):
            length = each.prefix_len + i + 1
            own_keys, own_values = held_keys[start : start + length], held_values[start : start + length]
            if (row := int(sink_rows[each.seq])) >= 0:
                own_keys = torch.cat((sinks[0, row].float(), own_keys[4:]))
                own_values = torch.cat((sinks[1, row].float(), own_values[4:]))
            group = QUERY_HEADS // 2
            token = query[each.first_token + i]
            scores = torch.einsum("hd,khd->hk", token, own_keys.repeat_interleave(group, 1)) * SCALE
            exact = torch.einsum("hk,khd->hd", scores.softmax(-1), own_values.repeat_interleave(group, 1))
            assert torch.allclose(out[each.first_token + i], exact, atol=1e-4)


def test_prompts_without_a_prefix_and_long_chunks_are_left_out() -> None:
    nothing = torch.zeros(3, 1, dtype=torch.int32)
    chunks = [chunk(0, 0, 5, 0), chunk(1, 5, LONGEST_CHUNK + 1, 64), chunk(2, 70, 0, 64)]
    assert short_chunks(chunks, nothing, nothing[:, 0], LAYOUT, num_query_heads=4) is None
