"""How well a model still finds things: RULER's tasks, answered with attention reading through a method."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.quality.cache_view import CacheView
from benchmarks.quality.conditions import Conditions
from benchmarks.quality.methods.base import Method
from benchmarks.quality.models import LoadedModel
from benchmarks.quality.passes import States, view_of
from benchmarks.quality.rows import Row
from benchmarks.quality.ruler.material import Material
from benchmarks.quality.ruler.scores import score
from benchmarks.quality.ruler.tasks import Sample, sample_of
from benchmarks.quality.substitute import reading_through


def prompt_of(tokenizer: Any, sample: Sample) -> list[int]:
    """Tokens of a prompt: the user's turn in the model's chat format, and how the answer begins."""
    text = sample.user
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": sample.user}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    is_plain = text == sample.user  # a chat template writes the special tokens itself
    return list(tokenizer(text + sample.answer_prefix, add_special_tokens=is_plain)["input_ids"])


def answer(loaded: LoadedModel, sample: Sample, view: CacheView, tail: int) -> str:
    """What the model writes, greedily, up to its end token or until nothing more can be scored."""
    model, tokenizer = loaded.model, loaded.tokenizer
    cache, written = DynamicCache(config=model.config), list[int]()
    inputs, text = prompt_of(tokenizer, sample), ""
    with torch.inference_mode(), reading_through(model, view, tail=tail):
        while len(written) < sample.max_new_tokens:
            batch = torch.tensor([inputs], device=model.device)
            output = model(input_ids=batch, past_key_values=cache, logits_to_keep=1)
            inputs = [int(output.logits[0, -1].argmax())]
            if inputs[0] == tokenizer.eos_token_id:
                break
            written += inputs
            text = str(tokenizer.decode(written, skip_special_tokens=True))
            if all(expected.lower() in text.lower() for expected in sample.answers):
                break
    return text


def measure_retrieval(
    loaded: LoadedModel,
    material: Material,
    methods: Sequence[Method],
    conditions: Conditions,
    states: States | None,
    tasks: Sequence[str],
    num_samples: int,
    advance: Callable[[str, int, int], None],
) -> dict[str, Row]:
    """Scores in percent by task, by name of the method, at contexts of `conditions.num_tokens` tokens."""
    found: dict[str, dict[str, list[float]]] = {
        method.name: {task: [] for task in tasks} for method in methods
    }
    done, total = 0, len(tasks) * num_samples * len(methods)
    for task in tasks:
        for index in range(num_samples):
            sample = sample_of(
                task,
                material,
                index,
                conditions.num_tokens,
                lambda sample: len(prompt_of(loaded.tokenizer, sample)),
            )
            for method in methods:
                view = view_of(loaded, method, states, conditions)
                prediction = answer(loaded, sample, view, conditions.tail)
                found[method.name][task].append(score(task, prediction, sample.answers))
                done += 1
                advance(f"retrieval at {conditions.num_tokens}", done, total)
    return {
        name: {
            "ruler": {task: round(100 * sum(scores) / len(scores), 2) for task, scores in by_task.items()},
            "samples": num_samples,
        }
        for name, by_task in found.items()
    }
