"""What in the settings of a Redis server will hurt a cache, in words for its operator."""

from collections.abc import Iterator

from tq_store.backends.redis_shard import ServerFacts


def advice(facts: ServerFacts, *, has_ttl: bool) -> Iterator[str]:
    """One sentence per setting that will hurt.

    Args:
        facts: What the server says of itself.
        has_ttl: Whether our blocks expire, which makes them fair game for the ``volatile-`` policies.
    """
    if not facts.max_bytes:
        yield (
            "maxmemory is 0, so it grows until the machine has no memory left; "
            "set it to what the cache may take"
        )
    if facts.eviction_policy == "noeviction":
        yield (
            "maxmemory-policy is noeviction, so once it is full new blocks are refused; set it to allkeys-lfu"
        )
    elif facts.eviction_policy.startswith("volatile-") and not has_ttl:
        yield (
            f"maxmemory-policy is {facts.eviction_policy}, which evicts only what expires, and our blocks "
            f"do not; set it to allkeys-lfu, or give the blocks a lifetime with redis_ttl"
        )
