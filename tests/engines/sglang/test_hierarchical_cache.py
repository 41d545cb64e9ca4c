"""SGLang's own host tier moves compressed pages and brings them back, with nothing of ours in between."""

import random
from pathlib import Path

from engines.sglang.engine import Engine
from engines.tiny_model import VOCABULARY

PROMPTS, PROMPT, PAGE = 4, 260, 64
OTHERS = 12
"""Sequences that begin after a prompt, more than have their first tokens raw at once."""


def test_pages_come_back_from_the_host_as_they_went(tiny_model: str, tmp_path: Path) -> None:
    """The pool holds two prompts, the host all four: each is found there twice and answered as on the device.

    The host does not keep a prompt's first tokens raw; so they are displaced before the device is asked.
    """
    arguments = {
        "model_path": tiny_model,
        "kv_cache_dtype": "tq4",
        "page_size": None,
        "attention_backend": None,
        "chunked_prefill_size": PAGE,
        "max_total_tokens": 768,
        "enable_hierarchical_cache": True,
        "hicache_ratio": 4.0,
        "hicache_io_backend": "direct",
        "hicache_mem_layout": "page_first_direct",
        "hicache_write_policy": "write_through",
    }
    generator = random.Random(1)

    def prompt_of(num_tokens: int) -> list[int]:
        return [generator.randrange(5, VOCABULARY) for _ in range(num_tokens)]

    prompts = [prompt_of(PROMPT) for _ in range(PROMPTS)]
    found = PROMPT // PAGE * PAGE
    engine = Engine(tmp_path / "log", arguments)
    try:
        on_device = []
        for prompt in prompts:
            assert engine.generate(prompt, 8)["cached"] == 0
            engine.generate([prompt_of(PAGE // 4) for _ in range(OTHERS)], 1)
            on_device.append(engine.generate(prompt, 8))
            assert (on_device[-1]["cached"], on_device[-1]["host"]) == (found, 0)
        once, twice = ([engine.generate(prompt, 8) for prompt in prompts] for _ in range(2))
        for before, first, second in zip(on_device, once, twice, strict=True):
            assert first["host"] == second["host"] == found
            assert first["tokens"] == second["tokens"] == before["tokens"]
    finally:
        engine.stop()
