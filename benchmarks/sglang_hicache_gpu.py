"""Time to first token of a long prompt whose pages lie in tq-store on the same host, against computing it.

`python -m benchmarks.sglang_hicache_gpu` starts a server on a Unix socket and one SGLang engine a case, on
eight Llama-8B layers with weights that mean nothing, and appends JSON lines. A case is a KV cache dtype and
an attention backend, as `benchmarks.sglang_gpu` has them, and what the store makes of pages:
`auto/fa3:none`, `auto/fa3:tq4`, `tq4:tq4`. Each prompt is computed once (`path` is `recompute`), saved,
flushed from device and host, and found again in the store (`path` is `storage`); `ttft_ms` is the median over
prompts of one request at a time with one new token. `stored_page_bytes` are those of a block, header
included, and `bf16_page_bytes` those of the same page in bf16.

Needs beside SGLang: grpcio, protobuf, xxhash, and for the server grpcio-health-checking, grpcio-reflection,
prometheus-client, redis and zstandard.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks import sglang_gpu
from benchmarks.circumstances import device_name
from benchmarks.llama_shape import model_config, prompts_of
from benchmarks.sglang_gpu import RESULTS, Row, engine_arguments
from benchmarks.store_processes import TqStore

CASES = ("auto/fa3:none", "auto/fa3:tq4", "tq4:tq4")
PAGE_TOKENS = 64
HICACHE = {
    "enable_hierarchical_cache": True,
    "hicache_ratio": 2.0,
    "hicache_io_backend": "direct",
    "hicache_mem_layout": "page_first_direct",
    "hicache_storage_backend": "dynamic",
    "hicache_storage_prefetch_policy": "wait_complete",
    "page_size": PAGE_TOKENS,
}
_WAIT_S = 60.0


def storage(address: str, codec: str, more: Mapping[str, Any] = MappingProxyType({})) -> str:
    """What an operator writes as `--hicache-storage-backend-extra-config`."""
    settings = {
        "backend_name": "tq-store",
        "module_path": "tq_connectors.sglang.hicache_storage",
        "class_name": "TQHiCacheStorage",
        "interface_v1": 1,
        "address": address,
        "revision": "dummy",
        "codec": codec,
    }
    return json.dumps({**settings, **more})


def first_token_ms(engine: Any, tokens: list[int]) -> tuple[float, Row]:
    """Time of a request with one new token, and what SGLang says of it."""
    start = time.perf_counter()
    answer = engine.generate(
        input_ids=tokens, sampling_params={"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}
    )
    return (time.perf_counter() - start) * 1e3, answer["meta_info"]


def flush(engine: Any) -> None:
    """Empty device and host, as soon as SGLang has nothing under way."""
    end_s = time.monotonic() + _WAIT_S
    while not engine.flush_cache().success:
        if time.monotonic() > end_s:
            raise RuntimeError("the engine is never idle")
        time.sleep(0.1)


def wait_until_saved(client: Any, num_blocks: int) -> Any:
    """What the server has, as soon as it has so many blocks."""
    end_s = time.monotonic() + _WAIT_S
    while (tier := client.stats().tiers["memory"]).num_blocks < num_blocks:
        if time.monotonic() > end_s:
            raise RuntimeError(f"the server has {tier.num_blocks} blocks, {num_blocks} were expected")
        time.sleep(0.05)
    return tier


def measure(engine: Any, client: Any, length: int, number: int) -> tuple[dict[str, float], Row]:
    """Medians of the time to first token, computed and restored, and the bytes of a page in the store."""
    inputs = prompts_of(number, length, seed=length)
    pages = (length - 1) // PAGE_TOKENS
    times: dict[str, list[float]] = {"recompute": [], "storage": []}
    for tokens in inputs:
        milliseconds, about = first_token_ms(engine, tokens)
        if about["cached_tokens"]:
            raise RuntimeError("a new prompt was cached")
        times["recompute"].append(milliseconds)
    tier = wait_until_saved(client, number * pages)
    for tokens in inputs:
        flush(engine)
        milliseconds, about = first_token_ms(engine, tokens)
        restored = (about.get("cached_tokens_details") or {}).get("storage", 0)
        if restored < pages * PAGE_TOKENS:
            raise RuntimeError(f"only {restored} of {length} tokens came from the store")
        times["storage"].append(milliseconds)
    medians = {path: round(statistics.median(each), 1) for path, each in times.items()}
    return medians, {"stored_page_bytes": round(tier.used_bytes / tier.num_blocks)}


def run_case(parsed: argparse.Namespace, case: str) -> None:
    """Start an engine in this process, and write the rows of its measurements."""
    import sglang
    import torch

    from tq_store.client import StoreClient

    engine_case, _, codec = case.partition(":")
    dtype, _, backend = engine_case.partition("/")
    more = HICACHE | {
        "hicache_storage_backend_extra_config": storage(parsed.address, codec, parsed.store),
        "max_total_tokens": 4 * parsed.context,
        "enable_cache_report": True,
    }
    with tempfile.TemporaryDirectory() as folder, StoreClient(parsed.address) as client:
        model = Path(folder)
        model.joinpath("config.json").write_text(json.dumps(model_config(parsed.layers)))
        arguments = engine_arguments(engine_case, model, parsed.context + 1024, more | parsed.engine)
        engine = sglang.Engine(**arguments)
        for length in (parsed.context, parsed.context):  # kernels are compiled on the way
            first_token_ms(engine, prompts_of(1, length, seed=1)[0])
        flush(engine)
        client.purge(None)
        medians, pages = measure(engine, client, parsed.context, parsed.prompts)
        shape = model_config(parsed.layers)
        heads, head_dim = shape["num_key_value_heads"], shape["head_dim"]
        for path, milliseconds in medians.items():
            row = {
                "kv_cache_dtype": dtype,
                "attention_backend": backend or "turboquant",
                "batch": 1,
                "context": parsed.context,
                "tpot_ms": None,
                "decode_tok_s": None,
                "ttft_ms": milliseconds,
                "path": path,
                "codec": codec,
                **pages,
                "bf16_page_bytes": 2 * 2 * PAGE_TOKENS * parsed.layers * heads * head_dim,
                "layers": parsed.layers,
                "pool_tokens": engine.get_server_info()["max_total_num_tokens"],
                "sglang": sglang.__version__,
                "device": device_name(),
                "torch": torch.__version__,
                "commit": sglang_gpu.commit(),
            }
            sglang_gpu.write_row(parsed.out, row)
        engine.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cases, one process each, on one server; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sglang_hicache_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="DTYPE[/BACKEND]:CODEC")
    parser.add_argument(
        "--context", type=int, default=16384, help="tokens of a prompt (default: %(default)s)"
    )
    parser.add_argument("--prompts", type=int, default=3, help="prompts of a case (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="arguments of SGLang")
    parser.add_argument("--store", type=json.loads, default={}, metavar="JSON", help="settings of ours")
    parser.add_argument("--memory", default="8GiB", help="of the server (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows are appended (default: %(default)s)")
    parser.add_argument("--timeout", type=int, default=400, help="seconds a case (default: %(default)s)")
    parser.add_argument("--in-process", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.in_process:
        run_case(parsed, parsed.in_process)
        return 0
    own = list(sys.argv[1:] if arguments is None else arguments)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        found_by = {"PYTHONPATH": sglang_gpu.plugin_path(Path(folder))}
        environment = sglang_gpu.ENVIRONMENT | os.environ | found_by
        options = ["--memory-budget", parsed.memory, "--max-inflight", "1GiB", "--max-outflight", "1GiB"]
        with TqStore(Path(folder), *options) as server:
            for case in parsed.cases:
                command = [sys.executable, "-m", "benchmarks.sglang_hicache_gpu", *own]
                command += ["--in-process", case, "--address", server.local_address]
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
