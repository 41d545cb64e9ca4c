"""Tasks that say how well a model still answers: RULER's needles, and word problems in the style of GSM8K."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import word_problems
from benchmarks.quality.answers import prompt_of
from benchmarks.quality.ruler import scores
from benchmarks.quality.ruler.material import Material
from benchmarks.quality.ruler.tasks import Sample, sample_of

NEEDLES = ("niah_single_2", "niah_multikey_1")
WORD_PROBLEMS = "word_problems"
_ANSWER_PREFIX = "Answer:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Prompts of one kind, and what is right.

    Args:
        name: One of `NEEDLES`, or `WORD_PROBLEMS`.
        context: Tokens that a prompt and its answer have at most.
        prompts: Tokens of each.
        answers: What must be written after each.
        max_new_tokens: Length of an answer.
    """

    name: str
    context: int
    prompts: list[list[int]]
    answers: list[str]
    max_new_tokens: int

    @property
    def label(self) -> str:
        """The name and the context."""
        return f"{self.name}-{self.context}"

    def score(self, place: int, written: str) -> float:
        """1.0 if a text answers a prompt, or 0.0."""
        if self.name == WORD_PROBLEMS:
            return float(word_problems.is_right(written, int(self.answers[place])))
        return scores.score(self.name, written, [self.answers[place]])


def needle_task(tokenizer: Any, material: Material, name: str, context: int, num_samples: int) -> Task:
    """A number that is hidden in essays, `context` tokens with its answer.

    Raises:
        ValueError: No such task, or too few tokens.
    """
    samples = [
        sample_of(name, material, number, context, lambda sample: len(prompt_of(tokenizer, sample)))
        for number in range(num_samples)
    ]
    return Task(
        name=name,
        context=context,
        prompts=[prompt_of(tokenizer, sample) for sample in samples],
        answers=[sample.answers[0] for sample in samples],
        max_new_tokens=samples[0].max_new_tokens,
    )


def word_problem_task(tokenizer: Any, num_samples: int) -> Task:
    """Generated problems after the same worked examples."""
    problems = [word_problems.problem_of(index) for index in range(num_samples)]
    prompts = [
        prompt_of(
            tokenizer,
            Sample(
                user=word_problems.prompt_text(problem),
                answer_prefix=_ANSWER_PREFIX,
                answers=[str(problem.answer)],
                max_new_tokens=word_problems.MAX_NEW_TOKENS,
            ),
        )
        for problem in problems
    ]
    return Task(
        name=WORD_PROBLEMS,
        context=max(map(len, prompts)) + word_problems.MAX_NEW_TOKENS,
        prompts=prompts,
        answers=[str(problem.answer) for problem in problems],
        max_new_tokens=word_problems.MAX_NEW_TOKENS,
    )


def write_tasks(path: Path, tasks: Sequence[Task]) -> None:
    """As JSON."""
    path.write_text(json.dumps([asdict(task) for task in tasks]), encoding="utf-8")


def read_tasks(path: Path) -> list[Task]:
    """What `write_tasks` wrote."""
    return [Task(**entries) for entries in json.loads(path.read_text(encoding="utf-8"))]
