"""Codecs for the blocks that vLLM hands a worker, one for each group of layers."""

from collections.abc import Sequence

import torch

from tq_connectors.vllm.chunk_codec import ChunkCodec, CopiedChunks, QuantizedChunks
from tq_connectors.vllm.chunk_mover import chunks_at_once
from tq_connectors.vllm.engine_pages import BlockShape, EnginePages, PermutedPages, StridedPages
from tq_connectors.vllm.plan import OffloadPlan
from tq_connectors.vllm.rows import PageRows
from tq_store.errors import ConfigError

_HEAD_MAJOR, _TOKEN_MAJOR = ("LBHNC", "BLHNC"), ("LBNHC", "BLNHC")


def chunk_codecs(
    groups: Sequence[Sequence[torch.Tensor]],
    plan: OffloadPlan,
    *,
    rank: int,
    blocks_per_chunk: int,
    layout: str | None,
    staging_bytes: int,
) -> list[ChunkCodec]:
    """A codec for each group of layers.

    Args:
        groups: ``[num_blocks, bytes of a block]`` int8 of each layer, of each group.
        plan: What becomes of them.
        rank: Which of the engine's ranks this is.
        blocks_per_chunk: Blocks that are moved together.
        layout: Name of vLLM's order of layers, blocks, heads and tokens; None for the connector's own wish.
        staging_bytes: Most bytes of cells on the device at once.

    Raises:
        ConfigError: The engine's blocks are not what the plan was made for.
    """
    at_once = chunks_at_once(plan.rows.cell_bytes, staging_bytes)
    balance = plan.balance(rank)
    codecs: list[ChunkCodec] = []
    for given in groups:
        layers = _checked(given, plan, layout)
        if plan.block is None or not isinstance(plan.rows, PageRows):
            codecs.append(CopiedChunks(layers, blocks_per_chunk=blocks_per_chunk))
        else:
            codecs.append(
                QuantizedChunks(
                    _engine_pages(layers, plan.block, layout),
                    plan.rows.rank_layout,
                    pages_per_chunk=plan.rows.pages_per_chunk,
                    most_chunks=at_once,
                    key_balance=None if balance is None else balance.to(layers[0].device),
                )
            )
    if any(codec.cell_bytes != plan.rows.cell_bytes for codec in codecs):
        raise ConfigError("this engine's groups of layers have blocks of unlike sizes, which only vLLM moves")
    return codecs


def _checked(layers: Sequence[torch.Tensor], plan: OffloadPlan, layout: str | None) -> list[torch.Tensor]:
    if plan.block is None:
        return list(layers)
    pieces = [piece for layer in layers for piece in _pieces(layer, plan.block, layout)]
    if isinstance(plan.rows, PageRows) and len(pieces) != plan.rows.num_layers:
        raise ConfigError(f"this engine has {len(pieces)} layers, not {plan.rows.num_layers}")
    return pieces


def _pieces(blocks: torch.Tensor, shape: BlockShape, layout: str | None) -> list[torch.Tensor]:
    """The layers that blocks hold one after the other: one, or all of them where blocks are outermost."""
    if blocks.shape[1] % shape.num_bytes or (
        blocks.shape[1] != shape.num_bytes and not f"{layout}".startswith("BL")
    ):
        raise ConfigError(
            f"a block of a layer has {blocks.shape[1]} bytes where keys and values take {shape.num_bytes}"
        )
    return list(blocks.split(shape.num_bytes, dim=1))


def _engine_pages(layers: list[torch.Tensor], shape: BlockShape, layout: str | None) -> EnginePages:
    if layers[0].device.type == "cpu":
        from tq_connectors.vllm.cpu_pages import cpu_orders

        return PermutedPages(layers, shape, *cpu_orders(shape))
    if layout is not None and layout not in (*_HEAD_MAJOR, *_TOKEN_MAJOR):
        raise ConfigError(f"blocks of the layout {layout} are not in one run; set kv_cache_layout to LBHNC")
    return StridedPages(layers, shape, head_major=layout not in _TOKEN_MAJOR)
