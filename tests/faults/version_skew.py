"""Old and new beside each other: on the wire, in the header of a block, and in the codec within it.

What the newer side adds is passed over or refused in words; a block that a reader does not know is a miss and
stays where it is; what an older release has written is served as it was.
"""

import contextlib
import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

import grpc
from faults.engine import GEOMETRY, LAYOUT, engine, prompt
from faults.trial import Trial
from faults.workload import PATIENT, check_log
from fuzz.fuzz_block import sealed
from store.running_server import foreign_server, wait_until
from store.sample_blocks import sample_block
from store.server_process import ServerProcess

from tq_connectors.codec import pack_pages
from tq_store.block import HEADER_BYTES, pack_block, parse_header
from tq_store.client import StoreClient
from tq_store.coded import pack_coded
from tq_store.keys import BlockKey, split_key
from tq_store.results import PutOutcome
from tq_store.rpc.convert import SERVICE_NAME
from tq_store.rpc.pipe import Pipe
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs

_PAGES = 6
_GOLDEN = Path(__file__).parent.parent / "golden"
_VERSION, _FLAGS, _CODEC_ID, _RESERVED = 8, 12, 144, 176
_FROM_THE_FUTURE = (
    # field 1000 as a number, 1001 as bytes, 1002 and 1003 as fixed numbers, 1004 as a message
    b"\xc0\x3e\x2a"
    + b"\xca\x3e\x03new"
    + b"\xd1\x3e"
    + bytes(8)
    + b"\xdd\x3e"
    + bytes(4)
    + b"\xe2\x3e\x02\x08\x01"
)


def run(trial: Trial) -> None:
    for outcome in (pb.PUT_OUTCOME_STORED, 99):
        _newer_server(trial, outcome)
    with ServerProcess() as server:
        _newer_client(trial, server)
        check_log(trial.result, server.log())
    _blocks_of_other_versions(trial)


def _newer_server(trial: Trial, outcome: int) -> None:
    """An engine of today on a server that says more than it should, and once an outcome that nobody knows."""
    server = _NewerServer(outcome)
    with foreign_server(server) as address, engine(address, trial.result, PATIENT) as own:
        own.request(prompt(0, _PAGES))
        own.flush()
        loaded = own.request(prompt(0, _PAGES))
        trial.result.expect(loaded == _PAGES, f"{loaded} pages came from a newer server")
        saved = own.cache.saves.saved_blocks
        trial.result.expect(saved == (_PAGES if outcome < 5 else 0), f"{saved} saves were believed")
        trial.result.count("skews", 3)


class _NewerServer(stubs.BlockStoreServicer):
    """Keeps blocks in a dict, and adds fields that today's messages do not have."""

    def __init__(self, outcome: int) -> None:
        self._blocks: dict[bytes, bytes] = {}
        self._outcome = outcome

    def Lookup(self, request: pb.Keys, context: object) -> pb.LookupResponse:
        found = [*(key in self._blocks for key in request.keys), False]
        return _extended(pb.LookupResponse(num_leading_hits=found.index(False)))

    def Get(self, request: pb.Keys, context: object) -> Iterator[pb.BlockFrame]:
        for index, key in enumerate(request.keys):
            data = self._blocks.get(key, b"")
            half = len(data) // 2
            yield _extended(pb.BlockFrame(index=index, block_bytes=len(data), data=data[:half]))
            yield _extended(pb.BlockFrame(index=index, offset=half, data=data[half:]))

    def OpenPipe(self, request: pb.OpenPipeRequest, context: grpc.ServicerContext) -> pb.OpenPipeResponse:
        """None to be had, or, as of an older server, nothing known of them."""
        if self._outcome == 99:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "what is a pipe?")
        return _extended(pb.OpenPipeResponse())

    def Put(self, request_iterator: Iterator[pb.BlockFrame], context: object) -> pb.PutResponse:
        blocks: list[tuple[bytes, bytearray]] = []
        for frame in request_iterator:
            if not frame.offset:
                blocks.append((frame.key, bytearray()))
            blocks[-1][1].extend(frame.data)
        self._blocks |= {key: bytes(data) for key, data in blocks}
        return _extended(pb.PutResponse(outcomes=[self._outcome] * len(blocks)))


def _newer_client(trial: Trial, server: ServerProcess) -> None:
    """A client of tomorrow on today's server: more fields, more methods, another version of the service."""
    key, block = sample_block(1)
    with grpc.insecure_channel(server.address) as channel:
        stub = stubs.BlockStoreStub(channel)
        half = len(block) // 2
        frames = [
            _extended(pb.BlockFrame(key=key, block_bytes=len(block), data=block[:half])),
            _extended(pb.BlockFrame(offset=half, data=block[half:])),
        ]
        outcomes = list(stub.Put(iter(frames), timeout=60).outcomes)
        trial.result.expect(outcomes == [pb.PUT_OUTCOME_STORED], f"a newer client's put was {outcomes}")
        keys = _extended(pb.Keys(keys=[key]))
        hits = stub.Lookup(keys, timeout=60).num_leading_hits
        trial.result.expect(hits == 1, "a newer client's lookup missed")
        served = b"".join(frame.data for frame in stub.Get(keys, timeout=60))
        if served != block:
            trial.result.served_wrong("a newer client got other bytes")
        opened = stub.OpenPipe(_extended(pb.OpenPipeRequest()), timeout=60)
        pipe = Pipe("127.0.0.1", opened.port, opened.ticket, context=None, timeout_s=60)
        with contextlib.closing(pipe):
            request = _extended(pb.PipedGetRequest(keys=[key], pipe=pipe.name, call=7))
            call = stub.GetPiped(request, timeout=60)
            if pipe.receive_block(7, 0, 60) != block:
                trial.result.served_wrong("a newer client got other bytes from a pipe")
            trial.result.expect(len(list(call)) == 1, "a newer client was told more than one begin")
        for method in (f"/{SERVICE_NAME}/Prefetch", "/tq_store.rpc.v2.BlockStore/Get"):
            call = channel.unary_unary(method)
            try:
                call(b"", timeout=60)
                trial.result.failed_request(f"{method} was answered")
            except grpc.RpcError as error:
                code = error.code()
                trial.result.expect(code is grpc.StatusCode.UNIMPLEMENTED, f"{method} ended with {code}")
        trial.result.count("skews", 6)


def _blocks_of_other_versions(trial: Trial) -> None:
    """On disk, as another release has left them, and on their way in."""
    directory = trial.directory / "disk"
    disk = ("--disk-path", directory, "--disk-budget", "1GiB")
    with ServerProcess(*disk):
        pass
    future = [
        _changed(sample_block(10), _VERSION, struct.pack("<H", 2)),
        _changed(sample_block(11), _FLAGS, struct.pack("<I", 1)),
        _changed(sample_block(12), _RESERVED, b"\1"),
    ]
    past = [path.read_bytes() for path in sorted(_GOLDEN.glob("block_*.bin"))]
    # a server that codes blocks has written this; one that does not must read it
    compressible = pack_block(parse_header(sample_block(13, 50_000)[1]), bytes(50_000))
    written = [(parse_header(data).key, data) for data in past]
    written.append((parse_header(compressible).key, pack_coded(compressible)))
    for key, data in [*future, *written]:
        _file(directory, key).write_bytes(data)
    with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
        for data in [*past, compressible]:
            (served,) = [block for _, block in client.get([parse_header(data).key])]
            if served != data:
                trial.result.served_wrong("a block of format version 1 is not served as it was written")
        for _, block in client.get([key for key, _ in future]):
            if block is not None:
                trial.result.served_wrong("a block of an unknown version was served")
        unsupported = client.stats().counters["unsupported"]
        trial.result.expect(unsupported == len(future), f"{unsupported} unknown blocks were counted")
        is_kept = all(_file(directory, key).read_bytes() == data for key, data in future)
        trial.result.expect(is_kept, "a block of an unknown version did not stay for those who know it")
        outcomes = client.put(future)
        trial.result.expect(outcomes == [PutOutcome.INVALID] * 3, f"unknown versions were {outcomes}")
        trial.result.count("skews", 2 * len(future) + len(written))
        _unknown_codec(trial, server, client)
        check_log(trial.result, server.log())


def _unknown_codec(trial: Trial, server: ServerProcess, client: StoreClient) -> None:
    """The store keeps any codec; an engine that does not know the one it finds computes for itself."""
    with engine(server.address, trial.result, PATIENT) as own:
        keys = own.cache.keys(prompt(7, _PAGES))
        for field in ("codec_id", "packing_id", "key_code", "rotation_id", "key_center", "codec_fingerprint"):
            blocks = [_foreign(key, field) for key in keys]
            outcomes = client.put(blocks)
            trial.result.expect(
                outcomes == [PutOutcome.STORED] * len(keys), f"an unknown {field} was {outcomes}"
            )
            loaded = own.request(prompt(7, _PAGES), saves=False)
            if loaded:
                trial.result.served_wrong(f"{loaded} pages of another {field} reached an engine")
            client.delete(keys)
            wait_until(lambda: client.lookup(keys) == 0)
            trial.result.count("skews")


def _foreign(key: BlockKey, field: str) -> tuple[BlockKey, bytes]:
    """A sound block under a key of ours whose maker used another codec."""
    block = pack_pages(LAYOUT, GEOMETRY.num_layers, key, bytes(GEOMETRY.num_layers * LAYOUT.page_bytes))
    value = b"\xa5" * 32 if field == "codec_fingerprint" else 77
    return key, pack_block(dataclasses.replace(parse_header(block), **{field: value}), block[HEADER_BYTES:])


def _changed(block: tuple[BlockKey, bytes], offset: int, value: bytes) -> tuple[BlockKey, bytes]:
    """With a field changed by somebody who knows what it means: the checksums agree."""
    key, data = block
    return key, sealed(data[:offset] + value + data[offset + len(value) :])


def _extended(message):  # type: ignore[no-untyped-def]
    message.MergeFromString(_FROM_THE_FUTURE)
    return message


def _file(directory: Path, key: BlockKey) -> Path:
    namespace, prefix = (part.hex() for part in split_key(key))
    return directory / "blocks" / prefix[:2] / f"{namespace}-{prefix}"
