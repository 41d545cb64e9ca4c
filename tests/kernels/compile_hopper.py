"""Compiles the Hopper kernels for sm_90, without a GPU, and prints what came out: a JSON line a case."""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_for
from triton.experimental.gluon._runtime import GluonASTSource

from tq_kernels import PageLayout, hopper, hopper_quantize, preset
from tq_kernels.device.hopper_append import append_tokens
from tq_kernels.device.hopper_columns import merge_columns, prepare_columns
from tq_kernels.device.hopper_decode import attend_split
from tq_kernels.device.hopper_quantize import quantize_windows
from tq_kernels.hopper_launch import append_constants

SPLITS = [
    ("tq4", 128, 128, 1, 4),
    ("tq4", 128, 128, 1, 4, hopper.MOST_REGISTERS),
    ("tq3", 64, 64, 1, 7),
    ("tq3", 128, 128, 1, 4),
    ("tq2", 128, 64, 1, 4),
    ("k8v4", 64, 128, 4, 4),
    ("tq4", 256, 128, 1, 4),
]
APPENDS = [("tq4", 128), ("tq3", 64), ("k3v2", 256)]
QUANTIZES = [
    (64, 64, "step"),
    (64, 128, "step"),
    (128, 64, "step"),
    (128, 128, "step"),
    (64, 128, "balanced"),
    (128, 128, "balanced"),
    (128, 128, "layers"),
]
LEFT_OUT = {
    "step": ("p_balance", "p_sources", "p_key_layers", "p_value_layers"),
    "balanced": ("p_sources", "p_key_layers", "p_value_layers"),
    "layers": ("p_balance", "p_seeds", "p_sink_slots", "p_sink_keys", "p_sink_values"),
}
"""Arguments that a launch of many tokens has none of."""
HEAD_DIMS = [64, 128, 256]
POINTERS = {
    "p_query": "*bf16",
    "p_keys": "*bf16",
    "p_values": "*bf16",
    "p_slots": "*i64",
    "p_sources": "*i64",
    "p_key_layers": "*i64",
    "p_value_layers": "*i64",
    "p_rotation": "*bf16",
    "p_seeds": "*i32",
    "p_sink_slots": "*i32",
    "p_pages": "*u8",
    "p_table": "*i32",
    "p_lengths": "*i32",
    "p_positions": "*i32",
    "p_balance": "*fp32",
    "p_signs": "*fp32",
    "p_cells": "*i32",
    "p_prepared": "*fp16",
    "p_partial": "*fp32",
    "p_partial_lse": "*fp32",
    "p_sink_keys": "*bf16",
    "p_sink_values": "*bf16",
    "p_sink_rows": "*i32",
    "p_out": "*bf16",
    "p_lse": "*fp32",
}
FLOATS = ("cap_log2", "factor", "score_factor")
STRIDES = ("table_stride", "page_stride", "query_seq_stride", "query_row_stride", "query_head_stride")
COUNTED = ("HMMA", "MOVM", "F2FP", "PRMT", "LDS", "STS", "BAR", "SHFL")
CAPABILITY, PTX_VERSION = 90, 86
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _split(
    name: str, head_dim: int, page_tokens: int, rows: int, group: int, limit: int | None = None
) -> dict[str, object]:
    layout = PageLayout(spec=preset(name), head_dim=head_dim, num_kv_heads=2, page_tokens=page_tokens)
    padded = max(8, 1 << (rows * group - 1).bit_length())
    raw = hopper.rotates_queries(layout, padded)
    fixed = hopper.constants(
        layout,
        rows=rows,
        group=group,
        padded=padded,
        tile_columns=hopper.columns_of_a_program(padded),
        window=False,
        softcap=False,
        raw=raw,
    )
    case = f"{name} {head_dim} {page_tokens} {rows}x{group}" + (f" {limit}" if limit else "")
    types = POINTERS | {"p_query": "*bf16" if raw else "*fp16", "p_out": "*fp32"}
    return _report(
        case,
        attend_split,
        fixed,
        types,
        num_warps=1,
        max_registers=limit or hopper.max_registers(layout, padded),
    )


def _columns(head_dim: int) -> list[dict[str, object]]:
    """Launches before and after the split, with everything optional switched on."""
    shape = {"GROUP": 4, "D": head_dim}
    before = shape | {"COLUMNS": 8, "PADDED": 8, "R": 4}
    after = shape | {"W": 4, "U": 8, "SINKS": 4, "WINDOW": True, "SOFTCAP": True}
    return [
        _report(f"prepare {head_dim}", prepare_columns, before, POINTERS, num_warps=4),
        _report(f"merge {head_dim}", merge_columns, after, POINTERS, num_warps=4),
    ]


def _append(name: str, head_dim: int) -> dict[str, object]:
    """A token into its page, with everything optional switched on."""
    layout = PageLayout(spec=preset(name), head_dim=head_dim, num_kv_heads=2, page_tokens=64)
    return _report(
        f"append {name} {head_dim}", append_tokens, append_constants(layout), POINTERS, num_warps=1
    )


def _quantize(page_tokens: int, head_dim: int, kind: str) -> dict[str, object]:
    """Many tokens into their pages."""
    layout = PageLayout(spec=preset("tq4"), head_dim=head_dim, num_kv_heads=8, page_tokens=page_tokens)
    fixed = hopper_quantize.constants(layout, 16 if kind == "layers" else 0) | dict.fromkeys(LEFT_OUT[kind])
    case, limit = f"quantize {page_tokens} {head_dim} {kind}", hopper_quantize.max_registers(layout)
    report = _report(
        case, quantize_windows, fixed, POINTERS, num_warps=hopper_quantize.WARPS, max_registers=limit
    )
    told = re.findall(r"add\.u32 t, t, (\d+);", str(fixed["CODE"]))
    return report | {"table_told": [int(each) for each in told]}


def _report(
    case: str,
    function: Any,
    fixed: dict[str, Any],
    types: dict[str, str],
    *,
    num_warps: int,
    max_registers: int | None = None,
) -> dict[str, object]:
    def kind(argument: str) -> str:
        if argument in fixed:
            return "constexpr"
        if argument in FLOATS:
            return "fp32"
        return types.get(argument, "i64" if argument in STRIDES else "i32")

    signature = {argument: kind(argument) for argument in function.arg_names}
    strides = [name for name in signature if name.endswith("_stride") and name != "table_stride"]
    aligned = [name for name, of in signature.items() if of.startswith("*") or name in strides]
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = GluonASTSource(function, signature, fixed, attributes)
    options = {"num_warps": num_warps, "maxnreg": max_registers}
    kernel = compile_for(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _dump("--dump-resource-usage", file.name)
        sass = _dump("--dump-sass", file.name)
    counts = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", sass))
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", resources)}
    return {
        "case": case,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "shared_bytes": usage["SHARED"] + kernel.metadata.shared,
        "first_shared": _shared_offsets(kernel.asm["ttgir"])[:1],
        **{each: counts[each] for each in COUNTED},
        "LDG.128": len(re.findall(r"LDG\.E\.128", sass)),
    }


def _shared_offsets(ttgir: str) -> list[int]:
    """Where the buffers of a kernel begin in shared memory, in the order in which it allocates them."""
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(ttgir)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, CAPABILITY, PTX_VERSION)
    manager.run(module, "shared_offsets")
    return [int(each) for each in re.findall(r"local_alloc .*?allocation\.offset = (\d+)", str(module))]


def _dump(what: str, path: str) -> str:
    run = subprocess.run([CUOBJDUMP, what, path], capture_output=True, text=True, check=True)
    return run.stdout


if __name__ == "__main__":
    columns = [each for head_dim in HEAD_DIMS for each in _columns(head_dim)]
    appends = [_append(*case) for case in APPENDS]
    quantizes = [_quantize(*case) for case in QUANTIZES]
    for report in [*(_split(*case) for case in SPLITS), *columns, *appends, *quantizes]:
        sys.stdout.write(json.dumps(report) + "\n")
