"""Measure every preset on SmolLM2: real block bytes, and what the logits lose to an uncompressed cache.

One document is prefilled in chunks of one page, so that every token attends to all pages before its own on
compressed bytes; KL and top-1 are those of positions 512 and on against plain attention in float32. Weights
are 4-bit ones dequantized to float32: the reference is that model, not the original checkpoint.

``python benchmarks/presets.py`` prints a table and writes ``benchmarks/results/presets.jsonl``.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from circumstances import circumstances
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from tq_connectors.hf.connector import TQConnector
from tq_connectors.hf.models import SMOLLM2, fetch_model
from tq_kernels import PRESETS
from tq_store.block import HEADER_BYTES

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "presets.jsonl"
FIRST_SCORED = 512


def measure(model: Any, token_ids: list[int], reference: torch.Tensor, name: str) -> dict[str, Any]:
    """One row: bytes a token with headers, ratio to bf16, mean KL in nats, and top-1 agreement."""
    connector = TQConnector(model, None, PRESETS[name], model_name="bench", revision="1")
    started = time.perf_counter()
    cache = connector.open_cache(token_ids)
    logits = connector.prefill(token_ids, cache, chunk_tokens=connector.layout.page_tokens)
    seconds = time.perf_counter() - started
    expected, got = reference[FIRST_SCORED:].log_softmax(-1), logits[FIRST_SCORED:].log_softmax(-1)
    kl = (expected.exp() * (expected - got)).sum(-1)
    layout, geometry = connector.layout, connector.geometry
    block_bytes = HEADER_BYTES + layout.page_bytes
    bf16_bytes = 4 * geometry.head_dim * geometry.num_kv_heads * geometry.num_layers
    return {
        "preset": name,
        "bytes_per_token": block_bytes / layout.page_tokens,
        "over_bf16": bf16_bytes * layout.page_tokens / block_bytes,
        "kl_mean": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "top1": float((expected.argmax(-1) == got.argmax(-1)).float().mean()),
        "prefill_s": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the text (default: %(default)s)")
    parser.add_argument("--document", type=Path, default=HERE / "documents" / "constitution.txt")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    parsed = parser.parse_args(arguments)
    folder = fetch_model(SMOLLM2.name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer(parsed.document.read_text(encoding="utf-8"))["input_ids"][: parsed.tokens]
    with torch.inference_mode():
        reference = model(input_ids=torch.tensor([token_ids])).logits[0].float()
    context = {
        **circumstances(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": SMOLLM2.name,
        "tokens": len(token_ids),
    }
    rows = [measure(model, token_ids, reference, name) for name in track(PRESETS, "presets")]
    print(f"{'preset':8}{'B/token':>9}{'x bf16':>8}{'mean KL':>10}{'p99 KL':>9}{'top-1':>8}{'prefill':>9}")
    for row in rows:
        print(
            f"{row['preset']:8}{row['bytes_per_token']:9.0f}{row['over_bf16']:8.2f}{row['kl_mean']:10.4f}"
            f"{row['kl_p99']:9.3f}{row['top1']:8.1%}{row['prefill_s']:8.1f}s"
        )
    parsed.output.write_text("".join(json.dumps({**row, **context}) + "\n" for row in rows))


if __name__ == "__main__":
    main()
