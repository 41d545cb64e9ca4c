"""An engine as the store sees one: it loads a prefix, computes what is missing and saves that."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

from faults.trial import Result
from faults.workload import HASTY, SLACK_S

from tq_connectors.codec import CacheGeometry
from tq_connectors.prefix_cache import PrefixCache
from tq_kernels import PageLayout, preset
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.keys import BlockKey

LAYOUT = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=4, page_tokens=16)
GEOMETRY = CacheGeometry(num_layers=8, num_kv_heads=4, head_dim=64, kv_dtype="bfloat16")
PAGES_BYTES = GEOMETRY.num_layers * LAYOUT.page_bytes


def prompt(document: int, num_pages: int) -> list[int]:
    """Tokens of the first pages of a document."""
    return [(document * 1_000_003 + token) % 2**32 for token in range(num_pages * LAYOUT.page_tokens)]


def pages_of(key: BlockKey) -> bytes:
    """What the model computes for a page; here it depends on the key alone, so any reader can check it."""
    return random.Random(key).randbytes(PAGES_BYTES)


class Engine:
    """Requests that must never fail, over a prefix cache.

    Every exception, every wrong byte and every request that outlives its deadlines by far is counted; a miss
    is not, whatever its reason.
    """

    def __init__(self, address: str, result: Result, config: ClientConfig = HASTY, salt: str = "") -> None:
        self._result = result
        self._deadline_s = config.lookup_timeout_s + config.transfer_timeout_s + SLACK_S
        self._client = StoreClient(address, config=config)
        self.cache = PrefixCache(
            self._client, LAYOUT, GEOMETRY, model="faults", revision="1", salt=salt, save_queue_bytes=64 << 20
        )

    def request(self, tokens: list[int], *, saves: bool = True) -> int:
        """One request; returns how many of its pages came from the store."""
        loaded = 0
        started = time.monotonic()
        self._result.count("requests")
        try:
            keys = self.cache.keys(tokens)
            for pages in self.cache.load(keys):
                if bytes(pages) != pages_of(keys[loaded]):
                    self._result.served_wrong(f"page {loaded} of a prompt is not the one that was saved")
                loaded += 1
            for key in keys[loaded:] if saves else ():
                self.cache.save(key, pages_of(key))
        except Exception as error:
            self._result.failed_request(f"an engine got {error!r}")
        elapsed_s = time.monotonic() - started
        if elapsed_s > self._deadline_s:
            self._result.failed_request(f"an engine waited {elapsed_s:.1f} s")
        return loaded

    def flush(self) -> bool:
        """Wait for the saves, no longer than an engine's end may take; whether all of them are through."""
        return self.cache.saves.flush(self._deadline_s)

    def close(self) -> None:
        try:
            self.cache.close(self._deadline_s)
            self._client.close()
        except Exception as error:
            self._result.failed_request(f"an engine got {error!r} when it ended")


@contextmanager
def engine(address: str, result: Result, config: ClientConfig = HASTY, salt: str = "") -> Iterator[Engine]:
    opened = Engine(address, result, config, salt)
    try:
        yield opened
    finally:
        opened.close()
