"""The engine of the accuracy benchmark: prompts are computed, found in the radix cache and in a store."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from engines.sglang.engine_worker import ARGUMENTS
from engines.tiny_model import VOCABULARY
from store.running_server import running_server

from benchmarks.accuracy_tasks import Task, write_tasks
from benchmarks.sglang_accuracy import stores_by_key

PAGE = 64
WORKER = Path(__file__).with_name("accuracy_worker.py")
ON_A_CPU = {"device": "cpu", "dtype": "float32", "disable_cuda_graph": True, "skip_server_warmup": True}


@pytest.mark.timeout(400)
def test_answers_by_path(tiny_model: str, tmp_path: Path) -> None:
    chance = random.Random(0)
    shared = [chance.randrange(3, VOCABULARY) for _ in range(100)]
    prompts = [shared + [chance.randrange(3, VOCABULARY) for _ in range(500)] for _ in range(2)]
    task = Task(name="niah_single_2", context=700, prompts=prompts, answers=["1", "2"], max_new_tokens=6)
    write_tasks(tmp_path / "tasks.json", [task])
    (tmp_path / "about.json").write_text(json.dumps({"folder": tiny_model, "stop": 2}))
    engine = {name: ARGUMENTS[name] for name in ("disable_overlap_schedule",)} | ON_A_CPU
    engine |= {"chunked_prefill_size": PAGE, "max_total_tokens": 2048}
    with running_server() as server:
        command = [sys.executable, str(WORKER), "--model", tiny_model, "--engine", json.dumps(engine)]
        command += ["--at-once", "1", "--in-process", "tq4", "--work", str(tmp_path)]
        with (tmp_path / "log").open("wb") as log:
            done = subprocess.run(
                [*command, "--address", server.address],
                stdout=log,
                stderr=log,
                env=os.environ | {"NO_COLOR": "1"},
            )
    assert done.returncode == 0, (tmp_path / "log").read_text(errors="replace")[-5000:]
    answers = json.loads((tmp_path / "tq4" / f"{task.label}.json").read_text())
    found = {path: each["found"] for path, each in answers.items()}
    pages, of_the_other = 600 // PAGE * PAGE, 0 if stores_by_key() else 100 // PAGE * PAGE
    assert found == {"cold": [0, 0], "radix": [pages] * 2, "storage": [pages, pages - of_the_other]}
    assert all(answers[path]["tokens"] == answers["cold"]["tokens"] for path in ("radix", "storage"))
    assert all(answers["cold"]["tokens"])
