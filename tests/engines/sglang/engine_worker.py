"""An SGLang engine on the CPU, in a process of its own: a JSON request a line in, a JSON answer a line out.

Usage: python engine_worker.py JSON, the arguments of `sglang.Engine`.
"""

import json
import os
import sys
from typing import Any

import engines.sglang.cpu
import engines.sglang.cpu_host_pools  # noqa: F401
import sglang

ARGUMENTS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "skip_tokenizer_init": True,
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "skip_server_warmup": True,
    "max_total_tokens": 2048,
    "max_running_requests": 4,
    "random_seed": 1,
    "dtype": "float32",
    "page_size": 16,
    "log_level": "info",
    "enable_cache_report": True,
}


def answer(engine: Any, request: dict[str, Any]) -> Any:
    if request["do"] == "flush":
        return engine.flush_cache().success
    sampling = {"temperature": 0, "max_new_tokens": request["num_new"], "ignore_eos": True}
    made = engine.generate(input_ids=request["tokens"], sampling_params=sampling)
    return [described(each) for each in made] if isinstance(made, list) else described(made)


def described(made: dict[str, Any]) -> dict[str, Any]:
    details = made["meta_info"].get("cached_tokens_details") or {}
    return {
        "tokens": made["output_ids"],
        "cached": made["meta_info"]["cached_tokens"],
        "storage": details.get("storage", 0),
        "host": details.get("host", 0),
        "details": details,
    }


def main() -> None:
    arguments = ARGUMENTS | json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what SGLang prints is a log
    engine = sglang.Engine(**arguments)
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=out, flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
