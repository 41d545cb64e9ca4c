"""Child process that writes blocks to a disk backend, and says which are stored, until it is killed."""

import asyncio
import sys
from pathlib import Path

from store.sample_blocks import sample_block

from tq_store.backends.disk import DiskBackend
from tq_store.results import PutOutcome


def payload_bytes(number: int) -> int:
    return 1000 + number * 7919 % 300_000


async def write_forever(directory: Path, budget_bytes: int, first: int) -> None:
    backend = await DiskBackend.open(directory, budget_bytes=budget_bytes)

    async def writer(number: int) -> None:
        while True:
            block = sample_block(number, payload_bytes(number))
            if await backend.put([block]) == [PutOutcome.STORED]:
                print(number, flush=True)
            number += 4

    await asyncio.gather(*(writer(first + lane) for lane in range(4)))


if __name__ == "__main__":
    asyncio.run(write_forever(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
