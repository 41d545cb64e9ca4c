"""What our kernels are compared with: torch's bf16 attention, at the form that is fastest for it."""

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.gpu.inputs import Arena
from benchmarks.gpu.timing import Call, Stopwatch, Timing
from benchmarks.registry import BF16, Case

_BACKENDS = dict(zip(BF16, (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION), strict=True))


class Bf16Attention:
    """Times of bf16 attention, each shape measured once."""

    def __init__(self, arena: Arena, watch: Stopwatch) -> None:
        self._arena, self._watch = arena, watch
        self._known: dict[tuple[int, ...], dict[str, Timing | str]] = {}

    def times(self, case: Case) -> dict[str, Timing | str]:
        """Time of each backend, or why it gave none."""
        if case.shape not in self._known:
            calls = _extend_calls if case.op == "extend" else _decode_calls
            self._known[case.shape] = {
                name: self._time(backend, calls(case, self._arena, backend))
                for name, backend in _BACKENDS.items()
            }
        return self._known[case.shape]

    def _time(self, backend: SDPBackend, calls: list[Call]) -> Timing | str:
        try:
            with sdpa_kernel(backend):
                return self._watch.time_graph(calls)
        except RuntimeError as error:
            return str(error).splitlines()[0]


def _decode_calls(case: Case, arena: Arena, backend: SDPBackend) -> list[Call]:
    """Few queries a sequence, contiguous keys; all queries of a KV head stand in as rows of one head.

    That spares the backends from expanding heads and is their fastest form: KV is read once. Rows that
    stand for several tokens all see every key.
    """
    rows = case.new_tokens * case.q_heads // case.kv_heads
    query = arena.normal(case.batch, case.kv_heads, rows, case.head_dim)
    shape = (arena.num_sets(case), 2, case.batch, case.kv_heads, case.context, case.head_dim)
    sets = arena.bf16(torch.Size(shape).numel()).view(shape)

    def call(keys: torch.Tensor, values: torch.Tensor) -> Call:
        return lambda: functional.scaled_dot_product_attention(query, keys, values)

    return [call(keys, values) for keys, values in sets]


def _extend_calls(case: Case, arena: Arena, backend: SDPBackend) -> list[Call]:
    """New queries over raw keys.

    FlashAttention masks as it should; cuDNN aligns a causal mask elsewhere, so it sees all keys: 0.8 % more.
    """
    num_keys = case.context + case.new_tokens
    query = arena.normal(case.batch, case.q_heads, case.new_tokens, case.head_dim)
    shape = (2, case.batch, case.kv_heads, num_keys, case.head_dim)
    keys, values = arena.bf16(torch.Size(shape).numel()).view(shape)
    masked = backend is SDPBackend.FLASH_ATTENTION
    mask = causal_lower_right(case.new_tokens, num_keys) if masked else None
    return [
        lambda: functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
    ]
