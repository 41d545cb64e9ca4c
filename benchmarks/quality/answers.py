"""Greedy answers to several prompts, with attention reading through a method.

Every prompt is read in a pass of its own; all answers are then written in step, a token of each in a pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.quality.conditions import Conditions
from benchmarks.quality.methods.base import Method
from benchmarks.quality.models import LoadedModel
from benchmarks.quality.passes import States, view_of
from benchmarks.quality.ruler.tasks import Sample
from benchmarks.quality.step_view import StepView
from benchmarks.quality.substitute import attending_by, reading_through

_ATTENTION_NAME = "quality-step"


def prompt_of(tokenizer: Any, sample: Sample) -> list[int]:
    """Tokens of a prompt: the user's turn in the model's chat format, and how the answer begins."""
    text = sample.user
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": sample.user}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    is_plain = text == sample.user  # a chat template writes the special tokens itself
    return list(tokenizer(text + sample.answer_prefix, add_special_tokens=is_plain)["input_ids"])


def answers_to(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    method: Method,
    states: States | None,
    conditions: Conditions,
) -> list[str]:
    """What the model writes to each, up to its end token or until nothing more can be scored."""
    prompts = [prompt_of(loaded.tokenizer, sample) for sample in samples]
    most = max(sample.max_new_tokens for sample in samples)
    view = StepView(method, loaded.geometry.num_layers, conditions, [len(ids) for ids in prompts], most)
    answers = [_Answer(loaded.tokenizer, sample) for sample in samples]
    with torch.inference_mode():
        newest = [
            _read_prompt(loaded, ids, row, method, states, conditions, view)
            for row, ids in enumerate(prompts)
        ]
        running = list(answers)
        with _stepping(loaded, view):
            while True:
                going = [
                    row
                    for row, (answer, token) in enumerate(zip(running, newest, strict=True))
                    if answer.goes_on(token)
                ]
                if not going:
                    break
                if len(going) <= len(running) / 2:  # seldom, as it moves all that is kept
                    view.keep(going)
                    running, newest = [running[row] for row in going], [newest[row] for row in going]
                newest = _next_tokens(loaded, newest, view)
    return [answer.text for answer in answers]


class _Answer:
    """An answer as it is written."""

    def __init__(self, tokenizer: Any, sample: Sample) -> None:
        self._tokenizer, self._sample = tokenizer, sample
        self._written: list[int] = []
        self._is_done = False
        self.text = ""

    def goes_on(self, token: int) -> bool:
        """Take the next token, unless the answer is done; whether it still is not."""
        self._is_done |= token == self._tokenizer.eos_token_id
        if not self._is_done:
            self._written.append(token)
            self.text = str(self._tokenizer.decode(self._written, skip_special_tokens=True))
            has_all = all(expected.lower() in self.text.lower() for expected in self._sample.answers)
            self._is_done = has_all or len(self._written) == self._sample.max_new_tokens
        return not self._is_done


def _read_prompt(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    row: int,
    method: Method,
    states: States | None,
    conditions: Conditions,
    view: StepView,
) -> int:
    """The first token of an answer; what attention saw of the prompt goes into `view`."""
    prompt_view = view_of(loaded, method, states, conditions)

    def read(
        layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = prompt_view(layer, queries, keys, values)
        view.begin(layer, row, (keys, values), seen, prompt_view.state(layer))
        return seen

    batch = torch.tensor([list(token_ids)], device=loaded.model.device)
    with reading_through(loaded.model, read, tail=conditions.tail):
        output = loaded.model(input_ids=batch, use_cache=False, logits_to_keep=1)
    return int(output.logits[0, -1].argmax())


def _next_tokens(loaded: LoadedModel, newest: Sequence[int], view: StepView) -> list[int]:
    """The token after the newest one of every sequence."""
    positions = view.advance(loaded.model.device)
    batch = torch.tensor(newest, device=loaded.model.device)[:, None]
    output = loaded.model(input_ids=batch, position_ids=positions[:, None], use_cache=False)
    following: list[int] = output.logits[:, -1].argmax(-1).tolist()
    return following


@contextmanager
def _stepping(loaded: LoadedModel, view: StepView) -> Iterator[None]:
    """Let attention of one new token a sequence see what `view` shows."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        keys, values, is_there = view.step(layer, key[:, :, 0], value[:, :, 0])
        if window := kwargs.get("sliding_window"):
            is_there = is_there & (is_there.sum(-1, keepdim=True) - is_there.cumsum(-1) < window)
        by_kv_head = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
        output = scaled_dot_product_attention(
            by_kv_head,
            keys.transpose(1, 2).to(query.dtype),
            values.transpose(1, 2).to(query.dtype),
            attn_mask=is_there[:, None, None].expand(-1, key.shape[1], by_kv_head.shape[2], -1),
            scale=scaling,
        )
        return output.flatten(1, 2)[:, None], None

    with attending_by(loaded.model, _ATTENTION_NAME, attend, lambda *_, **__: None):
        yield
