"""A step's batch, cut by how it attends: decode rows, cold prompts, chunks after a cached prefix."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """Sequences at the head of a batch, with few new tokens each, that read everything from pages.

    Args:
        num_seqs: Sequences.
        num_tokens: Their tokens, the first ones of the batch.
        rows: Most tokens of one of them.
        to_rows: ``[num_seqs * rows]`` the token of each row where numbers of tokens differ: the last row of a
            sequence is its last token, rows too many repeat one. None where all have `rows` tokens.
        to_tokens: ``[num_tokens]`` the row of each token; comes with `to_rows`.
    """

    num_seqs: int
    num_tokens: int
    rows: int
    to_rows: torch.Tensor | None = None
    to_tokens: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdPrompts:
    """Neighbours in a batch that have no tokens in the cache yet.

    Args:
        first_seq: Place of the first one in the batch.
        first_token: Where their tokens begin in the batch.
        lengths: Tokens of each.
        starts: ``[len(lengths) + 1]`` int32 on the device: the token at which each begins, counted from the
            first one.
    """

    first_seq: int
    first_token: int
    lengths: tuple[int, ...]
    starts: torch.Tensor

    @property
    def tokens(self) -> slice:
        """Their tokens in the batch."""
        return slice(self.first_token, self.first_token + sum(self.lengths))


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedChunk:
    """New tokens of one sequence that has others in the cache already.

    Args:
        seq: Place of the sequence in the batch.
        tokens: Its tokens in the batch.
        prefix_len: Tokens that it has in the cache.
    """

    seq: int
    tokens: slice
    prefix_len: int


def decode_rows(
    starts: Sequence[int], query_start: torch.Tensor, num_seqs: int, batch_tokens: int
) -> DecodeRows | None:
    """The first sequences of a batch as rows, or None if there are none.

    Args:
        starts: ``[at least num_seqs + 1]`` on the host: the first token of each sequence, then their end.
            Sequences without tokens at the end fill up a captured graph.
        query_start: The same on the device, int32.
        num_seqs: So many sequences decode.
        batch_tokens: Tokens of the batch, with those that fill up a graph.
    """
    counts = [starts[seq + 1] - starts[seq] for seq in range(num_seqs)]
    if not any(counts):
        return None
    rows, num_tokens = max(counts), starts[num_seqs]
    num_full = next((seq for seq, count in enumerate(counts) if count != rows), num_seqs)
    if not any(counts[num_full:]):
        num_seqs = max(num_full, min(num_seqs, batch_tokens // rows))
        return DecodeRows(num_seqs=num_seqs, num_tokens=num_seqs * rows, rows=rows)
    device = query_start.device
    ends = query_start[1 : num_seqs + 1].long()
    back = torch.arange(rows - 1, -1, -1, device=device)
    token = torch.arange(num_tokens, device=device)
    seq = torch.searchsorted(ends, token, right=True)
    return DecodeRows(
        num_seqs=num_seqs,
        num_tokens=num_tokens,
        rows=rows,
        to_rows=(ends[:, None] - 1 - back).clamp(min=0).flatten(),
        to_tokens=seq * rows + rows - (ends[seq] - token),
    )


def prefill_parts(
    starts: Sequence[int], lengths: Sequence[int], query_start: torch.Tensor, first_seq: int
) -> tuple[list[ColdPrompts], list[CachedChunk]]:
    """The sequences from first_seq on: runs of neighbours without a prefix, and those with one.

    Whether a sequence has a prefix is asked of it alone. Nothing about the longest of a batch tells.

    Args:
        starts: ``[num_seqs + 1]`` on the host: the first token of each sequence, then their end.
        lengths: ``[num_seqs]`` on the host: all tokens of a sequence, those of this step included.
        query_start: The same as `starts` on the device, int32.
        first_seq: Sequences before it are not looked at.
    """
    cold: list[ColdPrompts] = []
    chunks: list[CachedChunk] = []
    for first, last in _runs(starts, lengths, first_seq):
        if lengths[first] > starts[first + 1] - starts[first]:
            tokens = slice(starts[first], starts[first + 1])
            prefix_len = lengths[first] - (tokens.stop - tokens.start)
            chunks.append(CachedChunk(seq=first, tokens=tokens, prefix_len=prefix_len))
        else:
            counts = tuple(starts[seq + 1] - starts[seq] for seq in range(first, last))
            run = query_start[first : last + 1] - query_start[first]
            cold.append(ColdPrompts(first_seq=first, first_token=starts[first], lengths=counts, starts=run))
    return cold, chunks


def _runs(starts: Sequence[int], lengths: Sequence[int], first_seq: int) -> Iterator[tuple[int, int]]:
    """Sequences ``[first, last)``: neighbours without a prefix together, others alone, no empty ones."""
    first = None
    for seq in range(first_seq, len(lengths)):
        count = starts[seq + 1] - starts[seq]
        is_cold = 0 < count == lengths[seq]
        if first is not None and not is_cold:
            yield first, seq
            first = None
        if is_cold and first is None:
            first = seq
        elif count and not is_cold:
            yield seq, seq + 1
    if first is not None:
        yield first, len(lengths)
