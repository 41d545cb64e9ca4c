"""Inputs for cases: random pages at memory speed, scattered block tables, memory that is reused."""

import math

import torch

from benchmarks.registry import Case
from tq_kernels import Code, PageLayout
from tq_kernels.codebook import TARGETS

_COLD_L2S = 8
"""A case gets so many sets of inputs that their KV in bf16 exceeds this many L2s, or `_MOST_SETS`."""
_MOST_SETS = 32
_FEW_PAGES = 64
_CHUNK_BYTES = 256 << 20


class Arena:
    """Device memory for the inputs of cases.

    Args:
        device: Where.
        l2_bytes: Size of its L2.
        few: Make only a few pages and let all block tables share them: enough to compile kernels.
    """

    def __init__(self, device: torch.device, l2_bytes: int, *, few: bool = False) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0x5EED)
        self._l2_bytes = l2_bytes
        self._few = few
        self._layout: PageLayout | None = None
        self._pages = torch.empty(0, device=device)
        self._bf16 = torch.empty(0, device=device)

    def num_sets(self, case: Case) -> int:
        """How many sets of inputs a case rotates through, so that none is found in the L2."""
        if self._few:
            return 1
        return min(_MOST_SETS, math.ceil(_COLD_L2S * self._l2_bytes / case.bf16_bytes))

    def pages(self, layout: PageLayout, num_pages: int) -> torch.Tensor:
        """Random pages ``[num_pages, page_bytes]``, the same memory for every call with this layout."""
        num_pages = min(num_pages, _FEW_PAGES) if self._few else num_pages
        if self._layout != layout or len(self._pages) < num_pages:
            self._layout, self._pages = None, torch.empty(0, device=self.device)
            self._pages = random_pages(layout, num_pages, self.generator)
            self._layout = layout
        return self._pages[:num_pages]

    def block_tables(self, case: Case, num_pages: int) -> list[torch.Tensor]:
        """A table ``[batch, pages_per_seq]`` int32 for every set of inputs, no page twice, scattered."""
        wanted = self.num_sets(case) * case.batch * case.pages_per_seq
        order = torch.randperm(wanted, generator=self.generator, device=self.device) % num_pages
        tables = order.to(torch.int32).view(-1, case.batch, case.pages_per_seq)
        return [table.contiguous() for table in tables]

    def bf16(self, num_elements: int) -> torch.Tensor:
        """Random bf16 numbers, the same memory for every call."""
        if len(self._bf16) < num_elements:
            self._bf16 = torch.empty(0, device=self.device)
            self._bf16 = torch.empty(num_elements, dtype=torch.bfloat16, device=self.device)
            self._bf16.normal_(generator=self.generator)
        return self._bf16[:num_elements]

    def normal(self, *shape: int) -> torch.Tensor:
        """Fresh random bf16 numbers."""
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(generator=self.generator)


def random_pages(layout: PageLayout, num_pages: int, generator: torch.Generator) -> torch.Tensor:
    """Pages of random words, scales that give keys and values about unit variance, and small centres.

    Any word is valid for a Lloyd-Max code. Bytes of e4m3 and bfloat16 codes are those of Gaussian numbers,
    as random bytes would hold NaNs.
    """
    device = generator.device
    pages = torch.empty(num_pages, layout.page_bytes, dtype=torch.uint8, device=device)
    pages.view(torch.int32).random_(-(1 << 31), (1 << 31) - 1, generator=generator)
    for run in pages.split(max(1, _CHUNK_BYTES // layout.page_bytes)):
        for side, code in (("key", layout.spec.key), ("value", layout.spec.value)):
            if code.rotated:
                scales = _plane(run, layout, f"{side}_scales").view(torch.float16)
                scales.uniform_(0.75 / TARGETS[code], 1.25 / TARGETS[code], generator=generator)
            if code.bits >= 8:
                _fill_gaussian(_plane(run, layout, f"{side}_words"), code, generator)
        if layout.plane("key_center"):
            _plane(run, layout, "key_center").view(torch.float16).normal_(0, 0.1, generator=generator)
    return pages


def slots_of(order: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Slots of consecutive tokens whose pages are in this order."""
    within = torch.arange(layout.page_tokens, device=order.device)
    return (order[:, None] * layout.page_tokens + within).flatten()


def _fill_gaussian(words: torch.Tensor, code: Code, generator: torch.Generator) -> None:
    """Write bytes of codes without an index: e4m3 or bfloat16 numbers."""
    if code is Code.BF16:
        words.view(torch.bfloat16).normal_(generator=generator)
        return
    spread = TARGETS[code] if code.rotated else 1.0
    numbers = torch.empty(words.shape, dtype=torch.float32, device=words.device)
    numbers.normal_(0, spread, generator=generator).clamp_(-448, 448)
    words.copy_(numbers.to(torch.float8_e4m3fn).view(torch.uint8))


def _plane(pages: torch.Tensor, layout: PageLayout, name: str) -> torch.Tensor:
    """Bytes of a plane of all pages and heads, in place: ``[num_pages, num_kv_heads, plane bytes]``."""
    plane = layout.plane(name)
    assert plane is not None
    sections = pages.view(-1, layout.num_kv_heads, layout.section_bytes)
    return sections[..., plane.offset : plane.offset + plane.num_bytes]
