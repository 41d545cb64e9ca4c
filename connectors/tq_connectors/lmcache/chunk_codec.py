"""A chunk of keys and values to a block of packed pages and back: what the serde does, without LMCache.

The block is that of `proto/BLOCK_FORMAT.md`: it names its codec, geometry and owner, and its checksums cover
all of it. A reader with another preset, dtype or shape, another key, or a changed bit gets an error.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from tq_connectors.codec import block_info
from tq_connectors.codec_state import CodecState
from tq_connectors.engine.state import balances_of_layers
from tq_connectors.envelope import pack_object, unpack_object
from tq_connectors.lmcache.group_codecs import group_codec
from tq_connectors.lmcache.kv_layout import KVLayout, UnsupportedLayout, num_bytes, read_layout
from tq_connectors.lmcache.object_layout import describe
from tq_connectors.lmcache.serde_settings import SerdeSettings
from tq_connectors.lmcache.settings import UNCODED
from tq_store.block import HEADER_BYTES, BlockInfo, pack_header, verify_block
from tq_store.errors import ConfigError, IdentityMismatch
from tq_store.keys import BlockKey

_MOST_RANKS = 64
"""Whose balances are kept; a rank of more is sliced again."""


def chunk_key(model: str, part: str, salt: str, chunk_hash: bytes) -> BlockKey:
    """Whom a packed chunk belongs to. What it holds is not in the key but in the header."""
    owner = "\0".join(("lmcache chunk", model, part, salt)).encode()
    return BlockKey(hashlib.sha256(owner).digest() + hashlib.sha256(b"lmcache" + chunk_hash).digest())


@dataclass(frozen=True, slots=True)
class RankOf:
    """Which of an engine's tensor-parallel ranks a chunk is of."""

    rank: int = 0
    size: int = 1


class ChunkCodec:
    """Packs and unpacks chunks. Safe to use from several threads.

    Args:
        settings: Preset, heads and device.
        state: With which pages are made, or None.

    Raises:
        ConfigError: The state is of another model.
    """

    def __init__(self, settings: SerdeSettings, state: CodecState | None = None) -> None:
        device = settings.codec_device()
        self._pages = None if settings.preset == UNCODED else settings.page_layout()
        if self._pages is not None:
            self._groups = group_codec(self._pages, device)
        self._state = None if self._pages is None else state
        self._balance_of_rank = lru_cache(maxsize=_MOST_RANKS)(self._slice_balance)
        if self._state is not None:
            _, heads, channels = self._state.key_balance.shape
            if channels != settings.head_dim or heads % settings.num_kv_heads:
                raise ConfigError(
                    f"the codec state is of {heads} KV heads and {channels} channels, the serde was told "
                    f"{settings.num_kv_heads} and {settings.head_dim}"
                )

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

    def pack(
        self,
        key: BlockKey,
        tensors: Sequence[torch.Tensor],
        packed: torch.Tensor,
        rank: RankOf = RankOf(),  # it is frozen
    ) -> int:
        """Write a chunk's block and return its length.

        Args:
            key: From `chunk_key`.
            tensors: Contiguous tensors on the CPU, one for each group of layers.
            packed: ``[n]`` uint8 on the CPU, at least as long as `packed_bytes` says.
            rank: Whose heads these are.

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
        balances = self._balances(chunk, rank)
        for pages, tensor, balance in zip(self._by_group(payload, chunk), tensors, balances, strict=True):
            self._groups.quantize(tensor, balance, pages)
        _bytes_of(packed)[:HEADER_BYTES] = pack_header(self._header(key, chunk), _bytes_of(payload))
        return size

    def unpack(
        self,
        key: BlockKey,
        packed: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        rank: RankOf = RankOf(),  # it is frozen
    ) -> None:
        """Fill tensors from a chunk's block.

        Args:
            key: From `chunk_key`.
            packed: ``[n]`` uint8 on the CPU.
            tensors: Contiguous tensors on the CPU, one for each group of layers.
            rank: Whose heads these are.

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
        pages_of = self._by_group(packed[HEADER_BYTES:], chunk)
        for pages, tensor, balance in zip(pages_of, tensors, self._balances(chunk, rank), strict=True):
            self._groups.dequantize(pages, balance, tensor)

    def _read(self, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> KVLayout:
        assert self._pages is not None
        chunk = read_layout(shapes, dtypes, self._pages.num_kv_heads, self._pages.head_dim)
        num_layers = chunk.num_layers if self._state is None else len(self._state.key_balance)
        if chunk.num_layers != num_layers:
            raise UnsupportedLayout(
                f"a chunk has {chunk.num_layers} layers, the codec state {num_layers}: a state serves models "
                "whose chunks hold all layers"
            )
        return chunk

    def _header(self, key: BlockKey, chunk: KVLayout) -> BlockInfo:
        """The header of a chunk; the fingerprint also covers the dtype that was packed, and the state."""
        assert self._pages is not None
        state = "" if self._state is None else self._state.digest
        how = self._pages.spec.fingerprint + f"{chunk.dtype}{state}".encode()
        fingerprint = hashlib.sha256(how).digest()
        return replace(
            block_info(self._pages, chunk.num_layers, key),
            num_tokens=chunk.num_tokens,
            codec_fingerprint=fingerprint,
        )

    def _balances(self, chunk: KVLayout, rank: RankOf) -> list[torch.Tensor | None]:
        """What the keys of each group are divided by: ``[layers, heads, channels]`` float32."""
        if self._state is None or self._pages is None:
            return [None] * len(chunk.groups)
        return list(self._balance_of_rank(rank).split([layers for layers, _ in chunk.groups]))

    def _slice_balance(self, rank: RankOf) -> torch.Tensor:
        """Of all layers, the heads of a rank."""
        assert self._state is not None
        assert self._pages is not None
        num_layers, total_kv_heads, _ = self._state.key_balance.shape
        balances = balances_of_layers(
            self._state,
            self._pages,
            range(num_layers),
            num_model_layers=num_layers,
            total_kv_heads=total_kv_heads,
            tp_rank=rank.rank,
            tp_size=rank.size,
        )
        return torch.stack(balances)

    def _by_group(self, payload: torch.Tensor, chunk: KVLayout) -> tuple[torch.Tensor, ...]:
        """Pages ``[n, page_bytes]`` of each group of layers."""
        assert self._pages is not None
        per_layer = chunk.num_tokens // self._pages.page_tokens
        pages = payload.view(-1, self._pages.page_bytes)
        return torch.split(pages, [layers * per_layer for layers, _ in chunk.groups])


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data.cast("B")
