"""What tests of pages addressed by slots share: guarded pages, and tokens that are exact in float32."""

from dataclasses import dataclass

import torch

from tq_kernels import KeyCenter, PageLayout, preset
from tq_kernels.reference import plane_view, rotation_of

POISON = 0xA5
"""What fills every byte that nobody may touch."""
GAP = 128
"""Bytes between pages that belong to nobody."""
CPU = torch.device("cpu")


def layout_of(name: str, head_dim: int = 64, heads: int = 2, page_tokens: int = 16) -> PageLayout:
    return PageLayout(spec=preset(name), head_dim=head_dim, num_kv_heads=heads, page_tokens=page_tokens)


@dataclass(kw_only=True)
class GuardedPages:
    """Pages with bytes of nobody before, between and after them."""

    buffer: torch.Tensor
    pages: torch.Tensor

    def outside(self) -> torch.Tensor:
        """The bytes of nobody."""
        return torch.cat((self.buffer[0], self.buffer[-1], self.buffer[:, self.pages.shape[1] :].flatten()))

    def assert_outside_is_untouched(self) -> None:
        assert (self.outside() == POISON).all()


def guarded(pages: torch.Tensor, device: torch.device) -> GuardedPages:
    """The same pages on the device, guarded."""
    num_pages, page_bytes = pages.shape
    buffer = torch.full((num_pages + 2, page_bytes + GAP), POISON, dtype=torch.uint8, device=device)
    view = buffer[1:-1, :page_bytes]
    view.copy_(pages)
    return GuardedPages(buffer=buffer, pages=view)


@dataclass(kw_only=True)
class ExactTokens:
    """Tokens of small integers around the centres of their pages, and pages that hold these centres.

    Every rotated coordinate is an integer over head_dim, a power of two, and so are the centres and what is
    left of keys; every sum of squares is below 2^24 over its square. So float32 sums are exact in any order.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pages: torch.Tensor


def exact_tokens(
    layout: PageLayout,
    slots: list[int],
    num_pages: int,
    generator: torch.Generator,
    seed_pages: dict[int, int] | None = None,
) -> ExactTokens:
    """Tokens for slots, and pages of random bytes but for their centres.

    Args:
        layout: Page geometry and codec; head_dim a power of two.
        slots: Of the tokens; -1 skips.
        num_pages: Pages to make.
        generator: Of the numbers.
        seed_pages: Page whose centre a page takes, by page.
    """
    page_bytes = (num_pages, layout.page_bytes)
    pages = torch.randint(256, page_bytes, dtype=torch.uint8, generator=generator)
    heads, head_dim = layout.num_kv_heads, layout.head_dim
    shifts = torch.randint(-1, 2, (num_pages, heads, head_dim), generator=generator).float()
    if layout.spec.key_center is not KeyCenter.NONE:
        centers = (shifts @ rotation_of(layout, CPU).T).to(torch.float16)
        plane_view(pages, layout, "key_center")[..., 0, :] = centers.view(torch.int16)
    keys, values = (_signs(len(slots), layout, generator) for _ in range(2))
    by_page: dict[int, list[int]] = {}
    for token, slot in enumerate(slots):
        if slot >= 0:
            by_page.setdefault(slot // layout.page_tokens, []).append(token)
    for page, tokens in by_page.items():
        # pairs around the shift make the shift the mean; one that has no partner is the shift itself
        first, second = tokens[0 : len(tokens) // 2 * 2 : 2], tokens[1::2]
        keys[second] = -keys[first]
        if len(tokens) % 2:
            keys[tokens[-1]] = 0
        keys[tokens] += shifts[(seed_pages or {}).get(page, page)]
    return ExactTokens(keys=keys, values=values, pages=pages)


def _signs(num_tokens: int, layout: PageLayout, generator: torch.Generator) -> torch.Tensor:
    """-1, 0 and 1, half of them 0."""
    shape = (num_tokens, layout.num_kv_heads, layout.head_dim)
    return (
        torch.randint(2, shape, generator=generator) - torch.randint(2, shape, generator=generator)
    ).float()
