import pytest
from store.sample_blocks import sample_block

from tq_store.block import HEADER_LAYOUT, verify_block
from tq_store.describe import describe_block, describe_copies, describe_header, describe_stats
from tq_store.results import BackendStats, NamespaceUsage, ShardStats
from tq_store.rpc.convert import ServerStats, TierCopy

KEY, BLOCK = sample_block(5)


def changed(position: int) -> bytes:
    data = bytearray(BLOCK)
    data[position] ^= 1
    return bytes(data)


def test_a_sound_block_is_told_field_by_field() -> None:
    is_sound, text = describe_block(BLOCK)
    assert is_sound
    assert text == (
        "a sound block\n"
        f"namespace    {KEY[:32].hex()}\n"
        f"prefix hash  {KEY[32:].hex()}\n"
        "tokens       16, a layer has 1 pages of 16\n"
        "layers       0 to 0\n"
        "KV heads     0 to 0 of 1\n"
        "head_dim     64\n"
        "payload      256 bytes, in pages of 256\n"
        "codec        codec_id 1, packing_id 1, key_code 4, value_code 4, rotation_id 1, rotation_seed 5, "
        "key_center 0\n"
        f"fingerprint  {bytes(32).hex()}"
    )


@pytest.mark.parametrize(
    ("data", "check", "keeps_header"),
    [
        (b"", "the length check failed", False),
        (b"PNG", "the magic check failed", False),
        (BLOCK[:100], "the length check failed", False),
        (changed(HEADER_LAYOUT["format_version"][0]), "the version check failed", False),
        (changed(HEADER_LAYOUT["num_tokens"][0]), "the checksum check failed: the header differs", False),
        (changed(-1), "the checksum check failed: the payload differs", True),
        (BLOCK[:-1], "the length check failed: payload has 255 bytes", True),
        (BLOCK + b"x", "the length check failed: payload has 257 bytes", True),
    ],
)
def test_what_is_wrong_with_a_block_is_said_in_one_sentence(
    data: bytes, check: str, keeps_header: bool
) -> None:
    is_sound, text = describe_block(data)
    assert not is_sound
    verdict, *rest = text.split("\n")
    assert verdict.startswith(f"not a sound block: {check}")
    assert bool(rest) is keeps_header
    if keeps_header:
        assert "\n".join(rest) == f"its header is intact and says:\n{describe_header(verify_block(BLOCK))}"


def test_copies_are_told_by_tier() -> None:
    sound = TierCopy(tier="memory", block_bytes=512, header=BLOCK[:256])
    absent = TierCopy(tier="disk")
    damaged = TierCopy(tier="disk", block_bytes=9, header=b"garbage", problem="the bytes are wrong")
    silent = TierCopy(tier="redis", problem="this tier does not answer: gone")
    is_sound, text = describe_copies([sound, damaged, silent])
    assert is_sound
    assert text.startswith(
        "memory: here, 512 bytes, sound\n"
        "disk: here, 9 bytes, but not sound: the bytes are wrong\n"
        "redis: this tier does not answer: gone\n"
        "namespace"
    )
    assert describe_copies([absent, silent]) == (
        False,
        "disk: not here\nredis: this tier does not answer: gone",
    )
    assert describe_copies([damaged])[0] is False


def test_stats_are_a_table() -> None:
    memory = BackendStats(num_blocks=2, used_bytes=3 << 20, budget_bytes=1 << 30, evicted_blocks=4)
    usage = {
        "ab": NamespaceUsage(num_blocks=1, used_bytes=2),
        "cd": NamespaceUsage(num_blocks=4, used_bytes=4),
    }
    redis = BackendStats(num_blocks=5, used_bytes=6, budget_bytes=None, evicted_blocks=0, namespaces=usage)
    shards = [
        ShardStats(name="h:1", is_open=True, failed_calls=3, lost_keys=8),
        ShardStats(name="h:2", is_open=False, failed_calls=0, lost_keys=0),
    ]
    stats = ServerStats(
        version="1.0",
        uptime_s=61.6,
        tiers={"memory": memory, "redis": redis},
        counters={"misses": 7},
        shards={"redis": shards},
    )
    lines = [line.split() for line in describe_stats(stats)]
    assert lines == [
        ["tq-store", "1.0,", "up", "62", "s"],
        [],
        ["tier", "blocks", "used", "budget", "evicted"],
        ["memory", "2", "3", "MiB", "1", "GiB", "4"],
        ["redis", "5", "6", "B", "-", "0"],
        [],
        ["shard", "of", "state", "failed", "calls", "lost", "keys", "where"],
        ["redis", "open", "3", "8", "h:1"],
        ["redis", "closed", "0", "0", "h:2"],
        [],
        ["largest", "in", "blocks", "used", "namespace"],
        ["redis", "4", "4", "B", "cd"],
        ["redis", "1", "2", "B", "ab"],
        [],
        ["misses", "7"],
    ]
