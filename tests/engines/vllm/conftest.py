"""Engines that the tests share: two in each way of reaching the store, and one that has another preset."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

warnings.simplefilter("ignore")  # vLLM's and its dependencies' own

from engines.vllm.processes import Engine  # noqa: E402
from engines.vllm.releases import HAS_DRAFTS, HAS_OFFLOADING, HAS_PAGES  # noqa: E402
from engines.vllm.store_process import StoreOnDisk  # noqa: E402
from engines.vllm.valve import Valve  # noqa: E402

from tq_connectors.hf.models import SMOLLM2, fetch_model  # noqa: E402

ROOT = Path(__file__).parents[3]
BLOCK_TOKENS, PAGE_TOKENS, OFFLOADED_TOKENS = 32, 64, 128
BLOCKS = {"block_size": BLOCK_TOKENS, "num_gpu_blocks_override": 400}
READER_BLOCKS = 96
TIMEOUTS = {"connect_timeout": "5s", "lookup_timeout": "10s", "transfer_timeout": "15s"}


collect_ignore = []
if not HAS_OFFLOADING:
    collect_ignore += ["test_tier.py"]
if not HAS_PAGES:
    collect_ignore += ["test_pages.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what wants something of vLLM's that this release does not have."""
    wanted = {"[offloading]": HAS_OFFLOADING, "test_drafts_": HAS_DRAFTS}
    missing = [name for name, is_there in wanted.items() if not is_there]
    left_out = [item for item in items if any(name in item.name for name in missing)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")


@dataclass(frozen=True)
class Pair:
    """Two engines on one store: one that saves, and one that loads through a valve.

    Args:
        is_exact: Whether pages are as the model made them, so that a hit changes no number.
        unit: Tokens that are found together.
        free_blocks: Of the reader when it has nothing to do.
    """

    writer: Engine
    reader: Engine
    is_exact: bool
    unit: int
    free_blocks: int

    def findable(self, num_tokens: int) -> int:
        """Tokens of a prompt that can be found; one is always left to compute."""
        return (num_tokens - 1) // self.unit * self.unit


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreOnDisk]:
    made = StoreOnDisk(tmp_path_factory.mktemp("store"))
    yield made
    made.kill()


@pytest.fixture(autouse=True)
def nothing_left_broken(store: StoreOnDisk, valve: Valve) -> Iterator[None]:
    """One test that fails shall not fail the next."""
    yield
    valve.open()
    store.start()


@pytest.fixture(scope="session")
def valve(store: StoreOnDisk) -> Iterator[Valve]:
    with Valve(store.ports) as made:
        yield made


def offloading(address: str, **settings: Any) -> dict[str, Any]:
    """vLLM's offloading framework with our spec, worker and tier."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "TQOffloadingSpec",
            "cpu_bytes_to_use": 128 << 20,
            "block_size": OFFLOADED_TOKENS,
            "tq_store": {"revision": "r", "address": address, **TIMEOUTS, **settings},
        },
    }


def connecting(address: str, **settings: Any) -> dict[str, Any]:
    """Our own connector."""
    return {
        "kv_connector": "TQStoreConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"revision": "r", "address": address, **TIMEOUTS, **settings},
    }


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Starts engines in the background, and ends them when all tests are done."""
    engines: list[Engine] = []

    def start(transfer: dict[str, Any], **options: Any) -> Engine:
        config = {"kv_transfer_config": transfer, **options}
        if "model" not in config:
            config["model"] = str(fetch_model(SMOLLM2.name))
        engines.append(Engine(tmp_path_factory.mktemp("engine"), config))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="session", params=["offloading", "connector"])
def pair(
    request: pytest.FixtureRequest,
    store: StoreOnDisk,
    valve: Valve,
    start_engine: Callable[..., Engine],
) -> Pair:
    """Packed pages in four bits through vLLM's tiers, and bf16 in our pages through our own connector."""
    is_exact = request.param == "connector"
    transfer, preset = (connecting, "raw") if is_exact else (offloading, "tq4")
    writer = start_engine(transfer(store.address, preset=preset), **BLOCKS)
    reader = start_engine(
        transfer(valve.address, preset=preset), **BLOCKS | {"num_gpu_blocks_override": READER_BLOCKS}
    )
    unit = PAGE_TOKENS if is_exact else OFFLOADED_TOKENS
    return Pair(writer, reader, is_exact, unit, READER_BLOCKS - 1)


@pytest.fixture(scope="session")
def text() -> list[int]:
    """The Constitution of the United States, in tokens of the model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetch_model(SMOLLM2.name))
    return tokenizer((ROOT / "benchmarks/documents/constitution.txt").read_text())["input_ids"]


@pytest.fixture(scope="session")
def fresh(text: list[int]) -> Callable[..., list[int]]:
    """A prompt of so many tokens that no test has had before."""
    taken = iter(range(0, 100_000, 61))

    def prompt(num_tokens: int = 300) -> list[int]:
        start = next(taken) % (len(text) - num_tokens)
        return text[start : start + num_tokens]

    return prompt
