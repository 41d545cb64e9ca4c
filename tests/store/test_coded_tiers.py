"""Tiers that keep blocks compressed: on a real disk and a real Redis, damaged, mixed and switched over."""

import struct
from pathlib import Path

import pytest
import xxhash
from store.redis_process import RedisProcess
from store.running_server import running_server, wait_until
from store.sample_blocks import keys_of, sample_block
from store.test_coded import nibbles

from tq_store.backends.disk import DiskBackend
from tq_store.backends.memory import MemoryBackend
from tq_store.backends.redis import RedisBackend, RedisLimits
from tq_store.block import pack_block, parse_header
from tq_store.client import StoreClient
from tq_store.coded import MAGIC, is_coded, unpack_coded
from tq_store.config import ServerConfig, load_config
from tq_store.errors import ConfigError
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome
from tq_store.tiering.store import TieredStore

PAYLOAD_BYTES = 8192


def page_block(number: int) -> tuple[BlockKey, bytes]:
    """A block whose payload has the redundancy of real pages."""
    key, block = sample_block(number, PAYLOAD_BYTES)
    return key, pack_block(parse_header(block), nibbles(PAYLOAD_BYTES, seed=number))


BLOCKS = [page_block(number) for number in range(4)]
KEYS = keys_of(BLOCKS)


def file_of(directory: Path, key: BlockKey) -> Path:
    return directory / "blocks" / key[32:33].hex() / f"{key[:32].hex()}-{key[32:].hex()}"


async def disk_store(directory: Path, *, coded: bool) -> TieredStore:
    disk = await DiskBackend.open(directory, budget_bytes=64 << 20)
    return TieredStore([MemoryBackend(budget_bytes=1 << 20), disk], coded=["disk"] if coded else [])


async def write(directory: Path, *, coded: bool) -> None:
    store = await disk_store(directory, coded=coded)
    assert await store.put(BLOCKS) == [PutOutcome.STORED] * len(BLOCKS)
    await store.close()


@pytest.mark.parametrize("coded", [False, True])
async def test_what_one_setting_wrote_the_other_reads(tmp_path: Path, coded: bool) -> None:
    await write(tmp_path, coded=coded)
    for key, block in BLOCKS:
        data = file_of(tmp_path, key).read_bytes()
        assert is_coded(data) == coded
        assert (unpack_coded(data) if coded else data) == block
        assert (len(data) < 0.97 * len(block)) == coded
    store = await disk_store(tmp_path, coded=not coded)
    assert await store.get(KEYS) == [block for _, block in BLOCKS]
    assert await store.put(BLOCKS) == [PutOutcome.PRESENT] * len(BLOCKS)
    await store.close()


async def test_blocks_that_do_not_shrink_are_kept_plain(tmp_path: Path) -> None:
    key, block = sample_block(1, 200_000)
    store = await disk_store(tmp_path, coded=True)
    await store.put([(key, block)])
    await store.flush()
    assert file_of(tmp_path, key).read_bytes() == block
    await store.close()


@pytest.mark.parametrize("position", [0, 3, 9, 20, 40, 50, 57, 1000, -1])
async def test_a_damaged_one_is_a_miss_and_set_aside(tmp_path: Path, position: int) -> None:
    await write(tmp_path, coded=True)
    file = file_of(tmp_path, KEYS[1])
    damaged = bytearray(file.read_bytes())
    damaged[position] ^= 0x10
    file.write_bytes(damaged)
    store = await disk_store(tmp_path, coded=True)

    found = await store.get(KEYS)
    assert found == [BLOCKS[0][1], None, BLOCKS[2][1], BLOCKS[3][1]]
    unknown = position == 9  # the version, which damage cannot be told from
    assert (store._counters["quarantined"], store._counters["unsupported"]) == (1 - unknown, unknown)
    assert file.exists() == unknown
    await store.close()


async def test_one_under_anothers_key_is_a_miss(tmp_path: Path) -> None:
    await write(tmp_path, coded=True)
    file_of(tmp_path, KEYS[0]).write_bytes(file_of(tmp_path, KEYS[1]).read_bytes())
    store = await disk_store(tmp_path, coded=True)
    assert await store.get(KEYS[:2]) == [None, BLOCKS[1][1]]
    await store.close()


async def test_one_of_a_later_version_stays(tmp_path: Path) -> None:
    await write(tmp_path, coded=True)
    file = file_of(tmp_path, KEYS[0])
    data = bytearray(file.read_bytes())
    data[10] = 2  # a coder of the future, properly sealed
    struct.pack_into("<Q", data, 48, xxhash.xxh3_64_intdigest(bytes(data[:48])))
    file.write_bytes(data)
    store = await disk_store(tmp_path, coded=True)
    assert await store.get(KEYS[:1]) == [None]
    assert store._counters["unsupported"] == 1
    assert file.read_bytes() == data
    await store.close()


@pytest.mark.redis
async def test_the_shared_tier_too(redis_server: RedisProcess) -> None:
    limits = RedisLimits(timeout_s=10.0, lookup_timeout_s=10.0, census_s=None)
    for number in range(2):  # the second store has nothing in memory
        shared = await RedisBackend.open(redis_server.url, limits=limits)
        store = TieredStore([MemoryBackend(budget_bytes=1 << 20), shared], coded=["redis"])
        if number == 0:
            await store.put(BLOCKS)
            await store.flush()
            assert all(block is not None and is_coded(block) for block in await shared.get(KEYS))
        else:
            assert await store.get(KEYS) == [block for _, block in BLOCKS]
        await store.close()


def test_the_setting_of_a_server(tmp_path: Path) -> None:
    settings = {"disk_path": tmp_path, "disk_budget_bytes": 64 << 20, "disk_coding": "zstd"}
    with running_server(**settings) as server, StoreClient(server.address) as client:
        client.put(BLOCKS)
        wait_until(lambda: all(file_of(tmp_path, key).exists() for key in KEYS))
        assert all(file_of(tmp_path, key).read_bytes().startswith(MAGIC) for key in KEYS)


def test_coding_is_off_unless_asked_for() -> None:
    assert (ServerConfig().disk_coding, ServerConfig().redis_coding) == ("none", "none")
    for name in ("disk_coding", "redis_coding"):
        with pytest.raises(ConfigError, match=name):
            load_config(ServerConfig, arguments={name: "gzip"}, environment={})
