"""How well a model still finds things: RULER's tasks, answered with attention reading through a method."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache

import torch

from benchmarks.quality.answers import answers_to, prompt_of
from benchmarks.quality.articles import token_sequences
from benchmarks.quality.conditions import Conditions
from benchmarks.quality.methods.base import Method
from benchmarks.quality.models import LoadedModel, load_model
from benchmarks.quality.passes import states_of_text
from benchmarks.quality.rows import Row
from benchmarks.quality.ruler.material import load_material
from benchmarks.quality.ruler.scores import score
from benchmarks.quality.ruler.tasks import TASKS, sample_of

_material = cache(load_material)
_model = cache(load_model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """What is asked, and how.

    Args:
        tasks: Of RULER.
        contexts: Tokens of prompts with their answers.
        num_samples: Of each task at each length.
        batch_samples: Samples that are answered together.
        num_jobs: Processes; each has the model to itself.
    """

    tasks: Sequence[str] = TASKS
    contexts: Sequence[int] = (1024, 2048)
    num_samples: int = 25
    batch_samples: int = 8
    num_jobs: int = 1

    def batches(self, methods: Sequence[Method], conditions: Conditions) -> list["Batch"]:
        """All there is to do, by context, task, method and sample."""
        return [
            Batch(
                method=method,
                task=task,
                samples=range(first, min(first + self.batch_samples, self.num_samples)),
                conditions=replace(conditions, num_tokens=num_tokens),
            )
            for num_tokens in self.contexts
            for task in self.tasks
            for method in methods
            for first in range(0, self.num_samples, self.batch_samples)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some samples of a task that are answered together.

    Args:
        method: How keys and values are kept.
        task: Of RULER.
        samples: Their numbers.
        conditions: With the length of the prompts.
    """

    method: Method
    task: str
    samples: range
    conditions: Conditions


def scored(
    loaded: LoadedModel, batches: Sequence[Batch], num_jobs: int
) -> Iterator[tuple[Batch, list[float]]]:
    """Every batch and the scores of its samples, between 0 and 1, as they are done.

    Raises:
        OSError: A process died.
    """
    if num_jobs == 1:
        for batch in batches:
            yield batch, _scores_of(loaded, batch)
        return
    device, dtype = str(loaded.model.device), loaded.model.dtype
    pool = ProcessPoolExecutor(
        min(num_jobs, len(batches)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, (os.cpu_count() or 1) // num_jobs),),
    )
    with pool:
        waiting = {
            pool.submit(_scores_elsewhere, loaded.source, device, dtype, batch): batch for batch in batches
        }
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process that answers died; fewer --jobs or a smaller --batch may help"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def scores_entries(found: dict[str, dict[int, float]]) -> Row:
    """Entries of a row.

    Args:
        found: By task, the score of every sample.
    """
    by_task = {task: [scores[number] for number in sorted(scores)] for task, scores in found.items()}
    return {
        "ruler": {task: round(100 * sum(scores) / len(scores), 2) for task, scores in by_task.items()},
        "samples": max(len(scores) for scores in by_task.values()),
        "ruler_scores": {task: [round(value, 2) for value in scores] for task, scores in by_task.items()},
    }


def _scores_elsewhere(source: str, device: str, dtype: torch.dtype, batch: Batch) -> list[float]:
    """`_scores_of` in a process of its own, which keeps the model."""
    return _scores_of(_model(source, device=torch.device(device), dtype=dtype), batch)


def _scores_of(loaded: LoadedModel, batch: Batch) -> list[float]:
    """Score of every sample of a batch."""
    conditions, states, material = batch.conditions, None, _material()
    if conditions.state_from == "other":
        (other,) = token_sequences(loaded.tokenizer, 1, conditions.state_tokens)
        states = states_of_text(loaded, other, [batch.method], conditions)
    samples = [
        sample_of(
            batch.task,
            material,
            number,
            conditions.num_tokens,
            lambda sample: len(prompt_of(loaded.tokenizer, sample)),
        )
        for number in batch.samples
    ]
    answers = answers_to(loaded, samples, batch.method, states, conditions)
    return [
        score(batch.task, answer, sample.answers) for answer, sample in zip(answers, samples, strict=True)
    ]
