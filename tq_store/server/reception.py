"""Where every call of the store is received: who makes it, whether they may, and a note of how it went."""

from tq_store.errors import NotPermitted
from tq_store.server.audit import AuditLog
from tq_store.server.calls import IDENTITY, Call, is_local_peer
from tq_store.server.quotas import Quotas

_ADMIN_METHODS = frozenset({"Stats", "Inspect"})
"""They tell of all tenants at once. Purge is for one's own blocks; for more it asks the call itself."""


class Reception:
    """Knows the rules for callers; called from the event loop, for each call in its own task.

    With a tenants file, those tenants are admins of which it says so. Otherwise whoever calls from this
    machine is one, and callers from elsewhere only if told so.

    Args:
        quotas: Counts calls against tenants' rates.
        audit: Told how calls went.
        with_remote_admin: Whether callers from other machines may be admins without a tenants file.
    """

    def __init__(self, quotas: Quotas, audit: AuditLog, *, with_remote_admin: bool = False) -> None:
        self._quotas = quotas
        self._audit = audit
        self._with_remote_admin = with_remote_admin

    def identify(self, method: str, peer: str) -> Call:
        """The call that begins in the running task.

        Raises:
            LookupError: It has no identity, not even that of anybody: it came past the interceptor.
        """
        identity = IDENTITY.get()
        if identity.tenant.name:
            is_admin = identity.tenant.is_admin
        else:
            is_admin = self._with_remote_admin or is_local_peer(peer)
        return Call(method=method, identity=identity, peer=peer, is_admin=is_admin)

    def admit(self, call: Call) -> None:
        """Let a call in.

        Raises:
            NotPermitted: Only admins may make it.
            OverLimit: Its tenant calls too often, or too much at once.
        """
        self._quotas.begin(call)
        if call.method in _ADMIN_METHODS and not call.is_admin:
            raise NotPermitted(
                f"{call.method} takes an admin: a tenant that is one, or a call from the same machine"
            )

    def dismiss(self, call: Call, status: str, elapsed_s: float) -> None:
        """A call that was let in, or was not, has ended."""
        self._quotas.end(call)
        self._audit.call(call, status, elapsed_s)
