"""One replica of the demo, its own process: a job on stdin, events on stdout as JSON lines."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tq_connectors.hf.cache import TQCache
from tq_connectors.hf.connector import TQConnector
from tq_connectors.hf.models import weights_revision
from tq_kernels.spec import preset
from tq_store.client import StoreClient
from tq_store.errors import TQStoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a replica is asked to do.

    Args:
        role: ``"save"`` prefills the document, ``"answer"`` answers the question about it.
        model_folder: Hugging Face folder of the model.
        model_name: Its name in the cache namespace.
        preset: Codec preset.
        page_tokens: Tokens in a page.
        server: Address of the store.
        document: The shared text.
        document_tokens: How much of its beginning is used.
        question: What is asked about it.
        max_new_tokens: Length limit of the answer.
    """

    role: str
    model_folder: str
    model_name: str
    preset: str
    page_tokens: int
    server: str
    document: str
    document_tokens: int
    question: str
    max_new_tokens: int


class Replica:
    """A loaded model with its connector, working through one job."""

    def __init__(self, job: Job, client: StoreClient, events: TextIO) -> None:
        self._job = job
        self._events = events
        self._emit("step", text="loading the model")
        self._tokenizer = AutoTokenizer.from_pretrained(job.model_folder)
        self._model = AutoModelForCausalLM.from_pretrained(job.model_folder, dtype=torch.float32)
        self._connector = TQConnector(
            self._model,
            client,
            preset(job.preset),
            model_name=job.model_name,
            revision=weights_revision(Path(job.model_folder)),
            page_tokens=job.page_tokens,
        )
        assert self._connector.prefix_cache is not None  # there is a client
        self._prefix_cache = self._connector.prefix_cache
        self._plain_forward([0] * 8)  # the first pass of a process pays for allocations that serving does not

    def run(self) -> None:
        """Do the job and emit its result."""
        with self._connector:
            result = self._save() if self._job.role == "save" else self._answer()
        self._emit("result", **result)

    def _save(self) -> dict[str, Any]:
        """Prefill the document; its pages are saved while it works."""
        token_ids = self._prompt()[0]
        self._prefill(token_ids, self._connector.open_cache(token_ids), last_only=True)
        saves = self._prefix_cache.saves
        is_flushed = saves.flush(timeout_s=60)
        lost = saves.dropped_blocks + saves.failed_blocks
        if lost or not is_flushed:
            self._emit("step", text=f"the store took {saves.saved_blocks} pages and lost {lost}")
        return {"saved": saves.saved_blocks, "lost": lost}

    def _answer(self) -> dict[str, Any]:
        """Answer from the store's pages, then without any cache, and compare."""
        token_ids = self._prompt()[1]
        started = time.perf_counter()
        cache = self._connector.open_cache(token_ids)
        counters = self._prefix_cache.counters
        hit = counters.loaded_pages * self._job.page_tokens
        logits = [self._prefill(token_ids, cache)]
        ttft_warm_s = time.perf_counter() - started
        answer = self._decode(logits, cache)

        self._emit("step", text="the same without a cache")
        started = time.perf_counter()
        plain = self._plain_forward(token_ids)
        first = int(plain.logits[0, -1].argmax())
        ttft_cold_s = time.perf_counter() - started
        uncached = self._plain_decode(first, plain.past_key_values)
        cached_logits = torch.cat(logits)
        reference = self._plain_forward(token_ids + answer[:-1], keep=cached_logits.shape[0]).logits[0]
        kl, top1 = _compare(reference.float(), cached_logits)
        return {
            "prompt_tokens": len(token_ids),
            "tokens_hit": hit,
            "wire_bytes": counters.loaded_bytes,
            "ttft_cold_s": ttft_cold_s,
            "ttft_warm_s": ttft_warm_s,
            "kl_mean": kl,
            "top1": top1,
            "answer_cached": self._text(answer),
            "answer_uncached": self._text(uncached),
            "kv_values_per_token": 2
            * self._connector.geometry.num_layers
            * self._connector.geometry.num_kv_heads
            * self._connector.geometry.head_dim,
        }

    def _prompt(self) -> tuple[list[int], list[int]]:
        """Tokens up to the end of the document, and of the whole prompt."""
        document = self._document()
        messages = [
            {"role": "system", "content": document},
            {"role": "user", "content": self._job.question},
        ]
        try:
            text = str(
                self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
            end = text.index(document) + len(document)
        except (ValueError, TemplateError) as error:
            raise ValueError(
                f"the model's chat template does not take a document as its system message ({error}); "
                "name another model with --model"
            ) from error
        shared, whole = (
            self._tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text[:end], text)
        )
        return shared, whole

    def _document(self) -> str:
        """The paragraphs that fit `document_tokens`, or as much as fits of the first."""
        encoded = self._tokenizer(
            self._job.document, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        spans = encoded["offset_mapping"]
        if len(spans) <= self._job.document_tokens:
            return self._job.document
        text = self._job.document[: spans[self._job.document_tokens - 1][1]]
        whole_paragraphs, _, _ = text.rpartition("\n\n")
        return (whole_paragraphs or text).strip()

    def _prefill(self, token_ids: list[int], cache: TQCache, last_only: bool = False) -> torch.Tensor:
        total = len(token_ids)
        self._emit("progress", task="prefill", done=cache.get_seq_length(), total=total)
        return self._connector.prefill(
            token_ids,
            cache,
            last_only=last_only,
            on_chunk=lambda done: self._emit("progress", task="prefill", done=done, total=total),
        )

    def _decode(self, logits: list[torch.Tensor], cache: TQCache) -> list[int]:
        """Greedy answer on compressed pages; appends the logits of every step."""
        tokens = [int(logits[-1][-1].argmax())]
        with torch.inference_mode():
            while tokens[-1] != self._tokenizer.eos_token_id and len(tokens) < self._job.max_new_tokens:
                step = self._model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache)
                logits.append(step.logits[0].float())
                tokens.append(int(logits[-1][-1].argmax()))
                self._emit("progress", task="decode", done=len(tokens), total=self._job.max_new_tokens)
        return tokens

    def _plain_forward(self, token_ids: list[int], keep: int = 1) -> Any:
        """One uncompressed pass over all tokens; what an engine without any cache does."""
        with torch.inference_mode():
            return self._model(input_ids=torch.tensor([token_ids]), use_cache=True, logits_to_keep=keep)

    def _plain_decode(self, first: int, past: Any) -> list[int]:
        tokens = [first]
        with torch.inference_mode():
            while tokens[-1] != self._tokenizer.eos_token_id and len(tokens) < self._job.max_new_tokens:
                step = self._model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=past)
                tokens.append(int(step.logits[0, -1].argmax()))
                self._emit(
                    "progress", task="decode uncached", done=len(tokens), total=self._job.max_new_tokens
                )
        return tokens

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def _emit(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._events, flush=True)


def _compare(reference: torch.Tensor, logits: torch.Tensor) -> tuple[float, float]:
    """Mean KL(reference || logits) in nats, and the share of positions with the same best token."""
    expected, got = reference.log_softmax(-1), logits.log_softmax(-1)
    kl = (expected.exp() * (expected - got)).sum(-1).mean()
    top1 = (expected.argmax(-1) == got.argmax(-1)).float().mean()
    return float(kl), float(top1)


def main() -> int:
    """Run the job on stdin; an expected failure is an event with its sentence and exit status 1."""
    events = sys.stdout
    transformers_logging.disable_progress_bar()
    sys.stdout = sys.stderr  # whatever a library prints must not mix with events
    job = Job(**json.load(sys.stdin))
    try:
        with StoreClient(job.server) as client:
            Replica(job, client, events).run()
    except KeyboardInterrupt:
        return 130
    except (TQStoreError, ValueError, OSError) as error:  # OSError: what transformers says of a bad folder
        print(json.dumps({"event": "error", "text": str(error)}), file=events, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
