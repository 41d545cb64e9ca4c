"""What cold pages bring and cost: error at equal bytes on real keys and values, and time on one core.

Errors are of keys about their mean over the text and of values about zero, after the four sinks, means over
layers; keys are divided by the power 0.75 of their deviation, channel by channel, before either code.
Bits are split evenly between keys and values, for comparison.

``python -m benchmarks.cold`` prints tables and writes ``benchmarks/results/cold.jsonl``; GPU times come from
``python -m benchmarks.gpu.cold``.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.circumstances import circumstances
from benchmarks.real_vectors import keys_and_values
from tq_kernels import PRESETS, PageLayout, cold_page, reference
from tq_kernels.cold_layout import ColdLayout

RESULTS = Path(__file__).parent / "results" / "cold.jsonl"
MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")
NAMES = ("tq4", "tq3", "tq2")
_PAGE_TOKENS = 128


def _errors(originals: tuple[torch.Tensor, ...], restored: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Of keys about their mean, and of values: ``[2]``."""
    keys, values = originals
    energies = ((keys - keys.mean(0)).square().sum(), values.square().sum())
    sides = zip(originals, restored, energies, strict=True)
    return torch.stack([(one - other).square().sum() / energy for one, other, energy in sides])


def measure(model: str, name: str, keys: torch.Tensor, values: torch.Tensor) -> dict[str, Any]:
    """One row: LM pages against cold pages of the same bytes, layer by layer."""
    lm = PageLayout(
        spec=PRESETS[name], head_dim=keys.shape[-1], num_kv_heads=keys.shape[-2], page_tokens=_PAGE_TOKENS
    )
    cold = ColdLayout(
        head_dim=lm.head_dim,
        num_kv_heads=lm.num_kv_heads,
        page_tokens=_PAGE_TOKENS,
        section_bytes=lm.section_bytes,
    )
    errors, pages, quantize_s = torch.zeros(2, 2), [], 0.0
    for key, value in zip(keys, values, strict=True):
        balance = key.std(0) ** 0.75
        lm_pages = reference.quantize(key, value, lm, key_balance=balance)
        of_lm = reference.dequantize(lm_pages, lm, key_balance=balance)
        started = time.perf_counter()
        pages.append(cold_page.quantize(key, value, cold, key_balance=balance, key_extra_bits=0))
        quantize_s += time.perf_counter() - started
        of_cold = cold_page.roundtrip(
            key,
            value,
            section_bytes=cold.section_bytes,
            key_balance=balance,
            key_extra_bits=0,
            page_tokens=_PAGE_TOKENS,
        )
        errors += torch.stack([_errors((key, value), each) for each in (of_lm, of_cold)]) / len(keys)
    started = time.perf_counter()
    cold_page.dequantize(torch.cat(pages), cold)
    dequantize_s = time.perf_counter() - started
    num_bf16_bytes = 2 * (keys.numel() + values.numel())
    return {
        "model": model,
        "preset": name,
        "slot_bytes": lm.section_bytes / _PAGE_TOKENS,
        "lm_key_error": float(errors[0, 0]),
        "lm_value_error": float(errors[0, 1]),
        "cold_key_error": float(errors[1, 0]),
        "cold_value_error": float(errors[1, 1]),
        "quantize_mbps": num_bf16_bytes / quantize_s / 1e6,
        "dequantize_mbps": num_bf16_bytes / dequantize_s / 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=512, help="whole pages of 128 (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for model in parsed.models:
        keys, values = keys_and_values(model, parsed.tokens)
        rows += [measure(model, name, keys, values) for name in NAMES]
    print("| model | bytes of | bytes a token and head | keys, LM | keys, cold | values, LM | values, cold |")
    print("|---|---|---|---|---|---|---|")
    errors = ("lm_key_error", "cold_key_error", "lm_value_error", "cold_value_error")
    for row in rows:
        cells = " | ".join(f"{row[key]:.5f}" for key in errors)
        print(f"| {row['model']} | {row['preset']} | {row['slot_bytes']:.0f} | {cells} |")
    print("\n| model | bytes of | quantize, MB/s of bf16 | dequantize, MB/s of bf16 |\n|---|---|---|---|")
    for row in rows:
        speeds = f"{row['quantize_mbps']:.1f} | {row['dequantize_mbps']:.1f}"
        print(f"| {row['model']} | {row['preset']} | {speeds} |")
    facts = {**circumstances(), "torch": torch.__version__, "tokens": parsed.tokens}
    parsed.output.write_text("".join(json.dumps({**row, **facts}) + "\n" for row in rows))


if __name__ == "__main__":
    main()
