"""Compiles the Hopper split kernel for sm_90, without a GPU, and prints what came out: a JSON line a case."""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_for
from triton.experimental.gluon._runtime import GluonASTSource

from tq_kernels import PageLayout, hopper, preset
from tq_kernels.device.hopper_decode import attend_split

CASES = [("tq4", 128, 128, 1, 4), ("tq3", 64, 64, 1, 7), ("tq2", 128, 64, 1, 4), ("k8v4", 64, 128, 4, 4)]
POINTERS = {
    "p_query": "*fp16",
    "p_pages": "*u8",
    "p_table": "*i32",
    "p_lengths": "*i32",
    "p_positions": "*i32",
    "p_out": "*fp32",
    "p_lse": "*fp32",
}
SCALARS = {
    "table_stride": "i64",
    "page_stride": "i64",
    "num_splits": "i32",
    "num_sinks": "i32",
    "window": "i32",
    "cap_log2": "fp32",
}
ALIGNED = [*POINTERS, "page_stride"]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _report(name: str, head_dim: int, page_tokens: int, rows: int, group: int) -> dict[str, object]:
    layout = PageLayout(spec=preset(name), head_dim=head_dim, num_kv_heads=2, page_tokens=page_tokens)
    padded = max(8, 1 << (rows * group - 1).bit_length())
    fixed = hopper.constants(layout, rows=rows, group=group, padded=padded, window=False, softcap=False)
    signature = {**POINTERS, **SCALARS, **dict.fromkeys(fixed, "constexpr")}
    names = list(signature)
    attributes = {(names.index(each),): [["tt.divisibility", 16]] for each in ALIGNED}
    options = {"num_warps": 1, "maxnreg": hopper.max_registers(layout, padded)}
    source = GluonASTSource(attend_split, signature, fixed, attributes)
    kernel = compile_for(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _dump("--dump-resource-usage", file.name)
        sass = _dump("--dump-sass", file.name)
    counts = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", sass))
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", resources)}
    return {
        "case": f"{name} {head_dim} {page_tokens} {rows}x{group}",
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "shared_bytes": usage["SHARED"],
        **{each: counts[each] for each in ("HMMA", "MOVM", "F2FP", "PRMT", "LDS", "STS", "BAR")},
        "LDG.128": len(re.findall(r"LDG\.E\.128", sass)),
    }


def _dump(what: str, path: str) -> str:
    run = subprocess.run([CUOBJDUMP, what, path], capture_output=True, text=True, check=True)
    return run.stdout


if __name__ == "__main__":
    for case in CASES:
        sys.stdout.write(json.dumps(_report(*case)) + "\n")
