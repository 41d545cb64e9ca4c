"""Tokens of tenants: made here, shown once, kept as hashes and compared in constant time.

A token is ``tqs_<id>_<secret>``: a public id of 64 bits and a secret of 256 random bits. At rest stands
``<id>:<hash>``. The hash is SHA-256 over id and secret, not a slow one such as scrypt: slowness protects
secrets that can be guessed, and 256 random bits cannot, whatever a guess costs; but each call checks a
token, and tens of milliseconds for whoever sends one would be a lever to stop the server with. The id is the
salt. It also finds the one hash to compare with, and names the token in the audit log, so that an operator
sees when an old one is no longer used.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

_ID_BYTES = 8
_SECRET_BYTES = 32
_TOKEN = re.compile(rf"tqs_([0-9a-f]{{{2 * _ID_BYTES}}})_([0-9a-f]{{{2 * _SECRET_BYTES}}})")
_ENTRY = re.compile(rf"([0-9a-f]{{{2 * _ID_BYTES}}}):([0-9a-f]{{64}})")
_NOBODY = bytes(32)
"""No token hashes to this; compared with for an id that nobody has, so that it takes as long."""


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token as the tenants file keeps it.

    Args:
        id: Public; names the token in logs.
        digest: Hash of the whole token, 32 bytes.
    """

    id: str
    digest: bytes

    def __str__(self) -> str:
        return f"{self.id}:{self.digest.hex()}"


def new_token() -> tuple[str, TokenEntry]:
    """A token that nobody had before, and its entry for the file. The token cannot be got back from it."""
    token_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_hex(_SECRET_BYTES)
    return f"tqs_{token_id}_{secret}", TokenEntry(token_id, _digest(token_id, secret))


def parse_entry(text: str) -> TokenEntry:
    """An entry of the file.

    Raises:
        ValueError: Not ``<id>:<hash>``. The message does not show the text: it may be a token, by mistake.
    """
    match = _ENTRY.fullmatch(text)
    if not match:
        raise ValueError("not what `tq-store token new` prints for the file: 16 hex digits, a colon, 64 more")
    return TokenEntry(match[1], bytes.fromhex(match[2]))


def token_id_of(token: str) -> str | None:
    """The public id in something that has the shape of a token, or None."""
    match = _TOKEN.fullmatch(token)
    return match[1] if match else None


def matches(token: str, entry: TokenEntry | None) -> bool:
    """Whether a token is the one of an entry; takes the same time for a wrong one and for no entry."""
    match = _TOKEN.fullmatch(token)
    if not match:
        return False
    expected = entry.digest if entry else _NOBODY
    return hmac.compare_digest(_digest(match[1], match[2]), expected) and entry is not None


def _digest(token_id: str, secret: str) -> bytes:
    return hashlib.sha256(f"tq-store token v1\n{token_id}\n{secret}".encode()).digest()
