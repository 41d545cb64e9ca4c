"""From settings and a pool to the page store of one process: its part, its codec, its namespace."""

import logging
from dataclasses import dataclass

import torch

from tq_connectors.codec import CacheGeometry, namespace_for
from tq_connectors.codec_state import CodecState, agree_on_state
from tq_connectors.sglang.hicache_settings import UNCODED, PageSettings
from tq_connectors.sglang.page_codecs import PageCodec, QuantizedCodec, RowCodec
from tq_connectors.sglang.page_names import PageNames
from tq_connectors.sglang.page_shape import PagePart, PageShape
from tq_connectors.sglang.page_store import PageStore
from tq_kernels import PageLayout, preset
from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError, ConfigError, RpcError
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey, Namespace

logger = logging.getLogger(__name__)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process stands in its replica.

    Args:
        model: Name of the model.
        first_layer: First attention layer that it holds.
        tp_rank: Its rank among the processes that divide the KV heads.
        tp_size: How many these are.
        is_whole_depth: Whether it holds all layers of the model.
        rank: What else tells it from other processes of its replica.
    """

    model: str
    first_layer: int = 0
    tp_rank: int = 0
    tp_size: int = 1
    is_whole_depth: bool = True
    rank: str = ""


def open_page_store(client: StoreClient, settings: PageSettings, shape: PageShape, place: Place) -> PageStore:
    """The page store of a process.

    Asks the store for the model's codec state; while it does not answer, pages are made without one.

    Raises:
        ConfigError: The codec in the settings cannot pack such pages; the message says why.
    """
    part = PagePart(
        first_layer=place.first_layer,
        num_layers=shape.num_layers,
        first_kv_head=place.tp_rank * shape.num_kv_heads,
        num_kv_heads=shape.num_kv_heads,
        total_kv_heads=place.tp_size * shape.num_kv_heads,
        rank=place.rank,
    )
    codec: PageCodec
    if settings.codec == UNCODED:
        codec, state = RowCodec(part, shape), None
    else:
        layout = page_layout(settings.codec, shape)
        state = _fetch_state(client, layout, settings, shape, place)
        balance = None
        if state is not None:
            heads = slice(part.first_kv_head, part.first_kv_head + part.num_kv_heads)
            balance = state.key_balance[:, heads]
        codec = QuantizedCodec(layout, part, settings.codec_device(), balance)
    try:
        codec.info(BlockKey(bytes(BLOCK_KEY_BYTES)))
    except BlockFormatError as error:
        raise ConfigError(f"a page of all layers makes no block, use smaller pages: {error}") from error
    namespace = Namespace(
        model=place.model,
        revision=settings.revision,
        kv_dtype=shape.dtype_name,
        codec_fingerprint=codec.fingerprint,
        codec_state="" if state is None else state.digest,
        page_tokens=shape.page_tokens,
        num_layers=shape.num_layers,
        num_kv_heads=part.total_kv_heads,
        head_dim=shape.head_dim,
        salt=settings.salt,
    )
    return PageStore(
        client,
        PageNames(namespace, part),
        codec,
        page_bytes=shape.page_bytes,
        staging_bytes=settings.staging_bytes,
    )


def page_layout(codec: str, shape: PageShape) -> PageLayout:
    """Layout of the packed pages of a preset.

    Raises:
        ConfigError: The preset cannot pack pages of this shape.
    """
    if shape.dtype not in FLOATS:
        raise ConfigError(f"codec is {codec!r}, and the pool holds {shape.dtype_name}, which is not packed")
    try:
        return PageLayout(
            spec=preset(codec),
            head_dim=shape.head_dim,
            num_kv_heads=shape.num_kv_heads,
            page_tokens=shape.page_tokens,
        )
    except ValueError as error:
        raise ConfigError(f"codec {codec!r} cannot pack SGLang's pages (--page-size): {error}") from error


def _fetch_state(
    client: StoreClient, layout: PageLayout, settings: PageSettings, shape: PageShape, place: Place
) -> CodecState | None:
    """The model's state, if the store has one for all of its layers and heads."""
    if not place.is_whole_depth:
        return None
    geometry = CacheGeometry(
        num_layers=shape.num_layers,
        num_kv_heads=place.tp_size * shape.num_kv_heads,
        head_dim=shape.head_dim,
        kv_dtype=shape.dtype_name,
    )
    namespace = namespace_for(
        layout, geometry, model=place.model, revision=settings.revision, salt=settings.salt
    )
    try:
        state = agree_on_state(client, namespace, geometry, lambda: None)
    except (RpcError, BlockFormatError) as error:
        logger.warning("no codec state from the store, pages are made without: %s", error)
        return None
    logger.info("pages are made %s a codec state", "without" if state is None else "with")
    return state
