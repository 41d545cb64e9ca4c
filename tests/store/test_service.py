"""The service as any grpc client sees it: through generated stubs, so that the wire is proven protobuf."""

import asyncio
import socket
import threading
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from store.redis_process import RedisProcess
from store.running_server import WAIT_S, running_server, wait_until
from store.sample_blocks import NAMESPACE, OTHER_NAMESPACE, keys_of, sample_block, sample_blocks, sample_key
from store.some_quotas import quotas_over

from tq_store.client import StoreClient
from tq_store.config import ServerConfig
from tq_store.errors import BackendError, ConfigError, RpcError
from tq_store.rpc import convert
from tq_store.rpc.convert import METHODS
from tq_store.rpc.limits import MAX_FRAME_BYTES, MAX_KEYS
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs
from tq_store.server import app as app_module
from tq_store.server import gate as gate_module
from tq_store.server import service as service_module
from tq_store.server.app import Server
from tq_store.server.audit import AuditLog, NoSink
from tq_store.server.calls import ANYBODY, IDENTITY
from tq_store.server.gate import CallGate
from tq_store.server.metrics import Metrics
from tq_store.server.reception import Reception


def open_gate(metrics: Metrics) -> CallGate:
    """A gate for one call at once, which anybody makes."""
    IDENTITY.set(ANYBODY)
    reception = Reception(quotas_over(metrics=metrics), AuditLog(NoSink()))
    return CallGate(metrics, reception, call_timeout_s=WAIT_S, max_calls=1)


def frames_of(
    blocks: list[tuple[bytes, bytes]], frame_bytes: int = MAX_FRAME_BYTES
) -> Iterator[pb.BlockFrame]:
    for index, (key, data) in enumerate(blocks):
        for offset in range(0, len(data), frame_bytes):
            first = {"block_bytes": len(data), "key": key} if not offset else {}
            yield pb.BlockFrame(index=index, offset=offset, data=data[offset : offset + frame_bytes], **first)


def blocks_of(frames: Iterator[pb.BlockFrame]) -> list[bytes | None]:
    blocks: list[bytes | None] = []
    for frame in frames:
        assert len(frame.data) <= MAX_FRAME_BYTES
        if not frame.offset:
            assert frame.index == len(blocks)
            declared = frame.block_bytes
            blocks.append(b"" if declared else None)
        if frame.data:
            assert blocks[-1] is not None
            assert frame.offset == len(blocks[-1])
            blocks[-1] += frame.data
            assert len(blocks[-1]) <= declared
    return blocks


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as started:
        yield started


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel) -> stubs.BlockStoreStub:
    return stubs.BlockStoreStub(channel)


def code_of(call: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    return call.value.code()


def test_blocks_come_back_as_they_were_put(stub: stubs.BlockStoreStub) -> None:
    sizes = [256, MAX_FRAME_BYTES - 256, MAX_FRAME_BYTES - 255, 2 * MAX_FRAME_BYTES + 5]
    blocks = [sample_block(number, size) for number, size in enumerate(sizes)]
    answer = stub.Put(frames_of(blocks), timeout=WAIT_S)
    assert answer.outcomes == [pb.PUT_OUTCOME_STORED] * len(blocks)
    asked = [sample_key(99), *keys_of(blocks), sample_key(98), blocks[0][0]]
    got = blocks_of(stub.Get(pb.Keys(keys=asked), timeout=WAIT_S))
    assert got == [None, *(data for _, data in blocks), None, blocks[0][1]]


def test_frames_may_be_small(stub: stubs.BlockStoreStub) -> None:
    block = sample_block(1, 300)
    assert stub.Put(frames_of([block], 7), timeout=WAIT_S).outcomes == [pb.PUT_OUTCOME_STORED]
    assert blocks_of(stub.Get(pb.Keys(keys=[block[0]]), timeout=WAIT_S)) == [block[1]]


def test_each_block_of_a_put_has_its_own_outcome(stub: stubs.BlockStoreStub) -> None:
    good, other = sample_blocks(2)
    flipped = (sample_key(7), sample_block(7)[1][:-1] + b"?")
    answer = stub.Put(
        frames_of([good, good, (other[0], good[1]), flipped, (sample_key(8), b"x")]), timeout=WAIT_S
    )
    invalid = pb.PUT_OUTCOME_INVALID
    assert answer.outcomes == [pb.PUT_OUTCOME_STORED, pb.PUT_OUTCOME_PRESENT, invalid, invalid, invalid]


def test_lookup_contains_delete_and_purge(stub: stubs.BlockStoreStub) -> None:
    blocks = sample_blocks(3) + sample_blocks(2, namespace=OTHER_NAMESPACE)
    stub.Put(frames_of(blocks), timeout=WAIT_S)
    asked = pb.Keys(keys=[*keys_of(blocks)[:2], sample_key(50), blocks[2][0]])
    assert stub.Lookup(asked, timeout=WAIT_S).num_leading_hits == 2
    assert stub.Contains(asked, timeout=WAIT_S).flags == [True, True, False, True]
    assert stub.Delete(pb.Keys(keys=[blocks[0][0], sample_key(50)]), timeout=WAIT_S).flags == [True, False]
    assert stub.Lookup(asked, timeout=WAIT_S).num_leading_hits == 0
    assert stub.Purge(pb.PurgeRequest(namespace=NAMESPACE), timeout=WAIT_S).num_blocks == 2
    assert stub.Purge(pb.PurgeRequest(all=True), timeout=WAIT_S).num_blocks == 2
    assert stub.Lookup(pb.Keys(), timeout=WAIT_S).num_leading_hits == 0


def test_stats_and_ping_tell_the_version(stub: stubs.BlockStoreStub) -> None:
    stub.Put(frames_of(sample_blocks(3)), timeout=WAIT_S)
    stats = stub.Stats(pb.StatsRequest(), timeout=WAIT_S)
    (tier,) = stats.tiers
    assert (tier.name, tier.num_blocks, tier.used_bytes, tier.budget_bytes) == ("memory", 3, 3 * 512, 1 << 30)
    assert stats.counters["invalid"] == 0
    assert stats.uptime_s > 0
    assert stats.version == stub.Ping(pb.PingRequest(), timeout=WAIT_S).version != ""


FIRST = {"block_bytes": 4, "key": sample_key(1), "data": b"ab"}


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        ([FIRST | {"block_bytes": 1 << 40}], "over 268435712"),
        ([FIRST | {"key": b"short"}], "key of 5 bytes"),
        ([FIRST | {"index": 1}], "where block 0 was due"),
        ([FIRST, {"offset": 3, "data": b"c"}], "due was 2"),
        ([FIRST, FIRST], "due was 2"),
        ([FIRST, {"offset": 2, "data": b"cde"}], "longer than the 4 bytes"),
        ([FIRST, {"offset": 2}], "carries 0 bytes"),
        ([FIRST | {"block_bytes": 0, "data": b""}], "carries 0 bytes"),
        ([FIRST | {"block_bytes": 2 << 20, "data": bytes(MAX_FRAME_BYTES + 1)}], "may carry 1 to"),
        ([FIRST], "ended inside block 0"),
    ],
)
def test_a_put_that_breaks_the_order_of_frames_is_refused(
    stub: stubs.BlockStoreStub, frames: list[dict[str, object]], complaint: str
) -> None:
    with pytest.raises(grpc.RpcError) as call:
        stub.Put(iter([pb.BlockFrame(**frame) for frame in frames]), timeout=WAIT_S)
    assert code_of(call) is grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in call.value.details()
    assert stub.Contains(pb.Keys(keys=[sample_key(1)]), timeout=WAIT_S).flags == [False]


def test_a_put_over_the_total_is_refused_when_it_is_declared(
    stub: stubs.BlockStoreStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = sample_blocks(3)
    monkeypatch.setattr(service_module, "MAX_PUT_BYTES", 3 * 512)
    assert len(stub.Put(frames_of(blocks), timeout=WAIT_S).outcomes) == 3
    monkeypatch.setattr(service_module, "MAX_PUT_BYTES", 3 * 512 - 1)
    with pytest.raises(grpc.RpcError, match="come to more than 1535 bytes"):
        stub.Put(frames_of(blocks), timeout=WAIT_S)


@pytest.mark.parametrize("method", ["Lookup", "Contains", "Get", "Delete", "Purge", "Inspect"])
@pytest.mark.parametrize("request_bytes", [b"\xff", b"\x0a\x01x"])
def test_nonsense_is_answered_with_a_sentence(
    channel: grpc.Channel, method: str, request_bytes: bytes
) -> None:
    call = channel.unary_stream(f"/tq_store.rpc.v1.BlockStore/{method}", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(request_bytes, timeout=WAIT_S))
    assert code_of(caught) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["Lookup", "Contains", "Get", "Delete"])
def test_too_many_keys_are_refused(channel: grpc.Channel, method: str) -> None:
    call = channel.unary_stream(f"/tq_store.rpc.v1.BlockStore/{method}", None, None)
    with pytest.raises(grpc.RpcError, match="4097 keys in one call") as caught:
        list(call(convert.pack_keys([sample_key(1)] * (MAX_KEYS + 1)), timeout=WAIT_S))
    assert code_of(caught) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_frame_that_is_no_message_is_answered_with_a_sentence(channel: grpc.Channel) -> None:
    call = channel.stream_unary("/tq_store.rpc.v1.BlockStore/Put", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        call(iter([b"\xff"]), timeout=WAIT_S)
    assert code_of(caught) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_huge_message_is_refused_unread(stub: stubs.BlockStoreStub) -> None:
    with pytest.raises(grpc.RpcError) as call:
        stub.Put(iter([pb.BlockFrame(data=bytes(3 << 20))]), timeout=WAIT_S)
    assert code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED


class SlowPut:
    """A put whose frames are sent one by one, when the test says so."""

    def __init__(self, stub: stubs.BlockStoreStub, block: tuple[bytes, bytes]) -> None:
        self._frames = frames_of([block], MAX_FRAME_BYTES // 4)
        self._may_finish = threading.Event()
        self.call = stub.Put.future(self._send(), timeout=WAIT_S)

    def _send(self) -> Iterator[pb.BlockFrame]:
        yield next(self._frames)
        assert self._may_finish.wait(WAIT_S)
        yield from self._frames

    def finish(self) -> pb.PutResponse:
        self._may_finish.set()
        return self.call.result(WAIT_S)

    def cancel(self) -> None:
        self.call.cancel()
        self._may_finish.set()


def metric(server: Server, name: str, default: float | None = None) -> float:
    """Value of a metric, its labels in the name; the default where it is not there yet."""
    assert server.metrics_url is not None
    with urllib.request.urlopen(server.metrics_url, timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")]
    return values[0] if values or default is None else default


def test_blocks_being_received_are_bounded_over_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "_PATIENCE_S", 0.05)
    big, small = sample_block(1, MAX_FRAME_BYTES), sample_block(2, 1000)
    limits = {"max_inflight_bytes": MAX_FRAME_BYTES + 1000, "metrics_port": 0}
    with running_server(**limits) as server, grpc.insecure_channel(server.address) as channel:
        stub = stubs.BlockStoreStub(channel)
        slow = SlowPut(stub, big)
        wait_until(lambda: metric(server, "tq_store_inflight_bytes") == len(big[1]))
        with pytest.raises(grpc.RpcError) as call:
            stub.Put(frames_of([small]), timeout=WAIT_S)
        assert code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert slow.finish().outcomes == [pb.PUT_OUTCOME_STORED]
        assert metric(server, "tq_store_inflight_bytes") == 0
        slow = SlowPut(stub, sample_block(3, MAX_FRAME_BYTES))
        wait_until(lambda: metric(server, "tq_store_inflight_bytes") > 0)
        slow.cancel()
        wait_until(lambda: metric(server, "tq_store_inflight_bytes") == 0)
        assert stub.Put(frames_of([small]), timeout=WAIT_S).outcomes == [pb.PUT_OUTCOME_STORED]
        assert stub.Contains(pb.Keys(keys=[sample_key(3)]), timeout=WAIT_S).flags == [False]


def test_blocks_being_sent_are_bounded_over_all_calls(tmp_path: Path) -> None:
    """Slow readers hold no more than the window, and the one that takes its blocks still gets them."""
    limits = {"max_outflight_bytes": 24 << 20, "memory_budget_bytes": 1 << 20, "metrics_port": 0}
    disk = {"disk_path": tmp_path, "disk_budget_bytes": 1 << 30, "write_queue_bytes": 1 << 30}
    blocks = sample_blocks(6, 4 << 20)
    with running_server(**limits, **disk) as server, ExitStack() as stack:

        def connect() -> stubs.BlockStoreStub:
            return stubs.BlockStoreStub(stack.enter_context(grpc.insecure_channel(server.address)))

        stub = connect()
        stub.Put(frames_of(blocks), timeout=WAIT_S)
        asked = pb.Keys(keys=keys_of(blocks))
        wait_until(lambda: all(stub.Contains(asked, timeout=WAIT_S).flags))
        assert blocks_of(stub.Get(asked, timeout=WAIT_S)) == [data for _, data in blocks]  # tells sizes
        slow = [connect().Get(asked, timeout=WAIT_S) for _ in range(8)]
        for call in slow:
            stack.callback(call.cancel)
        wait_until(lambda: metric(server, "tq_store_outflight_bytes") > 16 << 20)
        assert metric(server, "tq_store_outflight_bytes") <= metric(server, "tq_store_max_outflight_bytes")
        for call in slow[1:]:
            call.cancel()
        assert blocks_of(slow[0]) == [data for _, data in blocks]
        wait_until(lambda: metric(server, "tq_store_outflight_bytes") == 0)


def test_a_peer_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(metrics_port=0) as server, grpc.insecure_channel(server.address) as channel:
        stub = stubs.BlockStoreStub(channel)
        blocks = sample_blocks(2, 8 << 20)
        stub.Put(frames_of(blocks), timeout=WAIT_S)
        monkeypatch.setattr(service_module, "_STALL_S", 0.1)
        slow = SlowPut(stub, sample_block(1, MAX_FRAME_BYTES))
        with pytest.raises(grpc.RpcError) as call:
            slow.call.result(WAIT_S)
        assert code_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
        slow.cancel()
        # more than what lies between the two can hold
        reader = stub.Get(pb.Keys(keys=keys_of(blocks) * 20), timeout=WAIT_S)
        next(reader)
        given_up = 'tq_store_requests_total{method="Get",status="DEADLINE_EXCEEDED"}'
        wait_until(lambda: metric(server, given_up, default=0) == 1)
        with pytest.raises(grpc.RpcError) as call:
            list(reader)
        assert code_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_calls_at_once_are_bounded() -> None:
    limits = {"max_concurrent_calls": 1, "metrics_port": 0}
    with running_server(**limits) as server, grpc.insecure_channel(server.address) as channel:
        stub = stubs.BlockStoreStub(channel)
        slow = SlowPut(stub, sample_block(1, MAX_FRAME_BYTES))
        wait_until(lambda: metric(server, "tq_store_active_requests") == 1)
        with pytest.raises(grpc.RpcError, match="1 calls are running, as many as max_concurrent") as call:
            stub.Ping(pb.PingRequest(), timeout=WAIT_S)
        assert code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED
        refused = 'tq_store_requests_total{method="Ping",status="RESOURCE_EXHAUSTED"}'
        assert metric(server, refused) == 1
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert health.status == health_pb2.HealthCheckResponse.SERVING, "busy is not dead"
        assert slow.finish().outcomes == [pb.PUT_OUTCOME_STORED]
        assert stub.Ping(pb.PingRequest(), timeout=WAIT_S).version


def test_a_client_that_reads_nothing_does_not_keep_its_place() -> None:
    limits = {"max_concurrent_calls": 1, "call_timeout_s": 1.0, "metrics_port": 0}
    with running_server(**limits) as server, grpc.insecure_channel(server.address) as channel:
        stub = stubs.BlockStoreStub(channel)
        blocks = sample_blocks(2, 8 << 20)
        stub.Put(frames_of(blocks), timeout=WAIT_S)
        call = stub.Get(pb.Keys(keys=keys_of(blocks) * 20), timeout=WAIT_S)
        timed_out = 'tq_store_requests_total{method="Get",status="DEADLINE_EXCEEDED"}'
        wait_until(lambda: metric(server, timed_out, default=0) == 1)
        with grpc.insecure_channel(server.address) as other:
            assert stubs.BlockStoreStub(other).Ping(pb.PingRequest(), timeout=WAIT_S).version
        call.cancel()


async def never(*_: object) -> None:
    await asyncio.Event().wait()


async def fail_to_send(*_: object) -> None:
    raise grpc.aio.InternalError("what grpc raises from an abort to nobody")


@pytest.mark.parametrize("abort", [never, fail_to_send])
async def test_a_call_whose_client_does_not_take_the_status_is_given_up(
    abort: Callable[..., Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> bytes:
        raise ValueError("wrong")

    monkeypatch.setattr(gate_module, "_STATUS_S", 0.01)
    gate = open_gate(Metrics(METHODS))
    with pytest.raises(asyncio.CancelledError):
        await gate.run("Get", SimpleNamespace(abort=abort, peer=lambda: "unix:"), body)


def test_a_call_that_stalls_is_ended_by_the_server() -> None:
    with running_server(call_timeout_s=0.1) as server, grpc.insecure_channel(server.address) as channel:
        slow = SlowPut(stubs.BlockStoreStub(channel), sample_block(1, MAX_FRAME_BYTES))
        with pytest.raises(grpc.RpcError) as call:
            slow.call.result(WAIT_S)
        assert code_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "longer than the server allows" in call.value.details()
        slow.cancel()


def copies(stub: stubs.BlockStoreStub, key: bytes) -> list[tuple[str, int, str]]:
    answer = stub.Inspect(pb.InspectRequest(key=key), timeout=WAIT_S)
    return [(copy.tier, copy.block_bytes, copy.problem) for copy in answer.copies]


def test_inspect_sees_what_each_tier_has_and_moves_nothing(tmp_path: Path) -> None:
    key, data = sample_block(1)
    disk = {"disk_path": tmp_path, "disk_budget_bytes": 1 << 20}
    with running_server(**disk) as server, grpc.insecure_channel(server.address) as channel:
        stub = stubs.BlockStoreStub(channel)
        assert copies(stub, key) == [("memory", 0, ""), ("disk", 0, "")]
        stub.Put(frames_of([(key, data)]), timeout=WAIT_S)
        wait_until(lambda: copies(stub, key) == [("memory", 512, ""), ("disk", 512, "")])
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == 512)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with running_server(**disk) as server, grpc.insecure_channel(server.address) as channel:
        stub = stubs.BlockStoreStub(channel)
        damaged = [("memory", 0, ""), ("disk", 512, "the payload differs from what was written")]
        assert copies(stub, key) == damaged
        assert copies(stub, key) == damaged
        answer = stub.Inspect(pb.InspectRequest(key=key), timeout=WAIT_S)
        assert answer.copies[1].header == data[:256]
        assert stub.Stats(pb.StatsRequest(), timeout=WAIT_S).counters["quarantined"] == 0


def test_inspect_tells_of_a_tier_that_does_not_answer(tmp_path: Path) -> None:
    redis = RedisProcess(tmp_path)
    try:
        with running_server(redis_url=redis.url) as server, grpc.insecure_channel(server.address) as channel:
            stub = stubs.BlockStoreStub(channel)
            assert copies(stub, sample_key(1)) == [("memory", 0, ""), ("redis", 0, "")]
            redis.kill()
            memory, (tier, block_bytes, problem) = copies(stub, sample_key(1))
            assert memory == ("memory", 0, "")
            assert (tier, block_bytes) == ("redis", 0)
            assert problem.startswith("this tier does not answer: ")
    finally:
        redis.kill()


def test_health_is_served(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "tq_store.rpc.v1.BlockStore"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=WAIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_describes_the_service(channel: grpc.Channel) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    symbol = "tq_store.rpc.v1.BlockStore"
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol),
    ]
    listed, described = reflection.ServerReflectionInfo(iter(asked), timeout=WAIT_S)
    names = [service.name for service in listed.list_services_response.service]
    assert names == ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", symbol]
    assert pb.DESCRIPTOR.serialized_pb in described.file_descriptor_response.file_descriptor_proto


def test_a_failure_of_ours_is_logged_and_not_shown(
    caplog: pytest.LogCaptureFixture, channel: grpc.Channel
) -> None:
    async def fail(_: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        async def body() -> bytes:
            raise RuntimeError("the inner secret")

        gate = open_gate(Metrics(frozenset()))
        return await gate.run("Fail", context, body)

    async def call_it() -> grpc.aio.AioRpcError:
        server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(fail)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", {"Fail": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await opened.unary_unary("/s/Fail", None, None)(b"")
        await server.stop(None)
        return caught.value

    error = asyncio.run(call_it())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "the server failed; its log says how"
    assert "the inner secret" in caplog.text


def test_a_call_that_its_client_ends_is_counted_as_such() -> None:
    blocks = sample_blocks(4, 8 << 20)
    with running_server(metrics_port=0) as server, grpc.insecure_channel(server.address) as channel:
        stub = stubs.BlockStoreStub(channel)
        stub.Put(frames_of(blocks), timeout=WAIT_S)
        call = stub.Get(pb.Keys(keys=keys_of(blocks)), timeout=WAIT_S)
        assert next(call).data
        call.cancel()
        wait_until(lambda: metric(server, "tq_store_active_requests") == 0)
        assert metric(server, 'tq_store_requests_total{method="Get",status="CANCELLED"}') == 1
        assert metric(server, "tq_store_sent_bytes_total") < 4 * 8 << 20


def test_a_drain_takes_no_new_calls_and_cuts_what_does_not_end(caplog: pytest.LogCaptureFixture) -> None:
    running = ExitStack()
    server = running.enter_context(running_server(grace_s=1.0, metrics_port=0))
    with ThreadPoolExecutor(1) as thread, grpc.insecure_channel(server.address) as channel:
        stub = stubs.BlockStoreStub(channel)
        slow = SlowPut(stub, sample_block(1, MAX_FRAME_BYTES))
        wait_until(lambda: metric(server, "tq_store_active_requests") == 1)
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        stopping = thread.submit(running.close)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError, match="the server is shutting down") as call:
            stub.Ping(pb.PingRequest(), timeout=WAIT_S)
        assert code_of(call) is grpc.StatusCode.UNAVAILABLE
        stopping.result(WAIT_S)
        assert "1 calls were still running after 1 s and are cut" in caplog.text
        slow.cancel()


async def test_a_client_that_leaves_while_we_send_is_no_failure_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def send() -> bytes:
        raise grpc.aio.InternalError("what grpc raises from a write to nobody")

    metrics = Metrics(METHODS)
    gate = open_gate(metrics)
    with pytest.raises(asyncio.CancelledError):
        await gate.run("Get", SimpleNamespace(peer=lambda: "unix:"), send)
    labels = {"method": "Get", "status": "CANCELLED"}
    assert metrics.registry.get_sample_value("tq_store_requests_total", labels) == 1
    assert not caplog.records
    assert await gate.drain(grace_s=0) == 0


def test_a_second_server_does_not_share_the_port(server: Server) -> None:
    with pytest.raises(ConfigError, match="cannot listen on 127"), running_server(listen=server.address):
        pass


def test_a_tier_that_cannot_start_stops_the_start_and_frees_the_others(tmp_path: Path) -> None:
    disk = {"disk_path": tmp_path, "disk_budget_bytes": 1 << 20}
    with pytest.raises(BackendError), running_server(**disk, redis_url="redis://127.0.0.1:1"):
        pass
    with running_server(**disk):
        pass


def test_a_purge_that_a_tier_missed_is_a_failure(tmp_path: Path) -> None:
    redis = RedisProcess(tmp_path)
    try:
        with running_server(redis_url=redis.url) as server, StoreClient(server.address) as client:
            redis.kill()
            with pytest.raises(RpcError, match="the purge is incomplete: the redis tier failed") as failure:
                client.purge(None)
            assert type(failure.value) is RpcError, "the server itself answers"
    finally:
        redis.kill()


def test_a_second_server_does_not_take_a_unix_socket_over(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    with running_server(listen=address), grpc.insecure_channel(address) as channel:
        with pytest.raises(ConfigError, match="another process does"), running_server(listen=address):
            pass
        assert stubs.BlockStoreStub(channel).Ping(pb.PingRequest(), timeout=WAIT_S).version


def test_a_unix_socket_that_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(f"{tmp_path}/socket")
    address = f"unix:{tmp_path}/socket"
    with running_server(listen=address), grpc.insecure_channel(address) as channel:
        assert stubs.BlockStoreStub(channel).Ping(pb.PingRequest(), timeout=WAIT_S).version


def test_a_unix_socket_is_served(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    with running_server(listen=address) as server, grpc.insecure_channel(address) as channel:
        assert server.address == address
        assert stubs.BlockStoreStub(channel).Ping(pb.PingRequest(), timeout=WAIT_S).version


def test_the_address_of_a_server_names_the_port_it_got() -> None:
    with running_server(listen="[::1]:0") as server:
        host, _, port = server.address.rpartition(":")
        assert host == "[::1]"
        assert int(port) > 0
    assert ServerConfig().listen.endswith(":7437")
