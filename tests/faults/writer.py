"""A client that puts blocks until it is killed: `python -m faults.writer ADDRESS FIRST_NUMBER`."""

import itertools
import sys

from faults.workload import PATIENT, numbered_block

from tq_store.client import StoreClient

BLOCKS_A_PUT = 5


def main(address: str, first: int) -> None:
    with StoreClient(address, config=PATIENT) as client:
        for number in itertools.count(first, BLOCKS_A_PUT):
            client.put(numbered_block(each) for each in range(number, number + BLOCKS_A_PUT))
            print(number, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
