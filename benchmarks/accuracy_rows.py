"""Rows and a table of answers: how many are right, as the baseline's, and after a hit as the cold run's."""

from collections.abc import Sequence
from typing import Any

from benchmarks.accuracy_tasks import Task
from benchmarks.paired import compared
from benchmarks.sglang_gpu import Row

STATELESS = "-stateless"
"""Ends the name of a case without a codec state."""

Answers = dict[str, Any]
"""To the prompts of a task: `tokens` that were written, and how many of each prompt's were `found`."""


def rows_of(tokenizer: Any, task: Task, by_case: dict[str, dict[str, Answers]], first: str) -> list[Row]:
    """A row for each case and path of a task: scores, and how they compare with the cold run of `first`."""

    def graded(answers: Answers) -> list[float]:
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers["tokens"]]
        return [task.score(place, text) for place, text in enumerate(texts)]

    def equal(one: Answers, other: Answers) -> list[bool]:
        return [a == b for a, b in zip(one["tokens"], other["tokens"], strict=True)]

    baseline = by_case[first]["cold"] if first in by_case else None
    base_grades = graded(baseline) if baseline is not None else []
    rows: list[Row] = []
    for case, answers in by_case.items():
        dtype, _, backend = case.removesuffix(STATELESS).partition("/")
        for path, each in answers.items():
            grades = graded(each)
            is_hit = [found > 0 for found in each["found"]]
            same = equal(each, answers["cold"])
            row = {
                "kv_cache_dtype": dtype,
                "attention_backend": backend or "turboquant",
                "case": case,
                "task": task.name,
                "context": task.context,
                "path": path,
                "samples": len(grades),
                "score": round(100 * sum(grades) / len(grades), 2),
                "hits": sum(is_hit),
                "equal_hits": None
                if path == "cold"
                else sum(hit and as_cold for hit, as_cold in zip(is_hit, same, strict=True)),
            }
            if baseline is not None and each is not baseline:
                comparison = compared(grades, base_grades)
                row |= {
                    "baseline": first,
                    "better": comparison.better,
                    "worse": comparison.worse,
                    "sign_test_p": round(comparison.sign_test_p, 4),
                    "difference": round(100 * comparison.difference, 2),
                    "interval": [round(100 * end, 2) for end in comparison.interval],
                    "same_as_baseline": sum(equal(each, baseline)),
                }
            rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Rows as lines of text."""
    lines = [
        f"{'task':17} {'context':>7} {'case':18} {'path':7} {'score':>6} {'+':>4} {'-':>4} {'p':>6} "
        f"{'95 % of difference':>20} {'equal hits':>11} {'= baseline':>11}"
    ]
    for row in rows:
        number = row["samples"]
        equal = "" if row["equal_hits"] is None else f"{row['equal_hits']}/{row['hits']}"
        line = f"{row['task']:17} {row['context']:7} {row['case']:18} {row['path']:7} {row['score']:6.1f} "
        if "baseline" in row:
            low, high = row["interval"]
            line += f"{row['better']:4} {row['worse']:4} {row['sign_test_p']:6.3f} {low:9.1f} to {high:7.1f} "
            line += f"{equal:>11} {row['same_as_baseline']:>7}/{number}"
        else:
            line += f"{'':37} {equal:>11}"
        lines.append(line.rstrip())
    return "\n".join(lines)
