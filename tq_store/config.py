"""Settings of server and client, and the one function that reads them.

A setting is called the same everywhere: `memory_budget` in the file, `--memory-budget` on the command line,
`TQ_STORE_MEMORY_BUDGET` in the environment, `memory_budget_bytes` in the object, where the unit is fixed.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tq_store.errors import ConfigError
from tq_store.settings import (
    COUNT,
    DURATION,
    ENVIRONMENT_PREFIX,
    PATH,
    SIZE,
    SWITCH,
    TEXT,
    Setting,
    about,
    choice,
    settings,
)

_REDIS_LOGIN = ("user", "password_file", "sentinel_user", "sentinel_password_file")
DEFAULT_ADDRESS = "127.0.0.1:7437"
CODING = choice("none", "zstd")
_LONGEST_S = 20 * 86_400
"""Of a deadline: grpc counts some of them in 32 bits of milliseconds."""
_KUBERNETES_NAME = re.compile(r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP)(_.+)?)")
_KUBERNETES_VALUE = re.compile(r"(tcp|udp)://.*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of `tq-store serve`; each field's meaning is its `help`."""

    listen: str = field(
        default=DEFAULT_ADDRESS,
        metadata=about(TEXT, "where to listen: host:port (port 0 picks one) or unix:path", "ADDRESS"),
    )
    local_socket: Path | None = field(
        default=None,
        metadata=about(PATH, "listen on this Unix socket too, without TLS, for clients of this host"),
    )
    shared_segments: int = field(
        default=128,
        metadata=about(COUNT, "pieces of memory that clients on a Unix socket may share; 0 takes none"),
    )
    payload_port: int | None = field(
        default=None,
        metadata=about(
            COUNT,
            "port for block bytes beside grpc (0 picks one); by default one is picked on loopback without"
            " TLS, and none opened elsewhere",
            "PORT",
        ),
    )
    payload_pipes: int = field(
        default=256,
        metadata=about(COUNT, "connections that clients may have on that port; 0 opens none"),
    )
    memory_budget_bytes: int = field(
        default=1 << 30, metadata=about(SIZE, "host memory for blocks, payload and headers")
    )
    disk_path: Path | None = field(
        default=None, metadata=about(PATH, "directory of the disk tier; no disk tier without it")
    )
    disk_budget_bytes: int | None = field(
        default=None, metadata=about(SIZE, "disk space for blocks; required with a disk path")
    )
    disk_coding: str = field(
        default="none",
        metadata=about(CODING, "compress blocks on disk: 3 to 8 % smaller, for a core's time"),
    )
    redis_url: str | None = field(
        default=None,
        repr=False,  # may hold a password
        metadata=about(
            TEXT,
            "shared tier: redis://host:6379/0, redis+sentinel://host,host/service, redis+cluster://host,host,"
            " with rediss for TLS, or unix:///path",
            "URL",
        ),
    )
    redis_coding: str = field(
        default="none",
        metadata=about(CODING, "compress blocks in the shared tier: 3 to 8 % smaller, for a core's time"),
    )
    redis_user: str | None = field(
        default=None, metadata=about(TEXT, "ACL user of the shared tier, where its URL names none", "NAME")
    )
    redis_password_file: Path | None = field(
        default=None,
        metadata=about(PATH, "password of the shared tier, on the first line; read at each new connection"),
    )
    redis_sentinel_user: str | None = field(
        default=None, metadata=about(TEXT, "ACL user at the sentinels, where they ask for one", "NAME")
    )
    redis_sentinel_password_file: Path | None = field(
        default=None, metadata=about(PATH, "password at the sentinels, on the first line")
    )
    redis_tls_ca: Path | None = field(
        default=None,
        metadata=about(PATH, "CA of the shared tier's certificates, PEM; without it the system's"),
    )
    redis_tls_cert: Path | None = field(
        default=None, metadata=about(PATH, "certificate to show the shared tier, PEM")
    )
    redis_tls_key: Path | None = field(
        default=None, metadata=about(PATH, "private key of that certificate, PEM")
    )
    redis_ttl_s: float | None = field(
        default=None,
        metadata=about(DURATION, "shared tier: forget blocks neither put nor got for so long; a get counts"),
    )
    redis_timeout_s: float = field(
        default=2.0, metadata=about(DURATION, "shared tier: longest wait for a block, once its turn has come")
    )
    redis_lookup_timeout_s: float = field(
        default=0.5, metadata=about(DURATION, "shared tier: longest wait for an answer that moves no blocks")
    )
    write_queue_bytes: int = field(
        default=256 << 20,
        metadata=about(SIZE, "blocks waiting for a lower tier; beyond it they are not written there"),
    )
    metrics_port: int | None = field(
        default=None, metadata=about(COUNT, "serve Prometheus metrics on this port (0 picks one)", "PORT")
    )
    metrics_host: str = field(
        default="127.0.0.1", metadata=about(TEXT, "address of the metrics port", "HOST")
    )
    tls_cert: Path | None = field(default=None, metadata=about(PATH, "server certificate chain, PEM"))
    tls_key: Path | None = field(default=None, metadata=about(PATH, "private key of the certificate, PEM"))
    tls_client_ca: Path | None = field(
        default=None, metadata=about(PATH, "demand client certificates signed by this CA, PEM")
    )
    token_file: Path | None = field(
        default=None,
        metadata=about(
            PATH,
            "demand one of the tokens in this file, one a line, or what `tq-store token new` prints for them",
        ),
    )
    tenants_file: Path | None = field(
        default=None,
        metadata=about(PATH, "demand a token of a tenant in this file; `tq-store token new` makes them"),
    )
    remote_admin: bool = field(
        default=False,
        metadata=about(
            SWITCH, "with a token_file: answer stats, inspect and purge --all from other machines"
        ),
    )
    audit_log: Path | None = field(
        default=None, metadata=about(PATH, "append a JSON line for each admin call, deletion and refusal")
    )
    audit_all: bool = field(
        default=False, metadata=about(SWITCH, "a line in the audit log for every other call too")
    )
    trace_endpoint: str | None = field(
        default=None,
        metadata=about(
            TEXT, "send OpenTelemetry traces there by OTLP/gRPC, e.g. http://localhost:4317", "URL"
        ),
    )
    log_format: str = field(
        default="text", metadata=about(choice("text", "json"), "how the log on stderr is written")
    )
    max_inflight_bytes: int = field(
        default=24 << 20,
        metadata=about(
            SIZE, "blocks being received at once; a put beyond it waits, and is refused after 15 s"
        ),
    )
    max_outflight_bytes: int = field(
        default=24 << 20,
        metadata=about(SIZE, "blocks being sent at once; a get beyond it waits, and is refused after 15 s"),
    )
    max_concurrent_calls: int = field(
        default=256, metadata=about(COUNT, "calls at once; a call beyond it is refused")
    )
    call_timeout_s: float = field(
        default=120.0, metadata=about(DURATION, "longest life of a call, whatever the client asks")
    )
    grace_s: float = field(
        default=20.0, metadata=about(DURATION, "time that calls in flight get to finish at shutdown")
    )

    def __post_init__(self) -> None:
        _, port = split_address(self.listen)
        if self.local_socket is not None and port is None:
            raise ConfigError(f"listen is {self.listen} already, a Unix socket: leave local_socket out")
        sizes = ("memory_budget_bytes", "disk_budget_bytes", "write_queue_bytes")
        flights = ("max_inflight_bytes", "max_outflight_bytes")
        _check_positive(self, *sizes, *flights, "max_concurrent_calls", "call_timeout_s")
        _check_counts(self, "shared_segments", "payload_pipes")
        if (self.disk_path is None) != (self.disk_budget_bytes is None):
            raise ConfigError("disk_path and disk_budget go together: set both, or neither")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together: set both, or neither")
        _check_positive(self, "redis_timeout_s", "redis_lookup_timeout_s")
        given = [
            name
            for name in (*_REDIS_LOGIN, "tls_ca", "tls_cert", "tls_key", "ttl_s")
            if getattr(self, f"redis_{name}") is not None
        ]
        if given and self.redis_url is None:
            raise ConfigError(f"redis_{given[0].removesuffix('_s')} is for a shared tier; set redis_url too")
        if self.redis_ttl_s is not None and self.redis_ttl_s < 1:
            raise ConfigError(f"redis_ttl_s is {self.redis_ttl_s}; it must be at least 1")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("tls_client_ca asks clients for certificates; set tls_cert and tls_key too")
        for name in ("metrics_port", "payload_port"):
            number = getattr(self, name)
            if number is not None and not 0 <= number <= 65535:
                raise ConfigError(f"{name} is {number}; a port lies in 0 to 65535")
        if self.payload_port is not None and port is None:
            raise ConfigError(f"payload_port is for clients by TCP; listen is {self.listen}")
        if self.token_file is not None and self.tenants_file is not None:
            raise ConfigError(
                "token_file and tenants_file exclude each other: give tokens to tenants, or to all"
            )
        if self.audit_all and self.audit_log is None:
            raise ConfigError("audit_all says what goes into the audit log; set audit_log too")
        needed = (
            ("--tls-cert and --tls-key", self.tls_cert),
            ("--token-file or --tenants-file", self.token_file or self.tenants_file),
        )
        missing = [flag for flag, path in needed if path is None]
        if missing and not is_local(self.listen):
            raise ConfigError(
                f"listen is {self.listen}, which other machines can reach: add {' and '.join(missing)}, "
                f"or listen on 127.0.0.1"
            )

    @property
    def pipe_port(self) -> int | None:
        """The port for block bytes, 0 to pick one; None for none."""
        _, port = split_address(self.listen)
        if port is None or not self.payload_pipes:
            return None
        if self.payload_port is None and is_local(self.listen) and self.tls_cert is None:
            return 0
        return self.payload_port

    @property
    def local_path(self) -> Path | None:
        """The Unix socket on which clients of this host call, if there is one."""
        path, port = split_address(self.listen)
        return Path(path) if port is None else self.local_socket


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Settings of a client; each field's meaning is its `help`."""

    address: str = field(
        default=DEFAULT_ADDRESS,
        metadata=about(TEXT, "where the server is: host:port or unix:path", "ADDRESS"),
    )
    connect_timeout_s: float = field(
        default=2.0, metadata=about(DURATION, "longest wait for a connection to come up")
    )
    lookup_timeout_s: float = field(
        default=1.0, metadata=about(DURATION, "deadline of lookup, contains and ping, retries included")
    )
    transfer_timeout_s: float = field(
        default=30.0, metadata=about(DURATION, "deadline of a get or a put, retries included")
    )
    admin_timeout_s: float = field(
        default=30.0, metadata=about(DURATION, "deadline of stats, inspect, delete and purge")
    )
    connections: int = field(
        default=1,
        metadata=about(COUNT, "to the server; several, of 16 MiB each, where one does not fill the link"),
    )
    shared_memory_bytes: int = field(
        default=32 << 20,
        metadata=about(
            SIZE,
            "memory shared with the server on a Unix socket, for each of at most 8 transfers, two pieces for "
            "a load; 0 streams",
        ),
    )
    pipes: int = field(
        default=8,
        metadata=about(
            COUNT, "connections beside grpc for the bytes of gets, where the server has them; 0 streams"
        ),
    )
    max_attempts: int = field(
        default=3,
        metadata=about(COUNT, "times that a call is tried which changes nothing"),
    )
    backoff_s: float = field(
        default=0.05, metadata=about(DURATION, "mean pause before the second attempt; doubles, with jitter")
    )
    tls: bool = field(default=False, metadata=about(SWITCH, "use TLS and the system's authorities"))
    tls_ca: Path | None = field(
        default=None,
        metadata=about(PATH, "use TLS; the server's certificate is signed by this CA, PEM"),
    )
    tls_cert: Path | None = field(default=None, metadata=about(PATH, "certificate to show the server, PEM"))
    tls_key: Path | None = field(default=None, metadata=about(PATH, "private key of that certificate, PEM"))
    token_file: Path | None = field(
        default=None,
        metadata=about(PATH, "show the server the first token in this file; may be replaced while in use"),
    )
    trace: bool = field(
        default=False, metadata=about(SWITCH, "make OpenTelemetry spans, with the process's own provider")
    )

    def __post_init__(self) -> None:
        split_address(self.address)
        timeouts = ("connect_timeout_s", "lookup_timeout_s", "transfer_timeout_s", "admin_timeout_s")
        _check_positive(self, *timeouts, "max_attempts", "backoff_s", "connections")
        _check_counts(self, "pipes")
        if not 0 <= self.shared_memory_bytes <= 1 << 30:
            raise ConfigError(
                f"shared_memory is {self.shared_memory_bytes} bytes; at most 1 GiB can be shared"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together: set both, or neither")
        if self.tls_cert is not None and not self.uses_tls:
            raise ConfigError("tls_cert is shown over TLS only; set tls_ca or tls too")

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls or self.tls_ca is not None


Config = TypeVar("Config", ServerConfig, ClientConfig)
_TABLES: dict[str, type[ServerConfig] | type[ClientConfig]] = {"server": ServerConfig, "client": ClientConfig}


def load_config(
    config_type: type[Config],
    *,
    arguments: Mapping[str, Any],
    file: Path | None = None,
    environment: Mapping[str, str],
) -> Config:
    """Settings from all sources: an argument beats the file, the file the environment, that the default.

    Args:
        config_type: `ServerConfig` or `ClientConfig`.
        arguments: Explicit values by setting name.
        file: TOML with the tables ``[server]`` and ``[client]``.
        environment: Usually `os.environ`; only names that start with ``TQ_STORE_`` are looked at.

    Raises:
        ConfigError: A key is unknown (the message names the nearest), a value not understood or not allowed.
    """
    known = settings(config_type)
    sources: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("environment", _from_environment(known, environment)),
        (str(file), _from_file(config_type, file) if file else {}),
        ("arguments", arguments),
    )
    values: dict[str, Any] = {}
    for source, given in sources:
        for name, value in given.items():
            if name not in known:
                _reject_unknown(name, known, source)
            values[known[name].field_name] = _parse(known[name], value, source)
    return config_type(**values)


def _parse(setting: Setting, value: Any, source: str) -> Any:
    try:
        return setting.kind.parse(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"{setting.name} ({source}): {value!r} is not understood; "
            f"write for example {setting.kind.example}"
        ) from error


def _from_environment(known: Mapping[str, Setting], environment: Mapping[str, str]) -> dict[str, str]:
    """Our variables, less those that Kubernetes sets for every Service whose name starts with tq-store."""
    variables = {setting.variable for table in _TABLES.values() for setting in settings(table).values()}
    own = {
        name: value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX)
        and not _KUBERNETES_NAME.fullmatch(name.removeprefix(ENVIRONMENT_PREFIX))
        and not _KUBERNETES_VALUE.fullmatch(value)
    }
    for name in own.keys() - variables:
        _reject_unknown(name, variables, "environment")
    return {name: own[setting.variable] for name, setting in known.items() if setting.variable in own}


def _from_file(config_type: type[Config], file: Path) -> Mapping[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config file {file} is not TOML: {error}") from error
    for name, table in content.items():
        if name not in _TABLES:
            _reject_unknown(name, _TABLES, str(file))
        if not isinstance(table, dict):
            raise ConfigError(f"{name} ({file}) is a table: write [{name}] on a line of its own")
    own: list[Mapping[str, Any]] = [content[name] for name in content if _TABLES[name] is config_type]
    return own[0] if own else {}


def _reject_unknown(name: str, known: Iterable[str], source: str) -> NoReturn:
    (nearest,) = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
    raise ConfigError(f"unknown setting {name!r} ({source}); did you mean {nearest!r}?")


def _check_counts(config: ServerConfig | ClientConfig, *names: str) -> None:
    for name in names:
        if (count := getattr(config, name)) < 0:
            raise ConfigError(f"{name} is {count}; it must be 0 or more")


def _check_positive(config: ServerConfig | ClientConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}; it must be greater than 0")
        if name.endswith("_s") and not value <= _LONGEST_S:
            raise ConfigError(f"{name} is {value}; it must be at most {_LONGEST_S} seconds, 20 days")


def split_address(address: str) -> tuple[str, int | None]:
    """Host and port of ``host:port`` or ``[v6]:port``; for ``unix:path``, the path and None.

    Raises:
        ConfigError: Neither.
    """
    if address.startswith("unix:") and len(address) > len("unix:"):
        return address.removeprefix("unix:"), None
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]/\s]+):(\d{1,5})", address)
    if not match or int(match[2]) > 65535:
        raise ConfigError(f"{address!r} is not an address; write host:port, [v6]:port or unix:path")
    return match[1].strip("[]"), int(match[2])


def is_local(address: str) -> bool:
    """Whether only this machine can reach an address: a Unix socket, 127.0.0.0/8, ::1 or localhost."""
    host, port = split_address(address)
    if port is None or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
