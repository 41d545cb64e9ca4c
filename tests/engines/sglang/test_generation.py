"""Whole engines: a real model and a tiny one answer from compressed pages, cold and from the radix cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines.sglang.engine import Engine
from engines.tiny_model import VOCABULARY
from tokenizers import Tokenizer

from tq_connectors.hf.models import SMOLLM2, fetch_model

DOCUMENT = Path(__file__).parents[3] / "benchmarks" / "documents" / "constitution.txt"
PAGE = 64
PROMPT = 300


@pytest.fixture(scope="module")
def model() -> Path:
    return fetch_model(SMOLLM2.name)


@pytest.fixture(scope="module")
def tokens(model: Path) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(model / "tokenizer.json")).encode(DOCUMENT.read_text()).ids
    return ids


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Prefill by chunks of one page, so that a token reads the same pages whether its prefix was found."""
    arguments = {
        "model_path": str(model),
        "kv_cache_dtype": "tq4",
        "page_size": None,
        "attention_backend": None,
        "chunked_prefill_size": PAGE,
        "enable_mixed_chunk": True,
        "disable_overlap_schedule": False,
        "max_total_tokens": 4096,
    }
    running = Engine(tmp_path_factory.mktemp("engine") / "log", arguments)
    yield running
    running.stop()


def test_the_engine_says_what_it_runs_on(engine: Engine) -> None:
    assert "tq-store: all 6 hooks took" in engine.log
    assert "4096 tokens in pages of 64, 210 bytes a token and layer" in engine.log


def test_a_radix_hit_answers_as_the_cold_run(engine: Engine, tokens: list[int]) -> None:
    engine.flush()
    cold = engine.generate(tokens[:PROMPT], 12)
    hit = engine.generate(tokens[:PROMPT], 12)
    assert (cold["cached"], hit["cached"]) == (0, PROMPT // PAGE * PAGE)
    assert hit["tokens"] == cold["tokens"]
    engine.flush()
    again = engine.generate(tokens[:PROMPT], 12)
    assert again["cached"] == 0
    assert again["tokens"] == cold["tokens"]


def test_an_answer_makes_sense(engine: Engine, model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    answer = engine.generate(tokenizer.encode(question).ids, 12)
    assert "Paris" in tokenizer.decode(answer["tokens"])


def test_a_batch_answers_as_its_prompts_alone(engine: Engine, tokens: list[int]) -> None:
    """Chunks of one prompt share passes with decodes of another; one grows over the end of a page."""
    engine.flush()
    prompts = [tokens[:60], tokens[100:240], tokens[400:465]]
    together = engine.generate(prompts, 8)
    for prompt, answer in zip(prompts, together, strict=True):
        engine.flush()
        alone = engine.generate(prompt, 8)
        assert answer["tokens"][:4] == alone["tokens"][:4]


def test_pages_of_128_tokens(tiny_model: str, tmp_path: Path, tokens: list[int]) -> None:
    arguments = {
        "model_path": tiny_model,
        "kv_cache_dtype": "k8v4",
        "page_size": 128,
        "attention_backend": None,
        "chunked_prefill_size": 128,
    }
    engine = Engine(tmp_path / "log", arguments)
    try:
        prompt = [token % VOCABULARY for token in tokens[:PROMPT]]
        cold = engine.generate(prompt, 8)
        hit = engine.generate(prompt, 8)
        assert (cold["cached"], hit["cached"]) == (0, 256)
        assert hit["tokens"] == cold["tokens"]
    finally:
        engine.stop()


@pytest.mark.timeout(600)  # two engines start one after the other
def test_two_ranks_answer_as_one(tiny_model: str, tmp_path: Path, tokens: list[int]) -> None:
    """Each holds the pages of its KV head."""
    prompt = [token % VOCABULARY for token in tokens[:PROMPT]]
    answers = []
    for ranks in (1, 2):
        arguments = {
            "model_path": tiny_model,
            "kv_cache_dtype": "tq4",
            "page_size": None,
            "attention_backend": None,
            "chunked_prefill_size": PAGE,
            "tp_size": ranks,
        }
        log = tmp_path / f"log{ranks}"
        engine = Engine(log, arguments, {"SGLANG_CPU_OMP_THREADS_BIND": "|".join("01"[:ranks])})
        try:
            answers += [engine.generate(prompt, 8) for _ in range(2)]
        finally:
            engine.stop()
        assert f"{76 // ranks} bytes a token and layer" in engine.log
    assert [answer["cached"] for answer in answers] == [0, 256, 0, 256]
    assert len({tuple(answer["tokens"]) for answer in answers}) == 1
