"""One process with LMCache's engine inside: saves or loads a cache of some tokens, and says what came.

Usage: python -m engines.lmcache.engine_process save|load|load-async CONFIG.json
"""

import json
import os
import queue
import sys
from pathlib import Path
from typing import Any

import torch
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.metadata import LMCacheMetadata
from store.running_server import wait_until

LAYERS, HEADS, DIM, CHUNK = 2, 2, 64, 256
TOKENS = list(range(4 * CHUNK))


def cache_of(tokens: int) -> torch.Tensor:
    """Keys and values ``[2, layers, tokens, heads * dim]`` that both processes can make."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(2, LAYERS, tokens, HEADS * DIM, generator=generator).bfloat16()


class CPUConnector(GPUConnectorInterface):
    """The engine's cache is one tensor on the CPU."""

    def __init__(self, cache: torch.Tensor) -> None:
        self._cache = cache

    def to_gpu(self, memory_obj: Any, start: int, end: int, **_: Any) -> None:
        self._cache[:, :, start:end] = memory_obj.tensor

    def from_gpu(self, memory_obj: Any, start: int, end: int, **_: Any) -> None:
        memory_obj.tensor.copy_(self._cache[:, :, start:end])

    def batched_to_gpu(self, memory_objs: Any, starts: Any, ends: Any, **_: Any) -> None:
        for each in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(*each)

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **_: Any) -> None:
        for each in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(*each)

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size((2, LAYERS, num_tokens, HEADS * DIM))


class Scheduler:
    """Whom LMCache tells what a lookup that does not wait has brought into its memory."""

    def __init__(self) -> None:
        self._answers: queue.Queue[tuple[str, int]] = queue.Queue()

    def send_response_to_scheduler(self, lookup_id: str, num_hit_tokens: int) -> None:
        self._answers.put((lookup_id, num_hit_tokens))

    def wait_for(self, lookup_id: str) -> int:
        answered, tokens = self._answers.get(timeout=20)
        assert answered == lookup_id
        return tokens


def main() -> None:
    action, settings = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    config = LMCacheEngineConfig.from_dict(
        {"chunk_size": CHUNK, "local_cpu": False, "max_local_cpu_size": 0.25, "remote_serde": "naive"}
        | {"enable_async_loading": action == "load-async"}
        | settings
    )
    metadata = LMCacheMetadata(
        model_name="org/model",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(LAYERS, 2, CHUNK, HEADS, DIM),
        chunk_size=CHUNK,
    )
    whole = cache_of(len(TOKENS))
    cache = whole.clone() if action == "save" else torch.zeros_like(whole)
    engine = LMCacheEngineBuilder.get_or_create(
        "engine", config, metadata, CPUConnector(cache), lambda tensor, rank: None, lambda item, rank: item
    )
    scheduler = Scheduler()
    engine.post_init(async_lookup_server=scheduler)
    if action == "load-async":
        engine.async_lookup_and_prefetch("request", TOKENS)
        answer: dict[str, Any] = {"found": scheduler.wait_for("request")}
    else:
        answer = {"found": engine.lookup(TOKENS)}
    if action == "save":
        engine.store(torch.tensor(TOKENS))
        wait_until(lambda: engine.lookup(TOKENS) == len(TOKENS))
    elif answer["found"]:  # else a scheduler asks for nothing
        answer["loaded"] = int(engine.retrieve(torch.tensor(TOKENS), req_id="request").sum())
        answer["equal"] = [
            bool(torch.equal(cache[:, :, start : start + CHUNK], whole[:, :, start : start + CHUNK]))
            for start in range(0, len(TOKENS), CHUNK)
        ]
    print("ANSWER " + json.dumps(answer), flush=True)
    os._exit(0)  # closing is LMCache's matter, and with some of its remote connectors it never ends


if __name__ == "__main__":
    main()
