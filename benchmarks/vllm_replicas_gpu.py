"""Replicas of one vLLM, one a device, on one tq-store server: what one has computed, the others find.

    python -m benchmarks.vllm_replicas_gpu
    python -m benchmarks.vllm_replicas_gpu --cases tq4 auto:tq4 --replicas 2

A case is a KV cache dtype and, after a colon, what is kept of bf16 pages (`TQOffloadingSpec`): ``tq4`` are
pages of ours that move untouched, ``auto:tq4`` bf16 pages that are packed on their way, ``auto:none`` bf16
all the way. Every replica is an unmodified vLLM in a process of its own, on a device of its own, with dummy
weights in the shape of Llama-3.1-8B with eight layers, and speaks to the server through shared memory. Rows
are appended to `results/vllm.jsonl`, one a mode:

- ``replica-cold``: `ttft_ms` of prompts that nobody knows, on the second replica.
- ``replica-hit``: the same for prompts that the first replica has computed and saved.
- ``replica-alone``: `tpot_ms` of a batch on the second replica while the others rest, the median of three.
- ``replica-beside``: the same while all others load prefixes without a pause; `hit_gib_per_s` are the bytes
  of bf16 pages that they found in that time.
- ``replica-loads``: all of them load prefixes at once and do nothing else; `hit_gib_per_s` as above, of all.
- ``replica-together``: the longest `ttft_ms` of a prefix that all of them are asked for at once and none has
  but the server, and `served_blocks`, the blocks that the server handed out for it.

vLLM and the packages of `tq-store[server]` must be importable.
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.circumstances import circumstances
from benchmarks.llama_shape import model_config, prompts_of
from benchmarks.plugins import plugin_path
from benchmarks.progress import Progress
from benchmarks.store_processes import TqStore
from benchmarks.vllm_offload_gpu import ENVIRONMENT, RESULTS, ROOT

CASES = ("auto:none", "auto:tq4", "tq4")
_CHUNK_TOKENS = 256
_ANSWER = 8
_BATCHES = 3
_IN_FLIGHT = ("--metrics-port", "0", "--max-inflight", "1GiB", "--max-outflight", "1GiB")

Row = dict[str, Any]


class Replica:
    """An engine in another process: each call is a line of JSON there and one back."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.vllm_replica", *arguments]
        with log.open("w") as file:
            self._process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | ENVIRONMENT | environment,
                cwd=ROOT,
            )
        self._log = log

    def begin(self, call: str, **arguments: Any) -> None:
        """Ask for something; `end` waits for it."""
        assert self._process.stdin is not None  # it is a pipe
        self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self._process.stdin.flush()

    def end(self) -> Any:
        """The answer to what was begun.

        Raises:
            RuntimeError: The process ended; the message has the end of its log.
        """
        assert self._process.stdout is not None  # it is a pipe
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        status, log = self._process.wait(), self._log.read_text(errors="replace").splitlines()[-15:]
        raise RuntimeError(f"a replica ended with status {status}: " + "\n".join(log))

    def ask(self, call: str, **arguments: Any) -> Any:
        """`begin` and `end`."""
        self.begin(call, **arguments)
        return self.end()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def measure(options: argparse.Namespace, case: str) -> Iterator[Row]:
    """The rows of a case."""
    progress = Progress(case)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.joinpath("config.json").write_text(json.dumps(model_config(options.layers)))
        entry_points = folder / "about"
        entry_points.mkdir()
        path = plugin_path(entry_points)
        store = stack.enter_context(TqStore(folder, "--memory-budget", options.server_memory, *_IN_FLIGHT))
        replicas = []
        for number in range(options.replicas):
            written = {**vars(options), "case": case, "address": store.local_address, "folder": str(folder)}
            arguments = [json.dumps(written, default=str)]
            environment = {"CUDA_VISIBLE_DEVICES": str(number), "PYTHONPATH": path}
            replica = Replica(arguments, environment, folder / f"replica-{number}.log")
            stack.callback(replica.close)
            replicas.append(replica)
        for replica in replicas:  # they start beside each other
            replica.begin("about")
        about, *_ = [replica.end() for replica in replicas]
        progress.say("the replicas are up")
        about |= {"mode": "", "batch": 1, "context": options.context, "commit": options.commit}
        about |= {"replicas": options.replicas, "tpot_ms": None, "prefill_tok_s": None, "ttft_ms": None}
        for row in _rows(options, replicas, about):
            progress.say(f"{row['mode']} is measured")
            yield row


def _rows(options: argparse.Namespace, replicas: Sequence[Replica], about: Row) -> Iterator[Row]:
    first, second, others = replicas[0], replicas[1], [*replicas[:1], *replicas[2:]]
    known = prompts_of(options.prompts, options.context, 1)
    for prompt in known:
        first.ask("run", prompts=[prompt], num_tokens=_ANSWER)
    first.ask("settle")
    for mode, prompts in (("cold", prompts_of(options.prompts, options.context, 2)), ("hit", known)):
        answers = [second.ask("run", prompts=[prompt], num_tokens=_ANSWER) for prompt in prompts]
        if mode == "hit" and min(answer["cached"][0] for answer in answers) < options.context - _CHUNK_TOKENS:
            raise RuntimeError(f"a prefix was not found: {[answer['cached'] for answer in answers]}")
        times = [answer["first_ms"] for answer in answers]
        yield about | {"mode": f"replica-{mode}", "ttft_ms": round(statistics.median(times), 2)}
    batch = prompts_of(options.batch, options.batch_context, 3)
    decode = {"prompts": batch, "num_tokens": options.steps + 1}
    second.ask("run", **decode)
    second.ask("settle")  # the batch is saved by then, which would be in the way of the next one
    shape = {"batch": options.batch, "context": options.batch_context}
    yield about | shape | {"mode": "replica-alone", "tpot_ms": _step_ms(second, decode)}
    loads = {"prompts": known, "seconds": options.load_seconds}
    for other in others:
        other.begin("load", **loads)
    time.sleep(0.2)
    times: Row = {"tpot_ms": _step_ms(second, decode)}
    times["hit_gib_per_s"] = _gib_per_s([other.end() for other in others], about)
    yield about | shape | {"mode": "replica-beside"} | times
    for replica in replicas:
        replica.begin("load", **loads)
    rate = _gib_per_s([replica.end() for replica in replicas], about)
    yield about | {"mode": "replica-loads", "hit_gib_per_s": rate}
    (shared,) = prompts_of(1, options.context, 4)
    second.ask("run", prompts=[shared], num_tokens=_ANSWER)
    second.ask("settle")
    second.ask("forget")
    before = second.ask("served")
    for replica in replicas:
        replica.begin("run", prompts=[shared], num_tokens=_ANSWER)
    together = [replica.end()["first_ms"] for replica in replicas]
    served = second.ask("served") - before
    yield about | {
        "mode": "replica-together",
        "ttft_ms": round(max(together), 2),
        "served_blocks": served,
    }


def _step_ms(replica: Replica, decode: Row) -> float:
    """Time of a step, of a batch that the replica's own cache has."""
    return round(statistics.median(replica.ask("run", **decode)["step_ms"] for _ in range(_BATCHES)), 3)


def _gib_per_s(loaded: Sequence[Row], about: Row) -> float:
    """The rate of loads beside each other, as if they had been of bf16 pages."""
    tokens, seconds = sum(each["tokens"] for each in loaded), max(each["seconds"] for each in loaded)
    return round(tokens * about["bf16_token_bytes"] / seconds / (1 << 30), 2)


def main() -> None:
    """Run the cases and append their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="DTYPE[:PRESET]")
    parser.add_argument("--replicas", type=int, default=2, help="devices, one engine each")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=16384, help="tokens of a prefix")
    parser.add_argument("--prompts", type=int, default=4, help="prefixes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batch-context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=256, help="decode steps of the batch")
    parser.add_argument("--load-seconds", type=float, default=5.0, help="of loads beside them")
    parser.add_argument("--host-gib", type=float, default=10, help="host memory of each engine")
    parser.add_argument("--server-memory", default="16GiB")
    parser.add_argument("--gpu-memory", type=float, default=0.85, help="share of a device; 0 for a CPU")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to write down where this is no git checkout")
    options = parser.parse_args()
    options.commit = options.commit or circumstances()["commit"]
    for case in options.cases:
        try:
            for row in measure(options, case):
                print(json.dumps(row), flush=True)
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        except RuntimeError as error:
            print(f"{case} failed: {error}", flush=True)


if __name__ == "__main__":
    main()
