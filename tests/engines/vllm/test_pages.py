"""A real vLLM whose KV pool holds compressed pages, by `kv_cache_dtype` alone: a real model's answers."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from engines.vllm.conftest import connecting, offloading
from engines.vllm.processes import Engine
from engines.vllm.store_process import StoreOnDisk

PAGES = {"kv_cache_dtype": "tq4", "block_size": 64, "max_num_batched_tokens": 256}
"""Prompts come in chunks of up to four pages: longer ones have a prefix in pages even when cold."""
FAR = 0.5
"""Nats that a token's log-probability may differ by between pages and bf16."""
CLOSE = 0.25
"""Nats between tokens that may change places when sums are taken in another order."""


@pytest.fixture(scope="module")
def pages(start_engine: Callable[..., Engine]) -> Engine:
    return start_engine(None, **PAGES, max_num_seqs=8)


@pytest.fixture(scope="module")
def plain(start_engine: Callable[..., Engine]) -> Engine:
    return start_engine(None, kv_cache_dtype="auto", max_num_seqs=8)


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def departs_at(answer: dict[str, Any], other: list[int]) -> tuple[int, float]:
    """Where other tokens part from an answer, and by how many nats the answer was for its own."""
    for place, (token, instead) in enumerate(zip(answer["tokens"], other, strict=True)):
        if token != instead:
            known = answer["logprobs"][place]
            return place, known[str(token)] - known.get(str(instead), float("-inf"))
    return len(other), 0.0


def test_a_prefix_hit_answers_as_the_cold_run_did(pages, fresh):
    prompt = fresh(300)  # cold, the last 44 tokens are computed after 256 in pages, as they are after a hit
    (cold,) = pages.run([prompt], 12)
    (hit,) = pages.run([prompt], 12)
    assert (cold["cached"], hit["cached"]) == (0, 256)
    assert hit["tokens"] == cold["tokens"]
    pages("reset", connector=False)
    (again,) = pages.run([prompt], 12)
    assert again["cached"] == 0
    assert again["tokens"] == cold["tokens"]


def test_prompts_that_hit_and_prompts_that_do_not_are_answered_beside_each_other(pages, fresh):
    known, other = fresh(200), fresh(60)
    prompts = [[*known[:128], *other[:40]], other, fresh(20), known]
    pages.run([known], 1)
    alone = [answer for prompt in prompts for answer in pages.run([prompt], 6)]
    pages("reset", connector=False)
    pages.run([known], 1)
    together = pages.run(prompts, 6)
    assert [answer["cached"] for answer in together] == [128, 0, 0, 192]
    assert tokens(together) == tokens(alone)


def test_a_prefix_that_is_computed_in_the_same_step_is_found(pages, fresh):
    prompt = fresh(129)  # the last token opens a page, and the page before is another sequence's of this step
    answers = pages.run([prompt] * 3, 8)
    assert [answer["cached"] for answer in answers] == [0, 128, 128]
    assert answers[1]["tokens"] == answers[2]["tokens"]
    assert answers[1]["tokens"][0] == answers[0]["tokens"][0]


@pytest.mark.parametrize("through", [offloading, connecting])
def test_pages_go_to_another_process_through_the_store_as_they_are(
    through: Callable[..., dict[str, Any]],
    start_engine: Callable[..., Engine],
    store: StoreOnDisk,
    fresh: Any,
):
    transfer = through(store.address, salt=through.__name__)
    writer, reader = (start_engine(transfer, **PAGES, max_num_seqs=4) for _ in range(2))
    prompt = fresh(300)
    (cold,) = writer.run([prompt], 8)
    writer("settle")
    # more sequences than have their first tokens raw: those of the prompt are then read from its first page,
    # as they are by who has that page from the store
    for _ in range(4):
        writer.run([fresh(20) for _ in range(4)], 1)
    (known,) = writer.run([prompt], 8)
    (found,) = reader.run([prompt], 8)
    assert [each["cached"] for each in (cold, known, found)] == [0, 256, 256]
    assert found["tokens"] == known["tokens"]


def test_answers_are_likely_to_the_same_model_in_bf16(pages, plain, text, fresh):
    fresh(250)  # its turn; the prompt is one whichever tests ran before, as it decides how long answers agree
    prompt = text[2379:2629]
    (answer,) = pages.run([prompt], 8, logprobs=1)
    (judged,) = plain.run([prompt], 8, logprobs=20)
    assert answer["tokens"][0] == judged["tokens"][0]
    agree = 0
    for place, token in enumerate(answer["tokens"]):
        if token != judged["tokens"][place]:
            break
        agree += 1
        gap = answer["logprobs"][place][str(token)] - judged["logprobs"][place][str(token)]
        assert abs(gap) < FAR
    assert agree >= 4


def test_sequences_that_lose_their_pages_come_to_their_end(start_engine, pages, fresh):
    prompts = [fresh(180) for _ in range(4)]
    pages("reset", connector=False)  # cold in both engines, whatever other tests asked of the first
    expected = pages.run(prompts, 60)
    crowded = start_engine(
        None,
        **PAGES,
        max_num_seqs=4,
        max_model_len=320,
        num_gpu_blocks_override=14,
    )
    answers = crowded.run(prompts, 60)
    assert crowded("preemptions")["count"] > 0
    for answer, want in zip(answers, expected, strict=True):
        assert len(answer["tokens"]) == 60
        # what is computed anew is attended to raw: a close call may fall the other way, but not all of them
        assert answer["tokens"][:6] == want["tokens"][:6]


def test_drafts_change_nothing_but_the_number_of_steps(start_engine, pages, fresh):
    again = fresh(90)
    prompt = [*again, *again[:60]]  # what follows was there before, so that drafts are right at times
    drafting = start_engine(
        None,
        **PAGES,
        max_num_seqs=4,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    )
    plain = pages("run", prompts=[prompt], max_tokens=24, logprobs=20)
    drafted = drafting("run", prompts=[prompt], max_tokens=24)
    assert drafted["steps"] < plain["steps"]
    ((answer,), (other,)) = plain["answers"], drafted["answers"]
    place, nats = departs_at(answer, other["tokens"])
    assert place > 4
    assert nats < CLOSE


def test_the_command_line_knows_the_names():
    parse = (
        "from vllm.engine.arg_utils import AsyncEngineArgs; "
        "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
        "parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()); "
        "words = '--model m --kv-cache-dtype k3v2 --attention-backend TQ'.split(); "
        "found = parser.parse_args(words); "
        "print(found.kv_cache_dtype, found.attention_backend)"
    )
    done = subprocess.run([sys.executable, "-c", parse], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "k3v2 TQ"
