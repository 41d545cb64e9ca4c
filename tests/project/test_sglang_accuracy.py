"""The accuracy benchmark, as far as it goes without an engine: problems, prompts, scores and rows."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sglang_accuracy, word_problems
from benchmarks.accuracy_rows import rows_of, table
from benchmarks.accuracy_tasks import Task, needle_task, read_tasks, word_problem_task, write_tasks
from benchmarks.paired import compared, sign_test_p
from benchmarks.quality.ruler.material import Material, Template
from benchmarks.word_problems import is_right, problem_of, prompt_text

_EQUATION = re.compile(r"(\d+(?: [-+*/] \d+)+) = (\d+)")


class Words:
    """A tokenizer whose tokens are words."""

    eos_token_id = 0

    def __init__(self) -> None:
        self._words = ["<end>"]

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self._words += [word for word in dict.fromkeys(text.split()) if word not in self._words]
        return {"input_ids": [self._words.index(word) for word in text.split()]}

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(self._words[token] for token in tokens if token)


def test_problems_are_worked_out_rightly() -> None:
    problems = [problem_of(index) for index in range(300)]
    for problem in problems:
        equations = _EQUATION.findall(problem.steps)
        assert 2 <= len(equations) <= 3, problem
        for terms, result in equations:
            value = int(terms.split()[0])
            for sign, number in re.findall(r"([-+*/]) (\d+)", terms):
                value = {
                    "+": value + int(number),
                    "-": value - int(number),
                    "*": value * int(number),
                    "/": value // int(number),
                }[sign]
            assert value == int(result), problem
        assert int(equations[-1][1]) == problem.answer >= 0
    assert problems == [problem_of(index) for index in range(300)]
    assert len({re.sub(r"\d+|[A-Z]\w+", "", problem.steps) for problem in problems}) >= 12


def test_a_prompt_has_worked_examples_and_ends_with_its_question() -> None:
    one, other = problem_of(0), problem_of(1)
    text = prompt_text(one)
    assert text.count("The answer is ") == word_problems.NUM_EXAMPLES
    assert text.endswith(f"Question: {one.question}")
    assert text.removesuffix(one.question) == prompt_text(other).removesuffix(other.question)


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("3 + 4 = 7 apples. The answer is 7.", True),
        ("The answer is $1,007.00 or so", False),
        ("The answer is 7.\n\nQuestion: Ann has 9 apples", True),
        ("The answer is 8. No, 7", False),
        ("it must be 3 + 4 = 7\n\nQuestion: Ann has 9", True),
        ("7 apples, less 2", False),
        ("seven", False),
        ("", False),
    ],
)
def test_what_is_right(written: str, right: bool) -> None:
    assert is_right(written, 7) is right


def test_numbers_with_thousands() -> None:
    assert is_right("The answer is $1,007.", 1007)
    assert is_right("The answer is -3.", -3)


def test_sign_test() -> None:
    assert sign_test_p(0, 0) == 1.0
    assert sign_test_p(3, 3) == 1.0
    assert sign_test_p(0, 5) == sign_test_p(5, 0) == pytest.approx(0.0625)
    assert sign_test_p(8, 2) == pytest.approx(0.109375)


def test_comparison() -> None:
    found = compared([1, 1, 0, 0], [1, 0, 1, 1])
    assert (found.better, found.worse) == (1, 2)
    assert found.difference == pytest.approx(-0.25)
    low, high = found.interval
    assert low == pytest.approx(-0.25 - 1.96 * (11 / 12) ** 0.5 / 2)
    assert low + high == pytest.approx(-0.5)
    assert compared([1, 1], [1, 1]).interval == (0, 0)
    with pytest.raises(ValueError, match="no samples"):
        compared([], [])


def test_tasks_and_their_file(tmp_path: Path) -> None:
    words = Words()
    template = Template(question="{context} {query}?", answer_prefix=" It is", max_new_tokens=8)
    material = Material(
        templates={"niah": template},
        essay_words=["One", "day", "came."] * 40,
        adjectives=["red"],
        nouns=["fox"],
        questions=[],
        documents=[],
    )
    needle = needle_task(words, material, "niah_single_2", 60, 3)
    problems = word_problem_task(words, 5)
    assert all(40 < len(prompt) + 8 <= 60 for prompt in needle.prompts)
    assert all(answer in words.decode(tokens) for tokens, answer in zip(*_told(needle), strict=True))
    assert words.decode(problems.prompts[0]).endswith("Answer:")
    assert problems.context == max(map(len, problems.prompts)) + word_problems.MAX_NEW_TOKENS
    assert needle.score(1, f"it is {needle.answers[1]}") == 1.0
    assert needle.score(1, "it is 1") == 0.0
    assert problems.score(2, f"The answer is {problems.answers[2]}.") == 1.0
    write_tasks(tmp_path / "tasks.json", [needle, problems])
    assert read_tasks(tmp_path / "tasks.json") == [needle, problems]


def _told(task: Task) -> tuple[list[list[int]], list[str]]:
    return task.prompts, task.answers


def task_of_three() -> tuple[Words, Task, list[list[int]]]:
    """A task, and the tokens that answer it rightly."""
    words = Words()
    right = [words(f"The answer is {number}.")["input_ids"] for number in (3, 4, 5)]
    task = Task(
        name="word_problems",
        context=80,
        prompts=[[1], [1, 2], [1, 2, 3]],
        answers=["3", "4", "5"],
        max_new_tokens=9,
    )
    return words, task, right


def test_rows_compare_with_the_cold_run_of_the_first_case() -> None:
    words, task, right = task_of_three()
    three, four, five = right
    by_case = {
        "auto/triton": {
            "cold": {"tokens": [three, four, four], "found": [0, 0, 0]},
            "radix": {"tokens": [three, four, four], "found": [64, 64, 64]},
        },
        "tq4": {
            "cold": {"tokens": [three, three, five], "found": [0, 0, 0]},
            "radix": {"tokens": [three, three, four], "found": [64, 0, 64]},
        },
    }
    rows = rows_of(words, task, by_case, "auto/triton")
    assert [row["score"] for row in rows] == [66.67, 66.67, 66.67, 33.33]
    assert "baseline" not in rows[0]
    assert rows[0]["equal_hits"] is None
    assert (rows[1]["equal_hits"], rows[1]["hits"], rows[1]["same_as_baseline"]) == (3, 3, 3)
    assert (rows[2]["better"], rows[2]["worse"], rows[2]["sign_test_p"]) == (1, 1, 1.0)
    assert (rows[3]["equal_hits"], rows[3]["hits"], rows[3]["same_as_baseline"]) == (1, 2, 2)
    assert rows[3]["kv_cache_dtype"] == "tq4"
    assert rows[3]["attention_backend"] == "turboquant"
    lines = table(rows).splitlines()
    assert len(lines) == 5
    assert "1/2" in lines[4]
    assert not any("baseline" in row for row in rows_of(words, task, by_case, "fp8_e5m2/triton"))


def test_the_pool_holds_all_prompts_of_a_task() -> None:
    _, task, _ = task_of_three()
    arguments = sglang_accuracy.arguments_of("tq4-stateless", Path("folder"), [task], {"nccl_port": 5})
    assert arguments["kv_cache_dtype"] == "tq4"
    assert arguments["load_format"] == "auto"
    assert arguments["max_total_tokens"] == 3 * 2 * 64
    assert arguments["nccl_port"] == 5
    assert arguments["max_running_requests"] <= max(arguments["cuda_graph_bs_decode"])


def test_a_case_that_fails_loses_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, task, right = task_of_three()

    def run_apart(parsed: argparse.Namespace, own: list[str], case: str, address: str | None) -> bool:
        if case == "fp8_e5m2/triton":
            return False
        folder = parsed.work / case.replace("/", "-")
        folder.mkdir()
        (folder / "about.json").write_text(json.dumps({"sglang": "0.5.17", "device": "cpu"}))
        answers = {path: {"tokens": right, "found": [0] * 3} for path in ("cold", "radix")}
        (folder / f"{task.label}.json").write_text(json.dumps(answers))
        return True

    monkeypatch.setattr(sglang_accuracy, "prepare", lambda parsed: (words, [task]))
    monkeypatch.setattr(sglang_accuracy, "run_apart", run_apart)
    out = tmp_path / "rows.jsonl"
    asked = ["--model", "somewhere/model", "--cases", "auto/triton", "fp8_e5m2/triton", "tq4"]
    state = tmp_path / "a.state"
    assert sglang_accuracy.main([*asked, "--out", str(out), "--jobs", "2", "--state", str(state)]) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["case"], row["state"]) for row in rows] == [("auto/triton", False)] * 2 + [("tq4", True)] * 2
    assert {"model", "context", "samples", "score", "sglang", "device", "commit"} < rows[0].keys()
    assert "failed: fp8_e5m2/triton" in capsys.readouterr().out


@pytest.mark.parametrize("timeout_s", [30, 0])
def test_an_engine_that_does_not_start_is_told(tmp_path: Path, timeout_s: int) -> None:
    """Here SGLang is not installed, or there is no time for it."""
    parsed = argparse.Namespace(work=tmp_path, state=None, timeout=timeout_s)
    assert not sglang_accuracy.run_apart(parsed, ["--model", "model"], "tq4", None)
