"""Our presets: keys and values through real page bytes and back."""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.base import Geometry, Place, Sides
from tq_kernels import PRESETS, CodecSpec, PageLayout
from tq_kernels.balance import estimate_balance
from tq_kernels.reference import dequantize, quantize, roundtrip
from tq_store.block import HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Pages:
    """A codec of `tq_kernels`.

    Args:
        name: What rows call it.
        spec: The codec.
        page_tokens: Tokens in a page.
        balanced: Whether keys are divided by the channel balance that replicas share.
    """

    name: str
    spec: CodecSpec
    page_tokens: int = 64
    balanced: bool = False

    @property
    def group_tokens(self) -> int:
        """See `Method`."""
        return self.page_tokens

    def total_bytes(self, geometry: Geometry, num_tokens: int, num_sinks: int) -> float:
        """Pages of all layers with scales, centres and padding, a header a block, and the sinks besides."""
        layout = self._layout(geometry.num_kv_heads, geometry.head_dim)
        block_bytes = HEADER_BYTES + layout.page_bytes * geometry.num_layers
        return num_tokens / self.page_tokens * block_bytes + geometry.raw_bytes_per_token * num_sinks

    def estimate(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor | None:
        """Balance ``[num_kv_heads, head_dim]``, as connectors measure it."""
        if not self.balanced:
            return None
        return estimate_balance(queries, keys, page_tokens=self.page_tokens, num_sinks=0)

    def read(
        self, keys: torch.Tensor, values: torch.Tensor, state: torch.Tensor | None, place: Place
    ) -> Sides:
        """See `Method`: whole pages by way of their bytes, and the open page without, at the same numbers."""
        layout = self._layout(*keys.shape[1:])
        num_whole = keys.shape[0] // self.page_tokens * self.page_tokens
        read: list[Sides] = []
        if num_whole:
            pages = quantize(keys[:num_whole], values[:num_whole], layout, key_balance=state)
            read.append(dequantize(pages, layout, key_balance=state))
        if num_open := keys.shape[0] - num_whole:
            page = roundtrip(*self._whole(keys[num_whole:], values[num_whole:]), layout, key_balance=state)
            read.append((page[0][:num_open], page[1][:num_open]))
        return torch.cat([part[0] for part in read]), torch.cat([part[1] for part in read])

    def _whole(self, keys: torch.Tensor, values: torch.Tensor) -> Sides:
        """Whole pages; one that is not full is filled up with its mean key, which moves no centre."""
        num_tokens = keys.shape[0]
        missing = -num_tokens % self.page_tokens
        if missing:
            mean = keys[num_tokens + missing - self.page_tokens :].mean(0, keepdim=True)
            keys = torch.cat((keys, mean.expand(missing, -1, -1)))
            values = torch.cat((values, torch.zeros_like(values[:1]).expand(missing, -1, -1)))
        return keys, values

    def _layout(self, num_kv_heads: int, head_dim: int) -> PageLayout:
        return PageLayout(
            spec=self.spec, head_dim=head_dim, num_kv_heads=num_kv_heads, page_tokens=self.page_tokens
        )


def page_methods(page_tokens: int) -> list[Pages]:
    """Every quantizing preset as connectors use it, and without the state (``-stateless``)."""
    presets = {name: spec for name, spec in PRESETS.items() if name not in ("fp8", "raw")}
    stateless = [Pages(f"{name}-stateless", spec, page_tokens) for name, spec in presets.items()]
    return stateless + [Pages(name, spec, page_tokens, balanced=True) for name, spec in presets.items()]
