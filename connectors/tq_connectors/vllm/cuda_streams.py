"""Streams of a CUDA device beside the engine's."""

from contextlib import AbstractContextManager

import torch

from tq_connectors.vllm.streams import Event


class CudaStreams:
    """Two streams, as `streams.Streams` wants them."""

    calls_take_time = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._compute, self._copy = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def compute(self) -> AbstractContextManager[object]:
        """Give what follows to the stream that computes."""
        return torch.cuda.stream(self._compute)

    def copy(self) -> AbstractContextManager[object]:
        """Give what follows to the stream that copies."""
        return torch.cuda.stream(self._copy)

    def event(self) -> Event:
        """An event that has happened, as long as it is not recorded."""
        return _Event(torch.cuda.Event(blocking=True))  # a thread that waits leaves its core to the engine

    def engine_event(self) -> Event:
        """The end of what the engine has given its device to do so far."""
        event = _Event(torch.cuda.Event())
        with torch.cuda.device(self._device):
            event.record()
        return event

    def to_device(self, numbers: torch.Tensor) -> torch.Tensor:
        """A copy of some numbers from host memory."""
        return numbers.pin_memory().to(self._device, non_blocking=True)

    def drain(self) -> None:
        """Let this thread go on only when both streams have done all that they were given."""
        for stream in (self._compute, self._copy):
            stream.synchronize()


class _Event:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def record(self) -> None:
        self._event.record()

    def wait(self) -> None:
        self._event.wait()

    def has_happened(self) -> bool:
        return bool(self._event.query())

    def synchronize(self) -> None:
        self._event.synchronize()
