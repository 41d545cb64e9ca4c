"""What every backend has to do; `test_<backend>.py` runs these against its own."""

import asyncio
import random

import pytest
from store.sample_blocks import (
    NAMESPACE,
    OTHER_NAMESPACE,
    block_bytes,
    bytes_of,
    keys_of,
    sample_block,
    sample_blocks,
    sample_key,
)

from tq_store.backends.base import Backend
from tq_store.errors import BackendUnavailable
from tq_store.results import PutOutcome


class BackendContract:
    """Needs a fixture `backend`: open, empty, with room for at least 64 MiB."""

    async def test_is_a_backend_with_a_name(self, backend: Backend) -> None:
        assert isinstance(backend, Backend)
        assert backend.name.islower()

    async def test_get_returns_the_bytes_that_were_put(self, backend: Backend) -> None:
        blocks = sample_blocks(3)
        assert await backend.put(blocks) == [PutOutcome.STORED] * 3
        assert await backend.get(keys_of(blocks)) == bytes_of(blocks)

    async def test_results_are_positional(self, backend: Backend) -> None:
        blocks = sample_blocks(40)
        await backend.put(blocks[::2])
        order = list(range(40))
        random.Random(1).shuffle(order)
        asked = [blocks[i][0] for i in order]
        assert await backend.contains(asked) == [i % 2 == 0 for i in order]
        assert await backend.get(asked) == [blocks[i][1] if i % 2 == 0 else None for i in order]
        assert await backend.delete(asked) == [i % 2 == 0 for i in order]

    async def test_put_outcomes_are_positional(self, backend: Backend) -> None:
        blocks = sample_blocks(40)
        await backend.put(blocks[::3])
        outcomes = [PutOutcome.STORED if i % 3 else PutOutcome.PRESENT for i in range(40)]
        assert await backend.put(blocks) == outcomes

    async def test_unknown_keys_miss(self, backend: Backend) -> None:
        key = sample_key(1)
        assert await backend.contains([key]) == [False]
        assert await backend.get([key]) == [None]
        assert await backend.delete([key]) == [False]

    async def test_a_key_may_come_twice_in_one_call(self, backend: Backend) -> None:
        key, block = sample_block(1)
        outcomes = await backend.put([(key, block), (key, block)])
        assert sorted(outcomes, key=lambda outcome: outcome.value) == [PutOutcome.STORED, PutOutcome.PRESENT]
        assert await backend.contains([key, key]) == [True, True]
        assert await backend.get([key, sample_key(2), key]) == [block, None, block]

    async def test_the_first_put_of_a_key_stays(self, backend: Backend) -> None:
        key, block = sample_block(1)
        await backend.put([(key, block)])
        assert await backend.put([(key, block + b"x")]) == [PutOutcome.PRESENT]
        assert await backend.get([key]) == [block]

    async def test_empty_batches(self, backend: Backend) -> None:
        assert await backend.contains([]) == []
        assert await backend.get([]) == []
        assert await backend.put([]) == []
        assert await backend.delete([]) == []

    async def test_a_block_of_8_mib(self, backend: Backend) -> None:
        blocks = sample_blocks(3, 8 << 20)
        assert await backend.put(blocks) == [PutOutcome.STORED] * 3
        # not compared in an assert of its own: a failure would print megabytes
        same = [
            got == block
            for got, block in zip(await backend.get(keys_of(blocks)), bytes_of(blocks), strict=True)
        ]
        assert same == [True] * 3

    async def test_a_thousand_blocks_in_one_call(self, backend: Backend) -> None:
        blocks = sample_blocks(1000)
        assert set(await backend.put(blocks)) == {PutOutcome.STORED}
        assert all(await backend.contains(keys_of(blocks)))
        assert await backend.get(keys_of(blocks)) == bytes_of(blocks)

    async def test_of_concurrent_puts_of_one_key_one_stores(self, backend: Backend) -> None:
        for number in range(10):
            key, block = sample_block(number, 100_000)
            outcomes = await asyncio.gather(*(backend.put([(key, block)]) for _ in range(8)))
            assert sum(outcome == [PutOutcome.STORED] for outcome in outcomes) == 1
            assert sum(outcome == [PutOutcome.PRESENT] for outcome in outcomes) == 7
            assert await backend.get([key]) == [block]

    async def test_concurrent_callers_get_their_own_answers(self, backend: Backend) -> None:
        async def caller(first: int) -> None:
            blocks = sample_blocks(5, first=first)
            await backend.put(blocks)
            assert await backend.get(keys_of(blocks)) == bytes_of(blocks)
            assert await backend.delete(keys_of(blocks)[:2]) == [True, True]
            assert await backend.contains(keys_of(blocks)) == [False, False, True, True, True]

        await asyncio.gather(*(caller(10 * number) for number in range(30)))

    async def test_a_cancelled_call_does_not_disturb_the_next(self, backend: Backend) -> None:
        blocks = sample_blocks(20, 200_000)
        await backend.put(blocks)
        for number in range(20):
            call = asyncio.create_task(backend.get(keys_of(blocks)))
            for _ in range(number):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            key, block = blocks[number]
            assert await backend.get([key]) == [block]

    async def test_a_deleted_block_is_gone_and_can_come_back(self, backend: Backend) -> None:
        key, block = sample_block(1)
        await backend.put([(key, block)])
        (held,) = await backend.get([key])
        assert await backend.delete([key]) == [True]
        assert held == block, "a returned buffer outlives the block"
        assert await backend.get([key]) == [None]
        assert await backend.put([(key, block)]) == [PutOutcome.STORED]
        assert await backend.get([key]) == [block]

    async def test_purge_of_a_namespace_leaves_the_others(self, backend: Backend) -> None:
        ours, theirs = sample_blocks(5), sample_blocks(7, namespace=OTHER_NAMESPACE)
        await backend.put(ours + theirs)
        assert await backend.purge(NAMESPACE) == 5
        assert await backend.get(keys_of(ours)) == [None] * 5
        assert await backend.get(keys_of(theirs)) == bytes_of(theirs)
        assert await backend.purge(NAMESPACE) == 0
        assert await backend.put(ours) == [PutOutcome.STORED] * 5

    async def test_purge_of_everything(self, backend: Backend) -> None:
        blocks = sample_blocks(5) + sample_blocks(7, namespace=OTHER_NAMESPACE)
        await backend.put(blocks)
        assert await backend.purge() == 12
        assert not any(await backend.contains(keys_of(blocks)))
        assert (await backend.stats()).num_blocks == 0

    async def test_a_quarantined_block_is_out_of_service(self, backend: Backend) -> None:
        blocks = sample_blocks(3)
        await backend.put(blocks)
        await backend.quarantine(blocks[1][0])
        assert await backend.get(keys_of(blocks)) == [blocks[0][1], None, blocks[2][1]]
        assert await backend.put(blocks) == [PutOutcome.PRESENT, PutOutcome.STORED, PutOutcome.PRESENT]
        assert await backend.get(keys_of(blocks)) == bytes_of(blocks)

    async def test_quarantine_of_an_unknown_key_does_nothing(self, backend: Backend) -> None:
        await backend.quarantine(sample_key(1))
        assert await backend.contains([sample_key(1)]) == [False]

    async def test_stats_follow_the_blocks(self, backend: Backend) -> None:
        before = await backend.stats()
        await backend.put(sample_blocks(10, 100_000))
        after = await backend.stats()
        assert (before.num_blocks, after.num_blocks) == (0, 10)
        assert after.used_bytes - before.used_bytes >= 10 * block_bytes(100_000)
        assert after.evicted_blocks == before.evicted_blocks == 0
        await backend.delete([sample_key(0)])
        assert (await backend.stats()).num_blocks == 9

    async def test_close_twice(self, backend: Backend) -> None:
        await backend.close()
        await backend.close()

    async def test_use_after_close(self, backend: Backend) -> None:
        key, block = sample_block(1)
        await backend.close()
        for call in (
            lambda: backend.contains([key]),
            lambda: backend.contains([]),
            lambda: backend.get([key]),
            lambda: backend.get([]),
            lambda: backend.put([(key, block)]),
            lambda: backend.put([]),
            lambda: backend.delete([key]),
            lambda: backend.quarantine(key),
            lambda: backend.purge(),
            lambda: backend.stats(),
        ):
            with pytest.raises(BackendUnavailable, match=f"{backend.name} tier is closed"):
                await call()


class BudgetContract(BackendContract):
    """For backends that keep a budget themselves; needs a fixture `small_backend` with one of 64 KiB."""

    async def test_the_budget_holds(self, small_backend: Backend) -> None:
        for first in range(0, 200, 10):
            await small_backend.put(sample_blocks(10, 1000, first=first))
            stats = await small_backend.stats()
            assert stats.budget_bytes == 64 << 10
            assert stats.used_bytes <= stats.budget_bytes
            assert stats.used_bytes == stats.num_blocks * block_bytes(1000)
        assert stats.num_blocks == (64 << 10) // block_bytes(1000)
        assert stats.evicted_blocks == 200 - stats.num_blocks

    async def test_evicted_blocks_miss_and_the_others_are_whole(self, small_backend: Backend) -> None:
        blocks = sample_blocks(200, 1000)
        await small_backend.put(blocks)
        found = await small_backend.get(keys_of(blocks))
        assert sum(block is not None for block in found) == (await small_backend.stats()).num_blocks
        assert all(got in (None, block) for got, block in zip(found, bytes_of(blocks), strict=True))

    async def test_a_block_over_the_whole_budget_is_refused_and_evicts_nothing(
        self, small_backend: Backend
    ) -> None:
        small = sample_block(1)
        await small_backend.put([small])
        assert await small_backend.put([sample_block(2, 64 << 10)]) == [PutOutcome.REFUSED]
        assert await small_backend.get([small[0], sample_key(2)]) == [small[1], None]

    async def test_a_block_of_exactly_the_budget_fits(self, small_backend: Backend) -> None:
        key, block = sample_block(1, (64 << 10) - block_bytes(0))
        assert await small_backend.put([(key, block)]) == [PutOutcome.STORED]
        assert await small_backend.get([key]) == [block]

    async def test_a_used_block_survives_a_scan(self, small_backend: Backend) -> None:
        hot = sample_block(0, 1000)
        await small_backend.put([hot])
        for number in range(1, 300):
            await small_backend.put([sample_block(number, 1000)])
            if number % 10 == 0:
                assert await small_backend.get([hot[0]]) == [hot[1]]

    async def test_putting_a_block_again_counts_as_use(self, small_backend: Backend) -> None:
        hot = sample_block(0, 1000)
        outcomes = []
        for number in range(1, 300):
            if number % 10 == 1:
                outcomes += await small_backend.put([hot])
            await small_backend.put([sample_block(number, 1000)])
        assert outcomes == [PutOutcome.STORED] + [PutOutcome.PRESENT] * 29

    async def test_asking_whether_a_block_is_there_does_not_count_as_use(
        self, small_backend: Backend
    ) -> None:
        key, block = sample_block(0, 1000)
        await small_backend.put([(key, block)])
        for number in range(1, 300):
            await small_backend.contains([key])
            await small_backend.put([sample_block(number, 1000)])
        assert await small_backend.contains([key]) == [False]

    async def test_of_a_prefix_that_is_too_long_the_beginning_stays(self, small_backend: Backend) -> None:
        prefix = sample_blocks(100, 1500)
        await small_backend.put(prefix)
        found = await small_backend.contains(keys_of(prefix))
        # 37 fit; a backend that writes several at a time keeps the order only nearly
        assert sum(found[:25]) >= 20
        assert sum(found[50:]) <= 8
