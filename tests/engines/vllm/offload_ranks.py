"""Ranks of an engine as vLLM's offloading framework sees them, without a model."""

import uuid
from collections.abc import Sequence
from typing import Any

import torch
from store.running_server import wait_until
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from tq_connectors.vllm.cpu_pages import cpu_orders
from tq_connectors.vllm.engine_pages import BlockShape
from tq_connectors.vllm.offload_spec import TQOffloadingSpec

LAYERS, HEADS, DIM, BLOCK, BLOCKS_PER_CHUNK, NUM_BLOCKS = 2, 4, 64, 32, 4, 12
CHUNK = BLOCK * BLOCKS_PER_CHUNK
KEYS = [make_offload_key(bytes([number]) * 32, 0) for number in range(4)]


def tokens_of(chunk: int) -> torch.Tensor:
    """Keys and values ``[2, LAYERS, CHUNK, HEADS, DIM]`` of all ranks."""
    generator = torch.Generator().manual_seed(chunk)
    return torch.randn(2, LAYERS, CHUNK, HEADS, DIM, generator=generator).bfloat16()


def offloading_config(tp_size: int, rank: int, engine_id: str, store: dict[str, Any]) -> OffloadingConfig:
    """What vLLM says to a spec."""
    heads = HEADS // tp_size
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(tokens_per_block=BLOCK, layer_names=("0", "1"), group_id=0),),
        worker_kv_bytes_per_block=LAYERS * BLOCK * heads * 2 * DIM * 2,
        enable_kv_cache_events=False,
        extra_config={"cpu_bytes_to_use": 8 << 20, "tq_store": store},
        engine_id=engine_id,
        model=OffloadingModelConfig(name="m", dtype="bfloat16"),
        cache=OffloadingCacheConfig(tokens_per_hash=BLOCK, blocks_per_chunk=BLOCKS_PER_CHUNK),
        parallel=OffloadingParallelConfig(
            rank=rank,
            world_size=tp_size,
            tp_size=tp_size,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=False,
        ),
        kv_cache_layout="LBHNC",
    )


class Ranks:
    """Workers and the manager of one engine with so many tensor-parallel ranks."""

    def __init__(self, tp_size: int, **store: Any) -> None:
        settings = {"revision": "r", "num_kv_heads": HEADS, "head_dim": DIM, "preset": "raw", **store}
        engine_id = uuid.uuid4().hex
        self._tp_size, self._jobs = tp_size, 0
        self._heads = HEADS // tp_size
        shape = BlockShape(block_tokens=BLOCK, num_kv_heads=self._heads, head_dim=DIM, dtype=torch.bfloat16)
        self.blocks = [
            [torch.zeros(NUM_BLOCKS, shape.num_bytes, dtype=torch.int8) for _ in range(LAYERS)]
            for _ in range(tp_size)
        ]
        self._shape = shape
        self.workers = [
            TQOffloadingSpec(offloading_config(tp_size, rank, engine_id, settings)).get_worker(
                CanonicalKVCaches(
                    [CanonicalKVCacheTensor(layer, shape.num_bytes) for layer in layers],
                    [[CanonicalKVCacheRef(number, shape.num_bytes) for number in range(LAYERS)]],
                )
            )
            for rank, layers in enumerate(self.blocks)
        ]
        self.manager = TQOffloadingSpec(offloading_config(tp_size, 0, engine_id, settings)).get_manager()
        self.context = ReqContext(req_id="request")
        self.manager.on_new_request(self.context)

    def compute(self, chunk: int, blocks: Sequence[int]) -> None:
        """Write a chunk's keys and values into blocks as the engine's attention does."""
        isa = _get_attn_isa(torch.bfloat16, BLOCK, DIM, "auto")
        slots = torch.tensor([block * BLOCK + offset for block in blocks for offset in range(BLOCK)])
        for rank, layers in enumerate(self.blocks):
            mine = slice(rank * self._heads, (rank + 1) * self._heads)
            for layer, (keys, values) in zip(layers, tokens_of(chunk).transpose(0, 1), strict=True):
                cache = layer.view(torch.bfloat16).view(NUM_BLOCKS, self._heads, 2 * BLOCK, DIM)
                sides = cache.chunk(2, dim=2)
                new = [side[:, mine].contiguous() for side in (keys, values)]
                ops.cpu_attn_reshape_and_cache(
                    *new, *sides, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
                )

    def read(self, blocks: Sequence[int]) -> torch.Tensor:
        """Keys and values of blocks, of all ranks, as `tokens_of` has them."""
        places = [order.argsort() for order in cpu_orders(self._shape)]
        ranks = []
        for layers in self.blocks:
            numbers = torch.stack(layers)[:, list(blocks)].view(torch.bfloat16)
            by_head = numbers.view(LAYERS, len(blocks), self._heads, 2, BLOCK * DIM)
            sides = [by_head[..., side, turned] for side, turned in enumerate(places)]
            tokens = [side.unflatten(-1, (BLOCK, DIM)).transpose(2, 3).flatten(1, 2) for side in sides]
            ranks.append(torch.stack(tokens))
        return torch.cat(ranks, dim=3)

    def store(self, chunks: Sequence[int], blocks: Sequence[int]) -> None:
        """Save chunks from blocks, down to the last tier."""
        keys = [KEYS[chunk] for chunk in chunks]
        prepared = self.manager.prepare_store(keys, self.context)
        assert prepared is not None
        assert list(prepared.keys_to_store) == keys
        self._move("submit_store", GPULoadStoreSpec(list(blocks), [len(blocks)], [0]), prepared.store_spec)
        self.manager.complete_store(keys, self.context)
        self.end_step()

    def load(self, chunks: Sequence[int], blocks: Sequence[int], first_block: int = 0) -> None:
        """Load chunks that have been found into blocks, from one of them on."""
        keys = [KEYS[chunk] for chunk in chunks]
        prepared = self.manager.prepare_load(keys, self.context)
        spec = GPULoadStoreSpec(list(blocks), [len(blocks)], [first_block])
        self._move("submit_load", prepared, spec)
        self.manager.complete_load(keys, self.context)

    def found(self, chunk: int) -> LookupResult:
        """What a lookup comes to, over as many steps as it takes."""
        results: list[LookupResult] = []

        def is_known() -> bool:
            results.append(self.manager.lookup(KEYS[chunk], self.context))
            self.end_step()
            return results[-1] in (LookupResult.HIT, LookupResult.MISS)

        wait_until(is_known)
        return results[-1]

    def end_step(self) -> None:
        """What vLLM's scheduler does at the end of a step."""
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def reset(self) -> None:
        """Forget what is in host memory; waits until nothing is on its way."""
        self.manager.reset_cache()

    def close(self) -> None:
        self.manager.on_request_finished(self.context)
        self.manager.shutdown()
        for worker in self.workers:
            worker.shutdown()

    def _move(self, submit: str, source: Any, target: Any) -> None:
        self._jobs += 1
        for worker in self.workers:
            assert getattr(worker, submit)(self._jobs, source, target)
            worker.wait({self._jobs})
            (result,) = worker.get_finished()
            assert (result.job_id, result.success) == (self._jobs, True)


def keys_of(chunks: Sequence[int]) -> list[OffloadKey]:
    """vLLM's keys of chunks."""
    return [KEYS[chunk] for chunk in chunks]
