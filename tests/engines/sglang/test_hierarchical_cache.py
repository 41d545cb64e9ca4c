"""SGLang's own host tier moves compressed pages and brings them back, with nothing of ours in between."""

import random
from pathlib import Path

from engines.sglang.engine import Engine
from engines.sglang.tiny_model import VOCABULARY

PROMPTS, PROMPT, PAGE = 4, 260, 64


def test_pages_come_back_from_the_host_as_they_went(tiny_model: str, tmp_path: Path) -> None:
    """The pool holds two prompts, the host all four: each is found there, twice, and answered alike.

    A cold run read its first tokens raw, which the host does not keep; so answers begin alike.
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
    prompts = [[generator.randrange(5, VOCABULARY) for _ in range(PROMPT)] for _ in range(PROMPTS)]
    engine = Engine(tmp_path / "log", arguments)
    try:
        cold, once, twice = ([engine.generate(prompt, 8) for prompt in prompts] for _ in range(3))
        assert [answer["cached"] for answer in cold] == [0] * PROMPTS
        for before, first, second in zip(cold, once, twice, strict=True):
            assert first["host"] == second["host"] == PROMPT // PAGE * PAGE
            assert first["tokens"] == second["tokens"]
            assert first["tokens"][:2] == before["tokens"][:2]
    finally:
        engine.stop()
