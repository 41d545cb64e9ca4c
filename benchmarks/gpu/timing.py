"""Times of GPU work: medians of CUDA-graph replays with a cold L2, and the ceilings of the device."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

_BUDGET_US = 150_000.0
_FEWEST, _MOST = 15, 200
_FLOOR_LAUNCHES = 32
_COPY_BYTES = 1 << 30
_PRODUCT_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Timing:
    """Median, 10th and 90th percentile of one call, in microseconds."""

    median_us: float
    low_us: float
    high_us: float

    @property
    def spread(self) -> str:
        """In words, for a row's note."""
        return f"10-90 %: {self.low_us:.1f}-{self.high_us:.1f} us"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reaches in this very run.

    Args:
        copy_gbps: Bytes read plus bytes written of a large copy, in GB/s.
        product_tflops: A large bf16 matrix product on random data.
        launch_us: A kernel that does nothing, one of many in a graph.
    """

    copy_gbps: float
    product_tflops: float
    launch_us: float

    def __str__(self) -> str:
        return (
            f"copy {self.copy_gbps:.0f} GB/s, bf16 product {self.product_tflops:.0f} TFLOP/s, "
            f"launch {self.launch_us:.2f} us"
        )

    def copy_us(self, num_bytes: int) -> float:
        """Time to move so many bytes at copy bandwidth."""
        return num_bytes / self.copy_gbps / 1e3

    def least_us(self, num_bytes: int, flops: int) -> float:
        """No kernel that moves these bytes and does this arithmetic is faster."""
        return max(self.copy_us(num_bytes), flops / self.product_tflops / 1e6)


class Stopwatch:
    """Times calls on one device; holds the buffer whose reading evicts the L2."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.l2_bytes = int(properties.L2_cache_size)
        self._evict = torch.ones(5 * self.l2_bytes // 4, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)
        self.device = device

    def flush(self) -> None:
        """Fill the L2 with clean lines: a flush that writes would bill its write-back to what follows."""
        torch.sum(self._evict, dim=0, out=self._sum)

    def graph(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        """All calls, one after the other, as one graph."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph

    def time_graph(self, calls: Sequence[Call], budget_us: float = _BUDGET_US) -> Timing:
        """Time of one of the calls, each on inputs of its own, in replays of a graph of all of them."""
        return self.time_call(self.graph(calls).replay, len(calls), budget_us)

    def time_call(self, call: Call, calls_inside: int = 1, budget_us: float = _BUDGET_US) -> Timing:
        """Time of a call that only queues work, over the number of calls it stands for."""
        self._once(call, 2)
        roughly_us = statistics.median(self._once(call, 3))
        runs = max(_FEWEST, min(_MOST, int(budget_us / max(roughly_us, 1.0))))
        times = sorted(time_us / calls_inside for time_us in self._once(call, runs))
        return Timing(statistics.median(times), times[runs // 10], times[runs - 1 - runs // 10])

    def _once(self, call: Call, runs: int) -> list[float]:
        """Microseconds of each run, none of them waited for before the next is queued."""
        pairs = []
        for _ in range(runs):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush()
            start.record()
            call()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize(self.device)
        return [1e3 * start.elapsed_time(stop) for start, stop in pairs]


def measure_ceilings(watch: Stopwatch) -> Ceilings:
    """Copy bandwidth, matrix rate and launch floor; the matrix products also bring the clocks up."""
    device = watch.device
    a, b = (torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, device=device).to(torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    product = watch.time_graph([lambda: torch.mm(a, b, out=c)])
    source = torch.randint(0, 1 << 30, (_COPY_BYTES // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    # a copy is a memory operation of the driver, the other one a kernel: the faster of the two is the ceiling
    copies = [
        watch.time_graph([lambda: target.copy_(source)]),
        watch.time_graph([lambda: torch.bitwise_not(source, out=target)]),
    ]
    one = torch.zeros(1, dtype=torch.int32, device=device)
    nothing = watch.time_graph([lambda: torch.bitwise_not(one, out=one)] * _FLOOR_LAUNCHES)
    return Ceilings(
        copy_gbps=2 * _COPY_BYTES / min(timing.median_us for timing in copies) / 1e3,
        product_tflops=2 * _PRODUCT_SIZE**3 / product.median_us / 1e6,
        launch_us=nothing.median_us,
    )
