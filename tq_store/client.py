"""The client that runs inside engines: synchronous, every call with a deadline, every block verified.

Not to be carried over a fork: grpc's threads do not survive one. Make the client in the process that uses it.
"""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from tq_store.block import payload_of, verify_block
from tq_store.config import ClientConfig
from tq_store.errors import BlockFormatError, RpcError, RpcUnavailable
from tq_store.keys import BlockKey
from tq_store.placed import PlacedBlock
from tq_store.results import GetOutcome, PutOutcome
from tq_store.rpc import convert
from tq_store.rpc.connection import Attempts, Connection
from tq_store.rpc.limits import MAX_KEYS
from tq_store.rpc.pipe import PipePool
from tq_store.rpc.piped import PipeRoad
from tq_store.rpc.segment import SegmentPool
from tq_store.rpc.shared import SharedRoad
from tq_store.rpc.shared_reader import SharedReader
from tq_store.rpc.streamed import Check, StreamRoad


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """Answer to a ping."""

    latency_s: float
    version: str


class StoreClient:
    """One server, seen from an engine. Safe to use from several threads; they share one connection.

    At ``unix:path`` blocks go through memory that is shared with the server. Elsewhere gets come through
    pipes, where the server has them, and all else goes as streams.

    Every call blocks until its deadline at the latest. Nothing is connected before the first call, and a lost
    connection comes back by itself. Calls that change nothing are tried again, within their deadline, while
    the server is unreachable. Batches over the limits of the contract are cut into several requests, which
    share the deadline.

    A call raises nothing but RpcError, whatever the server does: a block that does not verify against its key
    is a miss, counted in `counters`.

    Args:
        address: ``host:port`` or ``unix:path``; by default the address in the config.
        config: Deadlines, retries, TLS and token.

    Raises:
        ConfigError: A file is not readable, or a token would travel unencrypted to another machine.
    """

    def __init__(self, address: str | None = None, *, config: ClientConfig | None = None) -> None:
        self._config = config or ClientConfig()
        self._connection = Connection(address or self._config.address, self._config)
        self._segments = SegmentPool(self.address, self._config.shared_memory_bytes)
        self._shared = SharedRoad(self._connection, self._segments)
        self._pipes = PipePool(self._connection, self._config)
        self._streams = StreamRoad(self._connection, PipeRoad(self._connection, self._pipes))

    @property
    def address(self) -> str:
        """The server's address."""
        return self._connection.address

    @property
    def counters(self) -> dict[str, int]:
        """What went wrong since the client was made.

        ``rejected_blocks`` did not verify, ``broken_streams`` broke the order of frames, ``broken_pipes``
        broke in the middle of a get, ``retries`` were made, ``failed_calls`` ended in an exception.
        """
        return {"rejected_blocks": 0, "broken_streams": 0, "broken_pipes": 0} | self._connection.counters

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        """Number of leading keys that are there; one request for up to 4096 keys."""
        hits = 0
        attempts = self._connection.attempts(self._config.lookup_timeout_s)
        for chunk in _chunks(keys):
            parse = partial(convert.parse_hits, num_keys=len(chunk))
            request = convert.pack_keys(chunk)
            found = self._connection.ask("Lookup", request, parse, timeout_s=attempts.remaining_s)
            hits += found
            if found < len(chunk):
                break
        return hits

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which of the keys are there."""
        return self._ask_flags("Contains", keys, timeout_s=self._config.lookup_timeout_s, is_idempotent=True)

    def get(self, keys: Sequence[BlockKey]) -> Iterator[tuple[int, bytes | None]]:
        """Position and block of each key, in key order, as they arrive; None for a miss.

        The call is made when the first block is asked for. A reader that stops early cancels it. If the
        connection is lost on the way, the rest is asked for again; what was yielded stays yielded.

        Raises:
            RpcError: On the way, after any number of blocks.
        """
        attempts = self._connection.attempts(self._config.transfer_timeout_s)
        yield from self._get(keys, attempts, self._verified)

    def get_into(
        self, keys: Sequence[BlockKey], batches: Iterable[Sequence[PlacedBlock]]
    ) -> Generator[list[GetOutcome], None, None]:
        """Write blocks to places of the caller's; one outcome per block of each batch, in order.

        What is filled was verified on this side. A batch is taken when the outcomes of the last one have
        been looked at, so its places may be the same. On the same host the blocks that come next are asked
        for meanwhile. All have one deadline, and are tried again, as a `get`.

        Args:
            keys: Of all blocks, in order.
            batches: The blocks; fewer where the caller wants no more.

        Raises:
            RpcError: On the way; a batch that was filled in part comes before it, the rest of it missing.
        """
        attempts = self._connection.attempts(self._config.transfer_timeout_s)
        stream: Generator[tuple[int, bytes | None], None, None] | None = None
        position = 0
        with ExitStack() as opened:
            shared = opened.enter_context(self._shared.reader(keys, attempts))
            for batch in batches:
                outcomes: list[GetOutcome] = []
                try:
                    if stream is None:
                        self._fill_shared(shared, batch, outcomes, attempts)
                        if len(outcomes) < len(batch):
                            rest = keys[position + len(outcomes) :]
                            stream = opened.enter_context(closing(self._get(rest, attempts, _unchecked)))
                    if stream is not None:
                        pairs = zip(batch[len(outcomes) :], stream, strict=False)
                        outcomes.extend(self._filled(block, data) for block, (_, data) in pairs)
                except RpcError:
                    if outcomes:
                        yield outcomes + [GetOutcome.MISSING] * (len(batch) - len(outcomes))
                    raise
                position += len(batch)
                yield outcomes

    def put_from(self, blocks: Sequence[PlacedBlock]) -> list[PutOutcome]:
        """Store blocks from where they lie; one outcome per block, in order. Never tried again, as `put`."""
        attempts = self._connection.attempts(self._config.transfer_timeout_s)
        outcomes = self._shared.put_from(blocks, attempts)
        # made before any of them is sent: grpc may read on for a while after the call has failed
        rest = [(each.key, b"".join((each.pack_header(), *each.pieces))) for each in blocks[len(outcomes) :]]
        return outcomes + self._put(rest, attempts)

    def put(self, blocks: Iterable[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        """Store blocks; one outcome per block, in order.

        The iterable is read block by block, as the connection takes them, from this thread or from one of
        grpc's. Never tried again: a lost put is a future miss.
        """
        return self._put(blocks, self._connection.attempts(self._config.transfer_timeout_s))

    def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Remove blocks; True where one was there."""
        return self._ask_flags("Delete", keys, timeout_s=self._config.admin_timeout_s, is_idempotent=False)

    def purge(self, namespace: bytes | None) -> int:
        """Remove all blocks of a namespace digest, or with None all there are; returns how many."""
        return self._connection.ask(
            "Purge",
            convert.pack_purge(namespace),
            convert.parse_purged,
            timeout_s=self._config.admin_timeout_s,
            is_idempotent=False,
        )

    def stats(self) -> convert.ServerStats:
        """What the server tells of itself."""
        request, timeout_s = convert.pack_stats_request(), self._config.admin_timeout_s
        return self._connection.ask("Stats", request, convert.parse_stats, timeout_s=timeout_s)

    def inspect(self, key: BlockKey) -> list[convert.TierCopy]:
        """What each tier has under a key, from the fastest to the slowest."""
        request, timeout_s = convert.pack_inspect(key), self._config.admin_timeout_s
        return self._connection.ask("Inspect", request, convert.parse_copies, timeout_s=timeout_s)

    def ping(self) -> Pong:
        """Time for one round trip, the first one with connecting, and the server's version."""
        started = time.perf_counter()
        request, timeout_s = convert.pack_ping(), self._config.lookup_timeout_s
        version = self._connection.ask("Ping", request, convert.parse_pong, timeout_s=timeout_s)
        return Pong(latency_s=time.perf_counter() - started, version=version)

    def close(self) -> None:
        """Cut the connection; calls in other threads end with RpcError. A second close does nothing."""
        self._segments.close()
        self._pipes.close()
        self._connection.close()

    def __enter__(self) -> "StoreClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask_flags(
        self, method: str, keys: Sequence[BlockKey], *, timeout_s: float, is_idempotent: bool
    ) -> list[bool]:
        flags: list[bool] = []
        attempts = self._connection.attempts(timeout_s)
        for chunk in _chunks(keys):
            flags += self._connection.ask(
                method,
                convert.pack_keys(chunk),
                partial(convert.parse_flags, num_keys=len(chunk)),
                timeout_s=attempts.remaining_s,
                is_idempotent=is_idempotent,
            )
        return flags

    def _get(
        self, keys: Sequence[BlockKey], attempts: Attempts, check: Check
    ) -> Generator[tuple[int, bytes | None], None, None]:
        position = 0
        for chunk in _chunks(keys):
            end = position + len(chunk)
            while position < end:
                try:
                    for data in self._shared.get(keys[position:end], attempts):
                        yield position, check(keys[position], data)
                        position += 1
                    if position == end:
                        break
                    for block in self._streams.get(keys[position:end], attempts, check):
                        yield position, block
                        position += 1
                except RpcUnavailable as error:
                    self._connection.wait_or_raise(attempts, error)

    def _put(self, blocks: Iterable[tuple[BlockKey, bytes]], attempts: Attempts) -> list[PutOutcome]:
        outcomes: list[PutOutcome] = []
        source = _guarded(blocks)
        next_block = next(source, None)
        while next_block is not None:
            sent, next_block = self._shared.put(next_block, source, attempts)
            outcomes += sent
            if next_block is not None:
                sent, next_block = self._streams.put(next_block, source, attempts)
                outcomes += sent
        return outcomes

    def _fill_shared(
        self,
        shared: SharedReader,
        batch: Sequence[PlacedBlock],
        outcomes: list[GetOutcome],
        attempts: Attempts,
    ) -> None:
        """Fill blocks through shared memory, as far as it goes."""
        while True:
            try:
                for found in shared.fill(batch[len(outcomes) :]):
                    outcomes.append(self._placed(batch[len(outcomes)], found))
                return
            except RpcUnavailable as error:
                self._connection.wait_or_raise(attempts, error)

    def _filled(self, block: PlacedBlock, data: bytes | None) -> GetOutcome:
        """Copy what came for a block to its places, if it is that; to tell costs no look at what it says."""
        is_it = data is not None and block.kind.is_block(block.key, memoryview(data))
        if data is not None and is_it:
            block.fill(payload_of(data))
        return self._placed(block, is_it or data or False)

    def _placed(self, block: PlacedBlock, found: bytes | bool) -> GetOutcome:
        """What became of a block of which the road has found this."""
        if isinstance(found, bool):
            return GetOutcome.FILLED if found else GetOutcome.MISSING
        return GetOutcome.MISSING if self._verified(block.key, found) is None else GetOutcome.UNLIKE

    def _verified(self, key: BlockKey, data: bytes | None) -> bytes | None:
        if data is None:
            return None
        try:
            verify_block(data, key)
        except BlockFormatError:
            self._connection.count("rejected_blocks")
            return None
        return data


def _unchecked(_: BlockKey, data: bytes | None) -> bytes | None:
    """What came, for a reader that knows better what it should be."""
    return data


def _guarded(blocks: Iterable[tuple[BlockKey, bytes]]) -> Iterator[tuple[BlockKey, bytes]]:
    """The caller's blocks; whatever goes wrong with them is an RpcError."""
    try:
        yield from blocks
    except Exception as error:
        raise RpcError(f"the blocks to put could not be had: {error}") from error


def _chunks(keys: Sequence[BlockKey]) -> Iterator[Sequence[BlockKey]]:
    return (keys[start : start + MAX_KEYS] for start in range(0, len(keys), MAX_KEYS))
