"""Blocks read into places through shared memory: the server fills one segment while another is copied out."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from types import TracebackType

from tq_store.block import HEADER_BYTES
from tq_store.errors import RpcDenied, RpcError, RpcOverLimit, RpcTimeout, RpcUnavailable
from tq_store.keys import BlockKey
from tq_store.placed import PlacedBlock
from tq_store.rpc import convert
from tq_store.rpc.connection import Attempts, Connection, Pending
from tq_store.rpc.segment import Segment, SegmentPool

_KEYS_PER_CALL = 256
_BYTES_PER_CALL = 16 << 20
"""Of blocks: what is asked for at once is copied out while the server answers the next call."""
_CALLS_AT_ONCE = 2


class SharedReader:
    """The blocks of one get, in order. Used by one thread.

    The keys say what to ask for ahead, so a batch of places may be smaller than an answer, or larger.

    Args:
        connection: Carries the calls that say what lies where.
        segments: Empty where the server is not on this host; then nothing goes this way.
        keys: Of all blocks.
        attempts: The deadline of all calls.
    """

    def __init__(
        self, connection: Connection, segments: SegmentPool, keys: Sequence[BlockKey], attempts: Attempts
    ) -> None:
        self._connection, self._segments = connection, segments
        self._keys, self._attempts = keys, attempts
        self._position = 0
        self._answers: deque[_Answer] = deque()
        self._transfer = ExitStack()
        self._is_let_in = False
        self._calls_at_once = _CALLS_AT_ONCE

    def __enter__(self) -> "SharedReader":
        self._is_let_in = self._transfer.enter_context(self._segments.transfer())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave what is under way, and make room for another transfer; what follows has to go as a stream."""
        self._is_let_in = False
        self._leave_all()
        self._transfer.close()

    def fill(self, blocks: Sequence[PlacedBlock]) -> Iterator[bytes | bool]:
        """What became of the next blocks, as far as they come this way; a stream has to be asked for others.

        True where the places hold the payload: the block was verified in shared memory, which the server has
        written and leaves alone until it is asked again, and then copied, by the kernel and all at once. Of
        another block that is there its bytes, unverified, and False for a miss.

        Raises:
            RpcUnavailable, RpcTimeout, RpcDenied, RpcOverLimit: A stream would fare no better. What was not
                yielded may be asked for again.
        """
        done = 0
        try:
            while done < len(blocks):
                answer = self._next_answer(blocks[done].num_bytes)
                try:
                    num_left = answer.wait() if answer is not None else 0
                except RpcOverLimit:
                    if self._calls_at_once == 1:
                        raise
                    self._ask_alone()  # the server may have refused it for the call beside it
                    continue
                if answer is None or not num_left:
                    self.close()  # no shared memory, or the next block is larger than the segment
                    return
                found = answer.copy_out(blocks[done : done + num_left])
                done += len(found)
                self._position += len(found)
                yield from found
        except (RpcUnavailable, RpcTimeout, RpcDenied, RpcOverLimit):
            self._leave_all()
            raise
        except (RpcError, OSError):
            self.close()

    def _next_answer(self, block_bytes: int) -> "_Answer | None":
        """The answer that begins with the next block, and a call for what follows it; None where none can be.

        Args:
            block_bytes: Of the next block; the others are expected to be as long.
        """
        if self._answers and self._answers[0].is_used_up:
            self._answers.popleft().give_back(self._segments)
        if self._answers and self._answers[0].start + self._answers[0].num_used != self._position:
            self._leave_all()  # the answer before was shorter than expected
        while self._is_let_in and len(self._answers) < self._calls_at_once:
            start = self._answers[-1].end if self._answers else self._position
            if start == len(self._keys):
                break
            segment = self._segments.take(self._attempts.remaining_s)
            if segment is None:
                break
            most_keys = min(_BYTES_PER_CALL, segment.num_bytes) // block_bytes
            keys = self._keys[start : start + _share(len(self._keys) - start, most_keys)]
            try:
                pending = self._ask_for(segment, keys)
            except BaseException:
                self._segments.put_back(segment, is_sound=False)
                raise
            self._answers.append(_Answer(start, len(keys), segment, pending))
        return self._answers[0] if self._answers else None

    def _ask_for(self, segment: Segment, keys: Sequence[BlockKey]) -> Pending[list[int]]:
        parse = partial(convert.parse_shared_sizes, num_keys=len(keys), segment_bytes=segment.num_bytes)
        request = convert.pack_shared_get(segment.handle, keys)
        return self._connection.start("GetShared", request, parse, timeout_s=self._attempts.remaining_s)

    def _ask_alone(self) -> None:
        """After the next answer was refused: have one call at a time from here on, and none under way."""
        self._calls_at_once = 1
        self._answers.popleft().give_back(self._segments)
        for answer in self._answers:
            with suppress(RpcError):
                answer.wait()
        self._leave_all()

    def _leave_all(self) -> None:
        while self._answers:
            self._answers.popleft().give_back(self._segments)


class _Answer:
    """Blocks that the server puts into a segment, one after the other from its first byte on.

    Args:
        start: Position of the first.
        num_keys: How many were asked for.
        segment: Where they come to lie.
        pending: The call; gives the length of each, 0 for a miss, of as many as fit.
    """

    def __init__(self, start: int, num_keys: int, segment: Segment, pending: Pending[list[int]]) -> None:
        self.start, self.end = start, start + num_keys
        self.num_used = 0
        self._segment = segment
        self._pending: Pending[list[int]] | None = pending
        self._sizes_bytes: list[int] | None = None
        self._offset = 0

    @property
    def is_used_up(self) -> bool:
        """Whether all of it was copied out."""
        return self._sizes_bytes is not None and self.num_used == len(self._sizes_bytes)

    def wait(self) -> int:
        """How many blocks of it have not been copied out; the first time, when it is there.

        Raises:
            RpcError: The call failed; what is in the segment is not known, nor when.
        """
        if self._sizes_bytes is None:
            pending, self._pending = self._pending, None
            assert pending is not None, "an answer that failed is left"
            self._sizes_bytes = pending.answer()
            self.end = self.start + len(self._sizes_bytes)
        return len(self._sizes_bytes) - self.num_used

    def copy_out(self, blocks: Sequence[PlacedBlock]) -> list[bytes | bool]:
        """Copy the next blocks to their places, as `SharedReader.fill` says."""
        assert self._sizes_bytes is not None, "the answer is there"
        sizes_bytes = self._sizes_bytes[self.num_used : self.num_used + len(blocks)]
        found = _copy_out(self._segment, self._offset, blocks, sizes_bytes)
        self.num_used += len(sizes_bytes)
        self._offset += sum(sizes_bytes)
        return found

    def give_back(self, segments: SegmentPool) -> None:
        """Give the segment back; where the server may still write to it, when that is over."""
        if self._pending is None:
            segments.put_back(self._segment, is_sound=self._sizes_bytes is not None)
        else:
            self._pending.leave(lambda is_sound: segments.put_back(self._segment, is_sound=is_sound))


def _share(num_keys: int, most_keys: int) -> int:
    """How many of the keys to ask for now: calls are as few as may be, and of about the same length."""
    num_calls = -(-num_keys // max(1, min(most_keys, _KEYS_PER_CALL)))
    return -(-num_keys // num_calls)


def _copy_out(
    segment: Segment, start: int, blocks: Sequence[PlacedBlock], sizes_bytes: Sequence[int]
) -> list[bytes | bool]:
    """What lies in a segment, block after block from a byte on, as `SharedReader.fill` gives it."""
    found: list[bytes | bool] = []
    header = memoryview(bytearray(HEADER_BYTES))
    run: list[memoryview] = []
    offset = run_offset = start
    with segment.view() as view:
        for block, num_bytes in zip(blocks, sizes_bytes, strict=True):
            is_sound = block.kind.is_block(block.key, view[offset : offset + num_bytes])
            if is_sound and block.copy is not None:
                segment.read_into(run_offset, run)
                run, run_offset = [], offset + num_bytes
                with view[offset + HEADER_BYTES : offset + num_bytes] as payload:
                    block.copy(payload)
            elif is_sound:
                run += (header, *block.pieces)
            elif num_bytes:
                segment.read_into(run_offset, run)
                run, run_offset = [], offset + num_bytes
            found.append(is_sound or segment.read(offset, num_bytes) or False)
            offset += num_bytes
    segment.read_into(run_offset, run)
    return found
