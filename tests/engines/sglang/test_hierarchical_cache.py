"""SGLang's own host tier moves compressed pages and brings them back, with nothing of ours in between."""

import random
from pathlib import Path

from engines.sglang.engine import Engine

PROMPTS, PROMPT, PAGE = 4, 260, 64


def test_pages_come_back_from_the_host_as_they_went(tiny_model: str, tmp_path: Path) -> None:
    """The pool holds two prompts, the host all four: each is found there, and answered as before."""
    arguments = {
        "model_path": tiny_model,
        "load_format": "dummy",
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
    prompts = [[generator.randrange(5, 250) for _ in range(PROMPT)] for _ in range(PROMPTS)]
    engine = Engine(tmp_path / "log", arguments)
    try:
        cold = [engine.generate(prompt, 8) for prompt in prompts]
        assert [answer["cached"] for answer in cold] == [0] * PROMPTS
        for prompt, before in zip(prompts, cold, strict=True):
            again = engine.generate(prompt, 8)
            assert again["host"] == PROMPT // PAGE * PAGE
            assert again["tokens"] == before["tokens"]
    finally:
        engine.stop()
