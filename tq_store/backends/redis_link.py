"""Connections to one Redis or Valkey server: how they are opened, and our errors for what goes wrong."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tq_store.backends.redis_reader import ReplyReader
from tq_store.backends.redis_target import Address, Login, RedisTarget
from tq_store.backends.used_values import UsedValues
from tq_store.errors import BackendError, BackendTimeout, BackendUnavailable, ConfigError

_CLOSE_S = 1.0


class Link:
    """A pool of connections to one server.

    Args:
        address: The server.
        target: Database and TLS.
        max_connections: Callers beyond them wait.
    """

    def __init__(self, address: Address, target: RedisTarget, *, max_connections: int) -> None:
        self.where = f"redis at {address}"
        self._credentials = Credentials(target.login)
        kind: type[Connection] | type[UnixDomainSocketConnection]
        options: dict[str, Any] = {"db": target.database, **connection_options(target, self._credentials)}
        if address.port is None:
            kind, options["path"] = UnixDomainSocketConnection, address.host
        else:
            kind = SSLConnection if target.uses_tls else Connection
            options |= {"host": address.host, "port": address.port}
        self.pool = BlockingConnectionPool(
            max_connections=max_connections,
            timeout=None,
            connection_class=kind,
            socket_timeout=None,
            socket_connect_timeout=None,
            parser_class=partial(ReplyReader, used=UsedValues()),
            **options,
        )
        self.client = Redis.from_pool(self.pool)

    @asynccontextmanager
    async def round_trip(self, timeout_s: float) -> AsyncIterator[Callable[[], None]]:
        """Put a deadline on what happens inside; who calls what it gives has that time again.

        Raises:
            BackendError: The deadline passed, the server is gone, or it refused; no secret is in it.
        """
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                yield lambda: deadline.reschedule(clock() + timeout_s)
        except (RedisError, OSError) as error:
            raise self._credentials.translated(error, self.where, timeout_s) from (
                None if self._credentials.are_in(str(error)) else error
            )

    async def close(self, *, in_use: bool = True) -> None:
        """Close all connections, or all that are idle; what is under way on them fails.

        Does not wait long for what may hang.
        """
        with suppress(RedisError, OSError):
            async with asyncio.timeout(_CLOSE_S):
                await self.pool.disconnect(inuse_connections=in_use)


class Credentials(CredentialProvider):
    """Reads the login whenever a connection is opened, and remembers the password to keep it out of logs."""

    def __init__(self, login: Login) -> None:
        self._login = login
        self._secret = login.password

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Password, or user and password."""
        try:
            parts = self._login.read()
        except ConfigError as error:
            raise AuthenticationError(str(error)) from error
        self._secret = parts[-1]
        return (parts[0], parts[1]) if len(parts) > 1 else (parts[0],)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """The same; the file is small and local."""
        return self.get_credentials()

    def __bool__(self) -> bool:
        return self._login.is_set

    def are_in(self, text: str) -> bool:
        """Whether a text shows the password: a server that does not know AUTH repeats its arguments."""
        return self._secret is not None and self._secret in text

    def translated(self, error: Exception, where: str, timeout_s: float) -> BackendError:
        """Our error for one of the client library's, without the password."""
        if isinstance(error, (TimeoutError, RedisTimeoutError)):
            return BackendTimeout(f"{where} did not answer within {timeout_s} s")
        reason = str(error).replace(self._secret, "***") if self._secret else str(error)
        return BackendUnavailable(f"{where} does not work: {reason}")


def connection_options(target: RedisTarget, credentials: Credentials) -> dict[str, Any]:
    """What every connection of a target takes, to whichever server."""
    options: dict[str, Any] = {"protocol": 2}
    if credentials:
        options["credential_provider"] = credentials
    if target.uses_tls:
        options |= {
            "ssl_ca_certs": str(target.tls_ca) if target.tls_ca else None,
            "ssl_certfile": str(target.tls_cert) if target.tls_cert else None,
            "ssl_keyfile": str(target.tls_key) if target.tls_key else None,
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
        }
    return options
