"""The memory backend: the contract, and that it copies nothing."""

import pytest
from store.backend_contract import BudgetContract
from store.sample_blocks import sample_block

from tq_store.backends.memory import MemoryBackend
from tq_store.errors import ConfigError


class TestContract(BudgetContract):
    @pytest.fixture
    def backend(self) -> MemoryBackend:
        return MemoryBackend(budget_bytes=64 << 20)

    @pytest.fixture
    def small_backend(self) -> MemoryBackend:
        return MemoryBackend(budget_bytes=64 << 10)


async def test_get_hands_out_the_buffer_that_was_put() -> None:
    backend = MemoryBackend(budget_bytes=1 << 20)
    key, block = sample_block(1)
    await backend.put([(key, block)])
    assert (await backend.get([key]))[0] is block


async def test_its_name_can_be_chosen() -> None:
    assert MemoryBackend(budget_bytes=1).name == "memory"
    assert MemoryBackend(budget_bytes=1, name="near").name == "near"


@pytest.mark.parametrize("budget_bytes", [0, -1])
def test_a_budget_below_one_is_a_mistake(budget_bytes: int) -> None:
    with pytest.raises(
        ConfigError, match=f"budget_bytes of the memory tier must be at least 1, not {budget_bytes}"
    ):
        MemoryBackend(budget_bytes=budget_bytes)
