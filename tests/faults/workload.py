"""Blocks that can be told right from wrong anywhere, by their number, and readers that do so."""

import functools
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from faults.trial import Result
from store.sample_blocks import NAMESPACE, sample_block, sample_key

from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import RpcError
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey

PATIENT = ClientConfig(
    lookup_timeout_s=30, transfer_timeout_s=60, admin_timeout_s=60, max_attempts=20, backoff_s=0.02
)
"""For checks after a fault, where an answer is due."""
HASTY = ClientConfig(
    connect_timeout_s=0.5,
    lookup_timeout_s=0.5,
    transfer_timeout_s=1.0,
    admin_timeout_s=5.0,
    max_attempts=3,
    backoff_s=0.02,
)
"""For calls through a fault."""
STEADY = ClientConfig(lookup_timeout_s=5, transfer_timeout_s=10, max_attempts=5)
"""For engines whose server has a fault, but not for longer than this."""
BlockOf = Callable[[int], tuple[BlockKey, bytes]]
SLACK_S = 5.0
"""What a busy machine may add to a deadline before a call counts as hanging."""


@functools.lru_cache(1024)
def numbered_block(number: int) -> tuple[BlockKey, bytes]:
    """Sizes vary; every 40th block takes several frames."""
    if number % 40 == 39:
        return sample_block(number, 2_500_000)
    return sample_block(number, 1000 + number * 7919 % 200_000)


def numbered_blocks(numbers: Iterable[int]) -> list[tuple[BlockKey, bytes]]:
    return [numbered_block(number) for number in numbers]


def is_right(number: int, block: bytes) -> bool:
    return block == numbered_block(number)[1]


def check_served(
    result: Result, client: StoreClient, numbers: Sequence[int], block_of: BlockOf = numbered_block
) -> set[int]:
    """Get blocks where an answer is due; returns those that came, each compared byte by byte."""
    found = set()
    try:
        for position, block in client.get([sample_key(number) for number in numbers]):
            if block is None:
                continue
            found.add(numbers[position])
            if block != block_of(numbers[position])[1]:
                result.served_wrong(f"block {numbers[position]} came with other bytes")
    except RpcError as error:
        result.failed_request(f"get: {error}")
    if client.counters["rejected_blocks"]:
        result.served_wrong(f"the server sent {client.counters['rejected_blocks']} blocks that do not verify")
    return found


def check_disk_files(
    result: Result, directory: Path, numbers: Iterable[int], block_of: BlockOf = numbered_block
) -> int:
    """Compare every visible file of a disk tier with the block that it should be; returns how many."""
    names = {sample_key(number)[32:].hex(): number for number in numbers}
    count = 0
    for path in (directory / "blocks").glob("*/*"):
        namespace, prefix = path.name.split("-")
        if namespace != NAMESPACE.hex() or prefix not in names:
            result.served_wrong(f"{path.name} is a file that nobody put")
        elif path.read_bytes() != block_of(names[prefix])[1]:
            result.served_wrong(f"block {names[prefix]} is visible on disk with other bytes")
        count += 1
    return count


def check_redis_values(result: Result, url: str, numbers: Iterable[int]) -> set[int]:
    """Compare every visible value of a Redis tier with the block that it should be; returns those there."""
    from redis import Redis  # only scenarios with Redis need it

    keys = {sample_key(number): number for number in numbers}
    found = set()
    with Redis(unix_socket_path=urllib.parse.urlparse(url).path) as server:
        for name in server.scan_iter("tq:1:*", count=1000):
            # the hex digits are the key, however they are grouped
            digits = "".join(c for c in name.decode().removeprefix("tq:1:") if c in "0123456789abcdef")
            key = BlockKey(bytes.fromhex(digits)) if len(digits) == 2 * BLOCK_KEY_BYTES else None
            if key not in keys:
                result.served_wrong(f"{name!r} is a key in Redis that nobody put")
            elif not is_right(keys[key], server.get(name)):
                result.served_wrong(f"block {keys[key]} is visible in Redis with other bytes")
            else:
                found.add(keys[key])
    return found


def check_log(result: Result, log: str) -> None:
    """A server may warn; an error in its log is one that nobody foresaw."""
    if " ERROR " in log or "Traceback" in log:
        result.failed_request(f"the server logged an error: {log[-3000:]}")
