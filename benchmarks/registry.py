"""What `benchmarks.run` times: every case, what it is compared with, and the bar each must reach.

Plain data, importable without torch. The order is that of running: cases that share kernels and pages follow
each other, the longest first, so that a kernel compiles once and a pool is filled once.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tq_kernels import PRESETS, PageLayout

QUANTIZED = tuple(name for name in PRESETS if name not in ("fp8", "raw"))
PEERS = ("turbo-attn", "vllm", "vllm-soa", "aither", "turboquant-vllm")
"""Others' kernels that `--peers` can load; `vllm` is what an NVIDIA user gets from stock vLLM 0.33."""

BF16 = ("cudnn-bf16", "flash-bf16")
"""Torch's two bf16 attention backends; a decode case is compared with the faster one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration of one op.

    Args:
        op: `decode`, `verify` (drafted tokens of each sequence, through the decode path), `extend`,
            `quantize`, `append` (one token a sequence) or `dequantize`.
        preset: Name of the codec.
        batch: Sequences.
        context: Tokens of each sequence in pages; for quantize and dequantize the tokens converted.
        q_heads: Query heads; 0 for ops without queries.
        kv_heads: KV heads.
        head_dim: Channels of a head.
        page_tokens: Tokens of a page.
        new_tokens: Query rows of each sequence.
        against: What its time is compared with: `bf16` (the faster of `BF16`), a member of it, `fp8-limit`
            (half of bf16's bytes at copy bandwidth), `copy`, `launch` or `peers`.
    """

    op: str
    preset: str
    batch: int
    context: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_tokens: int = 128
    new_tokens: int = 1
    against: tuple[str, ...]

    @property
    def name(self) -> str:
        """What `--list` prints and `--only` matches."""
        heads = f"{self.q_heads}q{self.kv_heads}kv{self.head_dim}d"
        rows = f"+{self.new_tokens}" if self.new_tokens > 1 else ""
        return f"{self.op}/{self.preset}/{self.batch}x{self.context}{rows}/{heads}/p{self.page_tokens}"

    @property
    def layout(self) -> PageLayout:
        """Geometry of its pages."""
        return PageLayout(
            spec=PRESETS[self.preset],
            head_dim=self.head_dim,
            num_kv_heads=self.kv_heads,
            page_tokens=self.page_tokens,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """What decides the time of a bf16 baseline."""
        return self.batch, self.context, self.q_heads, self.kv_heads, self.head_dim, self.new_tokens

    @property
    def pages_per_seq(self) -> int:
        """Pages that hold the context of one sequence."""
        return -(-self.context // self.page_tokens)

    @property
    def bf16_bytes(self) -> int:
        """Keys and values of the context in bf16."""
        return 4 * self.batch * self.context * self.kv_heads * self.head_dim

    @property
    def page_bytes(self) -> int:
        """The same in pages, statistics and padding included."""
        return self.batch * self.pages_per_seq * self.layout.page_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """What some cases are meant to reach.

    Args:
        title: In words.
        only: Patterns of case names.
        measure: `speedup`, `roofline` or `median_us` of a row, or `gbps_of_tq4`: GB/s over those of tq4 at
            the same shape.
        reach: The value to reach, from below; from above for `median_us`.
        baselines: Rows that count, by what they are compared with.
        least_bf16_bytes: Leave out cases whose KV in bf16 is smaller.
    """

    title: str
    only: tuple[str, ...]
    measure: str
    reach: float
    baselines: tuple[str, ...]
    least_bf16_bytes: int = 0

    def cases(self) -> list[Case]:
        """The cases that the bar speaks of."""
        return [case for case in selected(self.only) if case.bf16_bytes >= self.least_bf16_bytes]


_LLAMA = (32, 8, 128)
_QWEN_1B5 = (12, 2, 128)
_QWEN_0B5 = (14, 2, 64)
_LIMITS = ("bf16", "fp8-limit")
_WITH_PEERS = (*_LIMITS, "peers")
_PLOTTED = [(32, context) for context in (32768, 16384, 8192, 4096, 2048)]
_QWEN = [(batch, context) for context in (131072, 32768, 16384, 4096) for batch in (64, 16, 4, 1)]
_PEER_SHAPES = {(32, 8192), (1, 131072)}


def _decode(
    preset: str,
    shape: tuple[int, int],
    heads: tuple[int, int, int],
    against: tuple[str, ...] = ("bf16",),
    page_tokens: int = 128,
    new_tokens: int = 1,
) -> Case:
    batch, context = shape
    q_heads, kv_heads, head_dim = heads
    return Case(
        op="decode" if new_tokens == 1 else "verify",
        preset=preset,
        batch=batch,
        context=context,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        new_tokens=new_tokens,
        against=against,
    )


def _convert(
    op: str,
    preset: str,
    batch: int,
    context: int,
    against: tuple[str, ...],
    head_dim: int = 128,
    page_tokens: int = 128,
) -> Case:
    return Case(
        op=op,
        preset=preset,
        batch=batch,
        context=context,
        q_heads=0,
        kv_heads=8,
        head_dim=head_dim,
        page_tokens=page_tokens,
        against=against,
    )


def _all_cases() -> Iterator[Case]:
    for preset in PRESETS:
        shapes = [*_PLOTTED, (8, 8192)] + ([(64, 8192), (1, 131072)] if preset == "tq4" else [])
        for shape in shapes:
            with_peers = preset == "tq4" and shape in _PEER_SHAPES
            yield _decode(preset, shape, _LLAMA, _WITH_PEERS if with_peers else _LIMITS)
    for new_tokens in (2, 4, 16):
        yield _decode("tq4", (32, 8192), _LLAMA, new_tokens=new_tokens)
    for shape in ((32, 32768), (32, 8192)):
        yield _decode("tq4", shape, _LLAMA, page_tokens=64)
    for heads in (_QWEN_1B5, _QWEN_0B5):
        for shape in _QWEN:
            yield _decode("tq4", shape, heads)
    for preset in ("tq4", "tq3", "tq2", "k8v4"):
        yield _convert("quantize", preset, 1, 32768, ("copy", "peers") if preset == "tq4" else ("copy",))
        yield _convert("append", preset, 64, 8192, ("launch",))
        yield _convert("dequantize", preset, 1, 32768, ("copy",))
    for head_dim, page_tokens in ((128, 64), (64, 128), (64, 64)):  # engines have pages of 64 tokens
        yield _convert("quantize", "tq4", 1, 32768, ("copy",), head_dim, page_tokens)
    for new_tokens in (8192, 2048, 512, 64):
        yield Case(
            op="extend",
            preset="tq4",
            batch=1,
            context=32768,
            q_heads=32,
            kv_heads=8,
            head_dim=128,
            new_tokens=new_tokens,
            against=BF16,
        )


CASES = tuple(_all_cases())
"""Every case, in running order."""

_MIB = 1 << 20

BARS = (
    Bar(
        title="decode tq4 32x32768 and 64x8192 over the faster bf16",
        only=("decode/tq4/32x32768/32q8kv128d/p128", "decode/tq4/64x8192/32q8kv128d/p128"),
        measure="speedup",
        reach=3.2,
        baselines=BF16,
    ),
    Bar(
        title="decode tq4 8x8192 and 1x131072 over the faster bf16",
        only=("decode/tq4/8x8192/32q8kv128d/p128", "decode/tq4/1x131072/32q8kv128d/p128"),
        measure="speedup",
        reach=2.9,
        baselines=BF16,
    ),
    Bar(
        title="decode tq4 8x8192 and 1x131072, share of copy bandwidth",
        only=("decode/tq4/8x8192/32q8kv128d/p128", "decode/tq4/1x131072/32q8kv128d/p128"),
        measure="roofline",
        reach=0.70,
        baselines=BF16,
    ),
    Bar(
        title="decode tq4 at Qwen2.5 shapes, bf16 KV above 256 MB",
        only=("decode/tq4/*/12q2kv128d/*", "decode/tq4/*/14q2kv64d/*"),
        measure="speedup",
        reach=1.8,
        baselines=BF16,
        least_bf16_bytes=256 * _MIB,
    ),
    Bar(
        title="decode tq4 at Qwen2.5 shapes, anywhere",
        only=("decode/tq4/*/12q2kv128d/*", "decode/tq4/*/14q2kv64d/*"),
        measure="speedup",
        reach=1.0,
        baselines=BF16,
    ),
    Bar(
        title="decode tq3, tq2, k8v4, k4v2, GB/s over tq4's",
        only=tuple(
            f"decode/{preset}/{shape}/32q8kv128d/p128"
            for preset in ("tq3", "tq2", "k8v4", "k4v2")
            for shape in ("32x8192", "32x32768")
        ),
        measure="gbps_of_tq4",
        reach=0.85,
        baselines=BF16,
    ),
    Bar(
        title="decode, any preset, over a perfect FP8 kernel, from 8x8192 up",
        only=tuple(
            f"decode/{preset}/{shape}/32q8kv128d/p128"
            for preset in QUANTIZED
            for shape in ("8x8192", "64x8192", "32x8192", "32x16384", "32x32768", "1x131072")
        ),
        measure="speedup",
        reach=1.0,
        baselines=("fp8-limit",),
    ),
    Bar(
        title="decode tq4 over stock vLLM's default kernel",
        only=("decode/tq4/32x8192/32q8kv128d/p128", "decode/tq4/1x131072/32q8kv128d/p128"),
        measure="speedup",
        reach=10.0,
        baselines=("vllm",),
    ),
    Bar(
        title="decode tq4 over turbo-attn",
        only=("decode/tq4/32x8192/32q8kv128d/p128", "decode/tq4/1x131072/32q8kv128d/p128"),
        measure="speedup",
        reach=3.0,
        baselines=("turbo-attn",),
    ),
    Bar(
        title="decode tq4 over vLLM's SoA kernel, aither and turboquant-vllm",
        only=("decode/tq4/32x8192/32q8kv128d/p128", "decode/tq4/1x131072/32q8kv128d/p128"),
        measure="speedup",
        reach=1.0,
        baselines=("vllm-soa", "aither", "turboquant-vllm"),
    ),
    Bar(
        title="quantize tq4, 32k tokens, share of copy traffic",
        only=("quantize/tq4/*/0q8kv128d/*",),
        measure="roofline",
        reach=0.70,
        baselines=("copy",),
    ),
    Bar(
        title="quantize tq4, one token of 64 sequences, microseconds a layer in a graph",
        only=("append/tq4/*",),
        measure="median_us",
        reach=10.0,
        baselines=("launch",),
    ),
    Bar(
        title="dequantize tq4, 32k tokens, share of copy traffic",
        only=("dequantize/tq4/*",),
        measure="roofline",
        reach=0.75,
        baselines=("copy",),
    ),
    Bar(
        title="extend tq4, 512 tokens over 32k, over bf16 FlashAttention (1.1x slower at most)",
        only=("extend/tq4/1x32768+512/*",),
        measure="speedup",
        reach=1 / 1.1,
        baselines=("flash-bf16",),
    ),
)
"""The bar of the kernels, in the order of running."""


def selected(patterns: Sequence[str]) -> list[Case]:
    """Cases whose names match one of the patterns, as globs or from the start of a part on; all for none."""
    if not patterns:
        return list(CASES)
    return [
        case
        for case in CASES
        if any(
            fnmatch.fnmatchcase(case.name, pattern) or f"/{pattern}" in f"/{case.name}"
            for pattern in patterns
        )
    ]
