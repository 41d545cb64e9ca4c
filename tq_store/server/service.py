"""The block store's methods: take the request apart, ask the store, put the answer together."""

import asyncio
import importlib.metadata
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial
from operator import itemgetter
from typing import Any

import grpc
import grpc.aio

from tq_store.backends.base import Backend
from tq_store.block import HEADER_BYTES
from tq_store.errors import BackendError
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome
from tq_store.rpc import convert
from tq_store.rpc.frames import Assembler, cut_block, pack_frame, parse_frame
from tq_store.rpc.limits import MAX_KEYS, MAX_PUT_BYTES
from tq_store.rpc.parcels import cut_parcels
from tq_store.runs import runs_of
from tq_store.server.calls import CALL
from tq_store.server.gate import CallGate, Context
from tq_store.server.metrics import Metrics
from tq_store.server.pipes import Pipes
from tq_store.server.read_ahead import ReadAhead
from tq_store.server.segments import Segment, Segments
from tq_store.server.tenant_store import TenantStore
from tq_store.server.window import ByteWindow
from tq_store.tiering.tier import Verify, check_all

_STALL_S = 10.0
"""How long a peer may take to send or to accept one frame, a mebibyte at most."""
_HURRY_S = 3.0
"""The same while its share of a window keeps others waiting: a second or so is what engines stop for."""

_MOST_COPIED_BYTES = 8 << 20
_COPIES_IN_WINDOW = 2
"""Of the blocks in a segment, so much is copied at once, and at most this part of the window."""

Method = Callable[[Any, Context], Awaitable[bytes | None]]


class BlockStoreService:
    """Answers the calls of `block_store.proto` from one store.

    Requests and answers are bytes on both sides; `convert` and `frames` give them their meaning, so that a
    request which breaks the contract is answered with a sentence and not dropped by grpc.

    Args:
        store: As the caller of a method sees it. Owned by whoever makes the service, like all others.
        tiers: The store's tiers, from the fastest to the slowest, for Inspect.
        verify: Checks a block against its key, for Inspect.
        gate: Every call passes it.
        inward: Bounds the blocks being received.
        outward: Bounds the blocks being sent.
        segments: Memory shared with clients of this host, or None where there is none.
        pipes: Connections beside grpc, or None where there are none.
        metrics: Told about block bytes.
    """

    def __init__(
        self,
        store: TenantStore,
        tiers: Sequence[Backend],
        *,
        verify: Verify,
        gate: CallGate,
        inward: ByteWindow,
        outward: ByteWindow,
        segments: Segments | None,
        pipes: Pipes | None,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._tiers = tuple(tiers)
        self._verify = verify
        self._gate = gate
        self._inward = inward
        self._outward = outward
        self._segments = segments
        self._pipes = pipes
        self._reader = ReadAhead(store, outward)
        self._metrics = metrics
        self._started = time.monotonic()
        self._version = importlib.metadata.version("tq-store")

    def handlers(self) -> "grpc.GenericRpcHandler[bytes, bytes]":
        """What a grpc server needs to route calls here."""
        unary: dict[str, Method] = {
            "Lookup": self._lookup,
            "Contains": self._contains,
            "Delete": self._delete,
            "Purge": self._purge,
            "Stats": self._stats,
            "Inspect": self._inspect,
            "Ping": self._ping,
        }
        routes = {
            name: grpc.unary_unary_rpc_method_handler(self._gated(name, method))
            for name, method in unary.items()
        }
        if self._segments is not None:
            for name, method in (("GetShared", self._get_shared), ("PutShared", self._put_shared)):
                routes[name] = grpc.unary_unary_rpc_method_handler(self._gated(name, method))
        if self._pipes is not None:
            routes["OpenPipe"] = grpc.unary_unary_rpc_method_handler(self._gated("OpenPipe", self._open_pipe))
            routes["GetPiped"] = grpc.unary_stream_rpc_method_handler(
                self._gated("GetPiped", self._get_piped)
            )
        routes["Get"] = grpc.unary_stream_rpc_method_handler(self._gated("Get", self._get))
        routes["Put"] = grpc.stream_unary_rpc_method_handler(self._gated("Put", self._put))
        return grpc.method_handlers_generic_handler(convert.SERVICE_NAME, routes)

    async def read_stats(self) -> convert.ServerStats:
        """The store's statistics, and the server's own facts."""
        stats = await self._store.stats()
        return convert.ServerStats(
            version=self._version,
            uptime_s=time.monotonic() - self._started,
            tiers=stats.tiers,
            counters=stats.counters,
            shards=stats.shards,
        )

    def _gated(self, name: str, method: Method) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            return await self._gate.run(name, context, partial(method, request, context))

        return call

    async def _lookup(self, request: bytes, _: Context) -> bytes:
        return convert.pack_hits(await self._store.lookup(convert.parse_keys(request)))

    async def _contains(self, request: bytes, _: Context) -> bytes:
        return convert.pack_flags(await self._store.contains(convert.parse_keys(request)))

    async def _delete(self, request: bytes, _: Context) -> bytes:
        return convert.pack_flags(await self._store.delete(convert.parse_keys(request)))

    async def _purge(self, request: bytes, _: Context) -> bytes:
        return convert.pack_purged(await self._store.purge(convert.parse_purge(request)))

    async def _stats(self, _: bytes, __: Context) -> bytes:
        return convert.pack_stats(await self.read_stats())

    async def _ping(self, _: bytes, __: Context) -> bytes:
        return convert.pack_pong(self._version)

    async def _inspect(self, request: bytes, _: Context) -> bytes:
        key = convert.parse_inspect(request)
        CALL.get().note_keys([key])
        return convert.pack_copies([await _inspect_tier(tier, key, self._verify) for tier in self._tiers])

    async def _get(self, request: bytes, context: Context) -> None:
        """Send the blocks. A client that accepts nothing for `_STALL_S` or `_HURRY_S` is given up."""
        keys = convert.parse_keys(request)
        async with aclosing(self._reader.blocks(keys)) as blocks:
            index = 0
            async for block in blocks:
                for frame in cut_block(index, block or b""):
                    async with self._outward.step(stall_s=_STALL_S, hurry_s=_HURRY_S):
                        await context.write(pack_frame(frame))
                    self._metrics.sent(len(frame.data))
                self._store.served([keys[index]], [block])
                index += 1

    async def _put(self, frames: AsyncIterator[bytes], _: Context) -> bytes:
        """Store each block when its last byte has arrived; hold one at a time."""
        assembler = Assembler(num_blocks=MAX_KEYS, keyed=True)
        outcomes: list[PutOutcome] = []
        total_bytes = held_bytes = 0
        try:
            while (raw := await self._next_frame(frames, is_holding=held_bytes > 0)) is not None:
                frame = parse_frame(raw)
                block = assembler.add(frame)
                if not frame.offset:
                    total_bytes += frame.block_bytes
                    if total_bytes > MAX_PUT_BYTES:
                        raise ValueError(f"the blocks of one put come to more than {MAX_PUT_BYTES} bytes")
                    await self._store.expect(frame.block_bytes)
                    await self._inward.take(frame.block_bytes)
                    held_bytes = frame.block_bytes
                self._metrics.received(len(frame.data))
                if block is not None and block.data is not None:
                    outcomes += await self._store.put([(BlockKey(block.key), block.data)])
                    self._inward.give(held_bytes)
                    held_bytes = 0
        finally:
            self._inward.give(held_bytes)
        if assembler.is_inside_block:
            raise ValueError(f"the call ended inside block {len(outcomes)}")
        return convert.pack_outcomes(outcomes)

    async def _get_shared(self, request: bytes, _: Context) -> bytes:
        """Write the blocks into the client's segment, as many as fit."""
        handle, keys = convert.parse_shared_get(request)
        segment = self._find_segment(handle)
        sizes_bytes: list[int] = []
        offset = 0
        at_hand = self._store.sizes_at_hand(keys)
        num_fitting = sum(end <= segment.num_bytes for end in itertools.accumulate(at_hand))
        if num_fitting < len(at_hand):
            keys = keys[:num_fitting]  # what does not fit is neither read nor counted
        async with aclosing(self._reader.groups(keys, is_quick=True)) as groups:
            async for group in groups:
                ends = itertools.accumulate((len(block or b"") for block in group), initial=offset)
                num_fitting = sum(end <= segment.num_bytes for end in ends) - 1
                blocks = group[:num_fitting]
                await segment.write(offset, [block for block in blocks if block is not None])
                written_bytes = [len(block or b"") for block in blocks]
                self._metrics.sent(sum(written_bytes))
                self._store.served(keys[len(sizes_bytes) : len(sizes_bytes) + num_fitting], blocks)
                sizes_bytes += written_bytes
                offset += sum(written_bytes)
                if num_fitting < len(group):
                    break
        return convert.pack_shared_sizes(sizes_bytes)

    async def _put_shared(self, request: bytes, _: Context) -> bytes:
        """Store the blocks that lie in the client's segment, from copies, made of several at a time."""
        handle, blocks = convert.parse_shared_put(request)
        segment = self._find_segment(handle)
        outcomes: list[PutOutcome] = []
        offset = 0
        most_bytes = min(_MOST_COPIED_BYTES, self._inward.limit_bytes // _COPIES_IN_WINDOW)
        for group in runs_of(blocks, itemgetter(1), most_bytes=most_bytes):
            held_bytes = sum(num_bytes for _, num_bytes in group)
            await self._inward.take(held_bytes)
            try:
                copies = await segment.read(offset, [num_bytes for _, num_bytes in group])
                self._metrics.received(held_bytes)
                keyed = [(key, copy) for (key, _), copy in zip(group, copies, strict=True)]
                outcomes += await self._store.put(keyed)
            finally:
                self._inward.give(held_bytes)
            offset += held_bytes
        return convert.pack_outcomes(outcomes)

    async def _open_pipe(self, _: bytes, __: Context) -> bytes:
        assert self._pipes is not None, "the method is served only with pipes"
        ticket = self._pipes.ticket(CALL.get().tenant)
        return convert.pack_opened_pipe(self._pipes.port if ticket else 0, ticket or b"")

    async def _get_piped(self, request: bytes, context: Context) -> None:
        """Write the blocks to the client's pipe. One that takes nothing in time is given up, as in a Get."""
        assert self._pipes is not None, "the method is served only with pipes"
        name, number, keys = convert.parse_piped_get(request)
        num_sent = 0
        with self._pipes.lend(name, CALL.get().tenant) as pipe:
            async with aclosing(self._reader.groups(keys, is_quick=False)) as groups:
                async for group in groups:
                    if not num_sent:
                        await context.write(convert.pack_piped_begin())
                    for pieces in cut_parcels(number, num_sent, group):
                        await pipe.write(pieces, self._patience)
                    await asyncio.sleep(0)  # a client that takes all at once leaves no other turn to others
                    self._metrics.sent(sum(len(block or b"") for block in group))
                    self._store.served(keys[num_sent : num_sent + len(group)], group)
                    num_sent += len(group)

    def _patience(self) -> AbstractAsyncContextManager[None]:
        return self._outward.step(stall_s=_STALL_S, hurry_s=_HURRY_S)

    async def _next_frame(self, frames: AsyncIterator[bytes], *, is_holding: bool) -> bytes | None:
        """The next frame of a put, or None after the last. A client that sends none in time is given up."""
        hurry_s = _HURRY_S if is_holding else _STALL_S
        async with self._inward.step(stall_s=_STALL_S, hurry_s=hurry_s):
            return await anext(frames, None)

    def _find_segment(self, handle: bytes) -> Segment:
        assert self._segments is not None, "the methods are served only with segments"
        return self._segments.find(handle)


async def _inspect_tier(tier: Backend, key: BlockKey, verify: Verify) -> convert.TierCopy:
    """What a tier has, read past the store, so that nothing is promoted and nothing quarantined."""
    try:
        (block,) = await tier.get([key])
    except BackendError as error:
        return convert.TierCopy(tier=tier.name, problem=f"this tier does not answer: {error}")
    if block is None:
        return convert.TierCopy(tier=tier.name)
    (flaw,) = await check_all([(key, block)], verify)
    problem = str(flaw) if flaw else ""
    return convert.TierCopy(
        tier=tier.name, block_bytes=len(block), header=block[:HEADER_BYTES], problem=problem
    )
