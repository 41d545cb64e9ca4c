"""Streams beside an engine's own: real ones on CUDA, and none where a call returns when it is done."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class Event(Protocol):
    """A point in what a stream was given to do."""

    def record(self) -> None:
        """Make it the end of what the current stream was given so far."""

    def wait(self) -> None:
        """Let the current stream go on only then."""

    def has_happened(self) -> bool:
        """Whether the stream has come so far."""

    def synchronize(self) -> None:
        """Let this thread go on only then."""


class Streams(Protocol):
    """Two streams: one that computes, and one that copies over the bus."""

    calls_take_time: bool
    """Whether a call returns when it is done, and not when the device has been given it."""

    def compute(self) -> AbstractContextManager[object]:
        """Give what follows to the stream that computes."""

    def copy(self) -> AbstractContextManager[object]:
        """Give what follows to the stream that copies."""

    def event(self) -> Event:
        """An event that has happened, as long as it is not recorded."""

    def engine_event(self) -> Event:
        """The end of what the engine has given its device to do so far; called on the engine's thread."""

    def to_device(self, numbers: torch.Tensor) -> torch.Tensor:
        """A copy of some numbers from host memory."""

    def drain(self) -> None:
        """Let this thread go on only when both streams have done all that they were given."""


def streams_of(device: torch.device) -> Streams:
    """Streams of a device.

    Raises:
        ValueError: Neither a CPU nor CUDA.
    """
    if device.type == "cpu":
        return _NoStreams()
    if device.type == "cuda":
        from tq_connectors.vllm.cuda_streams import CudaStreams

        return CudaStreams(device)
    raise ValueError(f"pages on {device} cannot be moved; CUDA and CPUs are served")


class _Done:
    def record(self) -> None:
        pass

    wait = synchronize = record

    def has_happened(self) -> bool:
        return True


class _NoStreams:
    calls_take_time = True

    def compute(self) -> AbstractContextManager[object]:
        return nullcontext()

    copy = compute

    def event(self) -> Event:
        return _Done()

    engine_event = event

    def to_device(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers

    def drain(self) -> None:
        pass
