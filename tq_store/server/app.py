"""The server process: built from a config, watched by health checks, drained before it ends."""

import asyncio
import importlib.metadata
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import make_wsgi_app

from tq_store.config import ServerConfig, split_address
from tq_store.errors import ConfigError
from tq_store.rpc.convert import METHODS, SERVICE_NAME
from tq_store.rpc.segment import SOCKET_SUFFIX
from tq_store.rpc.tracing import Tracing
from tq_store.rpc.transport import TRANSPORT_OPTIONS
from tq_store.server.access import Access
from tq_store.server.activity import Activity
from tq_store.server.endpoint import MetricsEndpoint
from tq_store.server.gate import CallGate
from tq_store.server.heap import settle_heap
from tq_store.server.metrics import Metrics
from tq_store.server.pages import Pages
from tq_store.server.pipes import Pipes
from tq_store.server.readings import Sampler
from tq_store.server.scrape import StoreCollector
from tq_store.server.segments import Segments
from tq_store.server.service import BlockStoreService
from tq_store.server.status_view import StatusView
from tq_store.server.tiers import coded_tiers, open_tiers
from tq_store.server.tls import tls_files
from tq_store.server.traces import ServerTraces
from tq_store.server.window import ByteWindow
from tq_store.tiering.store import TieredStore
from tq_store.tiering.tier import Watch

logger = logging.getLogger(__name__)

_LAST_BYTES_S = 1.0
_ALIVE_S = 2.0
_PATIENCE_S = 15.0
"""How long a call waits for its share of a window: longer than a stalled peer may keep its own."""
_SPARE_STREAMS = 16
"""On one connection, beyond the calls that may run: for health watches, and calls that are only refused."""
_OPTIONS = (
    *TRANSPORT_OPTIONS,
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.so_reuseport", 0),  # a second server on the port fails to start, it does not steal calls
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class Server:
    """A running server. Made by `start`; owns its tiers, its port and its threads until `stop`."""

    def __init__(self) -> None:
        self.address = ""
        self.metrics_url: str | None = None
        self._access: Access
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in the stubs
        self._resources = AsyncExitStack()
        self._is_serving = False

    @classmethod
    async def start(cls, config: ServerConfig) -> "Server":
        """Open the tiers, then the port. Nothing is left behind if any of it fails.

        Raises:
            ConfigError: A setting cannot be used: a file, an address, a budget.
            BackendError: A configured tier does not answer. A server without it would not be what was asked.
        """
        server = cls()
        try:
            await server._start(config)
        except BaseException:
            await server._resources.aclose()
            raise
        return server

    async def stop(self) -> None:
        """Drain: unhealthy, no new calls, those in flight get the grace period; then flush and close."""
        await self._resources.aclose()

    def reload(self) -> None:
        """Read the tokens again."""
        self._access.reload()

    async def _start(self, config: ServerConfig) -> None:
        """Open one thing after the other; what is opened first is closed last."""
        if config.local_path is not None:
            _check_unused(config.local_path)
        metrics = Metrics(METHODS)
        metrics.limits(
            max_requests=config.max_concurrent_calls,
            max_inflight_bytes=config.max_inflight_bytes,
            max_outflight_bytes=config.max_outflight_bytes,
        )
        self._access = Access(config, metrics)
        self._resources.push_async_callback(self._access.close)
        tracing = None
        if config.trace_endpoint is not None:
            traces = ServerTraces(config.trace_endpoint, version=importlib.metadata.version("tq-store"))
            self._resources.push_async_callback(asyncio.to_thread, traces.close)
            tracing = traces.tracing
        async with AsyncExitStack() as opened:
            tiers = await open_tiers(config, opened)
            store = TieredStore(
                tiers,
                write_queue_bytes=config.write_queue_bytes,
                watch=metrics.watch_tier if tracing is None else _watch_both(metrics, tracing),
                verify=self._access.verify,
                coded=coded_tiers(config),
            )
            opened.pop_all()  # the tiers are the store's now
        self._resources.push_async_callback(store.close)
        activity = Activity()
        segments = None
        if config.local_path is not None and config.shared_segments:
            segments = Segments(_memory_socket(config.local_path), limit=config.shared_segments)
            self._resources.push_async_callback(segments.close)
        pipes = None
        if config.pipe_port is not None:
            files = tls_files(config)
            pipes = Pipes(
                limit=config.payload_pipes,
                tls=files.context if files else None,
                on_denied=partial(metrics.denied, "OpenPipe"),
            )
            self._resources.push_async_callback(pipes.close)
        reception, tenant_store = self._access.guard(store, tiers, activity)
        gate = CallGate(
            metrics,
            reception,
            call_timeout_s=config.call_timeout_s,
            max_calls=config.max_concurrent_calls,
            tracing=tracing,
        )
        service = BlockStoreService(
            tenant_store,
            tiers,
            verify=self._access.verify,
            gate=gate,
            inward=_window("max_inflight", config.max_inflight_bytes, metrics.inflight),
            outward=_window("max_outflight", config.max_outflight_bytes, metrics.outflight),
            segments=segments,
            pipes=pipes,
            metrics=metrics,
        )
        if config.metrics_port is not None:
            loop, version = asyncio.get_running_loop(), importlib.metadata.version("tq-store")
            metrics.registry.register(StoreCollector(store.stats, self._access.usage, loop, version=version))
            sampler = Sampler(metrics.registry)
            self._resources.push_async_callback(asyncio.to_thread, sampler.close)
            pages = Pages(
                make_wsgi_app(metrics.registry),
                read_status=StatusView(sampler, activity).status,
                is_alive=lambda: _answers(loop),
                is_serving=lambda: self._is_serving,
            )
            endpoint = MetricsEndpoint(pages, host=config.metrics_host, port=config.metrics_port)
            self._resources.push_async_callback(asyncio.to_thread, endpoint.close)
            self.metrics_url = endpoint.url
        grpc_server = grpc.aio.server(
            interceptors=[self._access.interceptor()],
            options=(
                *_OPTIONS,
                ("grpc.max_concurrent_streams", config.max_concurrent_calls + _SPARE_STREAMS),
            ),
        )
        grpc_server.add_generic_rpc_handlers((service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, grpc_server)
        names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), grpc_server)
        self.address = _bind(grpc_server, config)
        await grpc_server.start()
        self._resources.push_async_callback(grpc_server.stop, _LAST_BYTES_S)
        if pipes is not None:
            assert config.pipe_port is not None, "there are no pipes otherwise"
            pipes.listen(split_address(self.address)[0], config.pipe_port)
        if segments is not None:
            segments.listen()  # only now: the address beside it is ours
        self._resources.push_async_callback(self._drain, gate, config.grace_s)
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._is_serving = True

    async def _drain(self, gate: CallGate, grace_s: float) -> None:
        self._is_serving = False
        await self._health.enter_graceful_shutdown()
        num_cut = await gate.drain(grace_s)
        if num_cut:
            logger.warning("%d calls were still running after %g s and are cut", num_cut, grace_s)


async def serve(config: ServerConfig, on_ready: Callable[[Server], None]) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it; a second signal ends the process at once.

    SIGHUP reads the tokens again; so does, within a second, a change of their file.

    Raises:
        ConfigError, BackendError: It could not start.
    """
    settle_heap()
    loop, asked_to_stop = asyncio.get_running_loop(), asyncio.Event()
    server = await Server.start(config)
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, asked_to_stop.set)
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    on_ready(server)
    await asked_to_stop.wait()
    for number in signals:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    logger.info("stopping; calls in flight have %g s", config.grace_s)
    await server.stop()


def _watch_both(metrics: Metrics, tracing: Tracing) -> Watch:
    """Measure and trace calls to tiers."""

    @contextmanager
    def watch(tier: str, operation: str, num_keys: int) -> Iterator[None]:
        with metrics.watch_tier(tier, operation, num_keys), tracing.tier_call(tier, operation, num_keys):
            yield

    return watch


def _window(name: str, limit_bytes: int, on_change: Callable[[int], None]) -> ByteWindow:
    return ByteWindow(name, limit_bytes=limit_bytes, patience_s=_PATIENCE_S, on_change=on_change)


def _bind(grpc_server: grpc.aio.Server, config: ServerConfig) -> str:
    """Open the port; returns the address with the port that was chosen."""
    _, port_number = split_address(config.listen)
    files = tls_files(config)
    try:
        if config.local_path is not None and port_number is not None:
            grpc_server.add_insecure_port(f"unix:{config.local_path}")
        if files is None:
            port = grpc_server.add_insecure_port(config.listen)
        else:
            port = grpc_server.add_secure_port(config.listen, files.credentials())
    except RuntimeError as error:
        where = f"{config.listen} and {config.local_socket}" if config.local_socket else config.listen
        raise ConfigError(
            f"cannot listen on {where}: another process may use it, or the host may not be ours"
        ) from error
    return config.listen if port_number is None else f"{config.listen.rpartition(':')[0]}:{port}"


def _memory_socket(path: Path) -> Path:
    return path.with_name(path.name + SOCKET_SUFFIX)


def _answers(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the event loop gets round to its work; asked from another thread."""
    turn = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop)
    try:
        turn.result(_ALIVE_S)
    except TimeoutError:
        turn.cancel()
        return False
    return True


def _check_unused(path: Path) -> None:
    """See that nobody listens on a Unix socket: grpc would replace it, and its owner later remove ours."""
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.connect(str(path))
        raise ConfigError(
            f"cannot listen on unix:{path}: another process does; stop it or choose another path"
        )
