"""Measure eviction orders on a prefix-reuse trace: how many bytes of the prompts would have been hits.

The trace: multi-turn chats behind shared system prompts, some with a shared document between the two, all
chosen by Zipf's law; two models, one with blocks four times as large; and, in the second trace, one-off long
documents that scan the cache. Every request looks its prefix up, gets the leading hits and puts the rest.
Only leading hits count, because a block is useless without those before it.

``python benchmarks/eviction.py`` prints a table and writes ``benchmarks/results/eviction.jsonl``.
"""

import argparse
import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from circumstances import circumstances

from tq_store.backends.policy import EvictionPolicy, Lru, S3Fifo
from tq_store.keys import BlockKey

RESULTS = Path(__file__).parent / "results" / "eviction.jsonl"
BUDGET_SHARES = (0.003, 0.01, 0.03, 0.1, 0.3)
BLOCK_BYTES = (64 << 10, 256 << 10)
NUM_SYSTEMS = 60
NUM_DOCUMENTS = 600
NUM_LIVE_CHATS = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt: its blocks from the first to the last, all of one size."""

    keys: Sequence[BlockKey]
    block_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An eviction order, and whether a prefix is admitted and touched from its last block to its first."""

    name: str
    make: Callable[[int], EvictionPolicy]
    last_to_first: bool


CONTENDERS = (
    Contender(name="lru, first to last", make=Lru, last_to_first=False),
    Contender(name="lru, last to first", make=Lru, last_to_first=True),
    Contender(
        name="s3-fifo 0.1, last to first",
        make=lambda budget_bytes: S3Fifo(budget_bytes, small_share=0.1),
        last_to_first=True,
    ),
    Contender(name="s3-fifo 0.3, first to last", make=S3Fifo, last_to_first=False),
    Contender(name="s3-fifo 0.3, last to first", make=S3Fifo, last_to_first=True),
)


def extended(keys: Sequence[BlockKey], contents: Iterable[int]) -> list[BlockKey]:
    """A chain of keys with blocks of these contents behind it: equal prefixes have equal keys."""
    longer = list(keys)
    for content in contents:
        parent = longer[-1] if longer else b""
        longer.append(BlockKey(hashlib.sha512(parent + content.to_bytes(8, "little")).digest()))
    return longer


def requests(num_requests: int, scan_share: float, seed: int = 1) -> Iterator[Request]:
    """The trace.

    Args:
        num_requests: How many prompts.
        scan_share: The part of them that are long documents seen once.
        seed: Decides everything.
    """
    rng = random.Random(seed)
    new_content = itertools.count()

    def contents(fewest: int, most: int) -> list[int]:
        return list(itertools.islice(new_content, rng.randint(fewest, most)))

    def by_zipf(length: int, exponent: float) -> Callable[[], int]:
        weights = list(itertools.accumulate(1 / (rank + 1) ** exponent for rank in range(length)))
        return lambda: rng.choices(range(length), cum_weights=weights)[0]

    systems = [extended([], contents(4, 24)) for _ in range(NUM_SYSTEMS)]
    documents = [contents(8, 48) for _ in range(NUM_DOCUMENTS)]
    any_system, any_document = by_zipf(NUM_SYSTEMS, 1.0), by_zipf(NUM_DOCUMENTS, 0.9)

    def new_chat() -> tuple[Request, int]:
        system = any_system()
        keys = systems[system]
        if rng.random() < 0.4:
            keys = extended(keys, documents[any_document()])
        turns = 1 + int(rng.expovariate(1 / 5))
        return Request(keys=keys, block_bytes=BLOCK_BYTES[system % 2]), turns

    # the most recent chat first; who spoke lately is likelier to speak next
    chats = [new_chat() for _ in range(NUM_LIVE_CHATS)]
    for _ in range(num_requests):
        if rng.random() < scan_share:
            system = any_system()
            keys = systems[system] if rng.random() < 0.5 else []
            yield Request(keys=extended(keys, contents(200, 600)), block_bytes=BLOCK_BYTES[system % 2])
            continue
        chat, turns = chats.pop(min(int(rng.expovariate(1 / 40)), NUM_LIVE_CHATS - 1))
        chat = Request(keys=extended(chat.keys, contents(1, 6)), block_bytes=chat.block_bytes)
        yield chat
        chats.insert(0, (chat, turns - 1) if turns > 1 else new_chat())


def leading_hit_ratio(trace: Iterable[Request], policy: EvictionPolicy, *, last_to_first: bool) -> float:
    """Bytes of leading hits over bytes asked for."""
    asked_bytes = hit_bytes = 0
    for request in trace:
        num_hits = sum(1 for _ in itertools.takewhile(policy.__contains__, request.keys))
        asked_bytes += len(request.keys) * request.block_bytes
        hit_bytes += num_hits * request.block_bytes
        for part in (request.keys[:num_hits], request.keys[num_hits:]):
            for key in reversed(part) if last_to_first else part:
                if key in policy:
                    policy.touch(key)
                else:
                    policy.admit(key, request.block_bytes)
    return hit_bytes / asked_bytes


def main() -> None:
    """Measure every contender at every budget, print the table, write the lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=8000, help="prompts in each trace")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of JSON lines to write")
    arguments = parser.parse_args()
    context = circumstances()
    lines = []
    for trace_name, scan_share in (("chats", 0.0), ("chats and scans", 0.03)):
        trace = list(requests(arguments.requests, scan_share))
        sizes = {key: request.block_bytes for request in trace for key in request.keys}
        total_bytes = sum(sizes.values())
        unlimited = leading_hit_ratio(trace, Lru(total_bytes), last_to_first=False)
        print(
            f"\n{trace_name}: {len(trace)} prompts, {total_bytes / 2**30:.1f} GiB of distinct blocks; "
            f"an unlimited budget hits {unlimited:.1%}\n"
        )
        print(f"{'budget / distinct bytes':28}" + "".join(f"{share:>9.1%}" for share in BUDGET_SHARES))
        for contender in CONTENDERS:
            start = time.perf_counter()
            ratios = [
                leading_hit_ratio(
                    trace, contender.make(int(total_bytes * share)), last_to_first=contender.last_to_first
                )
                for share in BUDGET_SHARES
            ]
            elapsed_s = time.perf_counter() - start
            num_calls = len(BUDGET_SHARES) * sum(len(request.keys) for request in trace)
            print(f"{contender.name:28}" + "".join(f"{ratio:>9.1%}" for ratio in ratios))
            lines += [
                {
                    "benchmark": "eviction",
                    "trace": trace_name,
                    "prompts": len(trace),
                    "policy": contender.name,
                    "budget_bytes": int(total_bytes * share),
                    "budget_share": share,
                    "leading_hit_ratio": round(ratio, 4),
                    "unlimited_hit_ratio": round(unlimited, 4),
                    "microseconds_per_block": round(1e6 * elapsed_s / num_calls, 2),
                    **context,
                }
                for share, ratio in zip(BUDGET_SHARES, ratios, strict=True)
            ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
