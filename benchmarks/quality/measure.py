"""Measure methods on one model: a row for each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers

from benchmarks.circumstances import circumstances
from benchmarks.quality.articles import token_sequences
from benchmarks.quality.codec import measure_codec
from benchmarks.quality.conditions import Conditions
from benchmarks.quality.logits import LogitLoss, compare, summary
from benchmarks.quality.methods.base import Method
from benchmarks.quality.methods.by_layer import PagesByLayer
from benchmarks.quality.models import LoadedModel
from benchmarks.quality.passes import States, logits_of, states_of_text, view_of
from benchmarks.quality.retrieval import Retrieval, scored, scores_entries
from benchmarks.quality.rows import Row
from benchmarks.quality.store import decode_through_store, running_store
from benchmarks.quality.tensors import LayerLoss, TensorLosses, measure_tensors
from tq_kernels import PRESETS

TEXT_METRICS = ("codec", "tensor", "logits")

Advance = Callable[[str, int, int], None]
"""Told of progress: the metric, passes done, passes in all."""


def measure_texts(
    loaded: LoadedModel,
    methods: Sequence[Method],
    conditions: Conditions,
    metrics: Sequence[str],
    advance: Advance,
) -> list[Row]:
    """Rows of all methods on Wikipedia articles.

    Args:
        loaded: The model.
        methods: What to measure.
        conditions: Under which conditions.
        metrics: Some of `TEXT_METRICS`.
        advance: Told of progress.
    """
    *texts, other = token_sequences(loaded.tokenizer, conditions.num_texts + 1, conditions.num_tokens)
    states = states_of_text(loaded, other, methods, conditions) if conditions.state_from == "other" else None
    measured: dict[str, Row] = {method.name: {} for method in methods}
    if "codec" in metrics:
        for method in methods:
            measured[method.name] |= measure_codec(method, loaded.geometry, conditions.num_sinks)
    if "tensor" in metrics:
        for name, tensor_losses in _tensors(loaded, texts, methods, conditions, states, advance).items():
            measured[name] |= tensor_losses.summary()
    if "logits" in metrics:
        for name, losses in _logits(loaded, texts, methods, conditions, states, advance).items():
            measured[name] |= summary(losses)
    return [
        {
            **{"measure": "text", "model": loaded.name, "preset": method.name},
            **size_of(loaded, method, conditions),
            **measured[method.name],
            **conditions.row(),
            **environment(loaded),
        }
        for method in methods
    ]


def measure_store(
    loaded: LoadedModel, methods: Sequence[Method], conditions: Conditions, advance: Advance
) -> list[Row]:
    """Rows of methods that are presets of ours or tables of them, over the second half of every article.

    Raises:
        ValueError: The store did not give back what was saved.
    """
    texts = token_sequences(loaded.tokenizer, conditions.num_texts, conditions.num_tokens)
    presets = [method for method in methods if method.name in PRESETS or isinstance(method, PagesByLayer)]
    losses: dict[str, list[LogitLoss]] = {method.name: [] for method in presets}
    blocks = dict.fromkeys(losses, 0)
    done, total = 0, len(texts) * len(presets)
    with running_store() as address:
        for token_ids in texts:
            reference = logits_of(loaded, token_ids, None)
            for method in presets:
                loss, num_blocks = decode_through_store(
                    loaded,
                    token_ids,
                    method.name,
                    address,
                    page_tokens=conditions.page_tokens,
                    reference=reference,
                )
                losses[method.name].append(loss)
                blocks[method.name] += num_blocks
                advance("store", done := done + 1, total)
    return [
        {
            **{"measure": "store", "model": loaded.name, "preset": method.name},
            **size_of(loaded, method, conditions),
            **summary(losses[method.name]),
            "blocks": blocks[method.name],
            **conditions.row(),
            **environment(loaded),
        }
        for method in presets
    ]


def measure_ruler(
    loaded: LoadedModel,
    methods: Sequence[Method],
    conditions: Conditions,
    retrieval: Retrieval,
    advance: Advance,
) -> list[Row]:
    """Rows of all methods on RULER's tasks, for each length of context.

    Raises:
        OSError: A process died.
    """
    batches = retrieval.batches(methods, conditions)
    found: dict[tuple[int, str], dict[str, dict[int, float]]] = {}
    done, total = 0, sum(len(batch.samples) for batch in batches)
    for batch, scores in scored(loaded, batches, retrieval.num_jobs):
        by_task = found.setdefault((batch.conditions.num_tokens, batch.method.name), {})
        by_task.setdefault(batch.task, {}).update(zip(batch.samples, scores, strict=True))
        advance("retrieval", done := done + len(scores), total)
    return [
        {
            **{"measure": "retrieval", "model": loaded.name, "preset": method.name},
            **size_of(loaded, method, at_length),
            **scores_entries(
                {task: found[at_length.num_tokens, method.name][task] for task in retrieval.tasks}
            ),
            **at_length.row(),
            **environment(loaded),
            "texts": None,
        }
        for at_length in (replace(conditions, num_tokens=num_tokens) for num_tokens in retrieval.contexts)
        for method in methods
    ]


def size_of(loaded: LoadedModel, method: Method, conditions: Conditions) -> Row:
    """Bytes a token of a sequence as long as the texts, and in bf16."""
    num_bytes = method.total_bytes(loaded.geometry, conditions.num_tokens, conditions.num_sinks)
    return {
        "bytes_per_token": num_bytes / conditions.num_tokens,
        "bytes_per_token_bf16": loaded.geometry.raw_bytes_per_token,
    }


def environment(loaded: LoadedModel) -> dict[str, Any]:
    """What the run was made with."""
    return {
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device.type),
        **circumstances(),
        **{"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _tensors(
    loaded: LoadedModel,
    texts: Sequence[Sequence[int]],
    methods: Sequence[Method],
    conditions: Conditions,
    states: States | None,
    advance: Advance,
) -> dict[str, TensorLosses]:
    losses = {method.name: TensorLosses() for method in methods}
    num_layers = loaded.geometry.num_layers
    for index, token_ids in enumerate(texts):
        views = {method.name: view_of(loaded, method, states, conditions) for method in methods}

        def take(layer: int, layer_losses: dict[str, LayerLoss], done: int = index * num_layers) -> None:
            for name, loss in layer_losses.items():
                losses[name].add(layer, loss)
            advance("tensor", done + layer + 1, len(texts) * num_layers)

        measure_tensors(loaded, token_ids, views, conditions.num_sinks, take)
    return losses


def _logits(
    loaded: LoadedModel,
    texts: Sequence[Sequence[int]],
    methods: Sequence[Method],
    conditions: Conditions,
    states: States | None,
    advance: Advance,
) -> dict[str, list[LogitLoss]]:
    losses: dict[str, list[LogitLoss]] = {method.name: [] for method in methods}
    done, total = 0, len(texts) * (len(methods) + 1)
    for token_ids in texts:
        reference = logits_of(loaded, token_ids, None)
        advance("logits", done := done + 1, total)
        for method in methods:
            view = view_of(loaded, method, states, conditions)
            logits = logits_of(loaded, token_ids, view, tail=conditions.tail)
            losses[method.name].append(compare(reference, logits, token_ids))
            advance("logits", done := done + 1, total)
    return losses
