"""ShortChunks: the last tokens of prompts whose prefixes were found, of many sequences in one launch.

A prefix that is found leaves up to a page of tokens to compute. One sequence after the other, that costs the
host more than the device; so they are attended to as decodes are, a few query rows at a time, all together.
They read their own tokens from pages, as every later token will.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tq_connectors.engine.attention import PagedAttention
from tq_kernels.decode_attention import DecodeWorkspace, decode_workspace
from tq_kernels.decode_plan import MAX_ROWS
from tq_kernels.layout import PageLayout

LONGEST_CHUNK = 64
"""New tokens up to which reading pages once for every few of them costs less than the launches it saves."""

ROWS = (1, 4, MAX_ROWS)
"""Rows that a part may have: every number takes seconds to compile, and rows too many next to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New tokens of one sequence.

    Args:
        seq: Place of the sequence in the batch.
        first_token: Place of its first new token among those of the batch.
        num_new: New tokens.
        prefix_len: Tokens before them.
    """

    seq: int
    first_token: int
    num_new: int
    prefix_len: int

    @property
    def is_short(self) -> bool:
        """Whether it is attended to together with others."""
        return self.prefix_len > 0 and 0 < self.num_new <= LONGEST_CHUNK


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortChunks:
    """Short chunks of a step, the same for all its layers. A part is a run of rows of one chunk.

    Args:
        chunks: The chunks.
        tokens: ``[num_tokens]`` int64 places of their tokens in the batch.
        rows_of_tokens: ``[num_tokens]`` int64 the row of each, over all parts.
        tokens_of_rows: ``[num_parts * num_rows]`` int64 the token of each row; rows too many repeat one.
        run: The tokens of the rows where these are a run of tokens, so that nothing need be gathered.
        num_rows: Rows of a part, of which the last is the part's last token.
        block_table: ``[num_parts, max_pages]`` int32.
        lengths: ``[num_parts]`` int32 tokens up to the last of each part.
        sink_rows: ``[num_parts]`` int32.
        workspace: For them.
    """

    chunks: tuple[Chunk, ...]
    tokens: torch.Tensor
    rows_of_tokens: torch.Tensor
    tokens_of_rows: torch.Tensor
    run: slice | None
    num_rows: int
    block_table: torch.Tensor
    lengths: torch.Tensor
    sink_rows: torch.Tensor
    workspace: DecodeWorkspace

    def attend(
        self, attention: PagedAttention, query: torch.Tensor, pages: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Attend with their tokens, which have been written to their pages.

        Args:
            attention: The layer.
            query: ``[num_tokens of the batch, num_query_heads, head_dim]``.
            pages: The layer's pool.
            out: The query's shape; rows of other tokens stay as they are.
        """
        rows = query[self.tokens_of_rows if self.run is None else self.run]
        attended = torch.empty_like(rows) if self.run is None else out[self.run]
        attention.decode(
            rows.unflatten(0, (-1, self.num_rows)),
            pages,
            self.block_table,
            self.lengths,
            sink_rows=self.sink_rows,
            workspace=self.workspace,
            out=attended.unflatten(0, (-1, self.num_rows)),
        )
        if self.run is None:
            out[self.tokens] = attended[self.rows_of_tokens]


def rows_for(num_new: int) -> int:
    """Rows of a part where chunks have up to so many tokens."""
    return next(rows for rows in ROWS if rows >= min(num_new, MAX_ROWS))


def short_chunks(
    chunks: Sequence[Chunk],
    block_table: torch.Tensor,
    sink_rows: torch.Tensor,
    layout: PageLayout,
    *,
    num_query_heads: int,
) -> ShortChunks | None:
    """The short ones of a step's chunks, or None if there are none.

    Args:
        chunks: Of a step, as the host knows them.
        block_table: ``[num_seqs, max_pages]`` int32.
        sink_rows: ``[num_seqs]`` int32 of `prepare_step`.
        layout: Of the pages.
        num_query_heads: Query heads of this process.
    """
    chosen = [chunk for chunk in chunks if chunk.is_short]
    if not chosen:
        return None
    num_rows = rows_for(max(chunk.num_new for chunk in chosen))
    seqs: list[int] = []
    lengths: list[int] = []
    tokens: list[int] = []
    rows_of_tokens: list[int] = []
    tokens_of_rows: list[int] = []
    for chunk in chosen:
        for start in range(0, chunk.num_new, num_rows):
            end = min(start + num_rows, chunk.num_new)
            first_row = len(tokens_of_rows)
            places = range(chunk.first_token + start, chunk.first_token + end)
            spare = num_rows - len(places)
            tokens_of_rows += [places[0]] * spare + list(places)
            tokens += places
            rows_of_tokens += range(first_row + spare, first_row + num_rows)
            seqs.append(chunk.seq)
            lengths.append(chunk.prefix_len + end)
    device, num_parts, num_tokens = block_table.device, len(seqs), len(tokens)
    # one copy from the host, which does not wait for it
    numbers = torch.tensor(
        seqs + lengths + tokens + rows_of_tokens + tokens_of_rows, pin_memory=device.type == "cuda"
    ).to(device, non_blocking=True)
    seq, length, token, row, token_of_row = numbers.split(
        (num_parts, num_parts, num_tokens, num_tokens, num_parts * num_rows)
    )
    run = range(tokens_of_rows[0], tokens_of_rows[0] + len(tokens_of_rows))
    max_pages = -(-max(lengths) // layout.page_tokens)
    return ShortChunks(
        chunks=tuple(chosen),
        tokens=token,
        rows_of_tokens=row,
        tokens_of_rows=token_of_row,
        run=slice(run.start, run.stop) if tokens_of_rows == list(run) else None,
        num_rows=num_rows,
        block_table=block_table[:, :max_pages][seq],
        lengths=length.to(torch.int32),
        sink_rows=sink_rows[seq],
        workspace=decode_workspace(layout, num_parts, num_query_heads, max_pages, device, num_rows),
    )
