"""One replica of `vllm_replicas_gpu`: an engine that does what lines of JSON on its input say."""

import argparse
import json
import statistics
import sys
import time
from typing import Any

from benchmarks.circumstances import device_name
from benchmarks.llama_shape import model_config
from benchmarks.vllm_offload_gpu import Engine, transfer_config
from tq_store.client import StoreClient


class Served:
    """The calls, by name; each returns what is answered."""

    def __init__(self, options: argparse.Namespace) -> None:
        dtype, _, preset = options.case.partition(":")
        transfer = transfer_config(
            f"store-{preset or 'none'}", options.address, round(options.host_gib * (1 << 30))
        )
        more = {} if dtype == "auto" else {"kv_cache_dtype": dtype, "block_size": 64}
        if dtype != "auto":
            from tq_connectors.vllm import plugin

            plugin.register()
        self._options = options
        self._engine = Engine(options, transfer, options.folder, **more)
        self._client = StoreClient(options.address)
        self._dtype = options.case
        self._engine.run([[7] * 300, [8] * 300], 4)

    def about(self) -> dict[str, Any]:
        """What is the same in all rows."""
        shape = model_config(self._options.layers)
        return {
            "kv_cache_dtype": self._dtype,
            "pool_tokens": self._engine.pool_tokens,
            "vllm": self._engine.version,
            "device": device_name(),
            "bf16_token_bytes": 4 * self._options.layers * shape["num_key_value_heads"] * shape["head_dim"],
        }

    def run(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """Times of a batch, and how much of each prompt was found."""
        prompts = [[*prompt, *([7] * 32)] for prompt in prompts]  # something is always left to compute
        first_s, steps, answers = self._engine.run(prompts, num_tokens)
        return {
            "first_ms": first_s * 1e3,
            "step_ms": statistics.mean(steps) * 1e3,
            "cached": [answer.num_cached_tokens or 0 for answer in answers],
        }

    def load(self, prompts: list[list[int]], seconds: float) -> dict[str, Any]:
        """Load prefixes from the store again and again."""
        started, tokens = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            self.forget()
            for prompt in prompts:
                tokens += self.run([prompt], 2)["cached"][0]
        return {"tokens": tokens, "seconds": time.perf_counter() - started}

    def forget(self) -> None:
        """Drop what is on the device and in host memory, so that the server is asked."""
        self._engine.llm.reset_prefix_cache(reset_connector=True)

    def settle(self) -> None:
        """Give the engine steps until what is to be saved is saved."""
        self._engine.settle()

    def served(self) -> int:
        """Blocks that the server has handed out."""
        counters = self._client.stats().counters
        return sum(count for name, count in counters.items() if name.startswith("hits_"))


def main() -> None:
    """Answer lines until there are no more."""
    served = Served(argparse.Namespace(**json.loads(sys.argv[1])))
    for line in sys.stdin:
        call = json.loads(line)
        answer = getattr(served, call.pop("call"))(**call)
        print(f"answer {json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
