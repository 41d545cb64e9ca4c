"""What importing costs and does, seen from fresh processes."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "triton", "transformers", "numpy", "numba", "vllm", "sglang", "lmcache")


def imported_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import tq_store.client, tq_store.block, tq_store.keys",
        "import tq_store.server.app, tq_store.cli",
        "import tq_kernels",
        "import tq_connectors",
    ],
)
def test_the_store_and_the_sizes_need_no_tensors(statement):
    assert not imported_by(statement).intersection(HEAVY)


def test_loops_for_a_cpu_are_compiled_by_whoever_runs_them():
    assert "numba" not in imported_by("import tq_kernels.host")


def test_the_client_needs_no_server_package():
    loaded = imported_by("import tq_store.client")
    assert not loaded.intersection({"redis", "prometheus_client"})


def test_every_extra_that_is_promised_is_declared():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) == {"kernels", "hf", "vllm", "sglang", "lmcache", "server", "otel", "dev"}


def test_make_help_names_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = {line.split()[0] for line in done.stdout.splitlines()}
    assert targets >= {"setup", "check", "test", "demo", "bench", "fuzz", "format"}
