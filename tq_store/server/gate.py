"""The gate that every store call passes: let in or not, limited in number and time, errors made statuses."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from tq_store.errors import BackendFull, BackendUnavailable, NotPermitted, OverLimit, TQStoreError
from tq_store.rpc.status import RETRY_KEY, status_of
from tq_store.rpc.tracing import Tracing
from tq_store.server.calls import CALL
from tq_store.server.metrics import Metrics
from tq_store.server.reception import Reception

logger = logging.getLogger(__name__)

_STATUS_S = 1.0
"""How long a client may take to accept the status of a failed call; one that reads nothing never does."""

_FULL_RETRY_S = 1.0
"""When a call that the server had no room for may be worth another try."""

Context = grpc.aio.ServicerContext[Any, Any]


class CallGate:
    """Counts the calls in flight, to refuse more than it may let in and so that a drain can wait for them.

    Args:
        metrics: Told about each call.
        reception: Says who calls, and whether they may.
        tracing: Makes a span of each call, if there is any.
        call_timeout_s: Longest life of a call, whatever deadline its client set.
        max_calls: Calls at once; those beyond it are refused. Health checks do not come this way, so a server
            that is busy does not look dead.
    """

    def __init__(
        self,
        metrics: Metrics,
        reception: Reception,
        *,
        call_timeout_s: float,
        max_calls: int,
        tracing: Tracing | None = None,
    ) -> None:
        self._metrics = metrics
        self._reception = reception
        self._tracing = tracing
        self._call_timeout_s = call_timeout_s
        self._max_calls = max_calls
        self._num_active = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_draining = False

    async def run(self, method: str, context: Context, body: Callable[[], Awaitable[bytes | None]]) -> Any:
        """One call, from its first to its last byte. What the body raises becomes the call's status."""
        if self._tracing is None:
            return await self._run(method, context, body)
        with self._tracing.server_call(method, context.invocation_metadata()):
            return await self._run(method, context, body)

    async def _run(self, method: str, context: Context, body: Callable[[], Awaitable[bytes | None]]) -> Any:
        call = self._reception.identify(method, context.peer())
        CALL.set(call)
        started = time.perf_counter()
        self._metrics.started()
        self._num_active += 1
        self._is_idle.clear()
        code, text = grpc.StatusCode.OK, ""
        hint: tuple[tuple[str, str], ...] = ()
        try:
            if self._is_draining:
                raise BackendUnavailable("the server is shutting down")
            if self._num_active > self._max_calls:
                raise BackendFull(
                    f"{self._max_calls} calls are running, as many as max_concurrent_calls allows; try again"
                )
            self._reception.admit(call)
            async with asyncio.timeout(self._call_timeout_s):
                return await body()
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.InternalError:  # how grpc says, while we send, that the client has gone
            code = grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from None
        except (TQStoreError, ValueError, TimeoutError) as error:
            code, text = status_of(error), str(error) or "the call took longer than the server allows"
            hint = _retry_hint(error)
            if isinstance(error, NotPermitted):
                self._metrics.forbidden()
        except Exception:
            logger.exception("%s failed", method)
            code, text = grpc.StatusCode.INTERNAL, "the server failed; its log says how"
        finally:
            self._num_active -= 1
            if not self._num_active:
                self._is_idle.set()
            elapsed_s = time.perf_counter() - started
            self._metrics.finished(method, code.name, elapsed_s, tenant=call.tenant.name)
            self._reception.dismiss(call, code.name, elapsed_s)
            if self._tracing is not None:
                self._tracing.describe(
                    {
                        "rpc.grpc.status_code": int(code.value[0]),
                        "tq_store.tenant": call.tenant.name,
                        "tq_store.num_keys": call.num_keys,
                        "tq_store.num_bytes": call.num_bytes,
                    }
                )
        try:
            async with asyncio.timeout(_STATUS_S):
                return await context.abort(code, text, hint)
        except (TimeoutError, grpc.aio.InternalError):
            raise asyncio.CancelledError from None  # to grpc: give the call up as it is

    async def drain(self, grace_s: float) -> int:
        """Refuse new calls and wait for those in flight; returns how many were still there at the end."""
        self._is_draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._is_idle.wait()
        except TimeoutError:
            return self._num_active
        return 0


def _retry_hint(error: Exception) -> tuple[tuple[str, str], ...]:
    """Trailing metadata for a refusal that time may cure."""
    if isinstance(error, OverLimit):
        retry_after_s = error.retry_after_s
    elif isinstance(error, BackendFull):
        retry_after_s = _FULL_RETRY_S
    else:
        return ()
    return ((RETRY_KEY, str(math.ceil(1000 * retry_after_s))),)
