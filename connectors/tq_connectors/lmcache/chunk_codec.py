"""A chunk of keys and values to a block of packed pages and back: what the serde does, without LMCache.

The block is that of `proto/BLOCK_FORMAT.md`: it names its codec, geometry and owner, and its checksums cover
all of it. A reader with another preset, dtype or shape, another key, or a changed bit gets an error.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tq_connectors.codec import block_info
from tq_connectors.envelope import pack_object, unpack_object
from tq_connectors.lmcache.kv_layout import KVLayout, num_bytes, read_layout, sides
from tq_connectors.lmcache.object_layout import describe
from tq_connectors.lmcache.settings import UNCODED
from tq_connectors.page_transfer import dequantize_on, quantize_on
from tq_kernels import PageLayout, host, preset
from tq_store.block import HEADER_BYTES, BlockInfo, pack_header, verify_block
from tq_store.errors import ConfigError, IdentityMismatch
from tq_store.keys import BlockKey


@dataclass(frozen=True, slots=True, kw_only=True)
class SerdeSettings:
    """What an operator writes beside ``"type": "tq"``.

    Args:
        preset: A preset, or none to seal bytes as they are: any layout, checksummed, not compressed.
        num_kv_heads: KV heads that one rank holds.
        head_dim: Channels of a head.
        page_tokens: Tokens of a page; a chunk must be whole pages.
        device: ``auto``, ``cpu``, or where Triton's kernels shall run, e.g. ``cuda:0``.
        max_workers: Threads of LMCache's that pack and unpack.

    Raises:
        ConfigError: A value is not allowed; the message names it.
    """

    preset: str
    num_kv_heads: int = 0
    head_dim: int = 0
    page_tokens: int = 64
    device: str = "auto"
    max_workers: int = 1

    def __post_init__(self) -> None:
        for name in ("page_tokens", "max_workers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"serde setting {name} must be an integer of at least 1, not {value!r}")
        if self.preset != UNCODED:
            self.page_layout()

    def page_layout(self) -> PageLayout:
        """Layout of the pages."""
        for name in ("num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(
                    f"serde setting {name} must be an integer of at least 1, not {value!r}: "
                    "a chunk of LMCache's does not tell its heads"
                )
        try:
            return PageLayout(
                spec=preset(self.preset),
                head_dim=self.head_dim,
                num_kv_heads=self.num_kv_heads,
                page_tokens=self.page_tokens,
            )
        except ValueError as error:
            raise ConfigError(f"serde: {error}") from error

    def codec_device(self) -> torch.device:
        """Where packing runs."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(f"serde setting device: {error}") from error


def read_serde_settings(written: Mapping[str, Any]) -> SerdeSettings:
    """Settings from LMCache's JSON.

    Raises:
        ConfigError: A setting is missing, unknown or not allowed; the message names it.
    """
    try:
        return SerdeSettings(**written)
    except TypeError as error:
        raise ConfigError(f"serde: {str(error).partition('() ')[2]}") from error


def chunk_key(model: str, part: str, salt: str, chunk_hash: bytes) -> BlockKey:
    """Whom a packed chunk belongs to. What it holds is not in the key but in the header."""
    owner = "\0".join(("lmcache chunk", model, part, salt)).encode()
    return BlockKey(hashlib.sha256(owner).digest() + hashlib.sha256(b"lmcache" + chunk_hash).digest())


class ChunkCodec:
    """Packs and unpacks chunks. Safe to use from several threads.

    Args:
        settings: Preset, heads and device.
    """

    def __init__(self, settings: SerdeSettings) -> None:
        self._settings = settings
        self._device = settings.codec_device()
        self._on_host = self._device.type == "cpu"
        self._pages = None if settings.preset == UNCODED else settings.page_layout()

    def packed_bytes(self, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> int:
        """Bytes of a packed chunk: exact, and the same for every chunk of a layout.

        Raises:
            UnsupportedLayout: The preset cannot pack this.
            BlockFormatError: It would be too large for a block.
        """
        if self._pages is None:
            empty = pack_object(BlockKey(bytes(64)), describe(shapes, dtypes), b"")
            return len(empty) + num_bytes(shapes, dtypes)
        chunk = self._read(shapes, dtypes)
        return HEADER_BYTES + self._header(BlockKey(bytes(64)), chunk).payload_bytes

    def pack(self, key: BlockKey, tensors: Sequence[torch.Tensor], packed: torch.Tensor) -> int:
        """Write a chunk's block and return its length.

        Args:
            key: From `chunk_key`.
            tensors: Contiguous tensors on the CPU, one for each group of layers.
            packed: ``[n]`` uint8 on the CPU, at least as long as `packed_bytes` says.

        Raises:
            UnsupportedLayout: The preset cannot pack this.
        """
        shapes, dtypes = [tensor.shape for tensor in tensors], [tensor.dtype for tensor in tensors]
        size = self.packed_bytes(shapes, dtypes)
        if self._pages is None:
            data = b"".join(_bytes_of(tensor) for tensor in tensors)
            block = pack_object(key, describe(shapes, dtypes), data)
            _bytes_of(packed)[:size] = block
            return size
        chunk = self._read(shapes, dtypes)
        payload = packed[HEADER_BYTES:size]
        for pages, tensor in zip(self._by_group(payload, chunk), tensors, strict=True):
            keys, values = sides(tensor, self._pages.num_kv_heads, self._pages.head_dim)
            self._quantize(keys, values, pages)
        _bytes_of(packed)[:HEADER_BYTES] = pack_header(self._header(key, chunk), _bytes_of(payload))
        return size

    def unpack(self, key: BlockKey, packed: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Fill tensors from a chunk's block.

        Args:
            key: From `chunk_key`.
            packed: ``[n]`` uint8 on the CPU.
            tensors: Contiguous tensors on the CPU, one for each group of layers.

        Raises:
            BlockFormatError: Not a sound block of this key, preset, dtype and shape; tensors are untouched.
            UnsupportedLayout: The preset cannot pack what is asked for.
        """
        shapes, dtypes = [tensor.shape for tensor in tensors], [tensor.dtype for tensor in tensors]
        block = _bytes_of(packed)
        info = verify_block(block, key)
        if self._pages is None:
            found = unpack_object(key, block)
            if found.layout != describe(shapes, dtypes):
                raise IdentityMismatch(
                    f"the chunk is {found.layout}, asked for was {describe(shapes, dtypes)}"
                )
            start = 0
            for tensor in tensors:
                target = _bytes_of(tensor)
                target[:] = found.data[start : start + len(target)]
                start += len(target)
            return
        chunk = self._read(shapes, dtypes)
        if info != self._header(key, chunk):
            raise IdentityMismatch("the chunk was packed by another preset, or from another dtype or shape")
        for pages, tensor in zip(self._by_group(packed[HEADER_BYTES:], chunk), tensors, strict=True):
            keys, values = sides(tensor, self._pages.num_kv_heads, self._pages.head_dim)
            self._dequantize(pages, keys, values)

    def _read(self, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> KVLayout:
        assert self._pages is not None
        return read_layout(shapes, dtypes, self._pages.num_kv_heads, self._pages.head_dim)

    def _header(self, key: BlockKey, chunk: KVLayout) -> BlockInfo:
        """The header of a chunk; the fingerprint also covers the dtype that was packed."""
        assert self._pages is not None
        fingerprint = hashlib.sha256(self._pages.spec.fingerprint + str(chunk.dtype).encode()).digest()
        return replace(
            block_info(self._pages, chunk.num_layers, key),
            num_tokens=chunk.num_tokens,
            codec_fingerprint=fingerprint,
        )

    def _by_group(self, payload: torch.Tensor, chunk: KVLayout) -> tuple[torch.Tensor, ...]:
        """Pages ``[n, page_bytes]`` of each group of layers."""
        assert self._pages is not None
        per_layer = chunk.num_tokens // self._pages.page_tokens
        pages = payload.view(-1, self._pages.page_bytes)
        return torch.split(pages, [layers * per_layer for layers, _ in chunk.groups])

    def _quantize(self, keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor) -> None:
        assert self._pages is not None
        if self._on_host:
            host.quantize(keys, values, self._pages, pages)
            return
        pages.copy_(quantize_on(self._device, keys, values, self._pages))

    def _dequantize(self, pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert self._pages is not None
        if self._on_host:
            host.dequantize(pages, self._pages, keys, values)
            return
        for target, side in zip((keys, values), dequantize_on(self._device, pages, self._pages), strict=True):
            target.copy_(side)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data.cast("B")
