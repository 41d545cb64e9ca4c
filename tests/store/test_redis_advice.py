import pytest

from tq_store.backends.redis_advice import advice
from tq_store.backends.redis_shard import ServerFacts


@pytest.mark.parametrize(
    ("max_bytes", "policy", "has_ttl", "words"),
    [
        (1, "allkeys-lfu", False, []),
        (1, "allkeys-lru", True, []),
        (1, "volatile-lfu", True, []),
        (1, "volatile-ttl", False, ["evicts only what expires"]),
        (1, "noeviction", True, ["new blocks are refused"]),
        (0, "allkeys-lfu", False, ["until the machine has no memory left"]),
        (0, "noeviction", False, ["until the machine has no memory left", "new blocks are refused"]),
    ],
)
def test_what_will_hurt_is_said(max_bytes: int, policy: str, has_ttl: bool, words: list[str]) -> None:
    facts = ServerFacts(num_keys=0, used_bytes=0, max_bytes=max_bytes, evicted_keys=0, eviction_policy=policy)
    sentences = list(advice(facts, has_ttl=has_ttl))
    assert len(sentences) == len(words)
    assert all(word in sentence for word, sentence in zip(words, sentences, strict=True))
