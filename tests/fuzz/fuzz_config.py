"""Fuzz target over settings: a TOML file, variables of the environment, values on the command line."""

import math
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fuzz.driver import mutated

from tq_store.config import ClientConfig, ServerConfig, load_config
from tq_store.errors import ConfigError
from tq_store.settings import settings

_FILE = b"""\
[server]
listen = "127.0.0.1:7437"
memory_budget = "8GiB"
disk_path = "/var/lib/tq-store"
disk_budget = 200_000_000
write_queue = "1.5 MiB"
call_timeout = "500ms"
grace = 2.5
max_concurrent_calls = 64
metrics_port = 0

[client]
address = "[::1]:7437"
lookup_timeout = "1s"
tls = true
max_attempts = 3
"""
_PIECES = [
    *(b"0", b"-1", b"1e999", b"nan", b"inf", b"9" * 400, b"0x10", b"true", b"[", b"]", b"{", b"}", b"'''"),
    *(b"\xff", b"\x00", "\u0663".encode(), b"MiB", b"h", b" ", b"\n", b"=", b"[server]\n", b"[[server]]\n"),
    *(b"server.a.b = 1\n", b"1979-05-27T07:32:00Z", b"unix:", b"host:99999", b"[" * 3000, b"a." * 3000),
    b"x = " + b"[" * 3000,
]
_TYPES = (ServerConfig, ClientConfig)
_NAMES = [(kind, name) for kind in _TYPES for name in settings(kind)]


def generate(rng: random.Random) -> bytes:
    """A file, or the value of one setting."""
    if rng.random() < 0.5:
        return b"\0" + mutated(rng, _FILE, _PIECES)
    kind, name = rng.choice(_NAMES)
    value = settings(kind)[name].shown_default or rng.choice(["8GiB", "500ms", "12", "true", "/tmp/x"])
    number = _NAMES.index((kind, name))
    return bytes([1 + number % 255]) + mutated(rng, value.encode(), _PIECES)


@contextmanager
def opened() -> Iterator[Callable[[bytes], Iterator[str]]]:
    """With a file to write."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "tq-store.toml"
        yield lambda data: _outcomes(data, file)


def _outcomes(data: bytes, file: Path) -> Iterator[str]:
    if not data or data[0] == 0:
        file.write_bytes(data[1:])
        for kind in _TYPES:
            yield _load(kind, file=file)
        return
    kind, name = _NAMES[(data[0] - 1) % len(_NAMES)]
    text = data[1:].decode(errors="surrogateescape")
    yield _load(kind, arguments={name: text})
    yield _load(kind, environment={settings(kind)[name].variable: text})


def _load(
    kind: type[ServerConfig | ClientConfig],
    *,
    arguments: dict[str, str] | None = None,
    environment: dict[str, str] | None = None,
    file: Path | None = None,
) -> str:
    try:
        config = load_config(kind, arguments=arguments or {}, environment=environment or {}, file=file)
    except ConfigError:
        return "refused"
    for setting in settings(kind).values():
        value = getattr(config, setting.field_name)
        if setting.field_name.endswith(("_bytes", "_s")) and value is not None:
            assert value >= 0, f"{setting.name} is {value}"
            assert math.isfinite(value), f"{setting.name} is {value}"
    return "config"
