"""Single bits flipped in every place where a block rests or passes; none of the results may be served.

Every bit of header and payload of a small block, on disk, in Redis, on the way to the server and on the way
to the client; bits here and there in a block of several frames; every bit of the name of a file. Each flip
has a block of its own, which is asked for afterwards.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

from faults.trial import Result, Trial
from faults.workload import PATIENT
from store.redis_process import RedisProcess
from store.running_server import foreign_server
from store.sample_blocks import sample_block
from store.server_process import ServerProcess

from tq_store.backends.base import Backend
from tq_store.backends.disk import DiskBackend
from tq_store.backends.memory import MemoryBackend
from tq_store.backends.redis import RedisBackend
from tq_store.client import StoreClient
from tq_store.keys import BlockKey, split_key
from tq_store.results import PutOutcome
from tq_store.rpc.limits import MAX_FRAME_BYTES
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs
from tq_store.tiering.store import TieredStore

BITS = 2 * 256 * 8
"""Of a block with a header of 256 bytes and as much payload."""
_LARGE_BLOCKS = 8
_LARGE_PAYLOAD_BYTES = 2 * MAX_FRAME_BYTES + 12_345
_BUDGET_BYTES = 1 << 30

Blocks = list[tuple[BlockKey, bytes]]


def run(trial: Trial) -> None:
    blocks = _flipped_blocks(trial)
    asyncio.run(_on_disk(trial, blocks))
    asyncio.run(_in_file_names(trial))
    asyncio.run(_in_redis(trial, blocks))
    _to_client(trial.result, blocks)
    _to_server(trial, blocks)


def _flipped_blocks(trial: Trial) -> Blocks:
    """Bit i of block i is flipped; a small run takes every n-th, which still meets every field."""
    step = max(1, round(1 / trial.scale))
    # the step is odd, or always the same bit of a byte would be met
    blocks = [_flipped(sample_block(bit), bit) for bit in range(0, BITS, step | 1)]
    for number in range(trial.times(_LARGE_BLOCKS)):
        large = sample_block(BITS + number, _LARGE_PAYLOAD_BYTES)
        blocks.append(_flipped(large, trial.rng.randrange(8 * len(large[1]))))
    return blocks


def _flipped(block: tuple[BlockKey, bytes], bit: int) -> tuple[BlockKey, bytes]:
    data = bytearray(block[1])
    data[bit // 8] ^= 1 << bit % 8
    return block[0], bytes(data)


async def _on_disk(trial: Trial, blocks: Blocks) -> None:
    """Files that changed while no server ran."""
    directory = trial.directory / "disk"
    await _make_disk(directory)
    for key, data in blocks:
        _file(directory, key).write_bytes(data)
    disk = await DiskBackend.open(directory, budget_bytes=_BUDGET_BYTES, quarantine_bytes=_BUDGET_BYTES)
    await _ask_store(trial.result, disk, blocks)
    quarantined = {path.name for path in (directory / "quarantine").iterdir()}
    # a flip in the version makes a block of the future, which stays for those who know it
    corrupt = {_file(directory, key).name for key, data in blocks if data[8:10] == b"\1\0"}
    missing = corrupt - quarantined
    trial.result.expect(not missing, f"{len(missing)} flipped blocks on disk were not set aside")


async def _in_file_names(trial: Trial) -> None:
    """A block under a name that is not its own, which may be another key or no key at all."""
    directory = trial.directory / "names"
    await _make_disk(directory)
    key, data = sample_block(1)
    path = _file(directory, key)
    asked = {key}
    for bit in range(0, 8 * len(path.name), max(1, round(1 / trial.scale)) | 1):
        name = bytearray(path.name.encode())
        name[bit // 8] ^= 1 << bit % 8
        if name[bit // 8] in b"/\0":
            continue
        with open(os.fsencode(path.parent) + b"/" + name, "wb") as file:
            file.write(data)
        text = name.decode(errors="replace").replace("-", "")
        if len(text) == 128 and set(text) <= set("0123456789abcdef"):
            asked.add(BlockKey(bytes.fromhex(text)))
        trial.result.count("flips")
    disk = await DiskBackend.open(directory, budget_bytes=_BUDGET_BYTES)
    store = TieredStore([MemoryBackend(budget_bytes=1), disk])
    for block in await store.get(list(asked)):
        if block is not None:
            trial.result.served_wrong("a block was served from a file with another name")
    await store.close()


async def _in_redis(trial: Trial, blocks: Blocks) -> None:
    directory = trial.directory / "redis"
    directory.mkdir()
    server = RedisProcess(directory)
    try:
        backend = await RedisBackend.open(server.url)
        await backend.put(blocks)
        await _ask_store(trial.result, backend, blocks)
    finally:
        server.kill()


async def _ask_store(result: Result, lower: Backend, blocks: Blocks) -> None:
    """Everything twice: what is not served must not come back either."""
    store = TieredStore([MemoryBackend(budget_bytes=_BUDGET_BYTES), lower])
    present = await store.contains([key for key, _ in blocks])
    result.expect(all(present), "a flipped block was gone before it was asked for")
    for _ in range(2):
        for start in range(0, len(blocks), 256):
            group = blocks[start : start + 256]
            for (key, _), served in zip(group, await store.get([key for key, _ in group]), strict=True):
                if served is not None:
                    result.served_wrong(
                        f"block {key.hex()[64:80]} came out of {lower.name} with a flipped bit"
                    )
    counters = (await store.stats()).counters
    noticed = counters["quarantined"] + counters["unsupported"] // 2
    result.expect(noticed == len(blocks), f"{noticed} of {len(blocks)} flips in {lower.name} were counted")
    result.count("flips", len(blocks))
    await store.close()


def _to_client(result: Result, blocks: Blocks) -> None:
    """A server whose memory rots: it sends what it has, and the client has to notice."""
    flipped = dict(blocks)

    class Rotten(stubs.BlockStoreServicer):
        def Get(self, request: pb.Keys, context: object) -> Iterator[pb.BlockFrame]:
            for index, key in enumerate(request.keys):
                data = flipped[BlockKey(key)]
                for start in range(0, len(data), MAX_FRAME_BYTES):
                    yield pb.BlockFrame(
                        index=index,
                        offset=start,
                        block_bytes=0 if start else len(data),
                        data=data[start : start + MAX_FRAME_BYTES],
                    )

    with foreign_server(Rotten()) as address, StoreClient(address, config=PATIENT) as client:
        for position, block in client.get(list(flipped)):
            if block is not None:
                result.served_wrong(f"block {position} reached an engine with a flipped bit")
        rejected = client.counters["rejected_blocks"]
        result.expect(rejected == len(flipped), f"{rejected} of {len(flipped)} flipped blocks were counted")
    result.count("flips", len(flipped))


def _to_server(trial: Trial, blocks: Blocks) -> None:
    """Blocks that changed on their way in are refused, whatever they would answer to."""
    with ServerProcess() as server, StoreClient(server.address, config=PATIENT) as client:
        accepted = [outcome for outcome in client.put(blocks) if outcome is not PutOutcome.INVALID]
        if accepted:
            trial.result.served_wrong(f"{len(accepted)} flipped blocks were accepted")
        trial.result.expect(not any(client.contains([key for key, _ in blocks])), "a refused block is there")
    trial.result.count("flips", len(blocks))


async def _make_disk(directory: Path) -> None:
    backend = await DiskBackend.open(directory, budget_bytes=_BUDGET_BYTES)
    await backend.close()


def _file(directory: Path, key: BlockKey) -> Path:
    namespace, prefix = (part.hex() for part in split_key(key))
    return directory / "blocks" / prefix[:2] / f"{namespace}-{prefix}"
