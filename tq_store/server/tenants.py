"""Tenants: the file that declares them, and how each gets keys that no other tenant can name.

A TOML file with a table for each::

    [search]
    tokens = ["5b1f0c2d9e8a7746:…"]     # from `tq-store token new search`; each line is valid while it stands
    bytes = "200GiB"                    # quotas, each optional
    keys = 1000000
    calls_per_second = 500
    calls_at_once = 64
    namespaces = ["9a41…"]              # optional: the only namespaces it may use, 64 hex digits each
    group = "answers"                   # optional: shares its blocks with the other tenants of the group
    admin = false                       # optional: may ask for stats, inspect blocks and purge everything

**Isolation.** A tenant's block lies under a namespace that is made from the tenant's *realm* (its group, or
else itself) and the namespace in its request: 8 bytes that stand for the realm, then 24 bytes of SHA-256 over
both. Whatever a tenant asks for, it names only blocks of its own realm: those of others are absent to it, by
the same way through the code and after the same time as blocks that do not exist.
"""

import hashlib
import struct
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tq_store.backends.usage import GROUP_BYTES
from tq_store.block import BlockInfo, verify_block
from tq_store.errors import ConfigError, IdentityMismatch, UnknownOwner
from tq_store.keys import DIGEST_BYTES, BlockKey, split_key
from tq_store.secret_file import read_secret_file
from tq_store.server.tokens import TokenEntry, parse_entry
from tq_store.settings import COUNT, SIZE, SWITCH

REALM_TAG_BYTES = GROUP_BYTES  # so that media count realms
_MAX_FILE_BYTES = 4 << 20
_MAX_NAME_CHARS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Someone with tokens, blocks and limits of their own.

    Args:
        name: In logs, metrics and the audit log; empty for the one tenant of a server without a tenants file.
        tokens: All that are valid now.
        group: Tenants of one group share their blocks; empty for a tenant that shares with nobody.
        quota_bytes: Bytes that its realm may hold, or None for no limit; likewise the other limits.
        quota_keys: Blocks that its realm may hold.
        calls_per_second: Calls that it may begin, on average over some seconds.
        calls_at_once: Calls that it may have in flight.
        namespaces: The only ones that it may use; empty for all.
        is_admin: Whether it may see and purge what is not its own.
        realm_tag: What the keys of its realm begin with; empty for the one tenant of a server without a file.
    """

    name: str
    tokens: tuple[TokenEntry, ...] = ()
    group: str = ""
    quota_bytes: int | None = None
    quota_keys: int | None = None
    calls_per_second: int | None = None
    calls_at_once: int | None = None
    namespaces: frozenset[bytes] = frozenset()
    is_admin: bool = False
    realm_tag: bytes = field(init=False)

    def __post_init__(self) -> None:
        tag = _hash("tq-store realm v1", self.realm.encode())[:REALM_TAG_BYTES] if self.name else b""
        object.__setattr__(self, "realm_tag", tag)

    @property
    def realm(self) -> str:
        """Whose blocks it sees; a group and a tenant of one name are two realms."""
        return f"group {self.group}" if self.group else f"tenant {self.name}"

    @property
    def has_quota(self) -> bool:
        """Whether what it may hold is limited."""
        return self.quota_bytes is not None or self.quota_keys is not None

    def store_namespace(self, namespace: bytes) -> bytes:
        """The namespace under which the store keeps what the tenant calls `namespace`, 32 bytes both."""
        if not self.name:
            return namespace
        mixed = _hash("tq-store tenant namespace v1", self.realm.encode(), namespace)
        return self.realm_tag + mixed[: DIGEST_BYTES - REALM_TAG_BYTES]


SOLE_TENANT = Tenant(name="")
"""Everybody, on a server without a tenants file. Its keys are the store's keys."""


class Tenants:
    """The tenants of one server at one time, found by token id and by realm. Immutable.

    Args:
        tenants: By name.

    Raises:
        ConfigError: A token stands for two tenants, or two realms have one tag.
    """

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self.by_name = dict(tenants)
        self._by_token: dict[str, tuple[Tenant, TokenEntry]] = {}
        self._by_tag: dict[bytes, Tenant] = {}
        for tenant in tenants.values():
            for entry in tenant.tokens:
                if entry.id in self._by_token:
                    raise ConfigError(f"the token {entry.id} stands twice in the tenants file")
                self._by_token[entry.id] = (tenant, entry)
            twin = self._by_tag.setdefault(tenant.realm_tag, tenant)
            if twin.realm != tenant.realm:
                raise ConfigError(f"rename {tenant.name}: its keys would begin as those of {twin.name} do")

    def of_token(self, token_id: str) -> tuple[Tenant, TokenEntry] | None:
        """The tenant and entry of a token id."""
        return self._by_token.get(token_id)

    def verify(self, block: bytes, key: BlockKey) -> BlockInfo:
        """As `verify_block`, for a key of the store: the block names the namespace that its tenant knows.

        Raises:
            BlockFormatError: As its subclasses say.
        """
        info = verify_block(block)
        namespace, prefix_hash = split_key(key)
        tenant = self._by_tag.get(namespace[:REALM_TAG_BYTES], SOLE_TENANT)
        if info.prefix_hash != prefix_hash:
            raise IdentityMismatch(f"a block of another key than {key.hex()[64:80]}")
        if tenant.store_namespace(info.namespace) != namespace:
            if (
                tenant is SOLE_TENANT
            ):  # left while it was being read, or known to other servers of this medium
                raise UnknownOwner(f"no tenant here has a block {key.hex()[64:80]} of this namespace")
            raise IdentityMismatch(f"a block of another key than {key.hex()[64:80]}, or of another tenant")
        return info


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("not a list of texts")
    return value


def _tokens(value: Any) -> tuple[TokenEntry, ...]:
    return tuple(map(parse_entry, _texts(value)))


def _namespaces(value: Any) -> frozenset[bytes]:
    digests = frozenset(map(bytes.fromhex, _texts(value)))
    if any(len(digest) != DIGEST_BYTES for digest in digests):
        raise ValueError(f"a namespace is written as {2 * DIGEST_BYTES} hex digits")
    return digests


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME_CHARS and value.isprintable()


def _group(value: Any) -> str:
    if not _is_name(value):
        raise ValueError("not a name")
    return str(value)


def _positive(value: int) -> int:
    if value < 1:
        raise ValueError("a limit is at least 1")
    return value


_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "tokens": ("tokens", _tokens),
    "bytes": ("quota_bytes", lambda value: _positive(SIZE.parse(value))),
    "keys": ("quota_keys", lambda value: _positive(COUNT.parse(value))),
    "calls_per_second": ("calls_per_second", lambda value: _positive(COUNT.parse(value))),
    "calls_at_once": ("calls_at_once", lambda value: _positive(COUNT.parse(value))),
    "namespaces": ("namespaces", _namespaces),
    "group": ("group", _group),
    "admin": ("is_admin", SWITCH.parse),
}
"""By key in the file: the field, and how its value is read."""


def load_tenants(path: Path) -> Tenants:
    """The tenants of a file.

    Raises:
        ConfigError: Not readable, readable by everybody, or not as this module's docstring says. The message
            shows no value, as it may be a token, by mistake.
    """
    content = read_secret_file(path, "tenants_file", _MAX_FILE_BYTES)
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"tenants_file {path} has more than {_MAX_FILE_BYTES} bytes")
    try:
        tables = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # whose message tells where, but may quote
        raise ConfigError(f"tenants_file {path} is not TOML") from error
    if not tables:
        raise ConfigError(f"tenants_file {path} declares no tenant; begin with a line [NAME]")
    return Tenants(_parse(path, tables))


def _parse(path: Path, tables: Mapping[str, Any]) -> dict[str, Tenant]:
    tenants = {}
    for name, table in tables.items():
        if not _is_name(name) or not isinstance(table, dict):
            raise ConfigError(
                f"tenants_file {path}: {name[:_MAX_NAME_CHARS]!r} declares no tenant; write [NAME] on a line "
                f"of its own, a name of at most {_MAX_NAME_CHARS} printable characters"
            )
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key not in _FIELDS:
                raise ConfigError(
                    f"tenants_file {path}: [{name}] has the unknown key {key[:_MAX_NAME_CHARS]!r}; "
                    f"known are {', '.join(_FIELDS)}"
                )
            field_name, parse = _FIELDS[key]
            try:
                values[field_name] = parse(value)
            except (ValueError, TypeError, OverflowError):
                # without the reason, which may quote the value
                raise ConfigError(f"tenants_file {path}: {key} of [{name}] is not understood") from None
        tenants[name] = Tenant(name=name, **values)
    return tenants


def _hash(domain: str, *parts: bytes) -> bytes:
    """SHA-256 over parts with their lengths, so that no two lists of parts run into each other."""
    hasher = hashlib.sha256(domain.encode())
    for part in parts:
        hasher.update(struct.pack("<I", len(part)) + part)
    return hasher.digest()
