"""What a KV cache dtype costs SGLang in right answers, on a real model, computed and found again.

`python -m benchmarks.sglang_accuracy --model smollm2-135m-instruct` starts one unmodified engine a case and
asks it, greedily, all samples of a task in one batch. Tasks are two of RULER's needles (niah_single_2 and
niah_multikey_1: a number hidden in essays) at each of `--contexts`, and arithmetic word problems in the style
of GSM8K, after eight worked examples: generated, not GSM8K itself (`benchmarks.word_problems`). A case is a
dtype and an attention backend, as in `auto/triton`; ours have no backend to choose, take the codec state of
`--state` (`tq-store calibrate --save`), and `tq4-stateless` does without it.

Every prompt is computed once, by itself (`path` is `cold`), and found again in the radix cache, whole pages
of it (`radix`); with `--storage`, once more after a flush, from a tq-store server on this host (`storage`).
`equal_hits` counts the answers of hits that are the cold run's, token by token, and `same_as_baseline` those
that are the baseline's. The baseline is the cold run of the first case that was named: `better` and `worse`
are samples that only one of the two has right, `sign_test_p` is the chance of so uneven a division, and
`interval` the 95 % interval of the difference of scores. A prefix that is found is read compressed where the
cold run read the tokens of the same chunk raw: `--engine '{"chunked_prefill_size": 64}' --at-once 1` makes
both read the same.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks import sglang_gpu, sglang_hicache_gpu
from benchmarks.accuracy_rows import STATELESS, Answers, rows_of, table
from benchmarks.accuracy_tasks import (
    NEEDLES,
    WORD_PROBLEMS,
    Task,
    needle_task,
    read_tasks,
    word_problem_task,
    write_tasks,
)
from benchmarks.circumstances import device_name
from benchmarks.plugins import plugin_path
from benchmarks.progress import Progress
from benchmarks.sglang_gpu import ENVIRONMENT, engine_arguments, write_row
from benchmarks.store_processes import TqStore

RESULTS = sglang_gpu.RESULTS.with_name("sglang_accuracy.jsonl")
CASES = ("auto/triton", "tq4")
PAGE_TOKENS = 64
_AT_ONCE = 64
_SETTLED_S = 1.0
_STATE_VARIABLE = "TQ_CONNECTORS_STATE"


def arguments_of(case: str, model: Path, tasks: Sequence[Task], more: dict[str, Any]) -> dict[str, Any]:
    """What `sglang.Engine` takes: a pool for all prompts of a task and decode graphs for all batches."""
    page = more.get("page_size") or PAGE_TOKENS
    room = [
        sum((len(prompt) + task.max_new_tokens) // page + 2 for prompt in task.prompts) * page
        for task in tasks
    ]
    own = {
        "load_format": "auto",
        "page_size": page,
        "max_total_tokens": max(room),
        "max_running_requests": _AT_ONCE,
        "enable_cache_report": True,
    }
    longest = max(task.context for task in tasks)
    return engine_arguments(case.removesuffix(STATELESS), model, longest + page, own | more)


def ask(engine: Any, task: Task, stop: int, at_once: int, *, apart: bool) -> list[dict[str, Any]]:
    """What SGLang answers to every prompt, so many `at_once`, or 0 for all; `apart`, none finds another's."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    sampling = {"temperature": 0.0, "max_new_tokens": task.max_new_tokens, "stop_token_ids": [stop]}
    step = at_once or len(task.prompts)
    answers: list[dict[str, Any]] = []
    for first in range(0, len(task.prompts), step):
        prompts = task.prompts[first : first + step]
        keys = [f"{task.label}-{first + number}" for number in range(len(prompts))]
        # as `engine.generate` does, which passes no key
        request = GenerateReqInput(
            input_ids=prompts, sampling_params=sampling, extra_key=keys if apart else None
        )
        replies = engine.tokenizer_manager.generate_request(request, None)
        answers += engine.loop.run_until_complete(anext(replies))
    return answers


def described(replies: Sequence[dict[str, Any]], found_in: str | None) -> Answers:
    """Tokens of answers, and how many of each prompt were cached, in the store alone if it is that."""
    about = [reply["meta_info"] for reply in replies]
    found = [
        (each.get("cached_tokens_details") or {}).get("storage", 0)
        if found_in == "storage"
        else each["cached_tokens"]
        for each in about
    ]
    return {"tokens": [list(reply["output_ids"]) for reply in replies], "found": found}


def answer_task(engine: Any, task: Task, stop: int, at_once: int, client: Any) -> dict[str, Answers]:
    """Answers by path: computed, found in the radix cache, and with a store found there."""
    sglang_hicache_gpu.flush(engine)
    if client is not None:
        client.purge(None)
    answers = {}
    for path in ("cold", "radix", *["storage"] * (client is not None)):
        if path == "storage":
            wait_until_settled(client)
            sglang_hicache_gpu.flush(engine)
        replies = ask(engine, task, stop, at_once, apart=path != "storage" or stores_by_key())
        answers[path] = described(replies, path)
    return answers


def stores_by_key() -> bool:
    """Whether SGLang finds pages in a store by a request's key too; 0.5.17 does only without one."""
    import sglang

    return sglang.__version__ != "0.5.17"


def wait_until_settled(client: Any) -> None:
    """Until nothing more comes into the store."""
    before = -1
    while (blocks := client.stats().tiers["memory"].num_blocks) != before or not blocks:
        before = blocks
        time.sleep(_SETTLED_S)


def run_case(parsed: argparse.Namespace, case: str) -> None:
    """Start an engine in this process, and write its answers, a file a task."""
    progress = Progress(case)
    import sglang
    import torch

    from tq_store.client import StoreClient

    tasks, more = read_tasks(parsed.work / "tasks.json"), dict(parsed.engine)
    about = json.loads((parsed.work / "about.json").read_text(encoding="utf-8"))
    if parsed.address:
        dtype = case.partition("/")[0].removesuffix(STATELESS)
        codec = dtype if "/" not in case else "none"
        more = (
            sglang_hicache_gpu.HICACHE
            | {"hicache_storage_backend_extra_config": sglang_hicache_gpu.storage(parsed.address, codec)}
            | more
        )
    folder = parsed.work / case.replace("/", "-")
    folder.mkdir()
    with ExitStack() as stack:
        client = stack.enter_context(StoreClient(parsed.address)) if parsed.address else None
        engine = sglang.Engine(**arguments_of(case, Path(about["folder"]), tasks, more))
        progress.say("the engine is up")
        environment = {
            "pool_tokens": engine.get_server_info()["max_total_num_tokens"],
            "sglang": sglang.__version__,
            "device": device_name(),
            "torch": torch.__version__,
        }
        (folder / "about.json").write_text(json.dumps(environment), encoding="utf-8")
        for task in tasks:
            answers = answer_task(engine, task, about["stop"], parsed.at_once, client)
            (folder / f"{task.label}.json").write_text(json.dumps(answers), encoding="utf-8")
            progress.say(f"{task.label} is answered")
        engine.shutdown()


def prepare(parsed: argparse.Namespace) -> tuple[Any, list[Task]]:
    """The tokenizer, and the tasks, in the folder that the engines' processes read."""
    from transformers import AutoTokenizer

    from tq_connectors.hf.models import fetch_model

    folder = fetch_model(parsed.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    about = {"folder": str(folder), "stop": tokenizer.eos_token_id}
    (parsed.work / "about.json").write_text(json.dumps(about), encoding="utf-8")
    if parsed.prompts is not None and parsed.prompts.is_file():
        tasks = read_tasks(parsed.prompts)
    else:
        tasks = [word_problem_task(tokenizer, parsed.problems)] * (WORD_PROBLEMS in parsed.tasks)
        needles = [task for task in parsed.tasks if task != WORD_PROBLEMS]
        if needles:
            from benchmarks.quality.ruler.material import load_material

            material = load_material()
            tasks += [
                needle_task(tokenizer, material, name, context, parsed.samples)
                for context in parsed.contexts
                for name in needles
            ]
        if parsed.prompts is not None:
            write_tasks(parsed.prompts, tasks)
    write_tasks(parsed.work / "tasks.json", tasks)
    return tokenizer, tasks


def run_apart(parsed: argparse.Namespace, own: Sequence[str], case: str, address: str | None) -> bool:
    """Run a case in a process of its own, with all that it starts ended at the latest when time is out."""
    command = [sys.executable, "-m", "benchmarks.sglang_accuracy", *own, "--in-process", case]
    command += ["--work", str(parsed.work), *(["--address", address] if address else [])]
    with tempfile.TemporaryDirectory() as folder:
        environment = ENVIRONMENT | os.environ | {"PYTHONPATH": plugin_path(Path(folder))}
        environment.pop(_STATE_VARIABLE, None)
        if parsed.state is not None and "/" not in case and not case.endswith(STATELESS):
            environment[_STATE_VARIABLE] = str(parsed.state.resolve())
        with subprocess.Popen(command, env=environment, start_new_session=True) as process:  # noqa: S603
            try:
                return process.wait(parsed.timeout) == 0
            except subprocess.TimeoutExpired:
                return False
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def report(parsed: argparse.Namespace, tokenizer: Any, tasks: Sequence[Task]) -> None:
    """Write the rows of all that was answered, and print them as a table."""
    rows = []
    for task in tasks:
        by_case = {}
        for case in parsed.cases:
            path = parsed.work / case.replace("/", "-") / f"{task.label}.json"
            if path.is_file():
                by_case[case] = json.loads(path.read_text(encoding="utf-8"))
        rows += rows_of(tokenizer, task, by_case, parsed.cases[0])
    for row in rows:
        about = parsed.work / row["case"].replace("/", "-") / "about.json"
        has_state = parsed.state is not None and "/" not in row["case"] and STATELESS not in row["case"]
        common = {
            "model": Path(parsed.model).name,
            "state": has_state,
            "at_once": parsed.at_once,
            "engine": parsed.engine,
        }
        facts = json.loads(about.read_text(encoding="utf-8"))
        write_row(parsed.out, common | row | facts | {"commit": sglang_gpu.commit()})
    print(table(rows), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cases, one process each; 1 if one of them failed."""
    parsed = _parser().parse_args(arguments)
    if parsed.in_process:
        run_case(parsed, parsed.in_process)
        return 0
    own = list(sys.argv[1:] if arguments is None else arguments)
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parsed.work = parsed.work or temporary / "work"
        parsed.work.mkdir(parents=True, exist_ok=True)
        tokenizer, tasks = prepare(parsed)
        if parsed.only_prepare:
            return 0
        addresses: list[str | None] = [None] * len(parsed.cases)
        if parsed.storage:
            folders = [Path(tempfile.mkdtemp(dir=temporary)) for _ in parsed.cases]
            addresses = [stack.enter_context(_server(folder)).local_address for folder in folders]
        with ThreadPoolExecutor(parsed.jobs) as pool:
            did = list(pool.map(lambda case, at: run_apart(parsed, own, case, at), parsed.cases, addresses))
        report(parsed, tokenizer, tasks)
    failed = [case for case, done in zip(parsed.cases, did, strict=True) if not done]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def _server(folder: Path) -> TqStore:
    return TqStore(folder, "--memory-budget", "8GiB", "--max-inflight", "1GiB", "--max-outflight", "1GiB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sglang_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME|FOLDER", help="as for the demo")
    add("--cases", nargs="+", default=list(CASES), metavar="DTYPE[/BACKEND]", help="the baseline first")
    add("--tasks", nargs="+", default=[WORD_PROBLEMS, *NEEDLES], choices=(WORD_PROBLEMS, *NEEDLES))
    add("--contexts", nargs="+", type=int, default=[1024, 2048], help="tokens of needle tasks")
    add("--samples", type=int, default=100, help="of a needle task at a context (default: %(default)s)")
    add("--problems", type=int, default=200, help="word problems (default: %(default)s)")
    add("--state", type=Path, metavar="FILE", help="codec state for our dtypes")
    add("--storage", action="store_true", help="answer once more from pages in a store")
    add("--at-once", type=int, default=0, metavar="N", help="prompts in a batch (default: all of a task)")
    add("--jobs", type=int, default=1, help="engines at a time (default: %(default)s)")
    add("--prompts", type=Path, metavar="FILE", help="read prompts there, or make it")
    add("--only-prepare", action="store_true", help="make that file, start no engine")
    add("--work", type=Path, metavar="FOLDER", help="a new one, to keep answers in")
    add("--engine", type=json.loads, default={}, metavar="JSON", help="arguments of SGLang")
    add("--out", type=Path, default=RESULTS, help="rows are appended (default: %(default)s)")
    add("--timeout", type=int, default=600, help="seconds a case (default: %(default)s)")
    add("--in-process", metavar="CASE", help=argparse.SUPPRESS)
    add("--address", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
