"""Groups of layers that take the way of a device, here a CPU, make what the CPU's own way makes."""

import threading

import pytest
import torch

from tq_connectors.lmcache import group_codecs
from tq_connectors.lmcache.group_codecs import DeviceGroups, group_codec
from tq_kernels import PageLayout, preset

CPU = torch.device("cpu")
HEADS, DIM, TOKENS, LAYERS = 2, 32, 64, 3
SHAPES = {
    "split": (2, LAYERS, TOKENS, HEADS * DIM),
    "fused": (1, LAYERS, TOKENS, HEADS * 2 * DIM),
    "fused 3d": (LAYERS, TOKENS, HEADS * 2 * DIM),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]


@pytest.fixture(autouse=True)
def _by_pytorch(monkeypatch):
    """What is tested here is the way there and back: kernels have tests of their own, and one below."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def layout(name: str = "tq4") -> PageLayout:
    return PageLayout(spec=preset(name), head_dim=DIM, num_kv_heads=HEADS, page_tokens=32)


def group_of(shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def empty_pages(of: PageLayout) -> torch.Tensor:
    return torch.full((LAYERS * TOKENS // of.page_tokens, of.page_bytes), 0xA5, dtype=torch.uint8)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative squared error."""
    return float((one.float() - other.float()).square().mean() / other.float().square().mean())


@pytest.mark.parametrize("is_balanced", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["tq4", "k3v2", "raw"])
def test_both_ways_make_and_read_the_same(name, shape, dtype, is_balanced):
    group, pages, room = group_of(SHAPES[shape], dtype), layout(name), empty_pages(layout(name))
    generator = torch.Generator().manual_seed(6)
    balance = torch.rand(LAYERS, HEADS, DIM, generator=generator) + 0.5 if is_balanced else None
    here, there = group_codec(pages, CPU), DeviceGroups(pages, CPU)
    there.quantize(group, balance, room)
    results = []
    for reader in (here, there):
        results.append(torch.zeros_like(group))
        reader.dequantize(room, balance, results[-1])
    # bfloat16 lies between the kernel and fp8, so that some numbers are rounded twice
    assert distance(results[0], results[1]) < (1e-3 if dtype is torch.float8_e4m3fn else 1e-5)
    written_here = empty_pages(pages)
    here.quantize(group, balance, written_here)
    again = torch.zeros_like(group)
    here.dequantize(written_here, balance, again)
    assert distance(again, results[0]) < 2e-3  # and a level is another now and then
    assert distance(again, group) < {"tq4": 0.015, "k3v2": 0.1, "raw": 0.002}[name]


def test_kernels_take_views_of_a_group(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    group, pages = group_of((2, 1, 32, HEADS * DIM)), empty_pages(layout())[:1]
    groups, balance = DeviceGroups(layout(), CPU), torch.full((1, HEADS, DIM), 2.0)
    groups.quantize(group, balance, pages)
    back = torch.zeros_like(group)
    groups.dequantize(pages, balance, back)
    assert distance(back, group) < 0.015


def test_a_group_lies_on_the_device_once_and_only_for_the_last_shapes(monkeypatch):
    made: list[tuple[int, ...]] = []

    class Counted(group_codecs.DeviceGroup):
        def __init__(self, layout, device, shape, dtype):
            made.append(tuple(shape))
            super().__init__(layout, device, shape, dtype)

    monkeypatch.setattr(group_codecs, "DeviceGroup", Counted)
    groups, pages = DeviceGroups(layout(), CPU), empty_pages(layout())
    for _ in range(3):
        groups.quantize(group_of(SHAPES["split"]), None, pages)
    assert made == [SHAPES["split"]]
    for layers in (1, 2, 4, 5):
        shape = (2, layers, TOKENS, HEADS * DIM)
        room = torch.empty(layers * TOKENS // 32, layout().page_bytes, dtype=torch.uint8)
        groups.quantize(group_of(shape), None, room)
    groups.quantize(group_of(SHAPES["split"]), None, pages)
    assert made.count(SHAPES["split"]) == 2


@pytest.mark.parametrize("first_mode", [True, False])
def test_inference_mode_may_come_and_go(first_mode):
    groups, pages, group = DeviceGroups(layout(), CPU), empty_pages(layout()), group_of(SHAPES["split"])
    for mode in (first_mode, not first_mode):
        with torch.inference_mode(mode):
            back = torch.zeros_like(group)
            groups.quantize(group, None, pages)
            groups.dequantize(pages, None, back)
        assert 0 < distance(back, group) < 0.015


def test_threads_do_not_meet():
    """Each has its own room: a chunk is never packed from what another thread copies meanwhile."""
    groups = DeviceGroups(layout(), CPU)
    start, wrong = threading.Barrier(4), []

    def work(number: int) -> None:
        group, pages = group_of(SHAPES["split"]) * (number + 1), empty_pages(layout())
        start.wait(timeout=30)
        for _ in range(20):
            back = torch.zeros_like(group)
            groups.quantize(group, None, pages)
            groups.dequantize(pages, None, back)
            if distance(back, group) > 0.015:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
