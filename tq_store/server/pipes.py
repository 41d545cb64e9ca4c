"""Connections of clients for block bytes beside grpc: who may open one, and whose it is.

A connection begins with a ticket, which a tenant has asked for by an authenticated call. Until then it has
two seconds for 32 bytes, and few are let in at a time. Nothing else is ever read from it.
"""

import asyncio
import errno
import logging
import os
import secrets
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from tq_store.errors import ConfigError
from tq_store.rpc.limits import PIPE_NAME_BYTES, TICKET_BYTES, TICKET_LIFE_S
from tq_store.server.pipe import Pipe, readable, run, writable
from tq_store.server.tenants import Tenant

logger = logging.getLogger(__name__)

_HELLO_S = 2.0
_GREETING = 32
"""Connections that may be on their way to a pipe."""
_IDLE_S = 60.0
_REST_S = 0.1
"""Before the next connection is let in, when files or memory ran out."""
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_SHARE = 2
"""One of several tenants may have the limit over this."""
_PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
_THREADS = max(1, min(4, _PROCESSORS // 2))
"""That encrypt, and copy to sockets where there are processors to spare."""

T = TypeVar("T")


class Pipes:
    """The pipes of all clients, and the port on which they are opened.

    Bound to one event loop. A pipe goes when its client closes it or leaves it idle, or a call on it fails.

    Args:
        limit: Pipes at once, and tickets for them; one of several tenants may have half of them.
        tls: Gives what to encrypt the next connection with; None for none.
        on_denied: Told of connections without a valid ticket.
    """

    def __init__(
        self, *, limit: int, tls: Callable[[], ssl.SSLContext] | None, on_denied: Callable[[], None]
    ) -> None:
        self.port = 0
        self._limit = limit
        self._tls = tls
        self._on_denied = on_denied
        self._tickets: dict[bytes, tuple[Tenant, float]] = {}
        self._pipes: dict[bytes, Pipe] = {}
        self._held: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._greeting = 0
        self._listeners: list[socket.socket] = []
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tq-store-pipe")

    def listen(self, host: str, port: int) -> None:
        """Open the port.

        Raises:
            ConfigError: It cannot be had.
        """
        try:
            places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise _no_pipes_on(host, port, error) from error
        reasons: list[OSError] = []
        for family, _, _, _, address in places:
            where = (address[0], self.port or port, *address[2:])
            # as grpc does: every address of IPv6 means those of IPv4 as well
            is_dual = address[0] == "::" and socket.has_dualstack_ipv6()
            try:
                listener = socket.create_server(where, family=family, dualstack_ipv6=is_dual)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise _no_pipes_on(host, port, error) from error
                reasons.append(error)  # a name may stand for addresses that this host has not
                continue
            self._listeners.append(listener)
            listener.setblocking(False)
            self.port = listener.getsockname()[1]
        if not self._listeners:
            raise _no_pipes_on(host, port, reasons[0])
        for listener in self._listeners:
            self._begin(self._accept(listener))

    def __len__(self) -> int:
        return len(self._pipes)

    def ticket(self, tenant: Tenant) -> bytes | None:
        """What opens one pipe for a tenant, within five seconds; None where there are enough."""
        self._forget_late_tickets()
        most_of_one = max(1, self._limit // _SHARE) if tenant.name else self._limit
        if self._held.total() >= self._limit or self._held[tenant.name] >= most_of_one:
            return None
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._tickets[ticket] = (tenant, asyncio.get_running_loop().time() + TICKET_LIFE_S)
        self._held[tenant.name] += 1
        return ticket

    @contextmanager
    def lend(self, name: bytes, tenant: Tenant) -> Iterator[Pipe]:
        """The pipe that a call names, to be written by it alone. It is closed unless the call ends well.

        Raises:
            ValueError: The tenant has no such pipe, or another call writes to it.
        """
        pipe = self._pipes.get(name)
        if pipe is None or pipe.tenant != tenant.name or pipe.has_gone.is_set():
            raise ValueError("no such pipe; open another")
        if pipe.is_lent:
            raise ValueError("another call writes to this pipe")
        pipe.is_lent = True
        pipe.is_free.clear()
        pipe.num_calls += 1
        try:
            yield pipe
        except BaseException:
            pipe.has_gone.set()
            raise
        finally:
            pipe.is_lent = False
            pipe.is_free.set()

    async def close(self) -> None:
        """Close everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        await asyncio.to_thread(self._threads.shutdown)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                logger.warning("a client that opens a pipe cannot be let in: %s", error)
                await asyncio.sleep(_REST_S)
                continue
            try:
                self._forget_late_tickets()
                if not self._tickets or self._greeting >= _GREETING:
                    raise ConnectionRefusedError  # nobody is due
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls is not None:
                    connection = self._tls().wrap_socket(
                        connection, server_side=True, do_handshake_on_connect=False
                    )
            except OSError:
                connection.close()
                continue
            self._greeting += 1
            serving = self._begin(self._serve(connection))
            # not in the task, as one that is cancelled before it starts does nothing at all
            serving.add_done_callback(partial(_close, connection))

    async def _serve(self, connection: socket.socket) -> None:
        """Greet one client, and keep its pipe until it has gone."""
        tenant = None
        try:
            try:
                async with asyncio.timeout(_HELLO_S):
                    tenant = self._redeem(await self._read_ticket(connection))
            except (OSError, EOFError, TimeoutError):
                pass
            finally:
                self._greeting -= 1
            if tenant is None:
                self._on_denied()
                return
            await self._keep(connection, tenant)
        finally:
            if tenant is not None:
                self._held[tenant.name] -= 1

    async def _keep(self, connection: socket.socket, tenant: Tenant) -> None:
        loop, name = asyncio.get_running_loop(), secrets.token_bytes(PIPE_NAME_BYTES)
        is_encrypted = isinstance(connection, ssl.SSLSocket)
        pipe = Pipe(connection, tenant, self._threads if is_encrypted or _THREADS > 1 else None)

        def end() -> None:
            loop.remove_reader(connection)
            pipe.has_gone.set()

        try:
            self._pipes[name] = pipe
            await pipe.write([memoryview(name)])
            loop.add_reader(connection, end)  # a client has nothing to say: whatever comes is the end
            num_calls = -1
            while not pipe.has_gone.is_set() and (pipe.is_lent or num_calls != pipe.num_calls):
                num_calls = pipe.num_calls
                with suppress(TimeoutError):
                    async with asyncio.timeout(_IDLE_S):
                        await pipe.has_gone.wait()
        except ValueError:
            pass
        finally:
            self._pipes.pop(name, None)
            pipe.has_gone.set()
            loop.remove_reader(connection)
            # a call that still writes finds the end; only then may the descriptor go
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
            await pipe.is_free.wait()

    async def _read_ticket(self, connection: socket.socket) -> bytes:
        """What a connection begins with.

        Raises:
            EOFError: It ends before that.
            OSError: It fails, or does not understand TLS.
        """
        if isinstance(connection, ssl.SSLSocket):
            await self._retried(connection, connection.do_handshake)
        ticket = b""
        while len(ticket) < TICKET_BYTES:
            left_bytes = TICKET_BYTES - len(ticket)
            received = await self._retried(connection, partial(connection.recv, left_bytes))
            if not received:
                raise EOFError
            ticket += received
        return ticket

    async def _retried(self, connection: socket.socket, operation: Callable[[], T]) -> T:
        while True:
            try:
                return await run(self._threads, operation)
            except (BlockingIOError, ssl.SSLWantReadError):
                await readable(connection)
            except ssl.SSLWantWriteError:
                await writable(connection)

    def _redeem(self, ticket: bytes) -> Tenant | None:
        """Whose pipe a ticket opens, once; it counts on as that pipe."""
        self._forget_late_tickets()
        tenant, _ = self._tickets.pop(ticket, (None, 0.0))
        return tenant

    def _forget_late_tickets(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for ticket, (tenant, until_s) in [*self._tickets.items()]:
            if until_s > now_s:
                break
            del self._tickets[ticket]
            self._held[tenant.name] -= 1


def _no_pipes_on(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"cannot take pipes on {host}:{port}: {error.strerror or error}")


def _close(connection: socket.socket, _: object) -> None:
    connection.close()
