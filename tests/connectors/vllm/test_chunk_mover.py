"""Chunks from an engine's blocks to cells and back, on the CPU through the reference ops."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from connectors.vllm.rows_of import page_layout, random_cache
from store.running_server import wait_until

from tq_connectors.vllm.chunk_codec import CopiedChunks, QuantizedChunks
from tq_connectors.vllm.chunk_mover import Chunk, ChunkMover, chunks_at_once
from tq_connectors.vllm.engine_pages import BlockShape, PermutedPages, StridedPages
from tq_connectors.vllm.streams import streams_of
from tq_kernels import reference
from tq_store.errors import ConfigError

SHAPE = BlockShape(block_tokens=16, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
LAYOUT = page_layout(2)
PAGES, CHUNK_BLOCKS, NUM_BLOCKS = 2, 8, 40


@pytest.fixture(autouse=True)
def reference_ops(monkeypatch):
    """As in an engine on a CPU: no interpreter of Triton, which other tests use."""
    monkeypatch.setattr("tq_kernels.cache_layers.takes_kernel", lambda device: False)


def layers(num_layers: int = 2) -> list[torch.Tensor]:
    return list(random_cache(num_layers * NUM_BLOCKS, SHAPE.num_bytes).chunk(num_layers))


def permutation(seed: int) -> torch.Tensor:
    return torch.randperm(16 * 64, generator=torch.Generator().manual_seed(seed))


PAGE_KINDS = {
    "head_major": lambda kept: StridedPages(kept, SHAPE, head_major=True),
    "token_major": lambda kept: StridedPages(kept, SHAPE, head_major=False),
    "permuted": lambda kept: PermutedPages(kept, SHAPE, permutation(1), permutation(2)),
}


def tokens_of(kind: str, layer: torch.Tensor, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[tokens, heads, head_dim]`` of blocks."""
    numbers = layer[blocks].view(SHAPE.dtype)
    if kind == "permuted":
        sides = numbers.view(len(blocks), 2, 2, 16 * 64).unbind(2)
        turned = [side[..., permutation(seed).argsort()] for seed, side in enumerate(sides, 1)]
        by_head = [side.view(len(blocks), 2, 16, 64).transpose(1, 2) for side in turned]
        return by_head[0].flatten(0, 1), by_head[1].flatten(0, 1)
    order = (2, 16, 128) if kind == "head_major" else (16, 2, 128)
    rows = numbers.view(len(blocks), *order)
    rows = rows.transpose(1, 2) if kind == "head_major" else rows
    keys, values = rows.flatten(0, 1).split(64, dim=-1)
    return keys, values


def codec_of(pages, **options: object) -> QuantizedChunks:
    return QuantizedChunks(pages, LAYOUT, pages_per_chunk=PAGES, most_chunks=3, **options)


def run(codec, chunks: list[Chunk], *, is_save: bool, cells_at_once: int = 2) -> None:
    staging_bytes = cells_at_once * codec.cell_bytes
    mover = ChunkMover([codec], staging_bytes=staging_bytes, is_save=is_save)
    mover.submit({7: chunks}, mover.fence())
    mover.wait({7, 99})
    (moved,) = mover.take_finished()
    assert (moved.job_id, moved.success) == (7, True)
    assert moved.num_bytes == len(chunks) * codec.cell_bytes
    assert not mover.take_finished()
    mover.close()


@pytest.mark.parametrize(
    ("kind", "is_balanced"), [("head_major", False), ("token_major", True), ("permuted", False)]
)
def test_a_saved_chunk_is_the_reference_s_pages_and_loads_into_other_blocks(kind, is_balanced):
    kept = layers()
    pages = PAGE_KINDS[kind](kept)
    balance = torch.full((2, 2, 64), 2.0) if is_balanced else None
    codec = codec_of(pages, key_balance=balance)
    sources = [list(range(first, first + CHUNK_BLOCKS)) for first in (3, 20)]
    cells = torch.zeros(2, codec.cell_bytes, dtype=torch.uint8)
    run(codec, [Chunk(0, cell, blocks) for cell, blocks in zip(cells, sources, strict=True)], is_save=True)
    for layer in range(2):
        keys, values = tokens_of(kind, kept[layer], sources[1])
        keys = keys / balance[layer] if balance is not None else keys
        expected = reference.quantize(keys, values, LAYOUT)
        found = cells[1].view(2, PAGES, -1)[layer]
        assert (found != expected).float().mean() < 1e-3  # sums over several pages are rounded otherwise

    before = [layer.clone() for layer in kept]
    targets = [[30, 31, -1, 33, 34, 35, 36, 37]]
    run(codec, [Chunk(0, cells[1], targets[0])], is_save=False)
    for layer in range(2):
        keys, values = reference.dequantize(cells[1].view(2, PAGES, -1)[layer], LAYOUT)
        keys = keys * balance[layer] if balance is not None else keys
        found_keys, found_values = tokens_of(kind, kept[layer], [30, 31, 33])
        wanted = [*range(32), *range(48, 64)]
        torch.testing.assert_close(found_keys, keys[wanted].bfloat16(), rtol=0.01, atol=0.01)
        torch.testing.assert_close(found_values, values[wanted].bfloat16(), rtol=0.01, atol=0.01)
        untouched = [*range(30), 32, 38, 39]
        assert torch.equal(kept[layer][untouched], before[layer][untouched])


def test_bytes_are_moved_as_they_are_and_blocks_left_out_go_to_the_null_block():
    kept = layers(3)
    codec = CopiedChunks(kept, blocks_per_chunk=2)
    cells = torch.zeros(2, codec.cell_bytes, dtype=torch.uint8)
    before = [layer.clone() for layer in kept]
    run(codec, [Chunk(0, cells[0], [3, 4]), Chunk(0, cells[1], [9, -1])], is_save=True)
    run(codec, [Chunk(0, cells[0], [20, 21]), Chunk(0, cells[1], [-1, 23])], is_save=False)
    for layer, old in zip(kept, before, strict=True):
        assert torch.equal(layer[[20, 21]], old[[3, 4]])
        assert torch.equal(layer[1:20], old[1:20])


class Counted(CopiedChunks):
    """Knows how many chunks it was given at once."""

    def save(self, blocks: torch.Tensor, cells: torch.Tensor) -> None:
        self.sizes = [*getattr(self, "sizes", []), len(cells)]
        super().save(blocks, cells)


def test_chunks_of_groups_go_through_their_own_codecs_those_of_all_jobs_together():
    codecs = [Counted(layers(1), blocks_per_chunk=1), Counted(layers(1), blocks_per_chunk=1)]
    cell_bytes = codecs[0].cell_bytes
    cells = torch.zeros(5, cell_bytes, dtype=torch.uint8)
    mover = ChunkMover(codecs, staging_bytes=2 * cell_bytes, is_save=True)
    jobs = {
        1: [Chunk(0, cells[0], [1]), Chunk(1, cells[1], [1]), Chunk(1, cells[2], [2])],
        2: [Chunk(0, cells[3], [2]), Chunk(1, cells[4], [3])],
    }
    mover.submit(jobs, mover.fence())
    mover.wait({1, 2})
    mover.close()
    first, second = (codec._layers[0] for codec in codecs)
    assert torch.equal(cells, torch.stack([first[1], second[1], second[2], first[2], second[3]]))
    assert [codec.sizes for codec in codecs] == [[2], [2, 1]]


class Stuck:
    """A codec that waits, then fails."""

    cell_bytes, blocks_per_chunk, device = 16, 1, torch.device("cpu")

    def __init__(self) -> None:
        self.may_go = threading.Event()

    def save(self, blocks: torch.Tensor, cells: torch.Tensor) -> None:
        assert self.may_go.wait(10)
        raise RuntimeError("the device is gone")

    load = save


def test_a_job_that_fails_says_so_and_nothing_waits_for_it_before(caplog):
    codec = Stuck()
    mover = ChunkMover([codec], staging_bytes=1, is_save=True)
    mover.submit({1: [Chunk(0, torch.zeros(16, dtype=torch.uint8), [0])]}, mover.fence())
    assert not mover.take_finished()
    codec.may_go.set()
    mover.wait({1})
    (moved,) = mover.take_finished()
    assert not moved.success
    assert "the device is gone" in caplog.text
    mover.close()


class Happens:
    """Events of a device that comes to their end when it is told, or when somebody waits."""

    def __init__(self) -> None:
        self.is_over = False

    def record(self) -> None:
        pass

    wait = record

    def has_happened(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.is_over = True


class Quick(type(streams_of(torch.device("cpu")))):
    """A device whose calls return at once."""

    calls_take_time = False
    num_drained = 0

    def event(self) -> Happens:
        return Happens()

    def drain(self) -> None:
        self.num_drained += 1
        raise RuntimeError("the device is gone, too")


def test_a_device_with_streams_is_given_everything_at_once(monkeypatch, caplog):
    device = Quick()
    monkeypatch.setattr("tq_connectors.vllm.chunk_mover.streams_of", lambda _: device)
    codec = CopiedChunks(layers(1), blocks_per_chunk=1)
    cells = torch.zeros(4, codec.cell_bytes, dtype=torch.uint8)
    mover = ChunkMover([codec], staging_bytes=2 * codec.cell_bytes, is_save=True)
    chunks = [Chunk(0, cells[number], [block]) for number, block in ((2, 5), (3, 6), (0, 7))]
    mover.submit({1: chunks[:2], 4: chunks[2:]}, mover.fence())
    assert torch.equal(cells[[2, 3, 0]], codec._layers[0][[5, 6, 7]])
    assert not mover.take_finished()
    mover.wait({4})
    moved = mover.take_finished()
    assert [(each.job_id, each.num_bytes // codec.cell_bytes) for each in moved] == [(1, 2), (4, 1)]
    assert all(each.success for each in moved)
    assert not device.num_drained
    monkeypatch.delattr(CopiedChunks, "save")
    mover.submit({2: chunks}, mover.fence())
    assert device.num_drained == 1  # before anybody is told, as parts before may still be on their way
    mover.wait({2})
    assert [moved.success for moved in mover.take_finished()] == [False]
    assert "moving chunks" in caplog.text
    mover.close()


class Step:
    """Work of the engine's in flight, for which threads wait."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def wait(self) -> None:
        assert self.may_end.wait(10)


def test_cells_are_copied_beside_the_step_in_flight_and_blocks_are_written_after_it():
    codec = CopiedChunks(layers(1), blocks_per_chunk=1)
    (layer,) = codec._layers
    before, cell, step = layer.clone(), layer[3].clone(), Step()
    mover = ChunkMover([codec], staging_bytes=codec.cell_bytes, is_save=False)
    mover._buffers[0].zero_()
    mover.submit({1: [Chunk(0, cell, [9])]}, step)
    wait_until(lambda: torch.equal(mover._buffers[0][0], cell))
    assert torch.equal(layer, before)
    step.may_end.set()
    mover.wait({1})
    assert torch.equal(layer[9], before[3])
    mover.close()


class Point:
    """An event: what has happened for certain when it has."""

    def __init__(self, device: "Queued", before: frozenset[str] = frozenset()) -> None:
        self.device, self.before = device, before

    def record(self) -> None:
        self.before = self.device.did()

    def wait(self) -> None:
        self.device.before[self.device.stream] |= self.before

    def has_happened(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Queued:
    """A device that knows what each of its streams has waited for or done."""

    calls_take_time = False

    def __init__(self) -> None:
        self.before: dict[str, frozenset[str]] = {"compute": frozenset(), "copy": frozenset()}
        self.steps: dict[str, list[frozenset[str]]] = {"compute": [], "copy": []}
        self.stream = ""

    def did(self) -> frozenset[str]:
        """A step of the stream is over; what has happened by then."""
        steps = self.steps[self.stream]
        self.before[self.stream] |= {f"{self.stream} {len(steps)}"}
        steps.append(self.before[self.stream])
        return steps[-1]

    @contextmanager
    def _on(self, stream: str) -> Iterator[None]:
        self.stream = stream
        yield
        self.stream = ""

    def compute(self) -> AbstractContextManager[None]:
        return self._on("compute")

    def copy(self) -> AbstractContextManager[None]:
        return self._on("copy")

    def event(self) -> Point:
        return Point(self)

    def engine_event(self) -> Point:
        return Point(self, frozenset({"memory is free"}))

    def to_device(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers


@pytest.mark.parametrize("is_save", [True, False])
def test_what_waits_for_what(monkeypatch, is_save):
    device = Queued()
    monkeypatch.setattr("tq_connectors.vllm.chunk_mover.streams_of", lambda _: device)
    codec = CopiedChunks(layers(1), blocks_per_chunk=1)
    mover = ChunkMover([codec], staging_bytes=codec.cell_bytes, is_save=is_save)
    cells = torch.zeros(4, codec.cell_bytes, dtype=torch.uint8)
    step = Point(device, frozenset({"step is over"}))
    mover.submit({1: [Chunk(0, cell, [block]) for block, cell in enumerate(cells, 1)]}, step)
    fill, drain = ("compute", "copy") if is_save else ("copy", "compute")
    filled, drained = device.steps[fill], device.steps[drain][: len(cells)]
    assert len(filled) == len(drained) == len(cells)
    assert all("memory is free" in before for before in filled)
    assert all(f"{fill} {turn}" in before for turn, before in enumerate(drained))
    assert all(f"{drain} {turn}" in before for turn, before in enumerate(filled[2:]))  # a buffer is free
    assert all("step is over" in before for before in device.steps["compute"])
    assert is_save or "step is over" not in device.steps["copy"][0] | device.steps["copy"][1]
    mover.close()


def test_chunks_are_whole_numbers_of_blocks():
    shape = BlockShape(block_tokens=48, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    pages = StridedPages([random_cache(2, shape.num_bytes)], shape, head_major=True)
    with pytest.raises(ConfigError, match="chunks of 128 tokens are not made of blocks of 48"):
        codec_of(pages)


def test_a_buffer_holds_at_least_one_chunk():
    assert (chunks_at_once(100, 50), chunks_at_once(100, 350)) == (1, 3)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="CUDA and CPUs"):
        streams_of(torch.device("meta"))
