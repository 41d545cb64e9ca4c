"""An SGLang engine on the CPU, in a process of its own: a JSON request a line in, a JSON answer a line out.

Usage: python replica_worker.py JSON, the arguments of `sglang.Engine`.
"""

import json
import os
import sys
from typing import Any

import engines.sglang.cpu
import engines.sglang.cpu_host_pools  # noqa: F401  both are imported first in every process of the engine
import sglang
from engines.sglang.engine_worker import ARGUMENTS


def generate(engine: Any, tokens: list[int], num_new: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": num_new, "ignore_eos": True}
    made = engine.generate(input_ids=tokens, sampling_params=sampling)
    details = made["meta_info"].get("cached_tokens_details") or {}
    return {
        "tokens": made["output_ids"],
        "cached": made["meta_info"]["cached_tokens"],
        "storage": details.get("storage", 0),
    }


def control(engine: Any, name: str, **arguments: Any) -> dict[str, Any]:
    """A call of SGLang's own for operators, as its HTTP server makes it."""
    answer = engine.loop.run_until_complete(getattr(engine.tokenizer_manager, name)(**arguments))
    return {"success": answer.success, "message": getattr(answer, "message", "")}


def main() -> None:
    arguments = ARGUMENTS | json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what SGLang prints is a log
    engine = sglang.Engine(**arguments)
    calls = {"generate": generate, "control": control}
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(calls[name](engine, **arguments)), file=out, flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
