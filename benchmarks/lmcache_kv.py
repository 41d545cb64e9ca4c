"""Keys and values of a real model on a real text, in a file that LMCache's environment can read.

``python -m benchmarks.lmcache_kv`` prefills SmolLM2 in the project's environment and writes bfloat16 bits as
``[2, layers, tokens, heads, channels]`` int16 to ``out/lmcache_kv.npy``, and to ``out/lmcache_kv.json`` how
long computing them took, and how long a token takes that follows them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from tq_connectors.hf.models import SMOLLM2, fetch_model

ROOT = Path(__file__).parents[1]
KV_FILE = ROOT / "out" / "lmcache_kv.npy"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prefill and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1024, help="length of the text (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=KV_FILE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as everything that is compared with these times
    folder = fetch_model(SMOLLM2.name)
    text = (ROOT / "benchmarks" / "documents" / "constitution.txt").read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: options.tokens]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = DynamicCache()
    with torch.inference_mode():
        started = time.perf_counter()
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        computed_s = time.perf_counter() - started
        steps_s = []
        for _ in range(11):
            started = time.perf_counter()
            model(torch.tensor([ids[-1:]]), past_key_values=cache, use_cache=True)
            steps_s.append(time.perf_counter() - started)
            cache.crop(-1)
    layers = [torch.stack((layer.keys[0], layer.values[0])).transpose(1, 2) for layer in cache.layers]
    bits = torch.stack(layers, dim=1).bfloat16().contiguous().view(torch.int16)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.save(options.out, bits.numpy(), allow_pickle=False)
    times = {"computed_ms": computed_s * 1e3, "step_ms": statistics.median(steps_s) * 1e3}
    options.out.with_suffix(".json").write_text(json.dumps(times))
    print(f"{options.out}: {list(bits.shape)}, {times}")


if __name__ == "__main__":
    main()
