"""Three tenants and a group at once, over the same keys with bytes of their own, while everything moves."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store.running_server import WAIT_S, running_server
from store.sample_blocks import NAMESPACE, sample_block, sample_key
from store.tenants_file import TenantsFile

from tq_store.block import pack_block, parse_header
from tq_store.keys import BlockKey
from tq_store.server import credentials as credentials_module

NUM_KEYS = 40
PAYLOAD_BYTES = 4096
ROUNDS = 60
TENANTS = {"a": {}, "b": {"bytes": "64KiB"}, "c": {"group": "g"}, "d": {"group": "g", "keys": 30}}
REALMS = {"a": "a", "b": "b", "c": "g", "d": "g"}


def block_of(realm: str, number: int) -> tuple[BlockKey, bytes]:
    """A block of the same key for every realm, with bytes that only this realm has."""
    key, block = sample_block(number, PAYLOAD_BYTES)
    payload = random.Random(f"{realm} {number}").randbytes(PAYLOAD_BYTES)
    return key, pack_block(parse_header(block), payload)


def test_no_tenant_is_ever_served_another_ones_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials_module, "_POLL_S", 0.02)
    file = TenantsFile(tmp_path)
    for name, fields in TENANTS.items():
        file.add(name, **fields)
    expected = {realm: dict(block_of(realm, n) for n in range(NUM_KEYS)) for realm in set(REALMS.values())}
    settings = {
        "memory_budget_bytes": 16 * PAYLOAD_BYTES,  # far less than what is put, so that blocks keep moving
        "disk_path": tmp_path / "disk",
        "disk_budget_bytes": 90 * PAYLOAD_BYTES,
        "tenants_file": file.path,
    }
    is_over = threading.Event()
    with running_server(**settings) as server:

        def work(name: str) -> Counter[str]:
            rng, seen, own = random.Random(name), Counter[str](), expected[REALMS[name]]
            with file.client(server.address, name) as client:
                for _ in range(ROUNDS):
                    numbers = rng.sample(range(NUM_KEYS), 8)
                    keys = [sample_key(number) for number in numbers]
                    match rng.randrange(10):
                        case 0:
                            client.delete(keys[:2])
                        case 1 if rng.random() < 0.3:
                            client.purge(NAMESPACE)
                        case 2 | 3 | 4:
                            client.put([(key, own[key]) for key in keys])
                        case _:
                            for position, block in client.get(keys):
                                if block is None:
                                    seen["missed"] += 1
                                else:
                                    seen["right" if block == own[keys[position]] else "wrong"] += 1
                assert client.counters["rejected_blocks"] == 0
            return seen

        def rotate() -> int:
            rotations = 0
            while not is_over.wait(0.05):
                file.add("a")
                rotations += 1
            return rotations

        with ThreadPoolExecutor(len(TENANTS) + 1) as threads:
            rotating = threads.submit(rotate)
            try:
                seen = sum((result for result in threads.map(work, TENANTS)), Counter[str]())
            finally:
                is_over.set()
            assert rotating.result(WAIT_S) > 0
    assert seen["wrong"] == 0
    assert seen["right"] > 200
    assert seen["missed"] > 0
