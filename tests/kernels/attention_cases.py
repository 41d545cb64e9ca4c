"""What tests of attention kernels share: pages, a plain half-precision attention, guarded outputs."""

from dataclasses import dataclass, field

import torch

from tq_kernels import PageLayout, preset
from tq_kernels.layout import WORD_FORMATS
from tq_kernels.reference import dequantize, quantize

from .tolerances import FLASH_RULE, attention_error, half_score_error

CANARY = 64
"""Elements before and after an output that nobody may touch."""


@dataclass(kw_only=True)
class Pages:
    """Packed pages, and the keys and values ``[num_pages, page_tokens, heads, dim]`` that they hold."""

    layout: PageLayout
    packed: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def tokens(self, block_table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoded keys and values of the first tokens of a sequence."""
        used = block_table[: -(-length // self.layout.page_tokens)].long()
        keys, values = (side[used].flatten(0, 1)[:length] for side in (self.keys, self.values))
        return keys, values

    def forget(self, page: int, first_slot: int) -> None:
        """Fill slots as if nothing had ever been written there: every byte of theirs is 0xFF, often a NaN."""
        layout = self.layout
        sections = self.packed[page].view(layout.num_kv_heads, layout.section_bytes)
        for side, code in (("key", layout.spec.key), ("value", layout.spec.value)):
            words, lanes = layout.plane(f"{side}_words"), WORD_FORMATS[code].lanes
            scales = layout.plane(f"{side}_scales")
            assert words is not None
            plane = sections[:, words.offset : words.offset + words.num_bytes]
            if scales is not None:
                sections[:, scales.offset + 2 * first_slot : scales.offset + scales.num_bytes] = 0xFF
            if side == "key":
                plane.view(layout.num_kv_heads, layout.page_tokens, -1)[:, first_slot:] = 0xFF
            elif scales is None:
                shape = (layout.num_kv_heads, layout.page_tokens // lanes, layout.head_dim, lanes, -1)
                for slot in range(first_slot, layout.page_tokens):
                    plane.view(shape)[:, slot // lanes, :, slot % lanes] = 0xFF


def make_pages(
    name: str,
    num_pages: int,
    generator: torch.Generator,
    device: torch.device,
    *,
    heads: int = 2,
    head_dim: int = 64,
    page_tokens: int = 32,
    key_balance: torch.Tensor | None = None,
) -> Pages:
    """Pages of random tokens whose keys have something in common."""
    layout = PageLayout(spec=preset(name), head_dim=head_dim, num_kv_heads=heads, page_tokens=page_tokens)
    shape = (num_pages * page_tokens, heads, head_dim)
    keys = torch.randn(shape, generator=generator) + 2 * torch.randn(shape[1:], generator=generator)
    if key_balance is not None:
        keys = keys / key_balance
    packed = quantize(keys, torch.randn(shape, generator=generator), layout)
    keys, values = (side.unflatten(0, (num_pages, page_tokens)) for side in dequantize(packed, layout))
    if key_balance is not None:
        keys = keys * key_balance
    return Pages(layout=layout, packed=packed.to(device), keys=keys.to(device), values=values.to(device))


def far_away(pages: Pages) -> tuple[torch.Tensor, int]:
    """The same pages at the end of a pool of over 2**31 bytes, most never touched, and where they begin."""
    num_pages = len(pages.packed)
    first = (1 << 31) // pages.layout.page_bytes + 1
    pool = torch.empty(
        first + num_pages, pages.layout.page_bytes, dtype=torch.uint8, device=pages.packed.device
    )
    pool[first:] = pages.packed
    return pool, first


def half_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    *,
    softmax_scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as plain PyTorch does it in half precision, every intermediate result rounded.

    Args:
        query: ``[rows, num_query_heads, head_dim]``; bf16 stays, anything else becomes fp16.
        keys: ``[num_tokens, num_kv_heads, head_dim]``.
        values: The same shape.
        seen: ``[rows, num_tokens]`` bool.
        softmax_scale: Factor on the scores.
        softcap: Their cap, or none.
    """
    dtype = torch.bfloat16 if query.dtype is torch.bfloat16 else torch.float16
    group = query.shape[1] // keys.shape[1]
    by_head = query.to(dtype).transpose(0, 1)
    keys, values = (side.to(dtype).transpose(0, 1).repeat_interleave(group, dim=0) for side in (keys, values))
    scores = by_head @ keys.mT * softmax_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores.float(), dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return (weights @ values).transpose(0, 1).float(), lse.transpose(0, 1)


def seen_tokens(
    positions: torch.Tensor, token_positions: torch.Tensor, sliding_window: int | None = None
) -> torch.Tensor:
    """``[rows, num_tokens]``: tokens not after a row, nor left behind by its window."""
    distance = positions[:, None] - token_positions[None, :]
    return (distance >= 0) & (distance < (sliding_window or 1 << 30))


@dataclass(kw_only=True)
class FlashRule:
    """FlashAttention's rule over all sequences of a test: largest errors, ours and what is allowed."""

    ours: list[float] = field(default_factory=lambda: [0.0, 0.0])
    allowed: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(
        self,
        result: tuple[torch.Tensor, torch.Tensor],
        truth: tuple[torch.Tensor, torch.Tensor],
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: torch.Tensor,
        *,
        softmax_scale: float,
        softcap: float | None = None,
    ) -> None:
        """One sequence: the kernel's output and log-sum-exp, the float32 reference's, and what went in."""
        assert result[0].isfinite().all()
        empty = truth[1] == -torch.inf
        assert torch.equal(result[1] == -torch.inf, empty)
        assert not result[0][empty].any()
        if not seen.any():
            return
        half = half_attention(query, keys, values, seen, softmax_scale=softmax_scale, softcap=softcap)
        floors = list(attention_error(query.float(), keys, values, softmax_scale))
        floors[1] += half_score_error(query, keys, softmax_scale)
        for i in range(2):
            true = truth[i][~empty]
            self.ours[i] = max(self.ours[i], float((result[i][~empty].float() - true).abs().max()))
            allowed = FLASH_RULE * float((half[i][~empty] - true).abs().max()) + floors[i]
            self.allowed[i] = max(self.allowed[i], allowed)

    def check(self) -> None:
        """Both errors keep the rule, and the rule can see a mistake."""
        assert self.allowed[0] < 0.1, self.allowed
        assert self.ours[0] <= self.allowed[0], f"output errs by {self.ours[0]}, {self.allowed[0]} is allowed"
        assert self.ours[1] <= self.allowed[1], f"lse errs by {self.ours[1]}, {self.allowed[1]} is allowed"


class Guarded:
    """A poisoned output between canaries."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._whole = torch.full((2 * CANARY + torch.Size(shape).numel(),), 77.0, dtype=dtype, device=device)
        self.inner = self._whole[CANARY:-CANARY].view(shape)
        self.inner.fill_(torch.nan)

    def check(self) -> None:
        """Nothing was written outside, and everything inside."""
        assert (self._whole[:CANARY] == 77.0).all()
        assert (self._whole[-CANARY:] == 77.0).all()
        assert not self.inner.isnan().any()
