"""Our errors and gRPC status codes, translated both ways by one table."""

import grpc

from tq_store.errors import (
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
    BlockFormatError,
    NotPermitted,
    OverLimit,
    RpcDenied,
    RpcError,
    RpcOverLimit,
    RpcTimeout,
    RpcUnavailable,
    RpcUnknown,
)

ERROR_STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (RpcTimeout, grpc.StatusCode.DEADLINE_EXCEEDED),
    (RpcUnavailable, grpc.StatusCode.UNAVAILABLE),
    (RpcDenied, grpc.StatusCode.UNAUTHENTICATED),
    (RpcDenied, grpc.StatusCode.PERMISSION_DENIED),
    (RpcUnknown, grpc.StatusCode.UNIMPLEMENTED),
    (RpcOverLimit, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotPermitted, grpc.StatusCode.PERMISSION_DENIED),
    (OverLimit, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (BackendTimeout, grpc.StatusCode.DEADLINE_EXCEEDED),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (BackendUnavailable, grpc.StatusCode.UNAVAILABLE),
    (BackendFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (BlockFormatError, grpc.StatusCode.INVALID_ARGUMENT),
    (ValueError, grpc.StatusCode.INVALID_ARGUMENT),
)
"""The first row that fits decides. What is not here is INTERNAL on the wire and RpcError at a client."""


RETRY_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata of RESOURCE_EXHAUSTED: when another try may be worth it. The name is gRPC's own (A6)."""


def status_of(error: Exception) -> grpc.StatusCode:
    """The status with which the server answers an error."""
    return next((code for kind, code in ERROR_STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def error_of(code: grpc.StatusCode, message: str) -> RpcError:
    """The exception that a client raises for a status."""
    for kind, known in ERROR_STATUS:
        if known is code and issubclass(kind, RpcError):
            return kind(message)
    return RpcError(message)
