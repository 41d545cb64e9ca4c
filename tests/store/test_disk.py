"""The disk backend: the contract, restarts, kill -9, full disks, and files that others tampered with."""

import asyncio
import contextlib
import os
import random
import resource
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from store.backend_contract import BudgetContract
from store.disk_writer import payload_bytes
from store.sample_blocks import (
    NAMESPACE,
    OTHER_NAMESPACE,
    block_bytes,
    bytes_of,
    keys_of,
    sample_block,
    sample_blocks,
    sample_key,
)

from tq_store.backends.disk import DiskBackend
from tq_store.backends.memory import MemoryBackend
from tq_store.block import verify_block
from tq_store.errors import BackendFull, BackendUnavailable, BlockFormatError, ConfigError
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome
from tq_store.tiering.store import TieredStore

ROOMY = 256 << 20


class TestContract(BudgetContract):
    @pytest.fixture
    async def backend(self, tmp_path: Path) -> AsyncIterator[DiskBackend]:
        backend = await DiskBackend.open(tmp_path / "disk", budget_bytes=64 << 20)
        yield backend
        await backend.close()

    @pytest.fixture
    async def small_backend(self, tmp_path: Path) -> AsyncIterator[DiskBackend]:
        backend = await DiskBackend.open(tmp_path / "small", budget_bytes=64 << 10)
        yield backend
        await backend.close()


@contextlib.asynccontextmanager
async def opened(
    directory: Path, budget_bytes: int = ROOMY, quarantine_bytes: int = 64 << 20
) -> AsyncIterator[DiskBackend]:
    backend = await DiskBackend.open(directory, budget_bytes=budget_bytes, quarantine_bytes=quarantine_bytes)
    try:
        yield backend
    finally:
        await backend.close()


def file_of(directory: Path, key: BlockKey) -> Path:
    return directory / "blocks" / key[32:33].hex() / f"{key[:32].hex()}-{key[32:].hex()}"


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def key_of(file: Path) -> BlockKey:
    return BlockKey(bytes.fromhex(file.name.replace("-", "")))


async def test_blocks_survive_a_restart(tmp_path: Path) -> None:
    blocks = sample_blocks(20) + sample_blocks(20, namespace=OTHER_NAMESPACE)
    async with opened(tmp_path) as backend:
        await backend.put(blocks)
        before = await backend.stats()
    async with opened(tmp_path) as backend:
        assert await backend.stats() == before
        assert await backend.get(keys_of(blocks)) == bytes_of(blocks)
        assert await backend.put(blocks[:1]) == [PutOutcome.PRESENT]


async def test_a_file_is_the_block_and_its_name_the_key(tmp_path: Path) -> None:
    key, block = sample_block(1)
    async with opened(tmp_path) as backend:
        await backend.put([(key, block)])
    assert file_of(tmp_path, key).read_bytes() == block


async def test_a_smaller_budget_after_a_restart_drops_the_oldest(tmp_path: Path) -> None:
    blocks = sample_blocks(10, 1000)
    async with opened(tmp_path) as backend:
        await backend.put(blocks)
    for age, (key, _) in enumerate(blocks):
        os.utime(file_of(tmp_path, key), (10**9 - age, 10**9 - age))
    async with opened(tmp_path, budget_bytes=4 * block_bytes(1000)) as backend:
        assert await backend.contains(keys_of(blocks)) == [True] * 4 + [False] * 6
        assert (await backend.stats()).evicted_blocks == 6
    assert len(files_in(tmp_path / "blocks")) == 4


async def test_a_block_over_a_smaller_budget_goes_at_the_restart(tmp_path: Path) -> None:
    large, small = sample_block(1, 5000), sample_block(2, 100)
    async with opened(tmp_path) as backend:
        await backend.put([large, small])
    async with opened(tmp_path, budget_bytes=1000) as backend:
        assert await backend.contains([large[0], small[0]]) == [False, True]
    assert files_in(tmp_path / "blocks") == [file_of(tmp_path, small[0])]


async def test_leftovers_go_and_files_of_others_stay(tmp_path: Path) -> None:
    key, block = sample_block(1)
    async with opened(tmp_path) as backend:
        await backend.put([(key, block)])
    (tmp_path / "partial" / "7").write_bytes(b"half a blo")
    elsewhere = f"{(key[32] + 1) % 256:02x}"
    foreign = [
        tmp_path / "blocks" / "notes.txt",
        tmp_path / "blocks" / "00" / "notes.txt",
        tmp_path / "blocks" / "00" / ("G" * 64 + "-" + "0" * 64),
        # a good name in the wrong shard is not where a get would look
        tmp_path / "blocks" / elsewhere / file_of(tmp_path, key).name,
    ]
    for file in foreign:
        file.write_text("not ours")
    async with opened(tmp_path) as backend:
        assert (await backend.stats()).num_blocks == 1
        assert await backend.get([key]) == [block]
        await backend.purge()
    assert not files_in(tmp_path / "partial")
    assert all(file.read_text() == "not ours" for file in foreign)


async def test_what_is_no_file_is_not_ours(tmp_path: Path) -> None:
    (key, block), (linked, _), (piped, _) = sample_blocks(3)
    async with opened(tmp_path) as backend:
        await backend.put([(key, block)])
    for folder in ("partial", "quarantine", "blocks/00"):
        (tmp_path / folder / "lost+found").mkdir()
    file_of(tmp_path, linked).symlink_to("/dev/zero")
    os.mkfifo(file_of(tmp_path, piped))
    async with opened(tmp_path) as backend:
        assert await backend.get([key, linked, piped]) == [block, None, None]
        assert (await backend.stats()).num_blocks == 1


async def test_no_partial_files_are_left_by_normal_work(tmp_path: Path) -> None:
    key, block = sample_block(1, 200_000)
    async with opened(tmp_path) as backend:
        await asyncio.gather(*(backend.put([(key, block)]) for _ in range(8)))
        assert not files_in(tmp_path / "partial")


async def test_evicted_and_deleted_blocks_leave_no_files(tmp_path: Path) -> None:
    async with opened(tmp_path, budget_bytes=10 * block_bytes(1000)) as backend:
        await backend.put(sample_blocks(50, 1000))
        files = files_in(tmp_path / "blocks")
        assert len(files) == 10
        assert await backend.contains([key_of(file) for file in files]) == [True] * 10
        await backend.delete([key_of(files[0])])
        assert sorted(files_in(tmp_path / "blocks")) == sorted(files[1:])


async def test_one_process_at_a_time(tmp_path: Path) -> None:
    async with opened(tmp_path):
        with pytest.raises(BackendUnavailable, match="in use by another process; give each tq-store its own"):
            await DiskBackend.open(tmp_path, budget_bytes=ROOMY)
    async with opened(tmp_path):
        pass


async def test_close_finishes_what_is_being_written(tmp_path: Path) -> None:
    block = sample_block(1, 8 << 20)
    backend = await DiskBackend.open(tmp_path, budget_bytes=ROOMY)
    put = asyncio.create_task(backend.put([block]))
    await asyncio.sleep(0)
    await backend.close()
    assert await put == [PutOutcome.STORED]
    async with opened(tmp_path) as backend:
        assert await backend.contains([block[0]]) == [True]


async def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendUnavailable, match=r"disk tier at .*/file/disk does not work: Not a directory"):
        await DiskBackend.open(tmp_path / "file" / "disk", budget_bytes=ROOMY)


async def test_a_budget_below_one_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="budget_bytes of the disk tier must be at least 1, not 0"):
        await DiskBackend.open(tmp_path, budget_bytes=0)


async def test_a_name_never_stands_for_less_than_the_block(tmp_path: Path) -> None:
    blocks = sample_blocks(6, 8 << 20)
    paths = [file_of(tmp_path, key) for key in keys_of(blocks)]
    sizes_seen: set[int] = set()
    finished = threading.Event()

    def watch() -> None:
        while not finished.is_set():
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    sizes_seen.add(path.stat().st_size)

    async with opened(tmp_path) as backend:
        watching = asyncio.create_task(asyncio.to_thread(watch))
        await backend.put(blocks)
        assert await backend.contains(keys_of(blocks)) == [True] * 6
        finished.set()
        await watching
    assert sizes_seen == {block_bytes(8 << 20)}


class TestKill:
    """A real child, killed with SIGKILL while four writers are at work."""

    def kill_after(self, directory: Path, budget_bytes: int, first: int, num_stored: int) -> list[int]:
        """Numbers of the blocks that the child said were stored."""
        tests, root = Path(__file__).parent.parent, Path(__file__).parent.parent.parent
        child = subprocess.Popen(
            [sys.executable, "-m", "store.disk_writer", str(directory), str(budget_bytes), str(first)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{tests}:{root}"},
        )
        assert child.stdout is not None
        with child.stdout:
            stored = [int(child.stdout.readline()) for _ in range(num_stored)]
            child.kill()
            child.wait()
            stored += [int(line) for line in child.stdout.read().splitlines()]
        assert child.returncode == -9
        return stored

    async def test_every_visible_block_is_whole_and_every_stored_block_is_there(self, tmp_path: Path) -> None:
        rng = random.Random(5)
        stored: list[int] = []
        num_leftovers = 0
        for instant in range(24):
            stored += self.kill_after(tmp_path, ROOMY, instant * 10_000, rng.randint(1, 60))
            num_leftovers += len(files_in(tmp_path / "partial"))
            visible = files_in(tmp_path / "blocks")
            for file in visible:
                verify_block(file.read_bytes(), key_of(file))
            async with opened(tmp_path) as backend:
                assert not files_in(tmp_path / "partial")
                assert (await backend.stats()).num_blocks == len(visible)
                assert all(await backend.contains([sample_key(number) for number in stored]))
        async with opened(tmp_path) as backend:
            found = await backend.get([sample_key(number) for number in stored])
        for number, block in zip(stored, found, strict=True):
            assert block == sample_block(number, payload_bytes(number))[1], number
        assert num_leftovers > 0, "no kill fell into a write, so this proved nothing"

    async def test_the_budget_holds_afterwards_even_between_write_and_eviction(self, tmp_path: Path) -> None:
        budget_bytes = 2 << 20
        for instant in range(6):
            self.kill_after(tmp_path, budget_bytes, instant * 10_000, 30 + 7 * instant)
            async with opened(tmp_path, budget_bytes) as backend:
                stats = await backend.stats()
                files = files_in(tmp_path / "blocks")
                assert stats.num_blocks == len(files) > 0
                assert stats.used_bytes == sum(file.stat().st_size for file in files) <= budget_bytes
                for file in files:
                    verify_block(file.read_bytes(), key_of(file))


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel refuses this process to write past a size in any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def tiny_disk(directory: Path, num_bytes: int) -> Iterator[None]:
    """A file system of its own where this user may mount one, else a limit on file sizes."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(directory)], check=True)
    else:
        with largest_file(num_bytes // 4):
            yield


class TestFull:
    async def test_a_full_disk_refuses_and_keeps_what_it_has(self, tmp_path: Path) -> None:
        directory = tmp_path / "tiny"
        small, large = sample_blocks(8, 30_000), sample_block(99, 900_000)
        with tiny_disk(directory, 1 << 20):
            async with opened(directory) as backend:
                await backend.put(small)
                with pytest.raises(
                    BackendFull, match=r"no room for the disk tier at .*: free space or lower"
                ):
                    await backend.put([large])
                assert not files_in(directory / "partial"), "a failed write gives its space back"
                assert await backend.get(keys_of([*small, large])) == [*bytes_of(small), None]
                assert (await backend.stats()).used_bytes == 8 * block_bytes(30_000)
                another = sample_block(100, 30_000)
                assert await backend.put([another]) == [PutOutcome.STORED], "there is room for smaller ones"
            async with opened(directory) as backend:
                assert await backend.get(keys_of([*small, another])) == [*bytes_of(small), another[1]]

    async def test_the_rest_of_a_batch_is_stored(self, tmp_path: Path) -> None:
        small, large = sample_blocks(6, 30_000), sample_block(99, 900_000)
        async with opened(tmp_path) as backend:
            with largest_file(100_000), pytest.raises(BackendFull):
                await backend.put([*small[:3], large, *small[3:]])
            assert await backend.get(keys_of([*small, large])) == [*bytes_of(small), None]
            assert await backend.put([large]) == [PutOutcome.STORED], "the limit is gone"


class TestTampering:
    async def test_a_deleted_file_is_a_miss_and_forgotten(self, tmp_path: Path) -> None:
        key, block = sample_block(1)
        async with opened(tmp_path) as backend:
            await backend.put([(key, block)])
            file_of(tmp_path, key).unlink()
            assert await backend.get([key]) == [None]
            assert await backend.contains([key]) == [False]
            assert (await backend.stats()).used_bytes == 0
            assert await backend.put([(key, block)]) == [PutOutcome.STORED]

    async def test_a_file_deleted_twice_over(self, tmp_path: Path) -> None:
        blocks = sample_blocks(4)
        async with opened(tmp_path) as backend:
            await backend.put(blocks)
            for key in keys_of(blocks):
                file_of(tmp_path, key).unlink()
            assert await backend.delete([blocks[0][0]]) == [True]
            await backend.quarantine(blocks[1][0])
            assert await backend.purge() == 2

    @pytest.mark.parametrize("change", [b"", b"grown by much" * 1000])
    async def test_a_file_of_another_length_does_not_verify(self, tmp_path: Path, change: bytes) -> None:
        key, block = sample_block(1)
        async with opened(tmp_path) as backend:
            await backend.put([(key, block)])
            file_of(tmp_path, key).write_bytes(block + change if change else block[:-1])
            (found,) = await backend.get([key])
            assert found is not None
            assert len(found) <= len(block) + 1, "reads no more than it needs to see the harm"
            with pytest.raises(BlockFormatError):
                verify_block(found, key)

    async def test_an_unreadable_file_costs_its_own_block_alone(self, tmp_path: Path) -> None:
        (key, block), other = sample_blocks(2)
        store = TieredStore(
            [MemoryBackend(budget_bytes=1), await DiskBackend.open(tmp_path, budget_bytes=ROOMY)]
        )
        await store.put([(key, block), other])
        await store.flush()
        file_of(tmp_path, key).unlink()
        file_of(tmp_path, key).mkdir()
        assert await store.get([other[0], key]) == [other[1], None]
        assert await store.get([other[0], key]) == [other[1], None]
        counters = (await store.stats()).counters
        assert (counters["quarantined"], counters["tier_errors_disk"]) == (1, 0)
        await store.put([(key, block)])
        await store.flush()
        assert file_of(tmp_path, key).read_bytes() == block
        await store.close()

    async def test_a_medium_that_reads_and_moves_nothing_is_a_failing_one(self, tmp_path: Path) -> None:
        key, block = sample_block(1)
        async with opened(tmp_path) as backend:
            await backend.put([(key, block)])
            file_of(tmp_path, key).unlink()
            file_of(tmp_path, key).mkdir()
            assert await backend.get([key]) == [b""], "no bytes, for whoever verifies"
            (tmp_path / "quarantine").rmdir()
            (tmp_path / "quarantine").write_bytes(b"")
            with pytest.raises(BackendUnavailable, match=r"does not work: Not a directory"):
                await backend.quarantine(key)
            assert await backend.contains([key]) == [True]

    async def test_slow_files_do_not_hold_up_the_loop(self, tmp_path: Path) -> None:
        (key, block), other = sample_blocks(2)
        async with opened(tmp_path) as backend:
            await backend.put([(key, block), other])
            file_of(tmp_path, key).unlink()
            os.mkfifo(file_of(tmp_path, key))
            slow = asyncio.create_task(backend.get([key]))
            # while a thread waits for the other end of the pipe
            assert await backend.get([other[0]]) == [other[1]]
            assert await backend.contains([key]) == [True]
            assert not slow.done()
            await asyncio.to_thread(file_of(tmp_path, key).write_bytes, block)
            assert await slow == [block]


class TestQuarantine:
    async def test_the_bytes_are_kept_for_inspection(self, tmp_path: Path) -> None:
        key, block = sample_block(1)
        async with opened(tmp_path) as backend:
            await backend.put([(key, block)])
            await backend.quarantine(key)
            assert (tmp_path / "quarantine" / file_of(tmp_path, key).name).read_bytes() == block
            assert not files_in(tmp_path / "blocks")
            assert (await backend.stats()).used_bytes == 0

    async def test_its_size_is_bounded_and_the_oldest_go_first(self, tmp_path: Path) -> None:
        blocks = sample_blocks(10, 1000)
        async with opened(tmp_path, quarantine_bytes=3 * block_bytes(1000)) as backend:
            await backend.put(blocks)
            for age, (key, _) in enumerate(reversed(blocks)):
                # the later it goes to quarantine, the older it is: only the former counts
                os.utime(file_of(tmp_path, key), (10**9 - 1000 * age, 10**9 - 1000 * age))
                for kept in files_in(tmp_path / "quarantine"):
                    os.utime(kept, (kept.stat().st_mtime - 10, kept.stat().st_mtime - 10))
                await backend.quarantine(key)
                assert len(files_in(tmp_path / "quarantine")) == min(age + 1, 3)
        kept_keys = {key_of(file) for file in files_in(tmp_path / "quarantine")}
        assert kept_keys == set(keys_of(blocks[:3]))

    async def test_its_size_is_bounded_over_restarts(self, tmp_path: Path) -> None:
        blocks = sample_blocks(4, 1000)
        for key, block in blocks:
            async with opened(tmp_path, quarantine_bytes=3 * block_bytes(1000)) as backend:
                await backend.put([(key, block)])
                await backend.quarantine(key)
        assert {key_of(file) for file in files_in(tmp_path / "quarantine")} == set(keys_of(blocks[1:]))

    async def test_many_blocks_go_without_a_look_at_those_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        blocks = sample_blocks(20)
        async with opened(tmp_path) as backend:
            await backend.put(blocks)
            monkeypatch.setattr(os, "scandir", None)
            for key in keys_of(blocks):
                await backend.quarantine(key)
            assert await backend.contains(keys_of(blocks)) == [False] * 20

    async def test_purge_takes_quarantined_blocks_too(self, tmp_path: Path) -> None:
        ours, theirs = sample_block(1), sample_block(2, namespace=OTHER_NAMESPACE)
        async with opened(tmp_path) as backend:
            await backend.put([ours, theirs])
            await backend.quarantine(ours[0])
            await backend.quarantine(theirs[0])
            assert await backend.purge(NAMESPACE) == 0, "they were not in service"
            assert [key_of(file) for file in files_in(tmp_path / "quarantine")] == [theirs[0]]
            await backend.purge()
            assert not files_in(tmp_path / "quarantine")


@pytest.mark.parametrize("was_made_before", [False, True])
async def test_blocks_are_their_owners_alone_whatever_the_directory_allows(
    tmp_path: Path, was_made_before: bool
) -> None:
    if was_made_before:
        for name in ("blocks", "partial", "quarantine"):
            (tmp_path / name).mkdir()
            (tmp_path / name).chmod(0o755)
    tmp_path.chmod(0o755)
    async with opened(tmp_path) as backend:
        await backend.put(sample_blocks(1))
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert sorted(folder.name for folder in folders) == ["blocks", "partial", "quarantine"]
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    assert tmp_path.stat().st_mode & 0o777 == 0o755, "its owner's affair"


async def test_folders_of_another_user_are_used_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks").chmod(0o770)
    monkeypatch.setattr(Path, "chmod", refuse)
    async with opened(tmp_path) as backend:
        assert await backend.put(sample_blocks(1)) == [PutOutcome.STORED]
    (record,) = caplog.records
    assert record.message == (
        f"{tmp_path / 'blocks'} belongs to another user, and others than tq-store may read what is in it"
    )
