"""SGLang's decode time, capacity and serving throughput by KV cache dtype, on eight Llama-8B layers.

`python -m benchmarks.sglang_gpu` starts one engine a case, with weights that mean nothing, and writes JSON
lines. A case is a dtype and an attention backend, as in `fp8_e4m3/fa3`; ours have no backend to choose.
Shapes are batch x context: the prompts are prefilled once (`ttft_ms` is of that pass: all prompts, one token
each), found again as prefixes, and decoded for 16 and for 80 tokens, whose difference is 64 steps
(`tpot_ms`). The mix is a stream of requests, so many at a time: `decode_tok_s` is then of all answers over
the whole time, `ttft_ms` and `tpot_ms` are medians over requests; a quarter of it goes before,
unmeasured. With `--tp 2` two devices divide the heads of every layer. SGLang must find our plugin in each of
its processes, which is arranged for a tree that is not installed as well.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.circumstances import circumstances, device_name
from benchmarks.llama_shape import model_config, prompts_of
from benchmarks.plugins import plugin_path
from benchmarks.progress import Progress

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sglang.jsonl"
CASES = ("auto/fa3", "fp8_e4m3/fa3", "tq4", "tq3", "auto/triton", "k8v4", "k4v2")
SHAPES = ("1x1024", "32x4096", "32x16384", "8x32768")
MIXES = (32, 64)
_SHORT, _LONG = 17, 81
ENVIRONMENT = {
    "SGL_KERNEL_NORM": "1",
    "SGLANG_IS_FLASHINFER_AVAILABLE": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "SGLANG_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}

Row = dict[str, Any]


def engine_arguments(case: str, model: Path, context: int, more: dict[str, Any]) -> dict[str, Any]:
    """What `sglang.Engine` takes for a case."""
    dtype, _, backend = case.partition("/")
    arguments = {
        "model_path": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "kv_cache_dtype": dtype,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "context_length": context,
        "mem_fraction_static": 0.8,
        "cuda_graph_bs_decode": [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64],
        "disable_prefill_cuda_graph": True,
        "random_seed": 0,
        "log_level": "info",
    }
    return arguments | ({"attention_backend": backend} if backend else {}) | more


def measure_shape(engine: Any, number: int, length: int) -> Row:
    """Times of a batch: prefill, a prefix hit and decode."""
    inputs, seconds, cached = prompts_of(number, length, seed=number * length), {}, []
    for name, tokens in (("cold", 1), ("hit", 1), ("short", _SHORT), ("long", _LONG)):
        start = time.perf_counter()
        answers = engine.generate(input_ids=inputs, sampling_params=_sampling(tokens))
        seconds[name] = time.perf_counter() - start
        cached.append(min(answer["meta_info"]["cached_tokens"] for answer in answers))
    if cached[1] < length - 256:
        raise RuntimeError(f"only {cached[1]} of {length} tokens were found again: the times mean nothing")
    tpot = (seconds["long"] - seconds["short"]) / (_LONG - _SHORT)
    return {
        "batch": number,
        "context": length,
        "tpot_ms": round(tpot * 1e3, 3),
        "decode_tok_s": round(number / tpot, 1),
        "ttft_ms": round(seconds["cold"] * 1e3, 1),
        "ttft_hit_ms": round(seconds["hit"] * 1e3, 1),
    }


def measure_mix(engine: Any, at_once: int, requests: int) -> Row:
    """Throughput of requests of 512 to 8192 tokens with answers of 128 to 512, so many at a time."""
    generator = random.Random(at_once)
    sizes = [(generator.randrange(512, 8193), generator.randrange(128, 513)) for _ in range(requests)]
    inputs = [prompts_of(1, length, seed=10_000 + i)[0] for i, (length, _) in enumerate(sizes)]
    engine.flush_cache()
    first: list[float] = []
    per_token: list[float] = []

    async def one(place: int, gate: asyncio.Semaphore) -> None:
        async with gate:
            start, came = time.perf_counter(), None
            stream = await engine.async_generate(
                input_ids=inputs[place], sampling_params=_sampling(sizes[place][1]), stream=True
            )
            async for _ in stream:
                came = came or time.perf_counter()
            if came is None:
                raise RuntimeError("a request had no answer")
            first.append(came - start)
            per_token.append((time.perf_counter() - came) / (sizes[place][1] - 1))

    async def all_of_them() -> None:
        gate = asyncio.Semaphore(at_once)
        await asyncio.gather(*(one(place, gate) for place in range(requests)))

    start = time.perf_counter()
    engine.loop.run_until_complete(all_of_them())
    seconds = time.perf_counter() - start
    return {
        "batch": at_once,
        "context": "mix",
        "tpot_ms": round(statistics.median(per_token) * 1e3, 3),
        "decode_tok_s": round(sum(answer for _, answer in sizes) / seconds, 1),
        "ttft_ms": round(statistics.median(first) * 1e3, 1),
        "total_tok_s": round(sum(map(sum, sizes)) / seconds, 1),
    }


def _sampling(tokens: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}


def run_case(parsed: argparse.Namespace, case: str) -> None:
    """Start an engine in this process, and write the rows of its measurements."""
    progress = Progress(case)
    import sglang
    import torch

    shapes = [tuple(map(int, shape.split("x"))) for shape in parsed.shapes]
    longest = max([length for _, length in shapes] + [8192 + 512] * bool(parsed.mixes))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        model.joinpath("config.json").write_text(json.dumps(model_config(parsed.layers)))
        more = {"tp_size": parsed.tp} | parsed.engine
        engine = sglang.Engine(**engine_arguments(case, model, longest + 1024, more))
        progress.say("the engine is up")
        pool_tokens = engine.get_server_info()["max_total_num_tokens"]
        dtype, _, backend = case.partition("/")
        common = {
            "kv_cache_dtype": dtype,
            "attention_backend": backend or "turboquant",
            "layers": parsed.layers,
            "tp_size": parsed.tp,
            "pool_tokens": pool_tokens,
            "sglang": sglang.__version__,
            "device": device_name(),
            "torch": torch.__version__,
            "commit": commit(),
        }
        # kernels are compiled on the way
        engine.generate(input_ids=prompts_of(8, 600, seed=1), sampling_params=_sampling(20))
        for number, length in ((8, 600), (1, 1000), (2, 12000)):
            if length <= longest:
                measure_shape(engine, number, length)
                progress.say(f"{number}x{length} has run")
        for number, length in shapes:
            write_row(parsed.out, common | measure_shape(engine, number, length))
            progress.say(f"{number}x{length} is measured")
        if parsed.mixes:
            measure_mix(engine, parsed.mixes[0], max(1, parsed.requests // 4))
        for at_once in parsed.mixes:
            write_row(parsed.out, common | measure_mix(engine, at_once, parsed.requests))
            progress.say(f"{at_once} at a time is measured")
        engine.shutdown()


def commit() -> str:
    """Of this tree; a copy without its history is told by TQ_COMMIT."""
    try:
        return os.environ.get("TQ_COMMIT") or circumstances()["commit"]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_row(path: Path, row: Row) -> None:
    """Append a row to a file of JSON lines, and show it."""
    print(json.dumps(row), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cases, one process each; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sglang_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="DTYPE[/BACKEND]")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), metavar="BATCHxCONTEXT")
    parser.add_argument("--mixes", nargs="*", type=int, default=list(MIXES), help="requests at a time")
    parser.add_argument("--requests", type=int, default=192, help="requests of a mix (default: %(default)s)")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="arguments of SGLang")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tp", type=int, default=1, help="devices that divide the heads of every layer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows are appended (default: %(default)s)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a case (default: %(default)s)")
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare attention with exact one first"
    )
    parser.add_argument("--in-process", metavar="CASE", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.in_process:
        run_case(parsed, parsed.in_process)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        environment = ENVIRONMENT | os.environ | {"PYTHONPATH": plugin_path(Path(folder))}
        if not parsed.no_check:
            ours = [case for case in parsed.cases if "/" not in case]
            check = [sys.executable, "-m", "benchmarks.sglang_attention", "--page-sizes", "64"]
            check += ["--presets", *ours]
            if ours and subprocess.run(check, env=environment, timeout=parsed.timeout).returncode:  # noqa: S603
                print("attention is not what exact attention over its pages is: nothing is timed")
                return 1
        own = list(sys.argv[1:] if arguments is None else arguments)
        failed = []
        for case in parsed.cases:
            command = [sys.executable, "-m", "benchmarks.sglang_gpu", *own, "--in-process", case]
            try:
                done = subprocess.run(command, env=environment, timeout=parsed.timeout).returncode == 0  # noqa: S603
            except subprocess.TimeoutExpired:
                done = False
            failed += [] if done else [case]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
