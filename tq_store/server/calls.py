"""One call: who makes it, from where, and what it has touched so far."""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from urllib.parse import unquote

from tq_store.keys import BlockKey, split_key
from tq_store.server.tenants import SOLE_TENANT, Tenant

KEY_PREFIX_CHARS = 16
"""Hex digits of a key's prefix hash, and of its namespace, that logs may show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whom a token stands for.

    Args:
        tenant: Whose it is.
        token_id: The token's public name; empty where no token is demanded.
    """

    tenant: Tenant
    token_id: str


ANYBODY = Identity(tenant=SOLE_TENANT, token_id="")
"""Whoever calls a server that demands no token."""


@dataclass(slots=True, kw_only=True)
class Call:
    """A call in flight.

    Args:
        method: Short name.
        identity: Who calls.
        peer: Where from, as grpc writes it.
        is_admin: Whether it may see and purge what is not its own.
        num_keys: Keys and blocks that it has named.
        num_bytes: Block bytes that it has read and stored.
        key_prefix: First hex digits of its first key's prefix hash.
        scope: First hex digits of the namespace that it names first, or ``all``.
        is_counted: Whether it is one of those that its tenant may have in flight.
        reserved: Bytes and blocks of its tenant's quota, for what it is sending; None for nothing.
    """

    method: str
    identity: Identity
    peer: str
    is_admin: bool
    num_keys: int = 0
    num_bytes: int = 0
    key_prefix: str = ""
    scope: str = ""
    is_counted: bool = False
    reserved: tuple[int, int] | None = None

    @property
    def tenant(self) -> Tenant:
        """Who calls."""
        return self.identity.tenant

    def note_keys(self, keys: Sequence[BlockKey]) -> None:
        """It names these keys."""
        if keys and not self.num_keys:
            namespace, prefix_hash = split_key(keys[0])
            self.key_prefix = prefix_hash.hex()[:KEY_PREFIX_CHARS]
            self.note_namespace(namespace)
        self.num_keys += len(keys)

    def note_namespace(self, namespace: bytes | None) -> None:
        """It names this namespace, or with None all there are."""
        self.scope = "all" if namespace is None else namespace.hex()[:KEY_PREFIX_CHARS]


IDENTITY: ContextVar[Identity] = ContextVar("tq_store_identity")
"""Set for each call before its method is found; a call without one came past the interceptor, and fails."""
CALL: ContextVar[Call] = ContextVar("tq_store_call")
"""The call that the running task serves, from the gate on."""


def is_local_peer(peer: str) -> bool:
    """Whether grpc's name of a peer is this machine: a Unix socket or a loopback address."""
    kind, _, rest = unquote(peer).partition(":")
    if kind in ("unix", "unix-abstract"):
        return True
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
