"""ChunkMover: chunks between an engine's device and rows of host memory, one after the other.

Two buffers of bounded size take turns: while one is copied over the bus, the codec works on the other. A
device with streams is given all of it at once, on streams of its own beside the engine's: a thread would have
to win Python's lock from the engine's again for every launch. Where calls return when they are done, a thread
makes them.
"""

import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

import torch

from tq_connectors.vllm.chunk_codec import ChunkCodec
from tq_connectors.vllm.streams import Event, streams_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk to move.

    Args:
        group: Which of the engine's groups of layers, and so which codec.
        cell: ``[cell_bytes]`` uint8 in host memory.
        blocks: Numbers of the blocks on the device, -1 for those to leave out.
    """

    group: int
    cell: torch.Tensor
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Given:
    """What a device was given to do: when, and the event at its end."""

    started: float
    end: Event


@dataclass(frozen=True, slots=True)
class _Job:
    """A job, and what it was given to the device with."""

    given: Future[_Given]
    num_bytes: int

    @property
    def is_done(self) -> bool:
        """Whether it has come to its end, whichever."""
        given = self.given
        return given.done() and (given.exception() is not None or given.result().end.has_happened())


@dataclass(frozen=True, slots=True)
class Moved:
    """A job that is done. One that failed has left its target in a state that nobody may read."""

    job_id: int
    success: bool
    num_bytes: int
    seconds: float


class ChunkMover:
    """One direction. Jobs run in the order of submission; nothing here waits but `wait` and `close`.

    Args:
        codecs: What a chunk of each group of layers becomes on the device; cells of one size.
        staging_bytes: Most bytes of each of the two buffers, but at least one chunk.
        is_save: From blocks to cells, or from cells to blocks.
    """

    def __init__(self, codecs: Sequence[ChunkCodec], *, staging_bytes: int, is_save: bool) -> None:
        self._codecs, self._is_save = codecs, is_save
        device, self._cell_bytes = codecs[0].device, codecs[0].cell_bytes
        self._chunks_at_once = chunks_at_once(self._cell_bytes, staging_bytes)
        shape = (self._chunks_at_once, self._cell_bytes)
        self._buffers = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(2)]
        self._streams = streams_of(device)
        # memory that the engine's work may still use until it has come here
        self._free = [self._streams.engine_event(), self._streams.engine_event()]
        self._jobs: dict[int, _Job] = {}
        self._pool = (
            ThreadPoolExecutor(1, thread_name_prefix=f"tq-{'save' if is_save else 'load'}")
            if self._streams.calls_take_time
            else None
        )

    def fence(self) -> Event:
        """All that the engine has given its device to do so far; called on the engine's thread."""
        return self._streams.engine_event()

    def submit(self, jobs: Mapping[int, Sequence[Chunk]], ready: Event) -> None:
        """Move the chunks of jobs; together they are done, or fail.

        The engine's blocks are neither read nor written before `ready` has happened. Cells of a load are read
        at once.
        """
        chunks = [chunk for of_job in jobs.values() for chunk in of_job]
        if self._pool is not None:
            given = self._pool.submit(self._move, chunks, ready)
        else:
            given = Future()
            try:
                given.set_result(self._move(chunks, ready))
            except Exception as error:
                with suppress(Exception):  # a device that fails in this, too, writes nothing any more
                    self._streams.drain()  # parts before the one that failed; their target may be reused now
                given.set_exception(error)
        for job_id, of_job in jobs.items():
            self._jobs[job_id] = _Job(given, len(of_job) * self._cell_bytes)

    def take_finished(self) -> list[Moved]:
        """Jobs that are done, each once."""
        done = [job_id for job_id, job in self._jobs.items() if job.is_done]
        return [_result(job_id, self._jobs.pop(job_id)) for job_id in done]

    def wait(self, job_ids: Collection[int]) -> None:
        """Wait until these jobs are done; those that are not known are."""
        all_given = [self._jobs[job_id].given for job_id in job_ids if job_id in self._jobs]
        wait(all_given)
        for given in all_given:
            if given.exception() is None:
                given.result().end.synchronize()

    def move(self, chunks: Sequence[Chunk], ready: Event) -> bool:
        """Whether chunks were moved, once they are; for callers who submit nothing else meanwhile."""
        self.submit({0: chunks}, ready)
        self.wait({0})
        return all(moved.success for moved in self.take_finished())

    def close(self) -> None:
        """Drop what waits, and wait for what runs. May be called twice."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self.wait([job_id for job_id, job in self._jobs.items() if not job.given.cancelled()])

    def _move(self, chunks: Sequence[Chunk], ready: Event) -> _Given:
        started = time.monotonic()
        with torch.inference_mode():
            end = self._save(chunks, ready) if self._is_save else self._load(chunks, ready)
        return _Given(started, end)

    def _save(self, chunks: Sequence[Chunk], ready: Event) -> Event:
        def quantize(part: Sequence[Chunk], cells: torch.Tensor) -> None:
            ready.wait()
            self._codecs[part[0].group].save(self._blocks_of(part), cells)

        def copy(part: Sequence[Chunk], cells: torch.Tensor) -> None:
            for start, rows in _runs(part):
                rows.copy_(cells[start : start + len(rows)], non_blocking=True)

        return self._pipeline(chunks, self._streams.compute, quantize, self._streams.copy, copy)

    def _load(self, chunks: Sequence[Chunk], ready: Event) -> Event:
        def copy(part: Sequence[Chunk], cells: torch.Tensor) -> None:
            for start, rows in _runs(part):
                cells[start : start + len(rows)].copy_(rows, non_blocking=True)

        def dequantize(part: Sequence[Chunk], cells: torch.Tensor) -> None:
            ready.wait()
            self._codecs[part[0].group].load(cells, self._blocks_of(part))

        return self._pipeline(chunks, self._streams.copy, copy, self._streams.compute, dequantize)

    def _pipeline(
        self,
        chunks: Sequence[Chunk],
        first: Callable[[], AbstractContextManager[object]],
        fill: Callable[[Sequence[Chunk], torch.Tensor], None],
        second: Callable[[], AbstractContextManager[object]],
        drain: Callable[[Sequence[Chunk], torch.Tensor], None],
    ) -> Event:
        """Fill one buffer on one stream while the other drains on the other; the event after all of it."""
        for turn, part in zip(itertools.cycle(range(2)), self._parts(chunks), strict=False):
            cells, free = self._buffers[turn][: len(part)], self._free[turn]
            filled = self._streams.event()
            with first():
                free.wait()
                fill(part, cells)
                filled.record()
            with second():
                filled.wait()
                drain(part, cells)
                free.record()
        done = self._streams.event()
        with second():
            done.record()
        return done

    def _parts(self, chunks: Sequence[Chunk]) -> Iterator[Sequence[Chunk]]:
        """Chunks of one group, of whichever jobs, as many as a buffer holds."""
        by_group = sorted(chunks, key=_group_of)
        for _, of_group in itertools.groupby(by_group, _group_of):
            group = list(of_group)
            for start in range(0, len(group), self._chunks_at_once):
                yield group[start : start + self._chunks_at_once]

    def _blocks_of(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        blocks = torch.tensor([block for chunk in chunks for block in chunk.blocks], dtype=torch.int64)
        return self._streams.to_device(blocks)


def _group_of(chunk: Chunk) -> int:
    return chunk.group


def _runs(chunks: Sequence[Chunk]) -> Iterator[tuple[int, torch.Tensor]]:
    """Cells that lie one after the other in memory, as one: position of the first, ``[n, cell_bytes]``."""
    start = 0
    for end in range(1, len(chunks) + 1):
        last = chunks[end - 1].cell
        if end == len(chunks) or chunks[end].cell.data_ptr() != last.data_ptr() + last.nbytes:
            yield start, chunks[start].cell.as_strided((end - start, len(last)), (len(last), 1))
            start = end


def _result(job_id: int, job: _Job) -> Moved:
    error = job.given.exception()
    if error is None:
        return Moved(job_id, True, job.num_bytes, time.monotonic() - job.given.result().started)
    logger.error("moving chunks between device and host memory failed", exc_info=error)
    return Moved(job_id, False, 0, 0.0)


def chunks_at_once(cell_bytes: int, staging_bytes: int) -> int:
    """Chunks that a buffer holds."""
    return max(1, staging_bytes // cell_bytes)
