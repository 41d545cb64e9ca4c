"""The attention backend in SGLang against exact attention over the same pages, without a model.

`python -m benchmarks.sglang_attention` runs prefill, a prefix hit, a mixed batch and decode, from a CUDA
graph if there can be one, on random keys and values, and prints one JSON line a preset. `exact` is the
relative error against attention over what was put in, which is what the preset costs; `codes` that against
attention over what the pages hold, which is what the kernels cost. It ends with 1 if that is too large.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_parallel

from tq_connectors.engine.layouts import DTYPES, PAGE_TOKENS
from tq_connectors.engine.sink_pool import NUM_SINKS
from tq_connectors.engine.state import load_state
from tq_connectors.sglang.backend import TurboQuantBackend
from tq_connectors.sglang.plugin import register
from tq_connectors.sglang.pool import TQTokenToKVPool
from tq_kernels.dequantize import dequantize_pages

LARGEST_ERROR = 0.02
LAYERS = 3


class Engine:
    """What of SGLang stands around its attention backend: pools, and batches of forward passes.

    Args:
        dtype_name: The preset.
        page_size: Tokens of a page.
        heads: Query heads, KV heads and channels.
        max_tokens: Of a sequence.
        max_seqs: Sequences, each of which has its own pages.
        dtype: Of the model.
        device: Where it all is.
    """

    def __init__(
        self,
        dtype_name: str,
        *,
        page_size: int,
        heads: tuple[int, int, int],
        max_tokens: int,
        max_seqs: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.heads, self.page_size, self.device, self.dtype = heads, page_size, device, dtype
        query_heads, kv_heads, head_dim = heads
        pages_each = -(-max_tokens // page_size)
        self.pool = TQTokenToKVPool(
            max_seqs * pages_each * page_size,
            page_size,
            dtype_name=dtype_name,
            dtype=torch.uint8,
            head_num=kv_heads,
            head_dim=head_dim,
            layer_num=LAYERS,
            device=device,
            enable_memory_saver=False,
        )
        # pages of a sequence lie anywhere but on page 0
        generator = torch.Generator().manual_seed(3)
        pages = torch.randperm(max_seqs * pages_each, generator=generator).view(max_seqs, pages_each) + 1
        slots = pages[..., None] * page_size + torch.arange(page_size)
        self.req_to_token = slots.flatten(1).to(device, torch.int32)
        self.layers = torch.nn.ModuleList(
            RadixAttention(query_heads, head_dim, head_dim**-0.5, kv_heads, number)
            for number in range(LAYERS)
        )
        runner = SimpleNamespace(
            model=self.layers,
            token_to_kv_pool=self.pool,
            req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token, size=max_seqs),
            model_config=SimpleNamespace(
                context_len=max_tokens,
                num_attention_heads=query_heads,
                num_hidden_layers=LAYERS,
                get_total_num_kv_heads=lambda: kv_heads,
            ),
            device=device,
            dtype=dtype,
        )
        with get_parallel().override(attn_tp_size=1, attn_tp_rank=0):
            self.backend = TurboQuantBackend(runner)
        shape = (LAYERS, max_seqs, max_tokens)
        # keys have a mean and tokens that stand out, as those of models do
        self.keys = torch.randn(*shape, kv_heads, head_dim, generator=generator).to(device, dtype)
        self.keys += torch.randn(kv_heads, head_dim, generator=generator).to(device, dtype)
        self.values = torch.randn(*shape, kv_heads, head_dim, generator=generator).to(device, dtype)
        self.query = torch.randn(*shape, query_heads, head_dim, generator=generator).to(device, dtype)

    def batch(self, mode: ForwardMode, spans: Sequence[tuple[int, int, int]]) -> SimpleNamespace:
        """A forward pass over spans: sequence, first new token, and where they end."""
        rows = torch.tensor([span[0] for span in spans], device=self.device)
        new = [end - start for _, start, end in spans]
        loc = [self.req_to_token[row, start:end] for row, start, end in spans]
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(spans),
            req_pool_indices=rows,
            seq_lens=torch.tensor([end for _, _, end in spans], device=self.device),
            out_cache_loc=torch.cat(loc).long(),
            extend_seq_lens=torch.tensor(new, device=self.device),
            extend_prefix_lens_cpu=[start for _, start, _ in spans],
            extend_seq_lens_cpu=new,
        )

    def _tokens(self, of: torch.Tensor, layer: int, spans: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        return torch.cat([of[layer, row, start:end] for row, start, end in spans])

    def forward(self, forward_batch: Any, spans: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Outputs of all layers, ``[num_tokens, query_heads, head_dim]``; metadata are made before."""
        outputs = []
        for number, layer in enumerate(self.layers):
            query = self._tokens(self.query, number, spans).flatten(1)
            keys, values = (self._tokens(of, number, spans) for of in (self.keys, self.values))
            if forward_batch.forward_mode.is_decode():
                out = self.backend.forward_decode(query, keys, values, layer, forward_batch)
            else:
                out = self.backend.forward_extend(query, keys, values, layer, forward_batch)
            outputs.append(out.view(-1, self.heads[0], self.heads[2]))
        return outputs

    def run(self, mode: ForwardMode, spans: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """One eager forward pass."""
        forward_batch = self.batch(mode, spans)
        self.backend.init_forward_metadata(forward_batch)
        return self.forward(forward_batch, spans)

    def exact(
        self, spans: Sequence[tuple[int, int, int]], raw_from: Sequence[int] | None
    ) -> list[torch.Tensor]:
        """Attention over raw keys and values from a position of each sequence on, and over pages before it.

        Args:
            spans: As for `batch`.
            raw_from: The positions; None for 0 everywhere.
        """
        return [
            torch.cat(
                [
                    self._attend(number, span, 0 if raw_from is None else raw_from[i])
                    for i, span in enumerate(spans)
                ]
            )
            for number in range(LAYERS)
        ]

    def _attend(self, layer: int, span: tuple[int, int, int], raw_from: int) -> torch.Tensor:
        row, start, end = span
        keys, values = (of[layer, row, :end].to(torch.float32, copy=True) for of in (self.keys, self.values))
        if raw_from > NUM_SINKS:
            held = self._held(layer, row, end)
            keys[NUM_SINKS:raw_from], values[NUM_SINKS:raw_from] = (
                side[NUM_SINKS:raw_from].float() for side in held
            )
        query = self.query[layer, row, start:end].float()
        group = self.heads[0] // self.heads[1]
        keys, values = (side.repeat_interleave(group, 1).transpose(0, 1) for side in (keys, values))
        scores = query.transpose(0, 1) @ keys.transpose(1, 2) * self.heads[2] ** -0.5
        position = torch.arange(end, device=self.device)
        scores = scores.masked_fill(position > position[start:end, None], -torch.inf)
        return (scores.softmax(-1) @ values).transpose(0, 1)

    def _held(self, layer: int, row: int, end: int) -> list[torch.Tensor]:
        """Keys and values as the pages of a sequence hold them."""
        num_pages = -(-end // self.page_size)
        table = (self.req_to_token[row, :: self.page_size] // self.page_size)[:num_pages].contiguous()
        shape = (num_pages, self.page_size, *self.heads[1:])
        held = [torch.empty(shape, dtype=torch.float32, device=self.device) for _ in range(2)]
        slots = torch.arange(num_pages * self.page_size, device=self.device)
        state = load_state(os.environ)
        balance = None if state is None else state.key_balance[layer].to(self.device)
        dequantize_pages(
            self.pool.pages(layer), table, *held, slots, self.pool.page_layout, key_balance=balance
        )
        return [side.flatten(0, 1) for side in held]


def relative(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Largest relative error in the 2-norm over the layers."""
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))


def cases(engine: Engine, length: int) -> Iterator[tuple[str, float, float]]:
    """Name of a forward pass, its error against what was put in, and against what the pages hold."""
    page = engine.page_size
    prefix = (length // 2) // page * page
    spans = [(0, 0, length), (1, 0, prefix), (2, 0, length - 7)]
    got = engine.run(ForwardMode.EXTEND, spans)
    yield "prefill", relative(got, engine.exact(spans, None)), relative(got, engine.exact(spans, None))
    spans = [(1, prefix, length)]
    got = engine.run(ForwardMode.EXTEND, spans)
    yield "hit", relative(got, engine.exact(spans, None)), relative(got, engine.exact(spans, [prefix]))
    spans = [(3, 0, page + 5), (0, length, length + 1), (2, length - 7, length - 6)]
    got = engine.run(ForwardMode.MIXED, spans)
    held = engine.exact(spans, [0, length + 1, length - 6])
    yield "mixed", relative(got, engine.exact(spans, None)), relative(got, held)
    at = [length + 1, length, length - 6, page + 5]
    spans = [(row, end, end + 1) for row, end in enumerate(at)]
    got = _decode(engine, spans)
    held = engine.exact(spans, [end + 1 for end in at])
    yield "decode", relative(got, engine.exact(spans, None)), relative(got, held)
    for _ in range(page):  # over the end of a page, one token at a time
        at = [end + 1 for end in at]
        spans = [(row, end, end + 1) for row, end in enumerate(at)]
        got = engine.run(ForwardMode.DECODE, spans)
    held = engine.exact(spans, [end + 1 for end in at])
    yield "opened", relative(got, engine.exact(spans, None)), relative(got, held)


def _decode(engine: Engine, spans: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
    """A decode, padded to one sequence more, from a CUDA graph where there is a GPU."""
    num_seqs = len(spans) + 1
    forward_batch = engine.batch(ForwardMode.DECODE, [*spans, (0, 0, 1)])
    forward_batch.out_cache_loc[-1] = 0
    padded = [*spans, (0, 0, 1)]
    engine.backend.init_cuda_graph_state(num_seqs, num_seqs)
    if not engine.device.startswith("cuda"):
        engine.backend.init_forward_metadata_out_graph(forward_batch, in_capture=True)
        engine.backend.init_forward_metadata_out_graph(forward_batch)
        return [out[: len(spans)] for out in engine.forward(forward_batch, padded)]
    warm = engine.batch(ForwardMode.DECODE, [(0, 0, 1)] * num_seqs)
    warm.out_cache_loc.zero_()
    engine.backend.init_forward_metadata_out_graph(warm, in_capture=True)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        engine.forward(warm, padded)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        engine.backend.init_forward_metadata_in_graph(warm)
        outputs = engine.forward(warm, padded)
    engine.backend.init_forward_metadata_out_graph(forward_batch)
    graph.replay()
    torch.cuda.synchronize()
    return [out[: len(spans)] for out in outputs]


def check(dtype_name: str, page_size: int, heads: tuple[int, int, int], length: int) -> dict[str, Any]:
    """A JSON line of a preset."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = Engine(
        dtype_name,
        page_size=page_size,
        heads=heads,
        max_tokens=length + 2 * page_size,
        max_seqs=4,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        device=device,
    )
    errors = {
        name: {"exact": round(exact, 4), "codes": round(codes, 4)}
        for name, exact, codes in cases(engine, length)
    }
    return {"kv_cache_dtype": dtype_name, "page_size": page_size, "length": length, "errors": errors}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check presets; 1 if kernels are further from exact attention over the pages than they may be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sglang_attention", description=__doc__)
    parser.add_argument("--presets", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--heads", nargs=3, type=int, default=[32, 8, 128], metavar=("QUERY", "KV", "DIM"))
    parser.add_argument("--page-sizes", nargs="+", type=int, default=list(PAGE_TOKENS), choices=PAGE_TOKENS)
    parser.add_argument(
        "--length", type=int, default=1000, help="tokens of a sequence (default: %(default)s)"
    )
    parsed = parser.parse_args(arguments)
    register()
    HookRegistry.apply_hooks()
    worst = 0.0
    for name in parsed.presets:
        for page_size in parsed.page_sizes:
            row = check(name, page_size, tuple(parsed.heads), parsed.length)
            worst = max(worst, *(error["codes"] for error in row["errors"].values()))
            print(json.dumps(row), flush=True)
    return int(worst > LARGEST_ERROR)


if __name__ == "__main__":
    sys.exit(main())
