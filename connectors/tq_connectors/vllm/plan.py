"""What moves between an engine's device, its host memory and the store, decided from facts alone."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tq_connectors.codec_state import CodecState
from tq_connectors.vllm.engine_pages import BlockShape
from tq_connectors.vllm.names import ChunkNames
from tq_connectors.vllm.rows import PageRows, RawRows, Rows
from tq_connectors.vllm.settings import UNCODED, StoreSettings
from tq_kernels import PRESETS, preset
from tq_kernels.layout import PageLayout
from tq_store.errors import ConfigError
from tq_store.keys import Namespace

_PLAIN_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Mode(enum.Enum):
    """What happens to the engine's blocks on their way."""

    QUANTIZED = "quantized on the device"
    PAGES = "packed pages already"
    RAW = "moved as they are"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine says of its cache.

    Args:
        model: Its name or path.
        dtype: Of its cache, or of the model where the cache follows that.
        num_layers: Layers of each of its groups of layers.
        block_tokens: Tokens in a block of each group.
        blocks_per_chunk: Blocks that are moved together.
        block_bytes: Bytes of a block, all layers of a group, on one rank.
        tp_size: Tensor-parallel ranks.
        world_size: All ranks.
        token_ranks: Ranks among which the tokens of a sequence are spread.
        layout: Name of the order of layers, blocks, heads and tokens.
        platform: What computes, on which the engine's own formats depend.
        is_replicated: Whether all ranks hold the same bytes, of which host memory has one copy.
    """

    model: str
    dtype: str
    num_layers: tuple[int, ...]
    block_tokens: tuple[int, ...]
    blocks_per_chunk: int
    block_bytes: int
    tp_size: int
    world_size: int
    token_ranks: int
    layout: str | None
    platform: str
    is_replicated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPlan:
    """How chunks are moved.

    Args:
        mode: What happens to them.
        rows: Rows of host memory as blocks.
        cell_bytes_per_block: Bytes in a row for one rank and one block.
        namespace: Of the blocks; each group of layers has one of its own.
        chunk_tokens: Tokens in a chunk.
        block: Of one layer of one rank, where it holds keys and values in the open.
        state: What packed pages are made with, if anything.
    """

    mode: Mode
    rows: Rows
    cell_bytes_per_block: int
    namespace: Namespace
    chunk_tokens: int
    block: BlockShape | None = None
    state: CodecState | None = None

    def balance(self, rank: int) -> torch.Tensor | None:
        """What this rank divides keys by, ``[num_layers, num_kv_heads, head_dim]`` float32 on the CPU."""
        if self.state is None or not isinstance(self.rows, PageRows):
            return None
        part = self.rows.part(rank)
        return self.state.key_balance[:, part.first_kv_head : part.last_kv_head + 1].contiguous()

    def names(self, group: int, hash_seed: Callable[[], bytes]) -> ChunkNames:
        """Names of the chunks of a group of layers."""
        namespace = replace(self.namespace, salt=f"group {group} {self.namespace.salt}")
        return ChunkNames(namespace, self.chunk_tokens, hash_seed)


def plan_offload(
    facts: EngineFacts,
    settings: StoreSettings,
    heads_of_model: Callable[[], tuple[int, int]],
    state: CodecState | None = None,
) -> OffloadPlan:
    """The plan for an engine.

    Args:
        facts: What the engine says of its cache.
        settings: What the operator says.
        heads_of_model: KV heads of the whole model and channels of each; asked where settings are silent.
        state: What packed pages are made with, the engine's own or ours.

    Raises:
        ConfigError: The engine's cache cannot be quantized; the message says why and what to choose.
    """
    is_packed = _is_packed(facts)
    if not is_packed and (facts.dtype not in _PLAIN_DTYPES or settings.preset == UNCODED):
        return _raw(facts, settings, None)
    num_kv_heads, head_dim = settings.num_kv_heads, settings.head_dim
    if not (num_kv_heads and head_dim):
        num_kv_heads, head_dim = heads_of_model()
    if is_packed:
        return _packed(facts, settings, num_kv_heads, head_dim, state)
    return _quantized(facts, settings, num_kv_heads, head_dim, state)


def _quantized(
    facts: EngineFacts, settings: StoreSettings, num_kv_heads: int, head_dim: int, state: CodecState | None
) -> OffloadPlan:
    if reason := _why_not_uniform(facts):
        raise ConfigError(f"this engine's cache cannot be quantized on its way, as {reason}: use preset none")
    num_layers, block_tokens = facts.num_layers[0], facts.block_tokens[0]
    chunk_tokens = block_tokens * facts.blocks_per_chunk
    if chunk_tokens % settings.page_tokens:
        raise ConfigError(
            f"chunks of {chunk_tokens} tokens are not whole pages of {settings.page_tokens}: set block_size "
            f"in kv_connector_extra_config to a multiple of {settings.page_tokens}"
        )
    layout = PageLayout(
        spec=preset(settings.preset),
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        page_tokens=settings.page_tokens,
    )
    rows = PageRows(layout, num_layers, chunk_tokens // settings.page_tokens, facts.tp_size)
    rank_heads = rows.rank_layout.num_kv_heads
    block = BlockShape(
        block_tokens=block_tokens,
        num_kv_heads=rank_heads,
        head_dim=head_dim,
        dtype=_PLAIN_DTYPES[facts.dtype],
    )
    _check_block_bytes(facts, num_layers * block.num_bytes, f"{rank_heads} KV heads of {head_dim}")
    return OffloadPlan(
        mode=Mode.QUANTIZED,
        rows=rows,
        cell_bytes_per_block=rows.cell_bytes // facts.blocks_per_chunk,
        namespace=_namespace(facts, settings, layout, num_layers, state),
        chunk_tokens=chunk_tokens,
        block=block,
        state=state,
    )


def _packed(
    facts: EngineFacts, settings: StoreSettings, num_kv_heads: int, head_dim: int, state: CodecState | None
) -> OffloadPlan:
    is_uniform = not _why_not_uniform(facts)
    if not is_uniform and len(facts.num_layers) != 1:
        return _raw(facts, settings, state)
    num_layers, block_tokens = facts.num_layers[0], facts.block_tokens[0]
    layout = PageLayout(
        spec=preset(facts.dtype), head_dim=head_dim, num_kv_heads=num_kv_heads, page_tokens=block_tokens
    )
    rows = PageRows(layout, num_layers, facts.blocks_per_chunk, facts.tp_size)
    if not is_uniform and facts.block_bytes % rows.rank_layout.page_bytes == 0:
        return _raw(facts, settings, state)
    if not is_uniform or num_layers * rows.rank_layout.page_bytes != facts.block_bytes:
        return _raw_of_some_layers(facts, settings, state)
    return OffloadPlan(
        mode=Mode.PAGES,
        rows=rows,
        cell_bytes_per_block=facts.block_bytes,
        namespace=_namespace(facts, settings, layout, num_layers, state),
        chunk_tokens=block_tokens * facts.blocks_per_chunk,
    )


def _raw_of_some_layers(facts: EngineFacts, settings: StoreSettings, state: CodecState | None) -> OffloadPlan:
    if not settings.skip_layers:
        raise ConfigError(
            f"some layers of the engine are not in {facts.dtype}, and it does not say which: set skip_layers "
            "to what --kv-cache-dtype-skip-layers has"
        )
    return _raw(facts, settings, state)


def _raw(facts: EngineFacts, settings: StoreSettings, state: CodecState | None) -> OffloadPlan:
    """Blocks as they are; a state only where they are packed."""
    words = (
        f"tp {facts.tp_size} tokens over {facts.token_ranks} layout {facts.layout} on {facts.platform} "
        f"without layers {settings.skip_layers!r}"
    )
    cell_bytes = facts.block_bytes * facts.blocks_per_chunk
    num_cells = 1 if facts.is_replicated else facts.world_size
    fingerprint = preset(facts.dtype).fingerprint.hex() if _is_packed(facts) else UNCODED
    return OffloadPlan(
        mode=Mode.RAW,
        rows=RawRows(cell_bytes, num_cells, words),
        cell_bytes_per_block=facts.block_bytes,
        namespace=Namespace(
            model=settings.model or facts.model,
            revision=settings.revision,
            kv_dtype=facts.dtype,
            codec_fingerprint=fingerprint,
            codec_state="" if state is None else state.digest,
            page_tokens=max(facts.block_tokens),
            num_layers=max(facts.num_layers),
            num_kv_heads=1,
            head_dim=1,
            salt=f"{num_cells} x {cell_bytes} bytes {words} {settings.salt}",
        ),
        chunk_tokens=max(facts.block_tokens) * facts.blocks_per_chunk,
    )


def _is_packed(facts: EngineFacts) -> bool:
    return facts.dtype in PRESETS and PRESETS[facts.dtype].key.rotated


def _why_not_uniform(facts: EngineFacts) -> str | None:
    """Why blocks are not pages of all heads once the ranks' are put together; None where they are."""
    if len(set(facts.num_layers)) != 1 or len(set(facts.block_tokens)) != 1:
        return "its groups of layers differ"
    if facts.world_size != facts.tp_size:
        return "its ranks are not all tensor-parallel"
    if facts.token_ranks != 1:
        return "the tokens of a sequence are spread over ranks"
    if facts.is_replicated:
        return "its ranks all hold the same bytes"
    return None


def _check_block_bytes(facts: EngineFacts, expected_bytes: int, words: str) -> None:
    if facts.block_bytes != expected_bytes:
        raise ConfigError(
            f"a block of this engine has {facts.block_bytes} bytes, and would have {expected_bytes} with "
            f"{words} in {facts.dtype}: its layers are of several kinds, or num_kv_heads and head_dim are "
            "wrong; with preset none it is moved as it is"
        )


def _namespace(
    facts: EngineFacts, settings: StoreSettings, layout: PageLayout, num_layers: int, state: CodecState | None
) -> Namespace:
    shape = [num_layers, layout.num_kv_heads, layout.head_dim]
    if state is not None and list(state.key_balance.shape) != shape:
        raise ConfigError(
            f"the codec state is of {list(state.key_balance.shape)} layers, heads and channels, "
            f"and this model has {shape}"
        )
    return Namespace(
        model=settings.model or facts.model,
        revision=settings.revision,
        kv_dtype=facts.dtype,
        codec_fingerprint=layout.spec.fingerprint.hex(),
        codec_state="" if state is None else state.digest,
        page_tokens=layout.page_tokens,
        num_layers=num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        salt=settings.salt,
    )
