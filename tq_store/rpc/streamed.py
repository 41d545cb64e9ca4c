"""Transfers as streams of frames, from and to a server on whatever host."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from tq_store.errors import RpcError
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome
from tq_store.rpc import convert
from tq_store.rpc.connection import Attempts, Connection
from tq_store.rpc.frames import Assembler, cut_block, pack_frame, parse_frame
from tq_store.rpc.lanes import Stop, fetch_in_order
from tq_store.rpc.limits import MAX_KEYS, MAX_PUT_BYTES
from tq_store.rpc.piped import PipeRoad
from tq_store.rpc.shared import Block, is_possible

Check = Callable[[BlockKey, bytes | None], bytes | None]
"""Given a key and what came for it: the block, or None for what is not sound."""


class StreamRoad:
    """Gets and puts within the limits of the contract. Safe to use from several threads.

    Args:
        connection: Carries the streams.
        pipes: Carry blocks of gets as far as they go.
    """

    def __init__(self, connection: Connection, pipes: PipeRoad) -> None:
        self._connection = connection
        self._pipes = pipes

    def get(self, keys: Sequence[BlockKey], attempts: Attempts, check: Check) -> Iterator[bytes | None]:
        """One answer per key, from one call as they arrive, or from calls on all connections.

        Args:
            keys: Of the blocks.
            attempts: The deadline.
            check: Called on the threads that receive.

        Raises:
            RpcError: On the way, after any number of answers.
        """
        num_connections = self._connection.num_connections
        if num_connections == 1 or len(keys) == 1:
            yield from self._fetch(keys, Stop(), attempts, check)
        else:

            def fetch(run: Sequence[BlockKey], stop: Stop) -> list[bytes | None]:
                return [*self._fetch(run, stop, attempts, check)]

            yield from fetch_in_order(fetch, keys, num_connections=num_connections)

    def _fetch(
        self, keys: Sequence[BlockKey], stop: Stop, attempts: Attempts, check: Check
    ) -> Iterator[bytes | None]:
        """One answer per key, from a pipe and from one Get for what it leaves."""
        received = 0
        for block in self._pipes.get(keys, stop, attempts):
            yield check(keys[received], block)
            received += 1
        keys = keys[received:]
        if not keys or stop.is_set:
            return
        request, timeout_s = convert.pack_keys(keys), attempts.remaining_s
        with closing(self._connection.receive("Get", request, timeout_s=timeout_s, stop=stop)) as frames:
            yield from self._read(keys, frames, check)

    def _read(
        self, keys: Sequence[BlockKey], frames: Iterator[bytes], check: Check
    ) -> Iterator[bytes | None]:
        """One answer per key from one Get. A server that breaks the order of frames is not read further."""
        received = 0
        assembler = Assembler(num_blocks=len(keys), keyed=False)
        try:
            for raw in frames:
                block = assembler.add(parse_frame(raw))
                if block is not None:
                    received += 1
                    yield check(keys[block.index], block.data)
        except ValueError:
            self._connection.count("broken_streams")
        except RpcError:
            if received < len(keys):
                raise
        yield from [None] * (len(keys) - received)

    def put(
        self, first: Block, source: Iterator[Block], attempts: Attempts
    ) -> tuple[list[PutOutcome], Block | None]:
        """Store `first` and blocks after it, as many as one call takes.

        Returns:
            One outcome per block that was taken, and the block after them, if there is one.

        Raises:
            RpcError: Nothing is known of any of them.
        """
        batch = _PutBatch(first, source)
        outcomes = self._connection.send(
            "Put", batch.frames(), batch.parse_outcomes, timeout_s=attempts.remaining_s
        )
        return outcomes, batch.left_over


class _PutBatch:
    """The blocks of one Put: taken from the caller's iterator until a limit of the contract is reached."""

    def __init__(self, first: Block, source: Iterator[Block]) -> None:
        self.left_over: Block | None = None
        self._first = first
        self._source = source
        self._was_sent: list[bool] = []
        self._is_complete = False

    def frames(self) -> Iterator[bytes]:
        """Serialized frames of the blocks that can be sound; read from a thread of grpc's."""
        block: Block | None = self._first
        index, total_bytes = 0, 0
        while block is not None:
            key, data = block
            is_sent = is_possible(key, data)
            if is_sent and (index == MAX_KEYS or total_bytes + len(data) > MAX_PUT_BYTES):
                self.left_over = block
                break
            self._was_sent.append(is_sent)
            if is_sent:
                total_bytes += len(data)
                for frame in cut_block(index, data, key=key):
                    yield pack_frame(frame)
                index += 1
            block = next(self._source, None)
        self._is_complete = True

    def parse_outcomes(self, raw: bytes) -> list[PutOutcome]:
        """Outcomes of all blocks of the batch; those that were not worth sending are invalid.

        Raises:
            ValueError: Not one outcome per block sent, or an answer before the last block was sent.
        """
        if not self._is_complete:
            raise ValueError("the server answered before it had all blocks")
        sent = iter(convert.parse_outcomes(raw, num_blocks=sum(self._was_sent)))
        return [next(sent) if was_sent else PutOutcome.INVALID for was_sent in self._was_sent]
