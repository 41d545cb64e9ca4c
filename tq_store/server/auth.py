"""Who may call: every call but a health check shows a valid token, where tokens are demanded."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from tq_store.server.audit import AuditLog
from tq_store.server.calls import IDENTITY
from tq_store.server.credentials import Credentials
from tq_store.server.metrics import Metrics

# probes carry no secrets, and learn none; Watch is not for them, as it lasts and would fill the server
_OPEN_METHOD = "/grpc.health.v1.Health/Check"


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Turns calls without a valid token away, before anything of them is read; says who makes the others.

    Args:
        credentials: Who is who.
        metrics: Told of calls that were turned away.
        audit: Told of them too.
    """

    def __init__(self, credentials: Credentials, metrics: Metrics, audit: AuditLog) -> None:
        self._credentials = credentials
        self._metrics = metrics
        self._audit = audit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called by grpc for every call, in the task that then serves it."""
        method = handler_call_details.method
        if method == _OPEN_METHOD:
            return await continuation(handler_call_details)
        identity = self._credentials.identify(handler_call_details.invocation_metadata)
        if identity is not None:
            IDENTITY.set(identity)
            return await continuation(handler_call_details)
        self._metrics.denied(method)
        # a stream handler fits calls of every shape: it answers without reading
        return grpc.stream_stream_rpc_method_handler(self._deny(method))

    def _deny(self, method: str) -> Callable[[Any, Any], Awaitable[None]]:
        async def deny(_: object, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
            self._audit.denied(method, context.peer())
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong; give the client a token_file"
            )

        return deny
