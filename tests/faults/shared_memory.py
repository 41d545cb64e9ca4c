"""Memory shared with a client that goes on writing to it while the server reads.

The server must check what it keeps, not what it saw: a block that it stored is whole whatever its client did
to the memory before, during and after the check.
"""

import threading
from pathlib import Path

import grpc
from faults.trial import Trial
from faults.workload import PATIENT, check_log, check_served
from store.sample_blocks import sample_block
from store.server_process import ServerProcess

from tq_store.client import StoreClient
from tq_store.results import PutOutcome
from tq_store.rpc.convert import pack_shared_put, parse_outcomes
from tq_store.rpc.segment import SOCKET_SUFFIX, Segment
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs

_PUTS = 300
_PAYLOAD_BYTES = 1 << 20
_HEADER_BYTES = 256


def run(trial: Trial) -> None:
    socket = trial.directory / "socket"
    options = ("--local-socket", socket, "--disk-path", trial.directory / "disk", "--disk-budget", "1GiB")
    with ServerProcess(*options) as server:
        numbers = range(trial.times(_PUTS))
        stored = _put_under_fire(trial, socket, numbers)
        trial.result.count("blocks_stored_under_fire", len(stored))
        with StoreClient(server.address, config=PATIENT) as client:
            served = check_served(trial.result, client, numbers, block_of=_block)
        if served - stored:
            trial.result.served_wrong(f"{len(served - stored)} blocks are there that were called invalid")
        check_log(trial.result, server.log())


def _put_under_fire(trial: Trial, socket: Path, numbers: range) -> set[int]:
    """Put each block from a segment in which a bit goes back and forth; returns those that were stored."""
    stored = set()
    segment = Segment(f"{socket}{SOCKET_SUFFIX}", _HEADER_BYTES + _PAYLOAD_BYTES)
    try:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            for number in numbers:
                key, data = _block(number)
                segment.write(0, data)
                with _Scribbler(segment, trial.rng.randrange(len(data)), data) as scribbler:
                    request = pb.SharedPutRequest.FromString(
                        pack_shared_put(segment.handle, [(key, len(data))])
                    )
                    answer = stubs.BlockStoreStub(channel).PutShared(request, timeout=60)
                trial.result.count("flips", scribbler.flips)
                (outcome,) = parse_outcomes(answer.SerializeToString(), num_blocks=1)
                if outcome is not PutOutcome.INVALID:
                    stored.add(number)
    finally:
        segment.close()
    return stored


class _Scribbler:
    """Flips a bit of a segment and flips it back, until the block ends."""

    def __init__(self, segment: Segment, position: int, data: bytes) -> None:
        self.flips = 0
        self._segment = segment
        self._position = position
        self._right = data[position : position + 1]
        self._wrong = bytes([data[position] ^ 1])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._scribble)

    def __enter__(self) -> "_Scribbler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _scribble(self) -> None:
        while not self._ended.wait(0.0003):
            self._segment.write(self._position, self._wrong)
            self.flips += 1
            self._ended.wait(0.0003)
            self._segment.write(self._position, self._right)


def _block(number: int) -> tuple[bytes, bytes]:
    return sample_block(number, _PAYLOAD_BYTES)
