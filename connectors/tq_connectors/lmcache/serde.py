"""The serde `tq`: LMCache's chunks as blocks of packed pages, for engines that keep their cache in bf16."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import get_registered_serde_types, register_serde_factory
from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor
from lmcache.v1.distributed.serde.base import Deserializer, SerdeProcessor, Serializer
from lmcache.v1.memory_management import MemoryObj

from tq_connectors.engine.state import load_state
from tq_connectors.lmcache.chunk_codec import ChunkCodec, RankOf, chunk_key
from tq_connectors.lmcache.serde_settings import read_serde_settings
from tq_store.keys import BlockKey

SERDE_NAME = "tq"


class TQSerializer(Serializer):
    """Chunks to blocks of a size that is exact and fixed, which LMCache's adapters insist on."""

    def __init__(self, codec: ChunkCodec) -> None:
        self._codec = codec

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Bytes of a packed chunk, exactly.

        Raises:
            UnsupportedLayout: LMCache registered a cache that the preset cannot pack; it logs this and stores
                nothing.
        """
        return self._codec.packed_bytes(layout_desc.shapes, layout_desc.dtypes)

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Pack one chunk."""
        return self._codec.pack(owner_of(key), _tensors(src), _flat(dst), rank_of(key))


class TQDeserializer(Deserializer):
    """Blocks to chunks; anything that is not exactly what was asked for raises, and LMCache has a miss."""

    def __init__(self, codec: ChunkCodec) -> None:
        self._codec = codec

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Unpack one chunk."""
        self._codec.unpack(owner_of(key), _flat(src), _tensors(dst), rank_of(key))


def owner_of(key: ObjectKey) -> BlockKey:
    """Whom LMCache's key says that a chunk belongs to."""
    part = f"rank {key.kv_rank:08x} group {key.object_group_id}"
    return chunk_key(key.model_name, part, key.cache_salt, key.chunk_hash)


def rank_of(key: ObjectKey) -> RankOf:
    """Which rank of how many LMCache's key names; its four bytes are written by `ObjectKey.ComputeKVRank`."""
    size, rank, _, _ = key.kv_rank.to_bytes(4, "big")
    return RankOf(rank, max(1, size))


def create_serde(settings: Mapping[str, Any]) -> SerdeProcessor:
    """The serde of one adapter, with the codec state that `TQ_CONNECTORS_STATE` names, if it names one.

    Raises:
        ConfigError: A setting is missing, unknown or not allowed, or the state is of another model; LMCache
            then does not start.
    """
    checked = read_serde_settings(settings)
    codec = ChunkCodec(checked, load_state(os.environ))
    return AsyncSerdeProcessor(TQSerializer(codec), TQDeserializer(codec), max_workers=checked.max_workers)


def register_serde() -> None:
    """Make LMCache know the serde; a second call does nothing."""
    if SERDE_NAME not in get_registered_serde_types():
        register_serde_factory(SERDE_NAME, create_serde)


def _tensors(chunk: MemoryObj) -> list[torch.Tensor]:
    if not chunk.meta.shapes:
        return [chunk.tensor]
    return [chunk.get_tensor(group) for group in range(len(chunk.meta.shapes))]


def _flat(buffer: MemoryObj) -> torch.Tensor:
    flat: torch.Tensor = buffer.tensor.view(torch.uint8).view(-1)
    return flat
