"""What is compiled ahead is not launched, but there for who launches it; for a card that is not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

_COMPILE = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tq_kernels import PageLayout, _launch, preset
from tq_kernels.compiled import compile_ahead


class Hopper:
    is_active = staticmethod(lambda: True)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


driver.set_active(Hopper())
layout = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=1, page_tokens=64)


def prepare(heads):
    prepared = torch.zeros(1, 1, 8, 64, dtype=torch.float16)
    query = torch.ones(1, 1, heads, 64, dtype=torch.bfloat16)
    _launch.launch_prepare(query=query, key_balance=None, prepared=prepared, layout=layout, factor=1.0)
    return prepared


def launches():
    for heads in (1, 2, 2, 4):
        assert not prepare(heads).any()  # nothing ran


def kernels():
    return list(_launch.prepare_query.device_caches[0][0].values())


assert not kernels()
compile_ahead(launches)
print(json.dumps([[kernel.metadata.name, "cubin" in kernel.asm] for kernel in kernels()]))


compile_ahead(launches)  # known now, and launched no more than before
"""


def test_kernels_are_compiled_and_none_is_launched(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout) == [["prepare_query", True]] * 3
