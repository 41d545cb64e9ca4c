"""Broken connections beside grpc: pipes that are cut, lossy, repeating, shuffled, flipped and silent.

grpc's own connection stays whole, so what a pipe loses comes as a stream or is a miss. Client and server meet
at a loopback address of each fault's own, where a proxy listens on both ports.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

from faults.engine import engine, prompt
from faults.proxy import Fault, Kind, proxied, random_fault
from faults.sockets import COUNTED_AS
from faults.trial import Trial
from faults.workload import HASTY, PATIENT, check_log
from store.server_process import ServerProcess

from tq_store.config import ClientConfig
from tq_store.rpc.connection import Connection
from tq_store.rpc.convert import pack_open_pipe, parse_opened_pipe

_ROUNDS = 10
"""Of every kind of fault."""
_AT_ONCE = 6
_PAGES = 12
_LOADS = 3
_GREETING_BYTES = 32


def run(trial: Trial) -> None:
    with ServerProcess() as server:
        with engine(server.address, trial.result, PATIENT) as first:
            first.request(prompt(0, _PAGES))
            trial.result.expect(first.flush(), "a save failed")
        port = _pipe_port(server)
        upward, downward = _one(trial, server, port, 0, None)
        trial.result.expect(upward == _GREETING_BYTES < downward, "the blocks did not come through a pipe")
        faults = [
            random_fault(trial.rng, kind, upward_bytes=upward, downward_bytes=downward)
            for _ in range(trial.times(_ROUNDS))
            for kind in Kind
        ]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            numbers = range(1, len(faults) + 1)
            list(pool.map(lambda number, fault: _one(trial, server, port, number, fault), numbers, faults))
        with engine(server.address, trial.result, PATIENT) as probe:
            trial.result.expect(probe.request(prompt(0, _PAGES)) == _PAGES, "the prefix is gone")
        check_log(trial.result, server.log())


def _one(trial: Trial, server: ServerProcess, port: int, number: int, fault: Fault | None) -> tuple[int, int]:
    """Load the prefix several times, by a pipe that is struck once; the bytes that went up and down it."""
    host = f"127.0.{1 + number // 250}.{1 + number % 250}"
    address = f"{host}:{server.address.rpartition(':')[2]}"
    config = PATIENT if fault is None else replace(HASTY, transfer_timeout_s=2.0)
    with (
        proxied(server.address, None, listen=address),
        proxied(f"127.0.0.1:{port}", fault, listen=f"{host}:{port}") as pipe,
        engine(address, trial.result, config) as struck,
    ):
        for _ in range(_LOADS):
            struck.request(prompt(0, _PAGES), saves=False)
        if fault is not None:
            trial.result.count(COUNTED_AS[fault.kind], pipe.struck)
        return pipe.passed[0], pipe.passed[1]


def _pipe_port(server: ServerProcess) -> int:
    with closing(Connection(server.address, ClientConfig())) as connection:
        port, _ = connection.ask("OpenPipe", pack_open_pipe(), parse_opened_pipe, timeout_s=60)
        return port
