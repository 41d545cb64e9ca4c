"""Transfers through memory that is shared with a server of the same host; what it leaves goes as a stream."""

from collections.abc import Iterator, Sequence
from functools import partial
from operator import attrgetter

from tq_store.block import MAX_BLOCK_BYTES, Buffer
from tq_store.errors import RpcDenied, RpcError, RpcOverLimit, RpcTimeout, RpcUnavailable
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey
from tq_store.placed import PlacedBlock
from tq_store.results import PutOutcome
from tq_store.rpc import convert
from tq_store.rpc.connection import Attempts, Connection
from tq_store.rpc.limits import MAX_KEYS
from tq_store.rpc.segment import Segment, SegmentPool
from tq_store.rpc.shared_reader import SharedReader
from tq_store.runs import runs_of

_KEYS_PER_CALL = 256

Block = tuple[BlockKey, bytes]


def is_possible(key: BlockKey, data: bytes) -> bool:
    """Whether a block is worth sending: one of these sizes may be sound."""
    return len(key) == BLOCK_KEY_BYTES and 0 < len(data) <= MAX_BLOCK_BYTES


class SharedRoad:
    """Gets and puts by the segments of a pool, as far as they go.

    Each payload byte is copied once by each side. Safe to use from several threads.

    Args:
        connection: Carries the calls that say what lies where.
        segments: Empty where the server is not on this host; then nothing goes this way.
    """

    def __init__(self, connection: Connection, segments: SegmentPool) -> None:
        self._connection = connection
        self._segments = segments

    def get(self, keys: Sequence[BlockKey], attempts: Attempts) -> Iterator[bytes | None]:
        """What the server has under the leading keys, unverified; for the others a stream has to be asked.

        Raises:
            RpcUnavailable, RpcTimeout, RpcDenied, RpcOverLimit: A stream would fare no better.
        """
        position = 0
        try:
            with self._segments.lend(attempts.remaining_s) as segment:
                while segment is not None and position < len(keys):
                    asked = keys[position : position + _KEYS_PER_CALL]
                    sizes_bytes = self._ask_for(segment, asked, attempts)
                    if not sizes_bytes:
                        return  # the next block is larger than the segment
                    offset = 0
                    for num_bytes in sizes_bytes:
                        yield segment.read(offset, num_bytes) if num_bytes else None
                        offset += num_bytes
                        position += 1
        except (RpcUnavailable, RpcTimeout, RpcDenied, RpcOverLimit):
            raise
        except RpcError:
            return

    def reader(self, keys: Sequence[BlockKey], attempts: Attempts) -> SharedReader:
        """Reads blocks into places; to be closed."""
        return SharedReader(self._connection, self._segments, keys, attempts)

    def put_from(self, blocks: Sequence[PlacedBlock], attempts: Attempts) -> list[PutOutcome]:
        """Store leading blocks from their places; the others have to go as a stream.

        Raises:
            RpcError: As its subclasses say.
        """
        outcomes: list[PutOutcome] = []
        with self._segments.lend(attempts.remaining_s) as segment:
            if segment is None:
                return outcomes
            size_of = attrgetter("num_bytes")
            for run in runs_of(blocks, size_of, most_bytes=segment.num_bytes, most_items=MAX_KEYS):
                if run[0].num_bytes > segment.num_bytes:
                    break
                pieces: list[Buffer] = []
                for block in run:
                    pieces += (block.pack_header(), *block.pieces)
                try:
                    segment.write_from(0, pieces)
                except OSError:
                    break
                outcomes += self._store(segment, [(block.key, block.num_bytes) for block in run], attempts)
        return outcomes

    def put(
        self, first: Block, source: Iterator[Block], attempts: Attempts
    ) -> tuple[list[PutOutcome], Block | None]:
        """Store leading blocks; their outcomes, and the first block that has to go as a stream, if any.

        Raises:
            RpcError: As its subclasses say.
        """
        outcomes: list[PutOutcome] = []
        block: Block | None = first
        with self._segments.lend(attempts.remaining_s) as segment:
            while segment is not None and block is not None and len(block[1]) <= segment.num_bytes:
                batch = _Batch(segment)
                block = batch.fill(block, source)
                outcomes += batch.outcomes(self._store(segment, batch.sent, attempts))
        return outcomes, block

    def _store(
        self, segment: Segment, sent: Sequence[tuple[BlockKey, int]], attempts: Attempts
    ) -> list[PutOutcome]:
        parse = partial(convert.parse_outcomes, num_blocks=len(sent))
        request = convert.pack_shared_put(segment.handle, sent)
        return self._connection.ask(
            "PutShared", request, parse, timeout_s=attempts.remaining_s, is_idempotent=False
        )

    def _ask_for(self, segment: Segment, keys: Sequence[BlockKey], attempts: Attempts) -> list[int]:
        parse = partial(convert.parse_shared_sizes, num_keys=len(keys), segment_bytes=segment.num_bytes)
        request = convert.pack_shared_get(segment.handle, keys)
        return self._connection.ask(
            "GetShared", request, parse, timeout_s=attempts.remaining_s, is_idempotent=False
        )


class _Batch:
    """Blocks that fill a segment."""

    def __init__(self, segment: Segment) -> None:
        self.sent: list[tuple[BlockKey, int]] = []
        self._was_sent: list[bool] = []
        self._segment = segment

    def fill(self, first: Block, source: Iterator[Block]) -> Block | None:
        """Copy blocks in, from the first on; returns the one that is left over, if any."""
        block: Block | None = first
        offset = 0
        while block is not None and len(self.sent) < MAX_KEYS:
            key, data = block
            if offset + len(data) > self._segment.num_bytes:
                return block
            self._was_sent.append(is_possible(key, data))
            if self._was_sent[-1]:
                self._segment.write(offset, data)
                self.sent.append((key, len(data)))
                offset += len(data)
            block = next(source, None)
        return block

    def outcomes(self, stored: list[PutOutcome]) -> list[PutOutcome]:
        """Those of all blocks; the ones that were not worth sending are invalid."""
        sent = iter(stored)
        return [next(sent) if was_sent else PutOutcome.INVALID for was_sent in self._was_sent]
