"""Decode, prefill and pool of a running vLLM by KV cache dtype: bf16, its own fp8, and pages of ours.

    python -m benchmarks.vllm_gpu
    python -m benchmarks.vllm_gpu auto tq4 --block-size 128 --repeats 5

Every dtype is an unmodified vLLM, with dummy weights in the shape of Llama-3.1-8B with eight layers, and full
decode graphs, in a process that steps it: device and host follow each other, as in vLLM's own offline runs
with VLLM_ENABLE_V1_MULTIPROCESSING=0. Nothing of ours need be installed. Before a dtype of ours is timed,
`vllm_gpu_check` holds what its layers compute on this device against exact attention. Rows are appended to
`results/vllm.jsonl` as they come:

- one for each batch and context: `tpot_ms`, `prefill_tok_s` (cold prompts) and `pool_tokens`;
- two for a long prompt: `ttft_ms` cold, and with all but its last tokens in the GPU's prefix cache (`mode`
  ends in ``-cold`` and ``-hit``).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.circumstances import circumstances, device_name
from benchmarks.llama_shape import model_config, prompts_of
from benchmarks.plugins import plugin_path
from benchmarks.progress import Progress

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vllm.jsonl"
DTYPES = ("auto", "fp8", "turboquant_4bit_nc", "tq4", "tq3", "k8v4")
SHAPES = ((1, 1024), (32, 4096), (32, 16384), (8, 32768))
_WARM_STEPS, _STEPS = 16, 64
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "HF_HUB_OFFLINE": "1",
}


class Engine:
    """One vLLM in this process, stepped by hand so that first tokens can be timed.

    Args:
        options: Of the command line.
        dtype: Of the KV cache.
        more: Further arguments of `vllm.LLM`.
    """

    def __init__(self, options: argparse.Namespace, dtype: str, **more: Any) -> None:
        import vllm

        from tq_connectors.vllm import plugin

        plugin.register()
        if options.block_size and dtype not in ("auto", "fp8"):
            more["block_size"] = options.block_size
        if options.gpu_memory:
            more["gpu_memory_utilization"] = options.gpu_memory
        if options.tp > 1:
            more["tensor_parallel_size"] = options.tp
        if not options.model:
            more |= {"load_format": "dummy", "skip_tokenizer_init": True}
        self.llm = vllm.LLM(
            model=options.model or options.folder,
            dtype="bfloat16",
            kv_cache_dtype=dtype,
            enable_prefix_caching=True,
            seed=0,
            **more,
        )
        self.version = vllm.__version__
        self._engine = self.llm.llm_engine
        self._sampling = vllm.SamplingParams
        self._number = 0

    def close(self) -> None:
        """End the engine's process, without which this one would not end either."""
        self._engine.engine_core.shutdown()

    @property
    def pool_tokens(self) -> int:
        """Tokens that fit on the device."""
        cache = self._engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks) * int(cache.block_size)

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> tuple[float, float, dict[int, list[int]]]:
        """Seconds until every prompt has its first token, seconds from there to the end, and the answers."""
        limits = self._sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        first_number = self._number + 1
        started = time.perf_counter()
        waiting, answers, first = set(), {}, 0.0
        for prompt in prompts:
            self._number += 1
            waiting.add(str(self._number))
            self._engine.add_request(str(self._number), {"prompt_token_ids": prompt}, limits)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                name = output.request_id.partition("-")[0]
                if output.outputs[0].token_ids:
                    waiting.discard(name)
                if output.finished:
                    answers[int(name) - first_number] = list(output.outputs[0].token_ids)
            if not waiting and not first:
                first = time.perf_counter()
        return first - started, time.perf_counter() - first, answers


def measure(options: argparse.Namespace, dtype: str) -> Iterator[dict[str, Any]]:
    """The rows of a dtype."""
    progress = Progress(dtype)
    longest = max(options.ttft_context, *(context for _, context in options.shapes))
    more: dict[str, Any] = {"enforce_eager": True}
    if options.graphs:
        sizes = sorted({batch for batch, _ in options.shapes})
        more = {
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": sizes,
            }
        }
    engine = Engine(options, dtype, max_model_len=longest + 4 * _STEPS, max_num_seqs=options.max_seqs, **more)
    progress.say("the engine is up")
    about = {
        "kv_cache_dtype": dtype
        if not options.block_size or dtype in ("auto", "fp8")
        else _named(options, dtype),
        "mode": _mode(options, dtype),
        **({"model": Path(options.model).name} if options.model else {"layers": options.layers}),
        "pool_tokens": engine.pool_tokens,
        "vllm": engine.version,
        "device": device_name(),
        "commit": options.commit,
    }
    engine.run(prompts_of(2, 300, 99), 4)
    progress.say("it has answered")
    for batch, context in options.shapes:
        tpots, prefills = [], []
        for turn in range(options.repeats):
            prompts = prompts_of(batch, context, turn)
            to_first, _, _ = engine.run(prompts, 1)
            prefills.append(batch * context / to_first)
            # prompts are in the prefix cache from here on
            _, short, _ = engine.run(prompts, _WARM_STEPS + 1)
            _, long, _ = engine.run(prompts, _WARM_STEPS + _STEPS + 1)
            tpots.append((long - short) / _STEPS * 1e3)
            progress.say(f"{batch}x{context}: {tpots[-1]:.3f} ms a token, {prefills[-1]:.0f} tokens/s cold")
        yield about | {
            "batch": batch,
            "context": context,
            "tpot_ms": round(statistics.median(tpots), 3),
            "prefill_tok_s": round(statistics.median(prefills)),
            "ttft_ms": None,
        }
    yield from _first_tokens(options, engine, about)
    progress.say("all is measured")
    engine.close()


def _first_tokens(
    options: argparse.Namespace, engine: Engine, about: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A long prompt cold, and again with another end; the answers of both runs of one prompt are compared."""
    context, num_answers = options.ttft_context, 16
    cold_ms, hit_ms, agreed = [], [], 0
    for turn in range(options.repeats + 1):
        (prompt,) = prompts_of(1, context, 1000 + turn)
        to_first, _, cold = engine.run([prompt], num_answers)
        cold_ms.append(to_first * 1e3)
        to_first, _, hit = engine.run([prompt], num_answers)
        hit_ms.append(to_first * 1e3)
        agreed += sum(one == other for one, other in zip(cold[0], hit[0], strict=True))
    total = num_answers * (options.repeats + 1)
    print(
        f"{about['kv_cache_dtype']}: {agreed} of {total} tokens after a prefix hit are those of the cold run"
    )
    for mode, times in (("cold", cold_ms), ("hit", hit_ms)):
        yield about | {
            "mode": f"{about['mode']}-{mode}",
            "batch": 1,
            "context": context,
            "tpot_ms": None,
            "prefill_tok_s": None,
            "ttft_ms": round(statistics.median(times[1:]), 2),
        }


def _mode(options: argparse.Namespace, dtype: str) -> str:
    mode = "stock" if dtype in ("auto", "fp8") or dtype.startswith("turboquant") else "pages"
    return mode if options.tp == 1 else f"{mode}-tp{options.tp}"


def _named(options: argparse.Namespace, dtype: str) -> str:
    return f"{dtype}/{options.block_size}"


def main() -> None:
    """Run the dtypes, each in a process of its own, and append their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dtypes", nargs="*", default=DTYPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shapes", type=_shapes, default=SHAPES, help="as 32x4096,8x32768")
    parser.add_argument("--ttft-context", type=int, default=16384)
    parser.add_argument("--block-size", type=int, help="of dtypes of ours: 64 or 128")
    parser.add_argument("--tp", type=int, default=1, help="devices that divide the heads of every layer")
    parser.add_argument("--max-seqs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu-memory", type=float, default=0.85, help="share of the device; 0 for a CPU")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--model", help="a folder with real weights in place of dummy ones")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to write down where this is no git checkout")
    parser.add_argument("--one", choices=("check", "measure"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.commit = options.commit or circumstances()["commit"]
    if not options.one:
        for dtype in options.dtypes:
            is_ours = dtype not in ("auto", "fp8") and not dtype.startswith("turboquant")
            checks = (
                options.check and is_ours and options.tp == 1
            )  # layers of other processes are out of sight
            parts = ("check", "measure") if checks else ("measure",)
            if any(_run_apart(options, dtype, part) for part in parts):
                print(f"{dtype} failed", flush=True)
        return
    (dtype,) = options.dtypes
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        Path(folder, "config.json").write_text(json.dumps(model_config(options.layers)))
        if options.one == "check":
            from benchmarks.vllm_gpu_check import check

            check(options, dtype)
            return
        for row in measure(options, dtype):
            print(json.dumps(row), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(
        (int(batch), int(context)) for batch, context in (each.split("x") for each in text.split(","))
    )


def _run_apart(options: argparse.Namespace, dtype: str, part: str) -> int:
    """Exit status of one part in a process of its own."""
    names = (
        "layers",
        "ttft_context",
        "block_size",
        "tp",
        "max_seqs",
        "repeats",
        "gpu_memory",
        "model",
        "out",
        "commit",
    )
    given = [
        f"--{name.replace('_', '-')}={value}"
        for name in names
        if (value := getattr(options, name)) is not None
    ]
    given += ["--shapes=" + ",".join(f"{batch}x{context}" for batch, context in options.shapes)]
    given += ["--graphs" if options.graphs else "--no-graphs", f"--one={part}"]
    command = [sys.executable, "-m", "benchmarks.vllm_gpu", dtype, *given]
    # the engine is in this process unless the environment says otherwise: steps then vary less
    processes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    with tempfile.TemporaryDirectory() as folder:
        path = {"PYTHONPATH": plugin_path(Path(folder))}
        environment = _ENVIRONMENT | processes | os.environ | path
        return subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode  # noqa: S603


if __name__ == "__main__":
    main()
