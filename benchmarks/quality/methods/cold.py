"""Cold pages: the bytes of a preset's pages spent on trellis levels and an entropy code."""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.base import Place, Sides
from benchmarks.quality.methods.pages import Pages, page_methods
from tq_kernels.cold_page import KEY_EXTRA_BITS, roundtrip


@dataclass(frozen=True, slots=True)
class ColdPages(Pages):
    """Pages of the same size as those of the codec, read back from storage.

    Args:
        name: As for `Pages`.
        spec: The codec whose bytes are spent.
        page_tokens: As for `Pages`.
        balanced: As for `Pages`.
        key_extra_bits: As for `cold_page.quantize`.
    """

    key_extra_bits: float = KEY_EXTRA_BITS

    def read(
        self, keys: torch.Tensor, values: torch.Tensor, state: torch.Tensor | None, place: Place
    ) -> Sides:
        """See `Method`; a page that is not full is filled up as `Pages` does."""
        num_tokens = keys.shape[0]
        keys, values = self._whole(keys, values)
        read_keys, read_values = roundtrip(
            keys,
            values,
            section_bytes=self._layout(*keys.shape[1:]).section_bytes,
            key_balance=state,
            key_extra_bits=self.key_extra_bits,
            page_tokens=self.page_tokens,
        )
        return read_keys[:num_tokens], read_values[:num_tokens]


def cold_methods(page_tokens: int) -> list[ColdPages]:
    """The presets that `page_methods` has with a state, at the same bytes."""
    return [
        ColdPages(f"{method.name}-cold", method.spec, page_tokens, balanced=True)
        for method in page_methods(page_tokens)
        if method.balanced
    ]
