"""The audit log: one JSON object a line that says who asked for what, and what became of it.

Never in it: tokens, token hashes, block contents, and of keys and namespaces more than the first digits.
"""

import json
import logging
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from tq_store.errors import ConfigError
from tq_store.server.calls import Call

logger = logging.getLogger(__name__)

_MAX_WAITING = 4096
_LAST_WRITES_S = 5.0
"""How long a stop waits for a disk; what hangs in the kernel cannot be ended."""
_MAX_REFUSALS_PER_S = 20
_MAX_METHOD_CHARS = 100
_CHANGING_METHODS = frozenset({"Delete", "Purge", "Stats", "Inspect"})
"""Always recorded: they change or show what other callers rely on."""
_REFUSALS = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"})


class Sink(Protocol):
    """Where records go."""

    def write(self, record: dict[str, Any]) -> None:
        """Take a record; does not block."""

    def close(self) -> None:
        """Write what waits."""


class NoSink:
    """Records that nobody asked for."""

    def write(self, record: dict[str, Any]) -> None:
        """Forget it."""

    def close(self) -> None:
        """Nothing waits."""


class FileSink:
    """Appends lines to a file from a thread of its own, so that a slow disk holds nobody up.

    At most 4,096 records wait; those beyond it are dropped and counted. The file is opened anew when it was
    renamed or removed, as log rotation does.

    Args:
        path: Made if missing, readable by its owner only.
        on_dropped: Told of each record lost; called from any thread.

    Raises:
        ConfigError: The file cannot be opened.
    """

    def __init__(self, path: Path, on_dropped: Callable[[], None]) -> None:
        self._path = path
        self._on_dropped = on_dropped
        self._is_failing = False
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_WAITING)
        try:
            self._descriptor = self._open()
        except OSError as error:
            raise ConfigError(f"audit_log {path} cannot be written: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="tq-audit", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Take a record; does not block."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._on_dropped()

    def close(self) -> None:
        """Write what waits, then close the file; a disk that hangs is given up after five seconds."""
        deadline = time.monotonic() + _LAST_WRITES_S
        try:
            self._waiting.put(None, timeout=_LAST_WRITES_S)
        except queue.Full:
            pass
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("audit_log %s cannot be written in time: its last records are lost", self._path)

    def _run(self) -> None:
        try:
            self._write_records()
        finally:
            os.close(self._descriptor)

    def _write_records(self) -> None:
        while (record := self._waiting.get()) is not None:
            line = json.dumps(record, ensure_ascii=True) + "\n"
            try:
                self._follow_rotation()
                os.write(self._descriptor, line.encode())
            except OSError as error:
                self._on_dropped()
                if not self._is_failing:
                    logger.warning("audit_log %s cannot be written: %s", self._path, error.strerror)
                self._is_failing = True
            else:
                self._is_failing = False

    def _follow_rotation(self) -> None:
        try:
            is_there = os.stat(self._path).st_ino == os.fstat(self._descriptor).st_ino
        except FileNotFoundError:
            is_there = False
        if not is_there:
            fresh = self._open()
            os.close(self._descriptor)
            self._descriptor = fresh

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


@dataclass(slots=True)
class _Refusals:
    """Of one second, of one caller: how many, and how many before them were not recorded."""

    second: int = 0
    count: int = 0
    suppressed: int = 0


class AuditLog:
    """What is recorded: calls that change or reveal, every refusal, and what happens to the server itself.

    Refusals come at most 20 a second of each tenant, and as many of all strangers together, so that nobody
    can fill the disk or hide another's; what is left out is counted in the ``suppressed`` of the next one.
    Called from the event loop.

    Args:
        sink: Where records go; owned, closed with the log.
        with_all_calls: Record lookups, gets and puts that went well, too.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, sink: Sink, *, with_all_calls: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sink = sink
        self._with_all_calls = with_all_calls
        self._clock = clock
        self._of_strangers = _Refusals()
        self._of_tenants: defaultdict[str, _Refusals] = defaultdict(_Refusals)

    def server(self, what: str, **facts: Any) -> None:
        """Something happened to the server: it started, stopped, read its tokens again."""
        self._write(what, facts)

    def call(self, call: Call, status: str, elapsed_s: float) -> None:
        """A call has ended."""
        if status not in _REFUSALS and not self._with_all_calls and call.method not in _CHANGING_METHODS:
            return
        facts = {
            "method": call.method,
            "outcome": status,
            "tenant": call.tenant.name,
            "token": call.identity.token_id,
            "peer": call.peer,
            "admin": call.is_admin,
            "scope": call.scope,
            "keys": call.num_keys,
            "key": call.key_prefix,
            "bytes": call.num_bytes,
            "seconds": round(elapsed_s, 6),
        }
        if status not in _REFUSALS:
            self._write("call", facts)
        else:
            self._refused(self._of_tenants[call.tenant.name], facts)

    def denied(self, method_path: str, peer: str) -> None:
        """A call without a valid token was turned away."""
        method = method_path.rpartition("/")[2][:_MAX_METHOD_CHARS]
        self._refused(self._of_strangers, {"method": method, "outcome": "UNAUTHENTICATED", "peer": peer})

    def close(self) -> None:
        """Write what waits."""
        self._sink.close()

    def _refused(self, earlier: "_Refusals", facts: dict[str, Any]) -> None:
        second = int(self._clock())
        if second != earlier.second:
            earlier.second, earlier.count = second, 0
        earlier.count += 1
        if earlier.count > _MAX_REFUSALS_PER_S:
            earlier.suppressed += 1
            return
        self._write("call", facts | ({"suppressed": earlier.suppressed} if earlier.suppressed else {}))
        earlier.suppressed = 0

    def _write(self, what: str, facts: dict[str, Any]) -> None:
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._sink.write({"time": moment, "event": what, **facts})
