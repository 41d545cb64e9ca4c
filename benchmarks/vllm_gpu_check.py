"""Whether our backend computes attention inside a running vLLM: every output of every layer is looked at.

Small batches of prompts run eagerly, cold, in chunks, after a prefix hit and through decode, all in one pool.
Every call of a layer's attention is held against float32 attention over the raw keys and values that the
engine has written into the same slots before.
"""

import argparse
import random
import statistics
from collections import defaultdict
from typing import Any

import torch

MOST_ERROR = {"raw": 0.01, "tq4": 0.2, "tq3": 0.35, "k8v4": 0.2, "k4v3": 0.35, "k3v4": 0.35}
"""Relative error that half of the calls stay below, and all below twice; other presets are only printed."""


def check(options: argparse.Namespace, dtype: str) -> None:
    """Compare, and print the errors.

    Raises:
        SystemExit: One is too large.
    """
    from benchmarks.vllm_gpu import Engine
    from tq_connectors.vllm.attention import TQAttentionImpl

    recorder = Recorder()
    engine = Engine(
        options,
        dtype,
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=8,
        max_num_batched_tokens=512,  # prompts come in chunks
    )
    recorder.wrap(TQAttentionImpl)
    numbers = random.Random(5)
    prompts = [[numbers.randrange(10, 31000) for _ in range(length)] for length in (700, 90, 40, 400)]
    engine.run(prompts, 6)
    # all but the first come from the prefix cache up to a page, and are computed beside a cold one
    others = [[*prompt[:-20], *range(40, 60)] for prompt in prompts]
    engine.run([[numbers.randrange(10, 31000) for _ in range(480)], *others], 6)
    failed = False
    for part, errors in sorted(recorder.errors.items()):
        half, worst = statistics.median(errors), max(errors)
        bound = MOST_ERROR.get("raw" if part == "cold" else dtype)
        failed |= bound is not None and not (half < bound and worst < 2 * bound)
        print(f"{dtype}: {part}: error {half:.4f}, {worst:.4f} at most, in {len(errors)} calls", flush=True)
    missing = {"cold", "chunk", "decode"} - recorder.errors.keys()
    if failed or missing:
        raise SystemExit(f"{dtype}: attention is not what it should be" if failed else f"not run: {missing}")


class Recorder:
    """Raw keys and values by layer and slot, and the errors of what layers made of them."""

    def __init__(self) -> None:
        self.errors: dict[str, list[float]] = defaultdict(list)
        self._raw: dict[str, tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]] = {}

    def wrap(self, impl: Any) -> None:
        """Look over the shoulder of a class of attention."""
        forward = impl.forward

        def watched(
            self_: Any, layer: Any, query: Any, key: Any, value: Any, *others: Any, **more: Any
        ) -> Any:
            output = forward(self_, layer, query, key, value, *others, **more)
            step = others[1] if len(others) > 1 else more["attn_metadata"]
            if step is not None:
                self._compare(self_, layer.layer_name, step, (query, key, value), output)
            return output

        impl.forward = watched

    def _compare(self, impl: Any, layer: str, step: Any, tokens: Any, output: torch.Tensor) -> None:
        query, key, value = tokens
        keys, values = self._raw.setdefault(layer, ({}, {}))
        for token, slot in enumerate(step.slot_mapping.tolist()):
            if slot >= 0:
                keys[slot], values[slot] = key[token].clone(), value[token].clone()
        parts: list[tuple[str, int, int, int]] = []
        if step.decode is not None:
            lengths = step.lengths.tolist()
            parts += [("decode", seq, seq, seq + 1) for seq in range(step.decode.num_seqs) if lengths[seq]]
        for prompts in step.cold:
            first = prompts.first_token
            for seq, length in enumerate(prompts.lengths, prompts.first_seq):
                parts.append(("cold", seq, first, first + length))
                first += length
        parts += [("chunk", each.seq, each.tokens.start, each.tokens.stop) for each in step.chunks]
        for each in step.short.chunks if step.short else ():
            parts.append(("short", each.seq, each.first_token, each.first_token + each.num_new))
        page_tokens = step.group.layout.page_tokens
        for part, seq, first, last in parts:
            length = int(step.lengths[seq])
            table = step.block_table[seq].tolist()
            slots = [table[at // page_tokens] * page_tokens + at % page_tokens for at in range(length)]
            if not all(slot in keys for slot in slots):
                continue  # a run of vLLM's own, over pages of nobody
            want = _exact(
                query[first:last],
                torch.stack([keys[s] for s in slots]),
                torch.stack([values[s] for s in slots]),
                impl,
            )
            got = output.view(query.shape)[first:last].float()
            self.errors[part].append(float((got - want).norm() / want.norm()))


def _exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, impl: Any) -> torch.Tensor:
    count, length = len(query), len(keys)
    position = torch.arange(length, device=query.device)
    distance = position[-count:, None] - position
    mask = (
        distance >= 0 if impl.sliding_window is None else (distance >= 0) & (distance < impl.sliding_window)
    )
    sides = (side.float().transpose(0, 1) for side in (query, keys, values))
    return torch.nn.functional.scaled_dot_product_attention(
        *sides, attn_mask=mask, scale=impl.scale, enable_gqa=True
    ).transpose(0, 1)
