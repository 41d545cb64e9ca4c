"""Who may call: every call but a health check shows a token from the token file."""

import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from tq_store.rpc.token import METADATA_KEY, bearer

# probes carry no secrets, and learn none; Watch is not for them, as it lasts and would fill the server
_OPEN_METHOD = "/grpc.health.v1.Health/Check"


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Turns calls without a valid token away, before anything of them is read.

    Args:
        tokens: Those that are accepted.
        on_denied: Told the full name of the method of each call that was turned away.
    """

    def __init__(self, tokens: Sequence[str], on_denied: Callable[[str], None]) -> None:
        self._accepted = [bearer(token).encode() for token in tokens]
        self._on_denied = on_denied

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called by grpc for every call."""
        method = handler_call_details.method
        if method == _OPEN_METHOD or self._is_accepted(handler_call_details.invocation_metadata):
            return await continuation(handler_call_details)
        self._on_denied(method)
        # a stream handler fits calls of every shape: it answers without reading
        return grpc.stream_stream_rpc_method_handler(_deny)

    def _is_accepted(self, metadata: Sequence[tuple[str, str | bytes]]) -> bool:
        shown = [value for name, value in metadata if name == METADATA_KEY]
        if len(shown) != 1:
            return False
        value = shown[0].encode() if isinstance(shown[0], str) else shown[0]
        # all of them, so that the time taken does not tell which one came close
        return any([hmac.compare_digest(value, accepted) for accepted in self._accepted])


async def _deny(_: object, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong; give the client a token_file"
    )
