"""Fuzz target over a disk tier's folder: names and contents of files that none of ours has written."""

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fuzz.driver import mutated, packed_list, unpacked_list
from fuzz.fuzz_block import sealed
from store.sample_blocks import keys_of, sample_block

from tq_store.backends.disk import DiskBackend
from tq_store.backends.memory import MemoryBackend
from tq_store.block import verify_block
from tq_store.keys import BlockKey, split_key
from tq_store.tiering.store import TieredStore

_BLOCKS = [sample_block(number, 100 + 50 * number) for number in range(4)]
_KEYS = keys_of(_BLOCKS)
_FOLDERS = ("blocks", "partial", "quarantine", ".")
_BUDGET_BYTES = 1 << 20


def _path(key: BlockKey) -> str:
    namespace, prefix = (part.hex() for part in split_key(key))
    return f"blocks/{prefix[:2]}/{namespace}-{prefix}"


def generate(rng: random.Random) -> bytes:
    """Some files: a path, a content, a path, …"""
    items: list[bytes] = []
    for key, block in rng.sample(_BLOCKS, rng.randint(1, len(_BLOCKS))):
        path, content = _path(key).encode(), block
        if rng.random() < 0.5:
            path = mutated(rng, path, [b"/", b"..", b"blocks/00/", b"partial/", b"quarantine/", b"\xff"])
        if rng.random() < 0.6:
            content = mutated(rng, content)
        if rng.random() < 0.3:
            content = sealed(content)
        items += [path, content]
    return packed_list(items)


@contextmanager
def opened() -> Iterator[Callable[[bytes], Iterator[str]]]:
    """With a folder as a tier makes it, and a loop."""
    with tempfile.TemporaryDirectory() as directory, asyncio.Runner() as runner:
        root = Path(directory)

        async def prepare() -> None:
            backend = await DiskBackend.open(root, budget_bytes=_BUDGET_BYTES)
            await backend.close()

        runner.run(prepare())
        yield lambda data: runner.run(_outcomes(data, root))


async def _outcomes(data: bytes, root: Path) -> list[str]:
    items = unpacked_list(data)
    files = zip(items[::2], items[1::2], strict=False)
    written = [name for name, content in files if _write(root, name, content)]
    disk = await DiskBackend.open(root, budget_bytes=_BUDGET_BYTES)
    store = TieredStore([MemoryBackend(budget_bytes=1), disk])
    try:
        return await _ask(store)
    finally:
        await store.purge(None)
        await store.close()
        _clear(root, written)


async def _ask(store: TieredStore) -> list[str]:
    """Get all blocks, put all of them, get them again."""
    seen = []
    for key, block in zip(_KEYS, await store.get(_KEYS), strict=True):
        if block is not None:
            verify_block(block, key)
        seen.append("miss" if block is None else "block")
    counters = (await store.stats()).counters
    seen += ["quarantined"] * counters["quarantined"] + ["unsupported"] * counters["unsupported"]
    assert not counters["tier_errors_disk"], "a file made the whole tier fail"
    await store.put(_BLOCKS)
    await store.flush()
    # a block of the future keeps its place
    num_missing = (await store.get(_KEYS)).count(None)
    assert num_missing <= counters["unsupported"], "a block cannot be put where a damaged one was"
    return seen


def _write(root: Path, name: bytes, content: bytes) -> bool:
    """Write one file below the root, where such a name can be."""
    path = os.path.normpath(os.path.join(os.fsencode(root), name))
    if not path.startswith(os.fsencode(root) + b"/"):
        return False
    with suppress(OSError, ValueError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        return True
    return False


def _clear(root: Path, written: list[bytes]) -> None:
    for name in written:
        with suppress(OSError):
            os.unlink(os.path.normpath(os.path.join(os.fsencode(root), name)))
    for folder in root.iterdir():
        if folder.is_dir() and folder.name not in _FOLDERS:
            shutil.rmtree(folder)
