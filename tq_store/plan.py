"""What a shared cache will take and save: bytes, memory, time to first token, and which links pay."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tq_store.block import HEADER_BYTES
from tq_store.errors import ConfigError
from tq_store.settings import format_size
from tq_store.sizing import Model, block_bytes, block_sizes

BASELINE = "raw"
COMPARED_LINKS_GBIT = (1.0, 5.0, 10.0, 25.0, 100.0)
DEFAULT_TFLOPS = 400.0
"""What an H100 makes of a long bf16 prefill: four tenths of what its data sheet says."""
DEFAULT_CLIENT_GIB_PER_S = 1.0
"""What one client takes; `load` of `make bench-store` is the number of a machine of yours."""

_MEMORY_OVERHEAD_BYTES = 750
_REDIS_OVERHEAD_BYTES = 300
_DISK_PAGE_BYTES = 4096
_LOOKUP_S = 0.002
_EXPAND_S = 128.5e-6 / (32_768 * 8 * 128)
"""To rotate one number of a key and of a value back to bf16 on an H100 (`benchmarks/results/gpu.jsonl`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked.

    Args:
        context: Tokens of a prompt.
        replicas: Engines that share the store.
        link_gbit: Speed of the store's network link, Gbit/s.
        hit_ratio: Part of the prompt, from its beginning, that the store has.
        preset: Codec of the pages: a preset, or a table by layer.
        page_tokens: Tokens of a page.
        prefill_tokens_per_s: Measured prefill speed of a replica; None estimates it from `tflops`.
        tflops: Arithmetic that a replica reaches in a prefill, 10**12 operations/s.
        client_gib_per_s: What one client takes however fast the link is.
    """

    model: Model
    context: int
    replicas: int = 1
    link_gbit: float = 10.0
    hit_ratio: float = 0.9
    preset: str = "tq4"
    page_tokens: int = 64
    prefill_tokens_per_s: float | None = None
    tflops: float = DEFAULT_TFLOPS
    client_gib_per_s: float = DEFAULT_CLIENT_GIB_PER_S

    def __post_init__(self) -> None:
        for name in (
            "context",
            "replicas",
            "link_gbit",
            "tflops",
            "client_gib_per_s",
            "prefill_tokens_per_s",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be greater than 0")
        if not 0 <= self.hit_ratio <= 1:
            raise ConfigError(f"hit_ratio is {self.hit_ratio}; it lies in 0 to 1")

    @property
    def hit_pages(self) -> int:
        """Pages that are loaded, each of all layers; only whole ones are."""
        return int(self.context * self.hit_ratio) // self.page_tokens


def bytes_per_token(question: Question, preset: str) -> float:
    """Bytes of a token in the store, headers included."""
    return block_bytes(question.model, preset, question.page_tokens) / question.page_tokens


def transfer_s(num_bytes: float, link_gbit: float, client_gib_per_s: float) -> float:
    """Time to carry bytes over a link to one client."""
    return num_bytes / min(link_gbit * 1e9 / 8, client_gib_per_s * 2**30)


def compute_s(question: Question, num_cached: int) -> float:
    """Time to prefill the prompt when its first tokens are cached.

    Each token is multiplied with the weights, and attends to those before it.
    """
    model, context = question.model, question.context
    num_new = context - num_cached
    attended = (context**2 - num_cached**2) / 2
    per_pair = 4 * model.num_layers * model.num_heads * model.head_dim
    work = 2 * model.active_weights * num_new + per_pair * attended
    if question.prefill_tokens_per_s is None:
        return work / (question.tflops * 1e12)
    whole = 2 * model.active_weights * context + per_pair * context**2 / 2
    return context / question.prefill_tokens_per_s * work / whole


def first_token_s(question: Question, preset: str, link_gbit: float, *, at_once: int = 1) -> float:
    """Time to first token with the store, for each of so many replicas that load at once."""
    num_bytes = question.hit_pages * block_bytes(question.model, preset, question.page_tokens)
    loading_s = transfer_s(num_bytes, link_gbit / at_once, question.client_gib_per_s)
    return _LOOKUP_S + loading_s + compute_s(question, question.hit_pages * question.page_tokens)


def pays_above_gbit(question: Question, preset: str) -> float | None:
    """The link from which on loading beats computing, for a client that takes as much; None for no link."""
    num_bytes = question.hit_pages * block_bytes(question.model, preset, question.page_tokens)
    saved_s = compute_s(question, 0) - compute_s(question, question.hit_pages * question.page_tokens)
    affordable_s = saved_s - _LOOKUP_S
    return num_bytes * 8 / affordable_s / 1e9 if affordable_s > 0 else None


def compression_pays_below_gbit(question: Question) -> float:
    """The link below which compressed blocks arrive sooner than raw ones even if the engine expands them.

    Where attention reads the compressed pages, nothing is expanded and they do at every speed.
    """
    model = question.model
    saved_bytes = bytes_per_token(question, BASELINE) - bytes_per_token(question, question.preset)
    expand_s = _EXPAND_S * model.num_layers * model.num_kv_heads * model.head_dim
    return max(0.0, saved_bytes * 8 / expand_s / 1e9)


def memory_bytes(question: Question) -> dict[str, int]:
    """Bytes that the prompt takes in each tier."""
    num_started = -(-question.context // question.page_tokens)
    num_whole = question.context // question.page_tokens
    blocks = block_sizes(question.model, question.preset, question.page_tokens)
    return {
        "gpu": num_started * sum(block - HEADER_BYTES for block in blocks),
        "memory": num_whole * sum(block + _MEMORY_OVERHEAD_BYTES for block in blocks),
        "disk": num_whole * sum(-(-block // _DISK_PAGE_BYTES) * _DISK_PAGE_BYTES for block in blocks),
        "redis": num_whole * sum(block + _REDIS_OVERHEAD_BYTES for block in blocks),
    }


def answer(question: Question) -> dict[str, Any]:
    """Everything, for programs; sizes in bytes, times in seconds, links in Gbit/s."""
    presets = dict.fromkeys((BASELINE, "fp8", question.preset))
    cached = question.hit_pages * question.page_tokens
    return {
        "preset": question.preset,
        "page_tokens": question.page_tokens,
        "block_bytes": block_bytes(question.model, question.preset, question.page_tokens),
        "blocks_per_page": len(block_sizes(question.model, question.preset, question.page_tokens)),
        "bytes_per_token": {preset: bytes_per_token(question, preset) for preset in presets},
        "memory_bytes": memory_bytes(question),
        "cached_tokens": cached,
        "first_token_s": {
            "without": compute_s(question, 0),
            "alone": first_token_s(question, question.preset, question.link_gbit),
            "all_replicas_at_once": first_token_s(
                question, question.preset, question.link_gbit, at_once=question.replicas
            ),
        },
        "transfer_s": transfer_s(
            question.hit_pages * block_bytes(question.model, question.preset, question.page_tokens),
            question.link_gbit,
            question.client_gib_per_s,
        ),
        "first_token_s_by_link": {
            f"{link_gbit:g}": {preset: first_token_s(question, preset, link_gbit) for preset in presets}
            for link_gbit in COMPARED_LINKS_GBIT
        },
        "pays_above_gbit": {preset: pays_above_gbit(question, preset) for preset in presets},
        "compression_pays_below_gbit": compression_pays_below_gbit(question),
    }


def describe(question: Question) -> Iterator[str]:
    """The answer in lines for people."""
    model, facts = question.model, answer(question)
    raw = facts["bytes_per_token"][BASELINE]
    yield (
        f"model               {model.num_layers} attention layers, {model.num_kv_heads} KV heads of "
        f"{model.head_dim}, {model.active_weights / 1e9:.2f} G weights a token"
    )
    presets = list(facts["bytes_per_token"])
    width = max(5, *map(len, presets))
    for preset, num_bytes in facts["bytes_per_token"].items():
        yield f"bytes per token     {preset:{width}} {num_bytes:12,.0f}  {raw / num_bytes:5.2f}x"
    num_blocks = facts["blocks_per_page"]
    name = "a block" if num_blocks == 1 else f"{num_blocks} blocks"
    yield f"{name:20}{question.page_tokens} tokens, {format_size(facts['block_bytes'])}"
    copies = f"one copy for {question.replicas} replicas" if question.replicas > 1 else "one replica"
    for tier, num_bytes in facts["memory_bytes"].items():
        where = "each replica" if tier == "gpu" else copies
        yield f"memory, {tier:11} {format_size(num_bytes):>10} for {question.context:,} tokens, {where}"
    yield ""
    times = facts["first_token_s"]
    source = "as measured" if question.prefill_tokens_per_s else f"at {question.tflops:g} TFLOP/s"
    yield f"first token without {times['without']:8.3f} s, computing all ({source})"
    yield (
        f"first token with    {times['alone']:8.3f} s, {facts['cached_tokens']:,} tokens in "
        f"{facts['transfer_s']:.3f} s over {question.link_gbit:g} Gbit/s"
    )
    if question.replicas > 1:
        yield f"                    {times['all_replicas_at_once']:8.3f} s if all replicas load at once"
    yield ""
    column = max(10, width + 2)
    yield "link, Gbit/s    no store " + "".join(f"{preset:>{column}}" for preset in presets)
    for link, by_preset in facts["first_token_s_by_link"].items():
        cells = "".join(f"{_cell(by_preset[preset], times['without']):>{column}}" for preset in presets)
        yield f"{link:>12} {times['without']:9.3f} s {cells}"
    client_gbit = question.client_gib_per_s * 2**30 * 8 / 1e9
    yield f"(* slower than to compute; a client takes {client_gbit:.1f} Gbit/s, faster links help it no more)"
    yield ""
    for preset, link_gbit in facts["pays_above_gbit"].items():
        if link_gbit is None:
            above = "never: to compute takes no longer than to ask"
        else:
            above = f"above {link_gbit:.2f} Gbit/s"
            above += ", which is more than a client takes" if link_gbit > client_gbit else ""
        yield f"loading {preset:{width}} pays  {above}"
    yield (
        f"compression pays    at every speed where attention reads the pages; where they are expanded, "
        f"below {facts['compression_pays_below_gbit']:,.0f} Gbit/s"
    )


def _cell(seconds: float, without_s: float) -> str:
    return f"{seconds:9.3f}{'*' if seconds > without_s else ' '}"
