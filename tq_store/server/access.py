"""Who may call, what they may hold, and what is written down about it: the parts, put together."""

import asyncio
from collections.abc import Sequence
from typing import Any

from tq_store.backends.base import Backend
from tq_store.config import ServerConfig
from tq_store.keys import BlockKey
from tq_store.server.activity import Activity
from tq_store.server.audit import AuditLog, FileSink, NoSink
from tq_store.server.auth import TokenInterceptor
from tq_store.server.credentials import Credentials
from tq_store.server.metrics import Metrics
from tq_store.server.quotas import Quotas, TenantUsage
from tq_store.server.realm_usage import RealmUsage
from tq_store.server.reception import Reception
from tq_store.server.tenant_store import TenantStore
from tq_store.tiering.store import TieredStore


class Access:
    """Made from a config before the tiers are; joined to them by `guard`; closed after them.

    Raises:
        ConfigError: A file of tokens or the audit log cannot be used.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        sink = FileSink(config.audit_log, metrics.audit_dropped) if config.audit_log else NoSink()
        self._audit = AuditLog(sink, with_all_calls=config.audit_all)
        self._tasks: list[asyncio.Task[None]] = []
        try:
            self._credentials = Credentials(
                token_file=config.token_file, tenants_file=config.tenants_file, on_reload=self._on_reload
            )
        except BaseException:
            self._audit.close()
            raise
        self._audit.server("start", listen=config.listen, tenants=len(self._credentials.directory.tenants))

    def verify(self, block: bytes, key: BlockKey) -> object:
        """Check a block of the store against its key; raises BlockFormatError."""
        return self._credentials.verify(block, key)

    def interceptor(self) -> TokenInterceptor:
        """Turns strangers away."""
        return TokenInterceptor(self._credentials, self._metrics, self._audit)

    def guard(
        self, store: TieredStore, tiers: Sequence[Backend], activity: Activity
    ) -> tuple[Reception, TenantStore]:
        """The way in for calls, and the store as they may see it; from now on tokens may change."""
        realms = RealmUsage(tiers)
        self._quotas = Quotas(self._metrics, realms, store.delete)
        self._tasks.append(asyncio.create_task(self._credentials.watch()))
        if self._config.tenants_file is not None:
            self._tasks.append(asyncio.create_task(realms.watch()))
        reception = Reception(self._quotas, self._audit, with_remote_admin=self._config.remote_admin)
        return reception, TenantStore(store, self._metrics, activity, self._quotas)

    def usage(self) -> list[TenantUsage]:
        """What tenants hold, for metrics."""
        return self._quotas.usage_by_label(self._credentials.directory.tenants.values())

    def reload(self) -> None:
        """Read the tokens again."""
        self._credentials.reload()

    async def close(self) -> None:
        """Stop watching, then write down that the server stops."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._audit.server("stop")
        await asyncio.to_thread(self._audit.close)

    def _on_reload(self, result: str) -> None:
        self._metrics.reloaded(result)
        facts: dict[str, Any] = {"outcome": result, "tenants": len(self._credentials.directory.tenants)}
        self._audit.server("reload", **facts)
