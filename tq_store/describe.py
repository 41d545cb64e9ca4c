"""A block, and what servers say of it, in words for people."""

from collections.abc import Iterator, Sequence

from tq_store.block import BlockInfo, parse_header, verify_block
from tq_store.errors import (
    BlockFormatError,
    ChecksumMismatch,
    IdentityMismatch,
    InvalidHeader,
    LengthMismatch,
    NotABlock,
    UnsupportedVersion,
)
from tq_store.results import largest_namespaces
from tq_store.rpc.convert import ServerStats, TierCopy
from tq_store.settings import format_size

_CHECKS: dict[type[BlockFormatError], str] = {
    NotABlock: "magic",
    UnsupportedVersion: "version",
    LengthMismatch: "length",
    ChecksumMismatch: "checksum",
    InvalidHeader: "header",
    IdentityMismatch: "identity",
}
_MAX_NAMESPACES = 10
_CODEC_FIELDS = (
    "codec_id",
    "packing_id",
    "key_code",
    "value_code",
    "rotation_id",
    "rotation_seed",
    "key_center",
)


def describe_header(info: BlockInfo) -> str:
    """What a header says; codec numbers are shown as numbers, their meaning lies with the codec."""
    last_layer = info.first_layer + info.num_layers - 1
    last_head = info.first_kv_head + info.num_kv_heads - 1
    codec = ", ".join(f"{name} {getattr(info, name)}" for name in _CODEC_FIELDS)
    return "\n".join(
        (
            f"namespace    {info.namespace.hex()}",
            f"prefix hash  {info.prefix_hash.hex()}",
            f"tokens       {info.num_tokens}, a layer has {info.pages_per_layer} pages of {info.page_tokens}",
            f"layers       {info.first_layer} to {last_layer}",
            f"KV heads     {info.first_kv_head} to {last_head} of {info.total_kv_heads}",
            f"head_dim     {info.head_dim}",
            f"payload      {info.payload_bytes} bytes, in pages of {info.page_bytes}",
            f"codec        {codec}",
            f"fingerprint  {info.codec_fingerprint.hex()}",
        )
    )


def describe_block(data: bytes) -> tuple[bool, str]:
    """Whether the bytes are a sound block, and what they say or which check they fail."""
    try:
        return True, f"a sound block\n{describe_header(verify_block(data))}"
    except BlockFormatError as error:
        verdict = f"not a sound block: the {_CHECKS[type(error)]} check failed: {error}"
    try:
        return False, f"{verdict}\nits header is intact and says:\n{describe_header(parse_header(data))}"
    except BlockFormatError:
        return False, verdict


def describe_copies(copies: Sequence[TierCopy]) -> tuple[bool, str]:
    """Whether some tier has a sound copy, and what each tier has."""
    parts = [_describe_copy(copy) for copy in copies]
    headers = [copy.header for copy in copies if copy.block_bytes and not copy.problem]
    if headers:
        parts.append(describe_header(parse_header(headers[0])))
    return bool(headers), "\n".join(parts)


def _describe_copy(copy: TierCopy) -> str:
    if not copy.block_bytes:
        return f"{copy.tier}: {copy.problem or 'not here'}"
    verdict = f"but not sound: {copy.problem}" if copy.problem else "sound"
    return f"{copy.tier}: here, {copy.block_bytes} bytes, {verdict}"


def _describe_shards(stats: ServerStats) -> Iterator[str]:
    if stats.shards:
        yield ""
        yield f"{'shard of':<10}{'state':>8}{'failed calls':>14}{'lost keys':>12}  where"
    for tier, shards in stats.shards.items():
        for shard in shards:
            state = "open" if shard.is_open else "closed"
            yield f"{tier:<10}{state:>8}{shard.failed_calls:>14}{shard.lost_keys:>12}  {shard.name}"


def _describe_namespaces(stats: ServerStats) -> Iterator[str]:
    if any(tier.namespaces for tier in stats.tiers.values()):
        yield ""
        yield f"{'largest in':<10}{'blocks':>12}{'used':>14}  namespace"
    for name, tier in stats.tiers.items():
        for namespace, usage in largest_namespaces(tier, _MAX_NAMESPACES):
            yield f"{name:<10}{usage.num_blocks:>12}{format_size(usage.used_bytes):>14}  {namespace}"


def describe_stats(stats: ServerStats) -> Iterator[str]:
    """Lines of a table of tiers, then of what was counted."""
    yield f"tq-store {stats.version}, up {stats.uptime_s:.0f} s"
    yield ""
    yield f"{'tier':<10}{'blocks':>12}{'used':>14}{'budget':>14}{'evicted':>12}"
    for name, tier in stats.tiers.items():
        budget = "-" if tier.budget_bytes is None else format_size(tier.budget_bytes)
        used = format_size(tier.used_bytes)
        yield f"{name:<10}{tier.num_blocks:>12}{used:>14}{budget:>14}{tier.evicted_blocks:>12}"
    yield from _describe_shards(stats)
    yield from _describe_namespaces(stats)
    yield ""
    for name, value in stats.counters.items():
        yield f"{name:<24}{value:>12}"
