"""A layer's pages serve an engine's steps: prompts in chunks, prefixes found again, tokens one by one."""

import statistics

import pytest
import torch

from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.sink_pool import NUM_SINKS, SinkPool
from tq_connectors.engine.workspaces import DecodeWorkspaces
from tq_kernels.step import prepare_step

LAYOUT = layout_for("tq4", head_dim=64, num_kv_heads=2)
P = LAYOUT.page_tokens
NUM_PAGES, QUERY_HEADS = 12, 4
CPU = torch.device("cpu")
SCALE = 0.125


@pytest.fixture(autouse=True)
def reference_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have tests of their own, and Triton's interpreter would take minutes."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


class Layer:
    """One layer, stepped as an engine steps it, beside all its keys and values as they were."""

    def __init__(self, *, with_sinks: bool, balance: torch.Tensor | None = None) -> None:
        self.pages = torch.full((NUM_PAGES, LAYOUT.page_bytes), 0xA5, dtype=torch.uint8)
        self.pool = None
        sinks = {}
        if with_sinks:
            self.pool = SinkPool(LAYOUT, num_layers=1, num_rows=4, dtype=torch.float32, device=CPU)
            self.pool.bind(NUM_PAGES)
            sinks = {"sink_keys": self.pool.keys[0], "sink_values": self.pool.values[0]}
        self.attention = PagedAttention(layout=LAYOUT, softmax_scale=SCALE, key_balance=balance, **sinks)
        self.workspaces = DecodeWorkspaces(
            LAYOUT, num_query_heads=QUERY_HEADS, max_seqs=4, max_tokens=512, max_rows=2, device=CPU
        )

    def step(
        self,
        tables: list[list[int]],
        lengths: list[int],
        counts: list[int],
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Output of every sequence; tokens of the sequences follow each other."""
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        table = torch.tensor(tables, dtype=torch.int32)
        numbers = torch.tensor(lengths, dtype=torch.int32)
        begins = torch.tensor([length == count for length, count in zip(lengths, counts, strict=True)])
        slots = [
            row[position // P] * P + position % P
            for row, length, count in zip(tables, lengths, counts, strict=True)
            for position in range(length - count, length)
        ]
        seeds = torch.zeros(starts[-1], dtype=torch.int32)
        sink_slots, rows = seeds.clone(), torch.zeros(len(lengths), dtype=torch.int32)
        if self.pool is not None and begins.any():
            self.pool.open_rows(table[:, 0], begins)
        prepare_step(
            table,
            numbers,
            torch.tensor(starts, dtype=torch.int32),
            LAYOUT,
            seed_pages=seeds,
            sinks=self.pool.table if self.pool else None,
            pages=self.pages,
            sink_slots=sink_slots,
            sink_rows=rows,
            num_sinks=NUM_SINKS,
            clock=self.pool.tick() if self.pool else 0,
            opens=bool(begins.any()),
        )
        self.attention.write(
            keys, values, torch.tensor(slots), self.pages, seed_pages=seeds, sink_slots=sink_slots
        )
        if self.pool is not None:
            self.pool.mark_rows(self.pages, table[:, 0], begins, rows)
        out = torch.empty_like(query)
        if len(set(counts)) == 1 and counts[0] <= 2:
            shape = (len(counts), counts[0], *query.shape[1:])
            self.attention.decode(
                query.view(shape),
                self.pages,
                table,
                numbers,
                sink_rows=rows,
                workspace=self.workspaces.get(len(counts), counts[0]),
                out=out.view(shape),
            )
        else:
            for seq in range(len(counts)):
                part = slice(starts[seq], starts[seq + 1])
                self.attention.extend(
                    query[part],
                    keys[part],
                    values[part],
                    self.pages,
                    table[seq],
                    lengths[seq] - counts[seq],
                    sink_row=rows[seq : seq + 1],
                    workspace=None,
                    out=out[part],
                )
        return list(out.split(counts))


def _tokens(count: int, generator: torch.Generator, first: float = 20.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a common part, and the first unlike all others, as models have them."""
    keys = torch.randn(count, 2, 64, generator=generator) + 3.0
    keys[0] = first * torch.randn(2, 64, generator=generator)
    return keys, torch.randn(count, 2, 64, generator=generator)


def _error(found: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> float:
    """Relative error against exact attention of the last tokens."""
    group = QUERY_HEADS // 2
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * SCALE
    last = torch.arange(len(keys) - len(query), len(keys))
    scores.masked_fill_(torch.arange(len(keys)) > last[:, None], -torch.inf)
    exact = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_steps_of_every_kind_attend_to_what_was_written(with_sinks: bool, balanced: bool) -> None:
    """Two sequences, one in two chunks with the other's prompt beside it, then tokens, then two at once."""
    generator = torch.Generator().manual_seed(7)
    balance = torch.rand(2, 64, generator=generator) + 0.5 if balanced else None
    layer = Layer(with_sinks=with_sinks, balance=balance)
    tables = [[3, 8, 1], [5, 2, 7]]
    first = 20.0 if with_sinks else 1.0
    keys, values = zip(*(_tokens(190, generator, first) for _ in tables), strict=True)
    query = torch.randn(2, 190, QUERY_HEADS, 64, generator=generator)
    done = [0, 0]
    errors = []
    for takes in [(70, 0), (20, 127), (1, 1), (1, 1), (2, 2), *[(1, 1)] * 5]:
        active = [seq for seq in range(2) if takes[seq]]
        parts = [slice(done[seq], done[seq] + takes[seq]) for seq in active]
        outs = layer.step(
            [tables[seq] for seq in active],
            [part.stop for part in parts],
            [takes[seq] for seq in active],
            torch.cat([query[seq][part] for seq, part in zip(active, parts, strict=True)]),
            torch.cat([keys[seq][part] for seq, part in zip(active, parts, strict=True)]),
            torch.cat([values[seq][part] for seq, part in zip(active, parts, strict=True)]),
        )
        for seq, part, out in zip(active, parts, outs, strict=True):
            done[seq] = part.stop
            errors.append(_error(out, query[seq][part], keys[seq][: part.stop], values[seq][: part.stop]))
    # a query that the first key answers alone costs most; a wrong page or seed costs more than 1
    assert max(errors) < 0.5
    assert statistics.median(errors) < 0.2
    assert errors[0] < 1e-5  # a chunk without a prefix is raw


def test_a_prefix_found_again_is_read_with_its_sinks_or_from_its_page() -> None:
    """The same suffix: while the row is there, after another sequence took it, and for a copied page."""
    generator = torch.Generator().manual_seed(7)
    layer = Layer(with_sinks=True)
    keys, values = _tokens(P + 8, generator)
    query = torch.randn(P + 8, QUERY_HEADS, 64, generator=generator)
    layer.step([[3, 4]], [P], [P], query[:P], keys[:P], values[:P])
    suffix = (query[P:], keys[P:], values[P:])

    def error(table: list[int]) -> float:
        (out,) = layer.step([table], [P + 8], [8], *suffix)
        return _error(out, query[P:], keys, values)

    raw = error([3, 6])
    layer.pages[9] = layer.pages[3]
    assert error([9, 6]) > raw
    for page in (7, 8, 9, 10):
        layer.step([[page]], [5], [5], query[:5], keys[:5], values[:5])
    assert error([3, 6]) > raw
    assert error([3, 6]) < 0.5


def test_a_chunk_after_fewer_tokens_than_sinks() -> None:
    generator = torch.Generator().manual_seed(7)
    layer = Layer(with_sinks=True)
    keys, values = _tokens(9, generator)
    query = torch.randn(9, QUERY_HEADS, 64, generator=generator)
    layer.step([[3]], [2], [2], query[:2], keys[:2], values[:2])
    (out,) = layer.step([[3]], [9], [7], query[2:], keys[2:], values[2:])
    assert _error(out, query[2:], keys, values) < 0.01


def test_workspaces_of_all_sizes_share_their_memory() -> None:
    workspaces = Layer(with_sinks=False).workspaces
    one, four = workspaces.get(1), workspaces.get(4, 2)
    assert one.partial_out.data_ptr() == four.partial_out.data_ptr()
    assert workspaces.get(1) is one
    assert (one.plan.columns, four.plan.columns) == (2, 4)


@pytest.mark.parametrize(
    ("dtype", "page_tokens", "message"),
    [("fp8", 64, "unknown KV cache dtype 'fp8'; choose one of tq4"), ("tq4", 16, "have 64 or 128 tokens")],
)
def test_pages_that_there_are_not_are_refused(dtype: str, page_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_for(dtype, head_dim=64, num_kv_heads=2, page_tokens=page_tokens)
