"""TQOffloadingWorker: an engine's blocks to cells of host memory and back, coded on the way.

It runs in every worker process of vLLM, whose connector asserts that transfers succeed: so all that can be
wrong is found when the worker is made. Served: vLLM 0.30 to 0.33.
"""

from collections.abc import Iterator, Sequence

import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from tq_connectors.vllm.chunk_codec import ChunkCodec
from tq_connectors.vllm.chunk_mover import Chunk, ChunkMover
from tq_store.errors import ConfigError

_NO_BLOCK = -1


class TQOffloadingWorker(OffloadingWorker):
    """Moves chunks on streams of its own; saves and loads do not wait for each other.

    Args:
        codecs: What a chunk of each group of layers becomes.
        region: Host memory of all ranks and the scheduler; released with this.
        cells: ``[num_chunks, cell_bytes]`` uint8: this rank's part of it.
        staging_bytes: Most device memory of each of four buffers, but at least one chunk.
    """

    def __init__(
        self,
        codecs: Sequence[ChunkCodec],
        region: SharedOffloadRegion,
        cells: torch.Tensor,
        *,
        staging_bytes: int,
    ) -> None:
        self._region = region
        self._cells: torch.Tensor | None = cells
        self._blocks_per_chunk = codecs[0].blocks_per_chunk
        self._saves = ChunkMover(codecs, staging_bytes=staging_bytes, is_save=True)
        self._loads = ChunkMover(codecs, staging_bytes=staging_bytes, is_save=False)
        self._held: dict[int, list[Chunk]] = {}
        self._ready = self._saves.fence()
        self._try_out(len(codecs))

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Save blocks once the engine's device has done what it was given so far.

        The device is given the saves of a step together, and after the engine's own work of that step, which
        so does not wait for them.
        """
        self._held[job_id] = list(self._chunks(src_spec, dst_spec))
        self._ready = self._saves.fence()
        return True

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        """Load blocks: over the bus at once, into them when the device has done what it was given so far."""
        self._loads.submit({job_id: list(self._chunks(dst_spec, src_spec))}, self._loads.fence())
        return True

    def get_finished(self) -> list[TransferResult]:
        """Jobs that are done, each once; vLLM asks at the end of every step."""
        self._let_go()
        return [
            TransferResult(moved.job_id, moved.success, moved.num_bytes, moved.seconds)
            for mover in (self._saves, self._loads)
            for moved in mover.take_finished()
        ]

    def wait(self, job_ids: set[int]) -> None:
        """Wait until these jobs are done; saves that nobody waits for are held on."""
        if not self._held.keys().isdisjoint(job_ids):
            self._let_go()
        self._saves.wait(job_ids)
        self._loads.wait(job_ids)

    def shutdown(self) -> None:
        """Wait for what runs, and release the memory."""
        self._held.clear()
        self._saves.close()
        self._loads.close()
        self._cells = None
        self._region.cleanup()

    def _let_go(self) -> None:
        if self._held:
            self._saves.submit(self._held, self._ready)
            self._held = {}

    def _try_out(self, num_groups: int) -> None:
        """Move a chunk of the engine's null block both ways: kernels are compiled now, or the start fails."""
        assert self._cells is not None
        if not len(self._cells):
            return
        null_blocks = [0] * self._blocks_per_chunk
        chunks = [Chunk(group, self._cells[0], null_blocks) for group in range(num_groups)]
        for mover in (self._saves, self._loads):
            if not mover.move(chunks, mover.fence()):
                raise ConfigError("this engine's blocks cannot be moved; the log says why")

    def _chunks(self, device: GPULoadStoreSpec, host: LoadStoreSpec) -> Iterator[Chunk]:
        """Chunks of a job, whose first of each group of layers may begin in the middle."""
        assert isinstance(host, CPULoadStoreSpec)
        assert self._cells is not None
        numbers, cells = device.block_ids.tolist(), iter(host.chunk_ids.tolist())
        for group, (size, first) in enumerate(zip(device.group_sizes, device.block_indices, strict=True)):
            blocks, numbers = numbers[:size], numbers[size:]
            left_out = first % self._blocks_per_chunk if size else 0
            blocks = [_NO_BLOCK] * left_out + blocks
            blocks += [_NO_BLOCK] * (-len(blocks) % self._blocks_per_chunk)
            for start in range(0, len(blocks), self._blocks_per_chunk):
                yield Chunk(group, self._cells[next(cells)], blocks[start : start + self._blocks_per_chunk])
