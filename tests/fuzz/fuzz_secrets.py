"""Fuzz target over files with secrets and what shows them: no crash, and no secret in a message."""

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fuzz.driver import mutated

from tq_store.backends.redis_target import parse_target
from tq_store.errors import ConfigError
from tq_store.rpc.token import MIN_TOKEN_CHARS, bearer, load_tokens
from tq_store.server.credentials import Credentials
from tq_store.server.tenants import load_tenants
from tq_store.server.tokens import new_token, parse_entry

_SECRET = "s3cret-that-nobody-may-read-in-a-log"
_TOKENS = f"{_SECRET}\n{'b' * MIN_TOKEN_CHARS}\n".encode()
_ENTRY = f"{'5b1f0c2d' * 2}:{'ab' * 32}"
_TENANTS = f"""\
[search]
tokens = ["{_ENTRY}"]
bytes = "200GiB"
keys = 1000000
calls_per_second = 500
namespaces = ["{"9a" * 32}"]
group = "answers"

[chat]
tokens = []
admin = false
""".encode()
_PIECES = [
    *(b"[", b"]", b'"', b"'", b"\n", b"\r", b"=", b"{", b"}", b"\x00", b"\xff", "\u00e9".encode()),
    *(
        b"-1",
        b"1e400",
        b"9" * 5000,
        b"[" * 3000,
        b"a." * 3000,
        b"true",
        f'"{_SECRET}"'.encode(),
        b"[search]\n",
    ),
]
_PIECES += [b"x = " + b"[" * 3000, f'secret = "{_SECRET}"\n'.encode(), f'tokens = ["{_SECRET}"]\n'.encode()]
_TOKEN, _TOKEN_ENTRY = new_token()
_METADATA = [bearer(_TOKEN).encode(), b"Bearer ", b"Bearer tqs_", b"Basic abc"]
_NUM_KINDS = 5


def generate(rng: random.Random) -> bytes:
    """A file of tokens, one of tenants, one with a password, what a call shows, or a line for the file."""
    kind = rng.randrange(_NUM_KINDS)
    start = (_TOKENS, _TENANTS, f"{_SECRET}\n".encode(), rng.choice(_METADATA), _ENTRY.encode())[kind]
    return bytes([kind]) + mutated(rng, start, _PIECES)


@contextmanager
def opened() -> Iterator[Callable[[bytes], Iterator[str]]]:
    """With a file to write, and credentials that know one tenant."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        known = Path(directory) / "known"
        known.touch(mode=0o600)
        known.write_text(f'[search]\ntokens = ["{_TOKEN_ENTRY}"]\n')
        credentials = Credentials(tenants_file=known)
        path.touch(mode=0o600)
        yield lambda data: _outcomes(data, path, credentials)


def _outcomes(data: bytes, path: Path, credentials: Credentials) -> Iterator[str]:
    kind, content = (data or b"\0")[0] % _NUM_KINDS, data[1:]
    if kind == 3:
        is_token = content == bearer(_TOKEN).encode()
        for shown in (content.decode("latin-1"), content):
            identity = credentials.identify((("authorization", shown),))
            assert (identity is not None) == is_token, "a token that is not one, or one that is not taken"
        yield "tenant" if is_token else "stranger"
        return
    path.write_bytes(content)
    load: tuple[Callable[[], object], ...] = (
        lambda: load_tokens(path),
        lambda: load_tenants(path),
        lambda: parse_target("redis://host", user="user", password_file=path),
        lambda: None,
        lambda: parse_entry(content.decode("latin-1")),
    )
    refusals: tuple[type[Exception], ...] = (ValueError,) if kind == 4 else (ConfigError,)
    try:
        load[kind]()
    except refusals as error:
        refusal = error
    else:
        yield ("tokens", "tenants", "password", "", "entry")[kind]
        return
    assert _SECRET not in str(refusal), "a message shows a secret"
    # of a tenants file, the cause may quote; nothing prints it
    assert kind == 1 or _SECRET not in str(refusal.__cause__), "the cause of an error shows a secret"
    yield "refused"
