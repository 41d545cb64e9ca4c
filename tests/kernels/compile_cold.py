"""Compiles the kernel that reads cold pages for sm_90, without a GPU, and prints what it takes as JSON."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_for

from tq_kernels.cold_layout import LANES
from tq_kernels.device.read_cold import read_cold_sections

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
FIXED = {"PAGE_TOKENS": 128, "HEAD_DIM": 128, "LANES": LANES, "SECTIONS": 4}


def main() -> None:
    """Registers, bytes of stack and of shared memory, and barriers."""
    kinds = dict.fromkeys(FIXED, "constexpr") | {"p_words": "*i16"}
    names = read_cold_sections.arg_names
    signature = {name: kinds.get(name, "*i32" if name.startswith("p_") else "i32") for name in names}
    source = ASTSource(read_cold_sections, signature, FIXED, {})
    kernel = compile_for(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    found["instructions"] = len(re.findall(r"/\*[0-9a-f]{4,}\*/ ", sass))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
