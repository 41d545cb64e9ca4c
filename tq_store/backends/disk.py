"""Blocks as files in a local directory, up to a byte budget; survives being killed at any instant.

::

    directory/
        lock                                 held while a process uses the directory
        partial/<number>                     being written; leftovers are removed at the next start
        blocks/<2 hex>/<namespace>-<prefix>  whole blocks, sharded by the first byte of the prefix hash
        quarantine/<namespace>-<prefix>      corrupt blocks, kept for inspection up to a bounded size

A block is written under ``partial``, flushed to the medium and then renamed, so that a name under ``blocks``
never stands for half a block. The rename itself is not flushed: a power cut may undo it, which is a future
miss. Only a purge flushes directories, because what was purged must not come back.
"""

import asyncio
import errno
import fcntl
import itertools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from tq_store.backends.policy import S3Fifo
from tq_store.backends.usage import UsageCounter
from tq_store.errors import BackendFull, BackendUnavailable, ConfigError
from tq_store.keys import BlockKey, split_key
from tq_store.results import MAX_NAMESPACES, BackendStats, PutOutcome

_T = TypeVar("_T")
_Args = TypeVarTuple("_Args")

_log = logging.getLogger(__name__)
_FILE_NAME = re.compile(r"([0-9a-f]{64})-([0-9a-f]{64})")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OF_ONE_FILE = {errno.EIO, errno.EACCES, errno.EISDIR, errno.ELOOP}
"""What reading says of a file on a bad sector; where the whole medium is at fault, moving it fails too."""
_READERS = 4
_WRITERS = 4


class DiskBackend:
    """One process's blocks on a local disk. All file work runs in threads of its own.

    Made by `open`. On top of the budget come the blocks being written, at most four, and the quarantine, so
    the file system needs that much more room. A full disk is BackendFull, and leaves what was stored alone.
    """

    def __init__(self, directory: Path, budget_bytes: int, quarantine_bytes: int) -> None:
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._quarantine_bytes = quarantine_bytes
        self.usage = UsageCounter()
        self._policy = S3Fifo(budget_bytes)
        # what is visible: changed under the lock, in threads; read on the loop without it
        self._sizes: dict[BlockKey, int] = {}
        self._quarantined: dict[str, int] = {}  # sizes by file name, the oldest first
        self._lock = threading.Lock()
        self._evicted_blocks = 0
        self._partial_names = itertools.count()
        self._closed = False
        with _translated(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._process_lock = (directory / "lock").open("wb")
            try:
                self._recover()
            except BaseException:
                self._process_lock.close()
                raise
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="tq-disk-read")
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="tq-disk-write")

    @classmethod
    async def open(
        cls, directory: Path, *, budget_bytes: int, quarantine_bytes: int = 64 << 20
    ) -> "DiskBackend":
        """Take a directory, remove what a killed process left half written, find the blocks that are whole.

        Args:
            directory: Made if missing; one process at a time.
            budget_bytes: Bytes of blocks to hold; if more are there, the oldest go now.
            quarantine_bytes: Bytes of corrupt blocks to keep for inspection; the oldest go first.

        Raises:
            ConfigError: The budget is not positive.
            BackendError: The directory cannot be used, or another process uses it.
        """
        if budget_bytes < 1:
            raise ConfigError(f"budget_bytes of the disk tier must be at least 1, not {budget_bytes}")
        return await asyncio.to_thread(cls, directory, budget_bytes, quarantine_bytes)

    @property
    def name(self) -> str:
        """Short name for metrics and logs."""
        return "disk"

    async def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are there; answered from the index in memory."""
        self._check_open()
        return [key in self._sizes for key in keys]

    async def get(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Read whole files, several at a time."""
        return await self._in_threads(self._readers, self._read, [(key,) for key in keys])

    async def put(self, blocks: Sequence[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        """Write, flush and rename, several at a time; blocks that fit are stored even if others fail."""
        # last to first, so that of a prefix that is too long the beginning stays
        return (await self._in_threads(self._writers, self._write, blocks[::-1]))[::-1]

    async def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Remove files."""
        return await self._in_threads(self._writers, self._drop, [(key,) for key in keys])

    async def quarantine(self, key: BlockKey) -> None:
        """Move a file to the quarantine folder."""
        await self._in_threads(self._writers, self._set_aside, [(key,)])

    async def purge(self, namespace: bytes | None = None) -> int:
        """Remove the files of a namespace digest, or all, also from quarantine; flushed before it returns."""
        return (await self._in_threads(self._writers, self._purge, [(namespace,)]))[0]

    async def first_to_go(self, group: bytes, *, num_bytes: int, num_blocks: int) -> list[BlockKey]:
        """Blocks of a group, the least worth keeping first."""
        call = (group, num_bytes, num_blocks)
        return (await self._in_threads(self._readers, self._first_to_go, [call]))[0]

    async def stats(self) -> BackendStats:
        """What is held now; quarantined blocks do not count."""
        self._check_open()
        return BackendStats(
            num_blocks=len(self._sizes),
            used_bytes=self._policy.used_bytes,
            budget_bytes=self._budget_bytes,
            evicted_blocks=self._evicted_blocks,
            namespaces=self.usage.largest(MAX_NAMESPACES),
        )

    async def close(self) -> None:
        """Finish the file work under way and let go of the directory."""
        if self._closed:
            return
        self._closed = True
        for pool in (self._writers, self._readers):
            await asyncio.to_thread(pool.shutdown)
        self._process_lock.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BackendUnavailable("the disk tier is closed")

    async def _in_threads(
        self, pool: ThreadPoolExecutor, function: Callable[[*_Args], _T], calls: Sequence[tuple[*_Args]]
    ) -> list[_T]:
        """Results in the order of the calls; the first error only after every call has ended."""
        self._check_open()
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(pool, function, *arguments) for arguments in calls]
        with _translated(self._directory):
            await asyncio.gather(*futures, return_exceptions=True)
            return [future.result() for future in futures]

    def _recover(self) -> None:
        try:
            fcntl.flock(self._process_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BackendUnavailable(
                f"{self._directory} is in use by another process; give each tq-store its own directory"
            ) from error
        for name in ("partial", "quarantine", "blocks"):
            _make_private(self._directory / name)
        for shard in range(256):
            (self._directory / f"blocks/{shard:02x}").mkdir(exist_ok=True)
        for leftover in _files(self._directory / "partial"):
            os.unlink(leftover)
        aside = [(file.stat().st_mtime_ns, file) for file in _files(self._directory / "quarantine")]
        self._quarantined = {file.name: file.stat().st_size for _, file in sorted(aside, key=itemgetter(0))}
        found = []
        for shard in range(256):
            for file in _files(self._directory / f"blocks/{shard:02x}"):
                match = _FILE_NAME.fullmatch(file.name)
                if match and match[2].startswith(f"{shard:02x}"):
                    status = file.stat()
                    key = BlockKey(bytes.fromhex(match[1] + match[2]))
                    found.append((status.st_mtime_ns, key, status.st_size))
        # the order of writing is all that a first-in first-out policy needs to remember
        for _, key, size_bytes in sorted(found):
            if size_bytes > self._budget_bytes:
                self._path(key).unlink()
            else:
                self._admit(key, size_bytes)

    def _path(self, key: BlockKey, folder: str | None = None) -> Path:
        namespace, prefix = (part.hex() for part in split_key(key))
        return self._directory / (folder or f"blocks/{prefix[:2]}") / f"{namespace}-{prefix}"

    def _admit(self, key: BlockKey, size_bytes: int) -> None:
        """Make a file that is in place visible, and drop what the budget has no room for any more."""
        victims = self._policy.admit(key, size_bytes)
        self._sizes[key] = size_bytes
        self.usage.add(key, size_bytes)
        self._evicted_blocks += len(victims)
        for victim in victims:
            self.usage.remove(victim, self._sizes.pop(victim))
        for victim in victims:
            self._path(victim).unlink(missing_ok=True)

    def _forget(self, key: BlockKey) -> bool:
        self._policy.remove(key)
        size_bytes = self._sizes.pop(key, None)
        if size_bytes is not None:
            self.usage.remove(key, size_bytes)
        return size_bytes is not None

    def _read(self, key: BlockKey) -> bytes | None:
        size_bytes = self._sizes.get(key)
        if size_bytes is None:
            return None
        try:
            with self._path(key).open("rb") as file:
                # one byte more than there should be, so that a file that grew is seen to be corrupt
                block = file.read(size_bytes + 1)
        except FileNotFoundError:
            # evicted just now, or deleted by someone else, in which case the index has to learn it
            with self._lock:
                if not self._path(key).exists():
                    self._forget(key)
            return None
        except OSError as error:
            if error.errno not in _OF_ONE_FILE:
                raise
            # no bytes are no block: whoever verifies counts it and sets it aside, and the tier goes on
            return b""
        with self._lock:
            self._policy.touch(key)
        return block

    def _write(self, key: BlockKey, block: bytes) -> PutOutcome:
        with self._lock:
            if key in self._sizes:
                self._policy.touch(key)
                return PutOutcome.PRESENT
        if len(block) > self._budget_bytes:
            return PutOutcome.REFUSED
        partial = self._directory / "partial" / str(next(self._partial_names))
        try:
            with partial.open("xb", buffering=0) as file:
                rest = memoryview(block)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            with self._lock:
                if key in self._sizes:
                    return PutOutcome.PRESENT
                partial.rename(self._path(key))
                self._admit(key, len(block))
                return PutOutcome.STORED
        finally:
            partial.unlink(missing_ok=True)

    def _first_to_go(self, group: bytes, num_bytes: int, num_blocks: int) -> list[BlockKey]:
        with self._lock:
            return self._policy.first_to_go(group, num_bytes=num_bytes, num_blocks=num_blocks)

    def _drop(self, key: BlockKey) -> bool:
        with self._lock:
            was_there = self._forget(key)
            if was_there:
                self._path(key).unlink(missing_ok=True)
            return was_there

    def _set_aside(self, key: BlockKey) -> None:
        with self._lock:
            if key not in self._sizes:
                return
            aside = self._path(key, "quarantine")
            try:
                self._path(key).rename(aside)
            except FileNotFoundError:
                self._forget(key)
                return
            self._forget(key)
            os.utime(aside)
            self._quarantined.pop(aside.name, None)
            self._quarantined[aside.name] = aside.stat().st_size
            excess_bytes = sum(self._quarantined.values()) - self._quarantine_bytes
            while excess_bytes > 0:
                oldest = next(iter(self._quarantined))
                excess_bytes -= self._quarantined.pop(oldest)
                (self._directory / "quarantine" / oldest).unlink(missing_ok=True)

    def _purge(self, namespace: bytes | None) -> int:
        with self._lock:
            doomed = [key for key in self._sizes if namespace in (None, split_key(key)[0])]
        num_dropped = sum(self._drop(key) for key in doomed)
        with self._lock:
            for name in [*self._quarantined]:
                if namespace is None or name.startswith(namespace.hex()):
                    del self._quarantined[name]
                    (self._directory / "quarantine" / name).unlink(missing_ok=True)
        for folder in {self._path(key).parent for key in doomed} | {self._directory / "quarantine"}:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return num_dropped


def _make_private(folder: Path) -> None:
    """Blocks tell what prompts said, so they are their owner's alone, whoever may enter the directory."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        try:
            folder.chmod(0o700)
        except PermissionError:
            _log.warning(
                "%s belongs to another user, and others than tq-store may read what is in it", folder
            )


def _files(folder: Path) -> list[os.DirEntry[str]]:
    """Plain files; what else lies in a folder of ours is not ours."""
    return [entry for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]


@contextmanager
def _translated(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise BackendFull(
                f"no room for the disk tier at {directory} ({error.strerror}): free space or lower its budget"
            ) from error
        raise BackendUnavailable(f"the disk tier at {directory} does not work: {error.strerror}") from error
