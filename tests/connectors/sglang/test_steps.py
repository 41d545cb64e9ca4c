"""Tables of batches: pages, slots, centres and sinks, as attention takes them."""

from functools import partial

import pytest
import torch

from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.sink_pool import SinkPool
from tq_connectors.sglang.segments import Kind
from tq_connectors.sglang.steps import Steps

P, NUM_PAGES, CONTEXT_PAGES = 64, 16, 4
LAYOUT = layout_for("tq4", head_dim=64, num_kv_heads=1, page_tokens=P)
PAGES_OF_REQUEST = torch.tensor([[5, 2, 9, 1], [3, 4, 8, 0], [7, 6, 0, 0]])
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def reference_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has tests of its own."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def make_steps(*, with_sinks: bool) -> tuple[Steps, torch.Tensor]:
    slots = PAGES_OF_REQUEST[..., None] * P + torch.arange(P)
    pages = torch.zeros(NUM_PAGES, LAYOUT.page_bytes, dtype=torch.uint8)
    sinks = None
    if with_sinks:
        sinks = SinkPool(LAYOUT, num_layers=1, num_rows=2, dtype=torch.bfloat16, device=CPU)
        sinks.bind(NUM_PAGES)
    req_to_token = slots.flatten(1).to(torch.int32)
    steps = Steps(
        LAYOUT,
        req_to_token=req_to_token,
        first_layer=partial(torch.clone, pages),
        sinks=sinks,
        num_query_heads=4,
    )
    return steps, req_to_token


def extend(steps: Steps, req_to_token: torch.Tensor, *spans: tuple[int, int, int]):  # type: ignore[no-untyped-def]
    prefix, new = [start for _, start, _ in spans], [end - start for _, start, end in spans]
    return steps.extend(
        torch.tensor([row for row, _, _ in spans]),
        torch.tensor([end for _, _, end in spans]),
        torch.tensor(new),
        torch.cat([req_to_token[row, start:end] for row, start, end in spans]).long(),
        prefix_lens_host=prefix,
        new_lens_host=new,
    )


def test_a_prefill_knows_its_pages_slots_and_centres() -> None:
    steps, req_to_token = make_steps(with_sinks=False)
    batch = extend(steps, req_to_token, (0, 0, 70), (1, 64, 66))
    assert batch.block_table.tolist() == [[5, 2], [3, 4]]
    assert batch.lengths.tolist() == [70, 66]
    assert batch.query_start.tolist() == [0, 70, 72]
    assert batch.slots[[0, 63, 64, 70, 71]].tolist() == [5 * P, 5 * P + 63, 2 * P, 4 * P, 4 * P + 1]
    # a page that this pass opens has the centre of the page before, unless that one is opened too
    assert batch.seed_pages.nonzero().numel() == 72
    assert batch.seed_pages[70] == 3
    assert set(batch.seed_pages.tolist()) == {-1, 3}
    assert [segment.kind for segment in batch.segments] == [Kind.FRESH, Kind.SHORT]
    assert batch.sink_rows.tolist() == [-1, -1]
    steps.first_layer_written(batch)


def test_a_decode_fills_memory_that_stays_and_writes_no_padding() -> None:
    steps, req_to_token = make_steps(with_sinks=False)
    memory = steps.empty(8, 8, 10 * CONTEXT_PAGES * P)
    assert memory.block_table.shape == (8, CONTEXT_PAGES)
    batch = memory.of_decode(3)
    out_cache_loc = torch.tensor([int(req_to_token[0, 128]), int(req_to_token[2, 69]), 0])
    steps.fill_decode(batch, torch.tensor([0, 2, 0]), torch.tensor([129, 70, 1]), out_cache_loc)
    assert batch.block_table.data_ptr() == memory.block_table.data_ptr()
    assert memory.block_table[:2].tolist() == [[5, 2, 9, 1], [7, 6, 0, 0]]
    assert memory.slots[:3].tolist() == [9 * P, 6 * P + 5, -1]
    assert memory.seed_pages[:3].tolist() == [2, -1, -1]
    assert memory.query_start[:4].tolist() == [0, 1, 2, 3]
    assert not batch.segments
    # SGLang leaves the padding of a graph out
    steps.fill_decode(batch, torch.tensor([0, 2, 0]), torch.tensor([129, 70, 1]), out_cache_loc[:2])
    assert memory.slots[:3].tolist() == [9 * P, 6 * P + 5, -1]


def test_sequences_that_begin_are_given_sinks_and_keep_them() -> None:
    steps, req_to_token = make_steps(with_sinks=True)
    batch = extend(steps, req_to_token, (0, 0, 70), (1, 64, 66))
    assert batch.begins is not None
    assert batch.begins.tolist() == [True, False]
    row = int(batch.sink_rows[0])
    assert row >= 0
    assert batch.sink_rows[1] == -1
    assert batch.sink_slots[:5].tolist() == [*range(4 * row, 4 * row + 4), -1]
    steps.first_layer_written(batch)
    later = extend(steps, req_to_token, (0, 70, 71))
    assert later.begins is None
    assert later.sink_rows.tolist() == [row]
    assert later.sink_slots.tolist() == [-1]
