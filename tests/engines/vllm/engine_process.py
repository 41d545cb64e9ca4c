"""A real vLLM on a CPU in a process of its own, which does what it is told line by line.

Usage: python -m engines.vllm.engine_process CONFIG.json, then JSON lines on stdin; one answer a line.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's core is in this process and can be stepped

from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.request import RequestStatus

from tq_connectors.vllm.kv_connector import TQStoreConnector

LONGEST_S = 120.0
PAUSE_S = 0.001


class SteppedEngine:
    """vLLM, a step at a time."""

    def __init__(self, config: dict[str, Any]) -> None:
        defaults = {
            "dtype": "bfloat16",
            "max_model_len": 1024,
            "enforce_eager": True,
            "block_size": 64,
            "enable_prefix_caching": True,
            "prefix_caching_hash_algo": "sha256_cbor",
            "seed": 0,
            "max_num_seqs": 64,
            "num_gpu_blocks_override": 200,
            "disable_log_stats": False,
        }
        self._llm = LLM(**(defaults | config))
        self._engine = self._llm.llm_engine
        self._core = self._engine.engine_core.engine_core
        self._number = 0
        self._preempted = 0
        self._is_idle = False
        schedule = self._core.scheduler.schedule

        def counted(*arguments: Any, **options: Any) -> Any:
            output = schedule(*arguments, **options)
            self._preempted += len(output.preempted_req_ids or ())
            self._is_idle = not output.total_num_scheduled_tokens
            return output

        self._core.scheduler.schedule = counted

    def run(
        self, prompts: list[list[int]], max_tokens: int, logprobs: int = 0, abort_when: str = ""
    ) -> dict[str, Any]:
        """Answer prompts, all at once; or give them up when one of them has come so far."""
        limits = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs or None,
        )
        order = []
        started = time.monotonic()
        for prompt in prompts:
            self._number += 1
            order.append(str(self._number))
            self._engine.add_request(order[-1], {"prompt_token_ids": prompt}, limits)
        answers: dict[str, dict[str, Any]] = {}
        first: dict[str, float] = {}
        steps = 0
        while self._engine.has_unfinished_requests():
            for output in self._step(started):
                (answer,) = output.outputs
                if answer.token_ids:
                    first.setdefault(output.request_id, time.monotonic() - started)
                if output.finished:
                    answers[output.request_id] = {
                        "tokens": list(answer.token_ids),
                        "cached": output.num_cached_tokens or 0,
                        "first_s": first.get(output.request_id, 0.0),
                        "logprobs": [
                            {str(token): found.logprob for token, found in position.items()}
                            for position in answer.logprobs or ()
                        ],
                    }
            steps += 1
            if abort_when and self._has_come_to(abort_when, first):
                self._engine.abort_request(order)
        return {"answers": [answers.get(name) for name in order], "steps": steps}

    def settle(self) -> dict[str, Any]:
        """Step until nothing is on its way to the store."""
        started = time.monotonic()
        while self._core.scheduler.has_requests():
            self._step(started)
        if has_kv_transfer_group() and isinstance(connector := get_kv_transfer_group(), TQStoreConnector):
            assert connector._worker._cache.saves.flush(LONGEST_S)
        return {}

    def reset(self, connector: bool) -> dict[str, Any]:
        """Forget the blocks on the device, and with `connector` those in host memory."""
        return {"done": self._llm.reset_prefix_cache(reset_connector=connector)}

    def preemptions(self) -> dict[str, Any]:
        """Requests that had to give up their blocks so far."""
        return {"count": self._preempted}

    def facts(self) -> dict[str, Any]:
        """What the engine counts of itself."""
        scheduler = self._core.scheduler
        return {
            "free_blocks": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            "requests": len(scheduler.requests),
        }

    def _step(self, started: float) -> list[Any]:
        """As vLLM's own loop does it: where nothing is computed, threads of connectors get their turn."""
        if time.monotonic() - started > LONGEST_S:
            raise TimeoutError("the engine does not come to an end")
        outputs = self._engine.step()
        if self._is_idle:
            time.sleep(PAUSE_S)
        return outputs

    def _has_come_to(self, stage: str, first: dict[str, float]) -> bool:
        scheduler = self._core.scheduler
        waits = {request.status for request in scheduler.requests.values()}
        return {
            "asked": True,
            "fetching": scheduler.connector.has_pending_push_work(),
            "loading": RequestStatus.WAITING_FOR_REMOTE_KVS in waits,
            "answering": bool(first),
        }[stage]


def main() -> None:
    """Serve until stdin ends."""
    engine = SteppedEngine(json.loads(Path(sys.argv[1]).read_text()))
    answers = os.fdopen(int(sys.argv[2]), "w", buffering=1)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        call = json.loads(line)
        answers.write(json.dumps(getattr(engine, call.pop("do"))(**call)) + "\n")


if __name__ == "__main__":
    main()
