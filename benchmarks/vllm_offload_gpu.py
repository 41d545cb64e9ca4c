"""Saving and loading prefixes beside a running vLLM: bf16 and packed, in host memory and from a server.

    python -m benchmarks.vllm_offload_gpu

Every case is an unmodified vLLM in a process of its own, with dummy weights in the shape of Llama-3.1-8B:
eight layers, or with `--layers 32` the whole of it:

- ``recompute``: no connector; what a prefix costs that is not found.
- ``offload-bf16``: vLLM's own `CPUOffloadingSpec`.
- ``offload-tq4`` (any preset): `TQOffloadingSpec`, bf16 on the device, packed pages in host memory.
- ``store-bf16``, ``store-tq4``: host memory is emptied, so that chunks come from a server on this machine, as
  over a network.
- ``local-bf16``, ``local-tq4``: the same through shared memory.
- ``store-bf16@10``, ``store-tq4@10``: the same through a link of so many Gbit/s.
- ``connector-tq4@10``: without host memory between, by `TQStoreConnector`.

Each writes two rows: decode of a batch while its prompts and answers are saved (`tpot_ms`, `prefill_tok_s`),
and the time to first token of one long prompt whose prefix is found (`ttft_ms`). Of every decode step the
median over repeats counts, so that a pause of the machine is not taken for a save, and a save, which has the
same step each time, is. vLLM and the packages of `tq-store[server]` must be importable.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.circumstances import circumstances, device_name
from benchmarks.llama_shape import model_config, prompts_of
from benchmarks.shaped_link import shaped_process
from benchmarks.store_processes import TqStore

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vllm.jsonl"
CASES = (
    "recompute",
    "offload-bf16",
    "offload-tq4",
    "store-bf16",
    "store-tq4",
    "local-bf16",
    "local-tq4",
    "store-bf16@10",
    "store-tq4@10",
    "connector-tq4@10",
)
_STORES = ("store", "local", "connector")
_CHUNK_TOKENS = 256
_MOST_UNCOUNTED = 12
"""First hits, beside which chunks may still be saved: until two in a row find the same."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "HF_HUB_OFFLINE": "1",
}


def transfer_config(
    case: str, address: str | None, host_bytes: int, more: dict[str, Any]
) -> dict[str, Any] | None:
    """The `kv_transfer_config` of a case, with more settings of ours."""
    kind, _, codec = case.partition("@")[0].partition("-")
    if kind == "recompute":
        return None
    store = {"revision": "dummy", "preset": "none" if codec == "bf16" else codec} | more
    store |= {"address": address} if address else {}
    if kind == "connector":
        return {
            "kv_connector": "TQStoreConnector",
            "kv_connector_module_path": "tq_connectors.vllm.kv_connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": store,
        }
    extra: dict[str, Any] = {
        "cpu_bytes_to_use": host_bytes,
        "block_size": _CHUNK_TOKENS,
        "offload_prompt_only": False,
    }
    if case == "offload-bf16":
        extra["spec_name"] = "CPUOffloadingSpec"
    else:
        extra |= {
            "spec_name": "TQOffloadingSpec",
            "spec_module_path": "tq_connectors.vllm.offload_spec",
            "tq_store": store,
        }
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


class Engine:
    """One vLLM in this process, stepped by hand so that every step can be timed."""

    def __init__(
        self, options: argparse.Namespace, transfer: dict[str, Any] | None, model: str, **more: Any
    ) -> None:
        import vllm

        more["enforce_eager"] = not options.graphs
        if options.graphs:
            sizes = sorted({1, options.batch})
            more |= {
                "compilation_config": {
                    "mode": 0,
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": sizes,
                }
            }
        if options.gpu_memory:
            more["gpu_memory_utilization"] = options.gpu_memory
        if transfer:
            more["kv_transfer_config"] = transfer
        self.llm = vllm.LLM(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=max(options.context, options.batch_context) + 2 * _CHUNK_TOKENS + options.steps,
            max_num_seqs=max(options.batch, 2),
            enable_prefix_caching=True,
            prefix_caching_hash_algo="sha256_cbor",
            seed=0,
            **more,
        )
        self.version = vllm.__version__
        self._engine = self.llm.llm_engine
        self._sampling = vllm.SamplingParams
        _yield_when_idle(self._engine.engine_core.engine_core)
        self._number = 0

    @property
    def pool_tokens(self) -> int:
        """Tokens that fit on the device."""
        cache = self._engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks) * int(cache.block_size)

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> tuple[float, list[float], list[Any]]:
        """Seconds until every prompt has its first token, seconds of every step from there, and answers."""
        limits = self._sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        waiting = set()
        for prompt in prompts:
            self._number += 1
            waiting.add(str(self._number))
            self._engine.add_request(str(self._number), {"prompt_token_ids": prompt}, limits)
        ends: list[float] = []
        answers = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.outputs[0].token_ids:
                    waiting.discard(output.request_id.partition("-")[0])
                if output.finished:
                    answers.append(output)
            if not waiting:
                ends.append(time.perf_counter())
        return ends[0] - started, [end - begin for begin, end in itertools.pairwise(ends)], answers

    def settle(self) -> None:
        """Give the engine steps until what is to be saved is saved."""
        for _ in range(3):
            self.run([[random.randrange(10, 31000) for _ in range(8)]], 8)
            time.sleep(0.5)


def _yield_when_idle(core: Any) -> None:
    """Let a core in this process wait after a step without work, as vLLM's own process for it does."""
    after_step = core.post_step

    def post_step(model_executed: bool) -> None:
        after_step(model_executed)
        if not model_executed and core.scheduler.has_requests():
            time.sleep(0.001)

    core.post_step = post_step


def measure(
    options: argparse.Namespace, case: str, address: str | None, model: str
) -> Iterator[dict[str, Any]]:
    """The rows of a case."""
    engine = Engine(options, transfer_config(case, address, options.host_gib << 30, options.store), model)
    engine.run(prompts_of(2, 300, 99), 4)
    about = {
        "kv_cache_dtype": "auto",
        "mode": case,
        "layers": options.layers,
        "pool_tokens": engine.pool_tokens,
        "vllm": engine.version,
        "device": device_name(),
        "commit": options.commit,
    }
    if "decode" in options.parts:
        yield about | decode_while_saving(options, case, engine)
    if "hit" in options.parts:
        yield about | found_prefix(options, case, engine)


def decode_while_saving(options: argparse.Namespace, case: str, engine: Engine) -> dict[str, Any]:
    """Prefill and decode of a batch."""
    steps, prefills = [], []
    for turn in range(options.repeats):
        prompts = prompts_of(options.batch, options.batch_context, turn)
        to_first, seconds, _ = engine.run(prompts, options.steps + 1)
        steps.append(seconds)
        prefills.append(options.batch * options.batch_context / to_first)
    means = [round(statistics.mean(seconds) * 1e3, 3) for seconds in steps]
    print(f"{case}: ms a token of each repeat, pauses included: {means}", flush=True)
    return {
        "batch": options.batch,
        "context": options.batch_context,
        "tpot_ms": round(statistics.mean(map(statistics.median, zip(*steps, strict=False))) * 1e3, 3),
        "prefill_tok_s": round(statistics.median(prefills)),
        "ttft_ms": None,
    }


class _Hit(NamedTuple):
    time_ms: float
    num_found: int
    is_same: bool


def found_prefix(options: argparse.Namespace, case: str, engine: Engine) -> dict[str, Any]:
    """Time to first token of a prompt that was computed before."""
    (prompt,) = prompts_of(1, options.context, 1000)
    prompt += [7] * 32  # something is always left to compute
    _, _, (cold,) = engine.run([prompt], 16)
    engine.settle()
    has_host_memory = case.startswith(("store", "local"))

    def hit() -> _Hit:
        engine.llm.reset_prefix_cache(reset_connector=has_host_memory)
        to_first, _, (answer,) = engine.run([prompt], 16)
        is_same = answer.outputs[0].token_ids == cold.outputs[0].token_ids
        return _Hit(to_first * 1e3, answer.num_cached_tokens or 0, is_same)

    hits = [hit(), hit()]
    while hits[-1].num_found != hits[-2].num_found and len(hits) < _MOST_UNCOUNTED:
        hits.append(hit())
    counted = [hit() for _ in range(options.repeats)]
    hits += counted
    found, times = [each.num_found for each in hits], [round(each.time_ms, 1) for each in hits]
    print(f"{case}: found {found} of {len(prompt)} tokens, ms {times}", flush=True)
    num_same = sum(each.is_same for each in hits)
    print(f"{case}: {num_same} of {len(hits)} answers are those of the cold run", flush=True)
    if case != "recompute" and min(each.num_found for each in counted) < options.context - _CHUNK_TOKENS:
        raise SystemExit(f"{case}: a prefix was not found, so there is no time to report")
    return {
        "batch": 1,
        "context": options.context,
        "tpot_ms": None,
        "prefill_tok_s": None,
        "ttft_ms": round(statistics.median(each.time_ms for each in counted), 2),
    }


@contextmanager
def serving(case: str, host_gib: int) -> Iterator[str | None]:
    """The address of a server of its own for a case that needs one, behind a link where the case has one."""
    if not case.startswith(_STORES):
        yield None
        return
    options = ["--metrics-port", "0", "--memory-budget", f"{host_gib}GiB"]
    with tempfile.TemporaryDirectory() as folder, TqStore(Path(folder), *options) as server:
        gbit = case.partition("@")[2]
        if gbit:
            with shaped_process(server.ports, float(gbit)) as link:
                yield link
        else:
            yield server.local_address if case.startswith("local") else server.address


def main() -> None:
    """Run the cases, each in a process of its own, and append their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--parts", nargs="+", default=["decode", "hit"], choices=["decode", "hit"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=16384, help="tokens of the prefix that is found")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batch-context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=256, help="decode steps of the batch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--host-gib", type=int, default=10, help="host memory of the engine, and of the server"
    )
    parser.add_argument("--store", type=json.loads, default={}, metavar="JSON", help="settings of ours")
    parser.add_argument("--gpu-memory", type=float, default=0.85, help="share of the device; 0 for a CPU")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to write down where this is no git checkout")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.commit = options.commit or circumstances()["commit"]
    if not options.one:
        for case in options.cases:
            command = [sys.executable, "-m", "benchmarks.vllm_offload_gpu", case, *_passed(options), "--one"]
            done = subprocess.run(command, check=False, cwd=ROOT, env=os.environ | ENVIRONMENT)  # noqa: S603
            if done.returncode:
                print(f"{case} failed", flush=True)
        return
    (case,) = options.cases
    with tempfile.TemporaryDirectory() as folder, serving(case, options.host_gib) as address:
        Path(folder, "config.json").write_text(json.dumps(model_config(options.layers)))
        for row in measure(options, case, address, folder):
            print(json.dumps(row), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _passed(options: argparse.Namespace) -> list[str]:
    names = ("layers", "context", "batch", "batch_context", "steps", "repeats", "host_gib", "gpu_memory")
    words = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in (*names, "out", "commit")]
    words.append(f"--store={json.dumps(options.store)}")
    return [*words, "--graphs" if options.graphs else "--no-graphs", "--parts", *options.parts]


if __name__ == "__main__":
    main()
