"""Pages of a pool on the device to the bytes that are stored, and back layer by layer.

Here a page is its slots, ``[page_tokens]`` int64 on the device, as SGLang's linker names it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tq_connectors.sglang.packed_pages import PackedCodec
from tq_connectors.sglang.page_codecs import PageCodec, RowCodec
from tq_connectors.sglang.page_shape import PageShape
from tq_connectors.sglang.quantized_pages import QuantizedCodec, narrowed, wide


class LayerCodec(PageCodec, Protocol):
    """A codec that fills a pool layer by layer."""

    def unpack_layer(self, stored: torch.Tensor, layer: int, slots: torch.Tensor) -> None:
        """Fill one of the pool's layers of n pages.

        Args:
            stored: Bytes ``[layers, n, layer_bytes]`` uint8 of the pages, on the CPU, of the model's layers.
            layer: Counted from the first in the pool.
            slots: ``[n * page_tokens]`` int64 on the device, page after page.
        """


@dataclass(frozen=True, slots=True)
class DevicePool:
    """Keys and values of a pool on the device.

    Args:
        keys: Of each layer, ``[slots, heads, elements]``.
        values: The same.
        page_tokens: Tokens of a page.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    page_tokens: int

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.keys[0].device

    @property
    def shape(self) -> PageShape:
        """A page."""
        _, num_kv_heads, head_dim = self.keys[0].shape
        return PageShape(
            num_layers=len(self.keys),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_tokens=self.page_tokens,
            dtype=self.keys[0].dtype,
        )

    def read(self, side: int, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """``[n, page_tokens, heads, elements]`` of slots of n pages."""
        buffer = (self.keys, self.values)[side][layer]
        rows: torch.Tensor = buffer.view(torch.uint8)[slots].view(buffer.dtype)
        return rows.view(-1, self.page_tokens, *buffer.shape[1:])

    def write(self, side: int, layer: int, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Undo `read`."""
        buffer = (self.keys, self.values)[side][layer]
        buffer.view(torch.uint8)[slots] = tokens.flatten(0, 1).contiguous().view(torch.uint8)


class DeviceRows(RowCodec):
    """Keys and values as they are.

    Args:
        pool: Where they are.
        arguments: Of `RowCodec`.
    """

    def __init__(self, pool: DevicePool, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pool = pool

    def pack(self, pages: Sequence[torch.Tensor]) -> torch.Tensor:
        """Bytes ``[n, num_bytes]`` uint8 of n pages, on the CPU."""
        slots = torch.cat(list(pages))
        layers = [
            torch.stack([self._pool.read(side, layer, slots) for side in range(2)]).permute(1, 3, 0, 2, 4)
            for layer in range(len(self._pool.keys))
        ]
        return torch.stack(layers, dim=1).flatten(1).view(torch.uint8).cpu()

    def unpack_layer(self, stored: torch.Tensor, layer: int, slots: torch.Tensor) -> None:
        """See `LayerCodec`."""
        shape = self._pool.shape
        rows = stored[layer].to(self._pool.device, non_blocking=True).view(shape.dtype)
        sides = rows.view(-1, shape.num_kv_heads, 2, shape.page_tokens, shape.head_dim).permute(2, 0, 3, 1, 4)
        for side in range(2):
            self._pool.write(side, layer, slots, sides[side])


class DevicePacked(PackedCodec):
    """Pages that the engine has packed already.

    Args:
        pool: Where they are.
        arguments: Of `PackedCodec`.
    """

    def __init__(self, pool: DevicePool, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pool = pool

    def pieces(self, page: torch.Tensor) -> list[memoryview] | None:
        """Nowhere on the CPU."""
        return None

    def pack(self, pages: Sequence[torch.Tensor]) -> torch.Tensor:
        """Bytes ``[n, num_bytes]`` uint8 of n pages, on the CPU."""
        indices = self._indices(torch.cat(list(pages)))
        layers = [self._layer(layer)[indices] for layer in range(self._num_layers)]
        return torch.stack(layers, dim=1).flatten(1).cpu()

    def unpack_layer(self, stored: torch.Tensor, layer: int, slots: torch.Tensor) -> None:
        """See `LayerCodec`."""
        indices = self._indices(slots)
        for own in range(2 * layer, min(2 * layer + 2, self._num_layers)):
            self._layer(own)[indices] = stored[own].to(self._pool.device, non_blocking=True)

    def _layer(self, layer: int) -> torch.Tensor:
        """``[num_pages, page_bytes]`` of one of the model's layers."""
        buffer = (self._pool.values if layer % 2 else self._pool.keys)[layer // 2]
        return buffer.view(-1, self._layout.page_bytes)

    def _indices(self, slots: torch.Tensor) -> torch.Tensor:
        return slots[:: self._pool.page_tokens] // self._pool.page_tokens


class DeviceQuantized(QuantizedCodec):
    """Keys and values that are packed where they are.

    Args:
        pool: Where they are.
        arguments: Of `QuantizedCodec`.
    """

    def __init__(self, pool: DevicePool, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pool = pool

    def pack(self, pages: Sequence[torch.Tensor]) -> torch.Tensor:
        """Bytes ``[n, num_bytes]`` uint8 of n pages, on the CPU."""
        slots = torch.cat(list(pages))
        keys, values = (
            torch.stack([self._pool.read(side, layer, slots) for layer in range(self._num_layers)], dim=1)
            for side in range(2)
        )
        return self._pack_tokens(keys, values)

    def unpack_layer(self, stored: torch.Tensor, layer: int, slots: torch.Tensor) -> None:
        """See `LayerCodec`."""
        dtype = self._pool.shape.dtype
        packed = stored[layer].to(self._pool.device, non_blocking=True)
        keys, values = self._dequantize(packed, wide(dtype))
        if self._balance is not None:
            keys = keys * self._balance[layer]
        for side, tokens in enumerate((keys, values)):
            rows = narrowed(tokens, dtype).unflatten(0, (-1, self._pool.page_tokens))
            self._pool.write(side, layer, slots, rows)
