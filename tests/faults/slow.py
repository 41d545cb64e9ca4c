"""Slow consumers and slow senders: readers that stop in the middle of a stream, writers that trickle.

Everyone else is served meanwhile and the server's memory stays within what they may hold. The slow ones get
right bytes, or are cut when their time is over or when they keep others waiting.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from faults.engine import engine, prompt
from faults.trial import Trial
from faults.workload import PATIENT, STEADY, check_log
from store.running_server import wait_until
from store.sample_blocks import bytes_of, keys_of, sample_block, sample_blocks
from store.server_process import ServerProcess

from tq_store.client import StoreClient
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs

_SLOW = 16
_BLOCKS = 12
_PAYLOAD_BYTES = 4 << 20
_PAGES = 8
_HELD_BYTES = 48 << 20
"""What one slow reader may make a server hold: the README says about 32 MiB."""
_CALL_TIMEOUT_S = 3
_WAIT_S = 60
_CUT = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}


def run(trial: Trial) -> None:
    _readers(trial)
    _cut(trial)


def _readers(trial: Trial) -> None:
    """Half of them read a frame and wait, half send a frame and wait; engines work on beside them."""
    blocks = sample_blocks(_BLOCKS, _PAYLOAD_BYTES)
    num_slow = trial.times(_SLOW, least=2)
    options = ("--memory-budget", "256MiB", "--disk-path", trial.directory / "disk", "--disk-budget", "1GiB")
    with ServerProcess(*options) as server, ThreadPoolExecutor(2 * num_slow) as pool:
        with StoreClient(server.address, config=PATIENT) as client:
            client.put(blocks)
        before_bytes = _resident_bytes(server)
        may_finish = threading.Event()
        slow = [pool.submit(_read_slowly, trial, server.address, blocks, may_finish) for _ in range(num_slow)]
        slow += [
            pool.submit(
                _send_slowly, trial, server.address, sample_block(1000 + number, _PAYLOAD_BYTES), may_finish
            )
            for number in range(num_slow)
        ]
        wait_until(lambda: server.metric("tq_store_active_requests") == 2 * num_slow)
        trial.result.count("slow_clients", 2 * num_slow)
        with engine(server.address, trial.result, STEADY) as own:
            own.request(prompt(0, _PAGES))
            trial.result.expect(own.flush(), "a save waited for slow clients")
            for _ in range(trial.times(40)):
                trial.result.expect(
                    own.request(prompt(0, _PAGES)) == _PAGES, "a load beside slow clients failed"
                )
        grown_bytes = _resident_bytes(server) - before_bytes
        trial.result.expect(
            grown_bytes < 2 * num_slow * _HELD_BYTES,
            f"{2 * num_slow} slow clients hold {grown_bytes >> 20} MiB",
        )
        may_finish.set()
        for answer in slow:
            trial.result.count(answer.result(_WAIT_S))
        wait_until(lambda: server.metric("tq_store_active_requests") == 0 and not server.is_receiving())
        check_log(trial.result, server.log())


def _cut(trial: Trial) -> None:
    """Clients that never go on take all calls there are; engines miss until these are cut, and no longer."""
    blocks = sample_blocks(2 * _BLOCKS, _PAYLOAD_BYTES)
    options = ("--max-concurrent-calls", "4", "--call-timeout", f"{_CALL_TIMEOUT_S}s")
    with ServerProcess(*options) as server, ThreadPoolExecutor(4) as pool:
        with engine(server.address, trial.result, STEADY) as own:
            own.request(prompt(0, _PAGES))
            own.flush()
            with StoreClient(server.address, config=PATIENT) as client:
                for block in blocks:
                    client.put([block])
            never = threading.Event()
            stuck = [pool.submit(_read_slowly, trial, server.address, blocks, never) for _ in range(4)]
            wait_until(lambda: server.metric("tq_store_active_requests") == 4)
            trial.result.count("slow_clients", 4)
            trial.result.expect(own.request(prompt(0, _PAGES), saves=False) == 0, "a fifth call was let in")
            wait_until(lambda: server.metric("tq_store_active_requests") == 0)
            trial.result.expect(own.request(prompt(0, _PAGES)) == _PAGES, "slow clients were not cut")
            never.set()
            for answer in stuck:
                answer.result(_WAIT_S)  # cut, or complete if the kernel's buffers took it all
        check_log(trial.result, server.log())


def _read_slowly(
    trial: Trial, address: str, blocks: list[tuple[bytes, bytes]], may_finish: threading.Event
) -> str:
    """Read one frame, and the rest when allowed; what came must be right, as far as it came."""
    received = [bytearray() for _ in blocks]
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        frames = stubs.BlockStoreStub(channel).Get(pb.Keys(keys=keys_of(blocks)), timeout=2 * _WAIT_S)
        end = "slow_readers_served"
        try:
            for frame in frames:
                received[frame.index] += frame.data
                may_finish.wait(_WAIT_S)
        except grpc.RpcError as error:
            end = _cut_end(trial, error)
    if not all(whole.startswith(part) for whole, part in zip(bytes_of(blocks), received, strict=True)):
        trial.result.served_wrong("a slow reader got other bytes")
    return end


def _send_slowly(trial: Trial, address: str, block: tuple[bytes, bytes], may_finish: threading.Event) -> str:
    """Send a few bytes, and the rest when allowed."""
    key, data = block

    def frames() -> Iterator[pb.BlockFrame]:
        yield pb.BlockFrame(key=key, block_bytes=len(data), data=data[:1])
        may_finish.wait(_WAIT_S)
        for start in range(1, len(data), 1 << 20):
            yield pb.BlockFrame(offset=start, data=data[start : start + (1 << 20)])

    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            answer = stubs.BlockStoreStub(channel).Put(frames(), timeout=2 * _WAIT_S)
        except grpc.RpcError as error:
            return _cut_end(trial, error)
        stored = list(answer.outcomes) == [pb.PUT_OUTCOME_STORED]
        trial.result.expect(stored, "a slow sender was told that its block is none")
        return "slow_senders_served"


def _cut_end(trial: Trial, error: grpc.RpcError) -> str:
    """A slow client was given up; it must be told why."""
    trial.result.expect(error.code() in _CUT, f"a slow client ended with {error.code()}")
    return "slow_clients_cut"


def _resident_bytes(server: ServerProcess) -> int:
    pages = Path(f"/proc/{server.pid}/statm").read_text().split()[1]
    return int(pages) * 4096
