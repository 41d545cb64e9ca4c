"""Where Redis is and how to get in: the URL, user, password and TLS files, read and checked.

Imports no Redis client: what it says is what any would need.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from tq_store.errors import ConfigError
from tq_store.secret_file import read_secret_file

_DEFAULT_PORT = 6379
_DEFAULT_SENTINEL_PORT = 26379
_MAX_PASSWORD_BYTES = 4096
_URL = re.compile(
    r"(?P<scheme>rediss?(?:\+sentinel|\+cluster)?)://(?:(?P<login>[^@/?#]*)@)?(?P<rest>[^@?#]*)"
)
_UNIX_URL = re.compile(r"unix://(?:(?P<login>[^@/?#]*)@)?(?P<path>/[^@?#]+)(?:\?db=(?P<database>\d{1,4}))?")
_HOST = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^:\[\]/\s,]+)(?::(?P<port>\d{1,5}))?")
_HOW_TO_WRITE = (
    "the URL of the redis tier must read redis://[user:password@]host[:port][/database], "
    "redis+sentinel://[user:password@]host[:port],…/service[/database], "
    "redis+cluster://[user:password@]host[:port],… or unix://[user:password@]/path[?db=database], "
    "rediss in place of redis for TLS, with special characters in the password percent-encoded"
)


class Arrangement(Enum):
    """How many servers there are, and who knows which of them counts."""

    STANDALONE = "standalone"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Address(NamedTuple):
    """A host and port, or the path of a Unix socket and no port."""

    host: str
    port: int | None

    def __str__(self) -> str:
        if self.port is None:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """A user and where the password stands; without a password, no login at all.

    Args:
        user: ACL user; None is the server's ``default``.
        password: The password itself.
        password_file: File whose first line is the password, read at each use: so it can be replaced.
    """

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: Path | None = None

    def __post_init__(self) -> None:
        if self.password is not None and self.password_file is not None:
            raise ConfigError("the password of the redis tier stands in its URL and in a file; keep one")
        if self.user is not None and not self.is_set:
            raise ConfigError(
                # without the user: whoever writes password@host means :password@host
                "the redis tier has a user and no password; write user:password@ or :password@ in its URL, "
                "or name a password file"
            )

    @property
    def is_set(self) -> bool:
        """Whether there is one."""
        return self.password is not None or self.password_file is not None

    def read(self) -> tuple[str, ...]:
        """What to log in with: nothing, a password, or a user and a password.

        Raises:
            ConfigError: The file is not readable, readable by everybody, or holds no password.
        """
        password = _read_password(self.password_file) if self.password_file else self.password
        if password is None:
            return ()
        return (password,) if self.user is None else (self.user, password)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisTarget:
    """Everything that opening a connection takes. Made by `parse_target`.

    Args:
        arrangement: What `addresses` are: the server, the sentinels, or some nodes of the cluster.
        service: What the sentinels call the master; empty for the others.
        uses_tls: To the servers, and to the sentinels too.
        tls_ca: Authorities that sign the servers' certificates; None means the system's.
        tls_cert: Certificate to show the servers; `tls_key` is its key.
    """

    arrangement: Arrangement
    addresses: tuple[Address, ...]
    service: str = ""
    database: int = 0
    login: Login
    sentinel_login: Login
    uses_tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        files = (self.tls_ca, self.tls_cert, self.tls_key)
        if any(files) and not self.uses_tls:
            raise ConfigError("TLS files of the redis tier are for TLS; write rediss in its URL")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError(
                "a certificate for the redis tier and its key go together: set both, or neither"
            )
        for path in files:
            if path is not None and not path.is_file():
                raise ConfigError(f"{path}, a TLS file of the redis tier, cannot be read: no such file")


def parse_target(
    url: str,
    *,
    user: str | None = None,
    password_file: Path | None = None,
    sentinel_user: str | None = None,
    sentinel_password_file: Path | None = None,
    tls_ca: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
) -> RedisTarget:
    """Read a URL and what goes with it.

    Args:
        url: See the README; a login in it is the servers', never the sentinels'.
        user: ACL user, where the URL names none.
        password_file: Its password, where the URL has none.
        sentinel_user: ACL user at the sentinels.
        sentinel_password_file: Password at the sentinels.
        tls_ca: See `RedisTarget`.
        tls_cert: See `RedisTarget`.
        tls_key: See `RedisTarget`.

    Raises:
        ConfigError: Something does not fit; the message shows neither the URL nor a password.
    """
    arrangement, uses_tls, url_login, addresses, service, database = _split_url(url)
    url_user, _, url_password = url_login.partition(":")
    login = Login(
        user=unquote(url_user) or user,
        password=unquote(url_password) or None,
        password_file=password_file,
    )
    sentinel_login = Login(user=sentinel_user, password_file=sentinel_password_file)
    if arrangement is not Arrangement.SENTINEL and sentinel_login != Login():
        raise ConfigError("a login at sentinels is for a URL of redis+sentinel:// or rediss+sentinel://")
    for each in (login, sentinel_login):
        each.read()
    return RedisTarget(
        arrangement=arrangement,
        addresses=addresses,
        service=service,
        database=database,
        login=login,
        sentinel_login=sentinel_login,
        uses_tls=uses_tls,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )


def _split_url(url: str) -> tuple[Arrangement, bool, str, tuple[Address, ...], str, int]:
    if match := _UNIX_URL.fullmatch(url):
        address = Address(unquote(match["path"]), None)
        return (
            Arrangement.STANDALONE,
            False,
            match["login"] or "",
            (address,),
            "",
            int(match["database"] or 0),
        )
    match = _URL.fullmatch(url)
    if match is None:
        raise ConfigError(_HOW_TO_WRITE)
    protocol, _, kind = match["scheme"].partition("+")
    arrangement = Arrangement(kind or "standalone")
    hosts, *path = match["rest"].removesuffix("/").split("/")
    service = unquote(path.pop(0)) if arrangement is Arrangement.SENTINEL and path else ""
    database = path.pop(0) if path and arrangement is not Arrangement.CLUSTER else "0"
    default_port = _DEFAULT_SENTINEL_PORT if arrangement is Arrangement.SENTINEL else _DEFAULT_PORT
    addresses = tuple(_address(host, default_port) for host in hosts.split(","))
    if (
        path
        or not re.fullmatch(r"\d{1,4}", database)
        or (arrangement is Arrangement.SENTINEL) != bool(service)
        or (arrangement is Arrangement.STANDALONE and len(addresses) > 1)
    ):
        raise ConfigError(_HOW_TO_WRITE)
    return arrangement, protocol == "rediss", match["login"] or "", addresses, service, int(database)


def _address(text: str, default_port: int) -> Address:
    match = _HOST.fullmatch(text)
    if match is None or int(match["port"] or 0) > 65535:
        raise ConfigError(_HOW_TO_WRITE)
    return Address(match["host"].strip("[]"), int(match["port"] or default_port))


def _read_password(path: Path) -> str:
    content = read_secret_file(path, "password file", _MAX_PASSWORD_BYTES)
    line = content.split(b"\n", 1)[0].rstrip(b"\r")
    if not line or len(line) > _MAX_PASSWORD_BYTES:
        raise ConfigError(f"password file {path} must hold a password on its first line")
    try:
        return line.decode()
    except UnicodeDecodeError:
        # its cause would quote the password
        raise ConfigError(f"password file {path} must hold UTF-8 text") from None
