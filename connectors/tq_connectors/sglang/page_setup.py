"""From settings, pool and model to the page store of one process: its shard, its codec, its namespace."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from tq_connectors.codec import CacheGeometry, namespace_for
from tq_connectors.codec_state import CodecState, agree_on_state
from tq_connectors.engine.state import STATE_VARIABLE, balance_of_layer, load_state
from tq_connectors.parts import Division, Shard, shard_of
from tq_connectors.sglang.hicache_settings import UNCODED, PageSettings
from tq_connectors.sglang.packed_pages import PackedCodec
from tq_connectors.sglang.page_codecs import PageCodec, RowCodec
from tq_connectors.sglang.page_names import PageNames
from tq_connectors.sglang.page_rows import num_pairs
from tq_connectors.sglang.page_shape import PageShape
from tq_connectors.sglang.page_store import PageStore
from tq_connectors.sglang.quantized_pages import QuantizedCodec
from tq_connectors.sglang.rank_state import of_first_rank
from tq_kernels import PageLayout, preset
from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError, ConfigError, RpcError
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey, Namespace

logger = logging.getLogger(__name__)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Whose cache it is, and where a process stands among those that hold it.

    Args:
        model: Name of the model.
        geometry: Shape of the whole model's cache; `kv_dtype` is the model's own.
        layers: Attention layers of the process's pipeline stage.
        tp_rank: Its rank among the processes that divide the KV heads.
        tp_size: How many these are.
        float8: The dtype of an fp8 cache, whose pools hold bytes for SGLang; None for another cache.
    """

    model: str
    geometry: CacheGeometry
    layers: range
    tp_rank: int = 0
    tp_size: int = 1
    float8: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Codecs:
    """What makes the codecs of a kind of pool.

    Args:
        rows: Makes a `RowCodec`.
        packed: Makes a `PackedCodec`.
        quantized: Makes a `QuantizedCodec`.
    """

    rows: Callable[..., PageCodec]
    packed: Callable[..., PageCodec]
    quantized: Callable[..., PageCodec]


HOST_CODECS = Codecs(RowCodec, PackedCodec, QuantizedCodec)
"""Of pages in host memory."""


def open_page_store(
    client: StoreClient,
    settings: PageSettings,
    shape: PageShape,
    place: Place,
    environment: Mapping[str, str] = os.environ,
    codecs: Codecs = HOST_CODECS,
    group: dist.ProcessGroup | None = None,
) -> PageStore:
    """The page store of a process.

    Where pages are packed on the way and no file holds the model's codec state, the store is asked for it, by
    one rank for all; while it has none, or does not answer, pages are made without.

    Args:
        client: Connection to the store; owned by the caller.
        settings: What the operator wrote.
        shape: A page in the pool.
        place: Whose cache it is, and where the process stands.
        environment: Names the file of the codec state.
        codecs: Make the codec for where pages are.
        group: The ranks that divide the KV heads, all of which make this call; None for a process alone.

    Raises:
        ConfigError: The codec in the settings does not fit the pool, or the pool not the model; the message
            says why.
    """
    geometry = place.geometry if shape.is_packed else replace(place.geometry, kv_dtype=shape.dtype_name)
    shard = shard_of(geometry, tp_rank=place.tp_rank, tp_size=place.tp_size, layers=place.layers)
    _check_pool(shape, shard, geometry)
    codec: PageCodec
    state = None
    if settings.codec == UNCODED:
        if shape.is_packed:
            raise ConfigError("codec is none, and the pool is packed; write the preset of --kv-cache-dtype")
        codec = codecs.rows(geometry, shape)
    else:
        layout = _layout(settings.codec, shape, geometry)
        state = of_file = load_state(environment)
        if shape.is_packed:
            codec = codecs.packed(layout, geometry.num_layers, shard.part)
        else:
            state = of_first_rank(
                lambda: of_file or _fetch_state(client, layout, settings, geometry, place), group
            )
            codec = codecs.quantized(
                layout,
                geometry.num_layers,
                shard.part,
                settings.codec_device(),
                _balance(state, shard, geometry),
            )
    namespace = Namespace(
        model=place.model,
        revision=settings.revision,
        kv_dtype=geometry.kv_dtype,
        codec_fingerprint=codec.fingerprint,
        codec_state="" if state is None else state.digest,
        page_tokens=shape.page_tokens,
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        salt=settings.salt,
    )
    names = PageNames(namespace, _division(settings, geometry, place), shard)
    for part in {*names.loaded_parts, *names.saved_parts}:
        try:
            codec.info(BlockKey(bytes(BLOCK_KEY_BYTES)), part)
        except BlockFormatError as error:
            raise ConfigError(f"a page of all layers makes no block, use smaller pages: {error}") from error
    return PageStore(
        client,
        names,
        codec,
        page_bytes=shape.page_bytes,
        staging_bytes=settings.staging_bytes,
        load_threads=settings.load_threads,
    )


def _check_pool(shape: PageShape, shard: Shard, geometry: CacheGeometry) -> None:
    num_layers = num_pairs(shard.part.num_layers) if shape.is_packed else shard.part.num_layers
    if (shape.num_layers, shape.num_kv_heads) != (num_layers, shard.part.num_kv_heads):
        raise ConfigError(
            f"the pool holds {shape.num_layers} layers and {shape.num_kv_heads} KV heads, of the model's "
            f"{num_layers} and {shard.part.num_kv_heads} were expected here"
        )
    if not shape.is_packed and shape.head_dim != geometry.head_dim:
        raise ConfigError(
            f"the pool holds keys of {shape.head_dim} channels, the model's have {geometry.head_dim}"
        )


def _layout(codec: str, shape: PageShape, geometry: CacheGeometry) -> PageLayout:
    """Layout of the pages of a preset, all KV heads."""
    if not shape.is_packed and shape.dtype not in FLOATS:
        raise ConfigError(
            f"codec is {codec!r}, and the pool holds {shape.dtype_name}, which cannot be packed"
        )
    try:
        layout = PageLayout(
            spec=preset(codec),
            head_dim=geometry.head_dim,
            num_kv_heads=geometry.num_kv_heads,
            page_tokens=shape.page_tokens,
        )
    except ValueError as error:
        raise ConfigError(f"codec {codec!r} cannot pack SGLang's pages (--page-size): {error}") from error
    if shape.is_packed and shape.head_dim != layout.slot_bytes:
        raise ConfigError(
            f"codec is {codec!r}, whose tokens take {layout.slot_bytes} bytes a head, and those in the pool "
            f"take {shape.head_dim}; write the preset of --kv-cache-dtype"
        )
    return layout


def _division(settings: PageSettings, geometry: CacheGeometry, place: Place) -> Division:
    """How replicas cut pages: heads by the settings, layers by pipeline stage."""
    division = Division.for_ranks(geometry, tp_sizes={place.tp_size, *settings.shared_tp_sizes})
    layer_cuts = {0, place.layers.start, place.layers.stop, geometry.num_layers}
    return Division(tuple(sorted(layer_cuts)), division.head_cuts)


def _balance(state: CodecState | None, shard: Shard, geometry: CacheGeometry) -> torch.Tensor | None:
    """``[layers, heads, channels]`` of a shard."""
    if state is None:
        return None
    part = shard.part
    return torch.stack(
        [
            balance_of_layer(
                state,
                layer,
                num_layers=geometry.num_layers,
                first_kv_head=part.first_kv_head,
                num_kv_heads=part.num_kv_heads,
                head_dim=geometry.head_dim,
            )
            for layer in range(part.first_layer, part.last_layer + 1)
        ]
    )


def _fetch_state(
    client: StoreClient, layout: PageLayout, settings: PageSettings, geometry: CacheGeometry, place: Place
) -> CodecState | None:
    """The model's state, if the store has one."""
    namespace = namespace_for(
        layout, geometry, model=place.model, revision=settings.revision, salt=settings.salt
    )
    try:
        state = agree_on_state(client, namespace, geometry, lambda: None)
    except (RpcError, BlockFormatError) as error:
        logger.warning(
            "rank %d of %d: no codec state from the store, pages are made without; where another replica or "
            "pipeline stage got one, nothing that they share is found. Restart when the store answers, "
            "or name a file in %s: %s",
            place.tp_rank,
            place.tp_size,
            STATE_VARIABLE,
            error,
        )
        return None
    logger.info("pages are made %s a codec state", "without" if state is None else "with")
    return state
