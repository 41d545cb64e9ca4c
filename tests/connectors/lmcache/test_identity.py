"""Two caches that differ in anything never share a key."""

import itertools

from tq_connectors.lmcache.identity import ObjectNames
from tq_connectors.lmcache.settings import StoreSettings
from tq_store.keys import BLOCK_KEY_BYTES

SETTINGS = {"revision": "r", "kv_dtype": "bfloat16", "codec": "tq4"}
OBJECT = {"model": "org/model", "part": "rank 1", "salt": "", "chunk_hash": b"hash"}


def key(settings: dict[str, str] | None = None, **changed: object) -> bytes:
    names = ObjectNames(StoreSettings(**(SETTINGS | (settings or {}))))
    return names.key(**(OBJECT | changed))


def test_a_key_is_a_block_key_and_always_the_same():
    assert len(key()) == BLOCK_KEY_BYTES
    assert key() == key()


def test_everything_that_makes_bytes_differ_is_in_the_key():
    changes = [
        {"settings": {"revision": "s"}},
        {"settings": {"kv_dtype": "float16"}},
        {"settings": {"codec": "tq3"}},
        {"settings": {"codec": "serde:tq4"}},
        {"settings": {"codec": "none"}},
        {"settings": {"salt": "x"}},
        {"model": "org/other"},
        {"part": "rank 2"},
        {"salt": "x"},
        {"chunk_hash": b"other"},
    ]
    keys = [key(), *(key(**change) for change in changes)]
    assert all(one != other for one, other in itertools.combinations(keys, 2))


def test_salts_cannot_be_shifted_into_each_other():
    assert key({"salt": "a b"}, salt="c") != key({"salt": "a"}, salt="b c")


def test_chunks_of_one_cache_share_a_namespace():
    assert key()[:32] == key(chunk_hash=b"other")[:32]
    assert key()[:32] != key(salt="tenant")[:32]
