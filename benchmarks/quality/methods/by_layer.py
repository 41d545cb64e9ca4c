"""Tables of our presets by layer: each layer's keys and values through pages of its own preset."""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.base import Geometry, Place, Sides
from benchmarks.quality.methods.pages import Pages
from tq_connectors.model_layout import ModelLayout
from tq_kernels import preset
from tq_kernels.balance import estimate_balance
from tq_store.block import HEADER_BYTES
from tq_store.layer_table import LayerTable


@dataclass(frozen=True, slots=True)
class PagesByLayer:
    """A table by layer, as connectors use it: with the channel balance wherever keys are rotated.

    Args:
        table: Presets by layer.
        page_tokens: Tokens in a page.

    Raises:
        ValueError: There is no such preset.
    """

    table: LayerTable
    page_tokens: int = 64

    def __post_init__(self) -> None:
        for name in self.table.presets:
            preset(name)

    @property
    def name(self) -> str:
        """The table's one name, whatever was typed."""
        return str(self.table)

    @property
    def group_tokens(self) -> int:
        """See `Method`."""
        return self.page_tokens

    def total_bytes(self, geometry: Geometry, num_tokens: int, num_sinks: int) -> float:
        """Pages of all layers, a header a block and so one a run of equal layers, and the sinks besides."""
        layout = ModelLayout.for_codec(
            self.name,
            num_layers=geometry.num_layers,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            page_tokens=self.page_tokens,
        )
        page_bytes = layout.page_bytes + HEADER_BYTES * len(layout.runs)
        return num_tokens / self.page_tokens * page_bytes + geometry.raw_bytes_per_token * num_sinks

    def estimate(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Balance ``[num_kv_heads, head_dim]``; `read` takes it where keys are rotated."""
        return estimate_balance(queries, keys, page_tokens=self.page_tokens, num_sinks=0)

    def read(self, keys: torch.Tensor, values: torch.Tensor, state: torch.Tensor, place: Place) -> Sides:
        """See `Method`: what the pages of the layer's preset hold."""
        name = self.table.by_layer(place.num_layers)[place.layer]
        pages = Pages(name, preset(name), self.page_tokens)
        return pages.read(keys, values, state if pages.spec.key.rotated else None, place)
