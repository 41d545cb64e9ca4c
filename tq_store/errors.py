"""Every exception that tq_store raises.

::

    TQStoreError
    ├── ConfigError              a setting is wrong; the message says which and what to write instead
    ├── BlockFormatError         bytes that are not a sound block
    │   ├── NotABlock            the magic is missing
    │   ├── UnsupportedVersion   a format version or feature flag that this reader does not know
    │   ├── LengthMismatch       shorter or longer than the header says
    │   ├── ChecksumMismatch     header or payload differ from what was written
    │   ├── InvalidHeader        intact, but its fields contradict each other or the limits
    │   ├── IdentityMismatch     a sound block, but not the one that was asked for
    │   └── UnknownOwner         a sound block of a tenant that this server does not know, or no longer
    ├── BackendError             a storage medium failed
    │   ├── BackendTimeout       it did not answer in time
    │   ├── BackendUnavailable   it cannot be reached or refuses to work
    │   ├── BackendFull          it has no room and may not make any
    │   └── BackendBusy          it works, and has more to do than this call could wait for
    ├── CallRefused              the server may not, or will not now, do what a call asks
    │   ├── NotPermitted         the caller is not allowed to do this
    │   └── OverLimit            the caller has reached one of its limits
    └── RpcError                 the service answered with a failure, or not at all
        ├── RpcTimeout           the deadline passed
        ├── RpcUnavailable       nobody listens, or the server is draining
        ├── RpcUnknown           the server does not know the call
        ├── RpcDenied            the token is missing, wrong, or not allowed to do this
        └── RpcOverLimit         the server, or the caller, has reached a limit; later it may work

A miss is not an error: it is a value.
"""


class TQStoreError(Exception):
    """Root of the tree."""


class ConfigError(TQStoreError):
    """A setting is wrong; the message names it and says what to write instead."""


class BlockFormatError(TQStoreError):
    """Bytes that are not a sound block."""


class NotABlock(BlockFormatError):
    """The magic is missing."""


class UnsupportedVersion(BlockFormatError):
    """A format version or feature flag that this reader does not know."""


class LengthMismatch(BlockFormatError):
    """Shorter or longer than the header says."""


class ChecksumMismatch(BlockFormatError):
    """Header or payload differ from what was written."""


class InvalidHeader(BlockFormatError):
    """Intact, but its fields contradict each other or exceed the limits."""


class IdentityMismatch(BlockFormatError):
    """A sound block, but not the one that was asked for."""


class UnknownOwner(BlockFormatError):
    """A sound block of a tenant that this server does not know, or no longer."""


class BackendError(TQStoreError):
    """A storage medium failed."""


class BackendTimeout(BackendError):
    """The medium did not answer in time."""


class BackendUnavailable(BackendError):
    """The medium cannot be reached or refuses to work."""


class BackendFull(BackendError):
    """The medium has no room and may not make any."""


class BackendBusy(BackendError):
    """The medium works, and has more to do than this call could wait for."""


class CallRefused(TQStoreError):
    """The server may not, or will not now, do what a call asks."""


class NotPermitted(CallRefused):
    """The caller is not allowed to do this."""


class OverLimit(CallRefused):
    """The caller has reached one of its limits; `retry_after_s` says when another try may be worth it."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RpcError(TQStoreError):
    """The service answered with a failure, or not at all."""


class RpcTimeout(RpcError):
    """The deadline of the call passed."""


class RpcUnavailable(RpcError):
    """Nobody listens at the address, or the server is draining."""


class RpcUnknown(RpcError):
    """The server does not know the call: it is older than the client, or does without."""


class RpcDenied(RpcError):
    """The token is missing, wrong, or not allowed to do this."""


class RpcOverLimit(RpcError):
    """The server, or the caller, has reached a limit; later it may work."""
