"""What a peer is given and what it answers with: raw keys and values, and the best of its settings."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu.timing import Call, Stopwatch

ENCODE_TOKENS = 32768
_QUICK_US = 15_000.0
_MOST_ERROR = 0.25
"""Of an output against attention over the raw keys and values: 0.14 is what 4 bits give on white noise."""
_SEQUENCES_CHECKED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Raw keys and values of one shape, and where they lie in pages of one size."""

    batch: int
    context: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    keys: torch.Tensor
    values: torch.Tensor
    query: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor

    @property
    def num_pages(self) -> int:
        """Pages of all sequences."""
        return int(self.block_table.numel())

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A peer with one choice of its settings; `encode` takes how many tokens to write."""

    settings: str
    encode: Callable[[int], object]
    decode: Callable[[], torch.Tensor]
    bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The fastest right candidate so far, in microseconds."""

    candidate: Candidate
    page_tokens: int
    decode_us: float
    encode_us: float
    in_graph: bool

    @property
    def note(self) -> str:
        """Settings, in words."""
        how = "" if self.in_graph else ", not in a graph"
        return f"{self.candidate.settings}, {self.page_tokens}-token pages{how}"


def random_load(
    batch: int, context: int, heads: tuple[int, int, int], page_tokens: int, device: torch.device
) -> Load:
    """White noise in scattered pages, full to the last slot."""
    q_heads, kv_heads, head_dim = heads
    generator = torch.Generator(device).manual_seed(0x5EED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)

    num_pages = batch * (context // page_tokens)
    order = torch.randperm(num_pages, generator=generator, device=device)
    within = torch.arange(page_tokens, device=device)
    return Load(
        batch=batch,
        context=context,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        keys=normal(batch * context, kv_heads, head_dim),
        values=normal(batch * context, kv_heads, head_dim),
        query=normal(batch, q_heads, head_dim),
        block_table=order.view(batch, -1).to(torch.int32),
        slots=(order[:, None] * page_tokens + within).flatten(),
        lengths=torch.full((batch,), context, dtype=torch.int32, device=device),
    )


def sweep(candidates: Iterator[Candidate], load: Load, watch: Stopwatch) -> Iterator[Best | str]:
    """Time candidates; yields each that is right and faster than all before it, and why others are out."""
    want = _raw_attention(load)
    best = math.inf
    encode_us = math.nan
    for candidate in candidates:
        try:
            if math.isnan(encode_us):
                candidate.encode(len(load.keys))
                encode_us, _ = _time(watch, lambda c=candidate: c.encode(ENCODE_TOKENS))  # type: ignore[misc]
            got = candidate.decode()[: len(want)].float()
            error = float((got - want).norm() / want.norm())
            if not error <= _MOST_ERROR:
                yield f"{candidate.settings}: output errs by {error:.2f}"
                continue
            decode_us, in_graph = _time(watch, candidate.decode)
        except Exception as failure:  # whatever a foreign kernel raises ends this candidate only
            yield f"{candidate.settings}: {repr(failure)[:200]}"
            continue
        if decode_us < best:
            best = decode_us
            yield Best(
                candidate=candidate,
                page_tokens=load.page_tokens,
                decode_us=decode_us,
                encode_us=encode_us,
                in_graph=in_graph,
            )


def warm_up(candidates: Iterator[Candidate]) -> None:
    """Run every candidate once, on whatever its pages hold; errors are those that a sweep will meet again."""
    for number, candidate in enumerate(candidates):
        with contextlib.suppress(Exception):
            if not number:
                candidate.encode(ENCODE_TOKENS)
            candidate.decode()


def _time(watch: Stopwatch, call: Call) -> tuple[float, bool]:
    """Median microseconds, and whether the call could be captured in a graph."""
    try:
        return watch.time_graph([call], _QUICK_US).median_us, True
    except RuntimeError:
        torch.cuda.synchronize()
        return watch.time_call(call, budget_us=_QUICK_US).median_us, False


def _raw_attention(load: Load) -> torch.Tensor:
    """Float32 attention of the first sequences over the raw keys and values."""
    outputs = []
    for seq in range(min(load.batch, _SEQUENCES_CHECKED)):
        rows = slice(seq * load.context, (seq + 1) * load.context)
        keys, values = (raw[rows].float().transpose(0, 1) for raw in (load.keys, load.values))
        query = load.query[seq].float().view(load.kv_heads, -1, load.head_dim)
        weights = (query @ keys.transpose(1, 2) * load.scale).softmax(-1)
        outputs.append((weights @ values).flatten(0, 1))
    return torch.stack(outputs)
