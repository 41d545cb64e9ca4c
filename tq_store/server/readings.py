"""Metrics over time: readings of a registry at regular moments, and rates between two of them."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

logger = logging.getLogger(__name__)

_FIRST_READING_S = 5.0

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """All samples of a registry at one moment.

    Args:
        clock_s: When it was taken; only differences mean something.
        samples: Values by name, then by sorted labels.
    """

    clock_s: float
    samples: Mapping[str, Mapping[Labels, float]]

    def total(self, name: str, **labels: str) -> float:
        """Sum over the samples of a name that carry these labels; 0 where there are none."""
        wanted = labels.items()
        return sum(value for found, value in self._samples(name) if wanted <= dict(found).items())

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Sums by the value of one label, over the samples that carry these other labels."""
        sums: dict[str, float] = {}
        for found, value in self._samples(name):
            own = dict(found)
            if label in own and labels.items() <= own.items():
                sums[own[label]] = sums.get(own[label], 0.0) + value
        return sums

    def _samples(self, name: str) -> Iterator[tuple[Labels, float]]:
        return iter(self.samples.get(name, {}).items())


def quantile(buckets: Mapping[str, float], share: float) -> float | None:
    """Upper bound of a share of the observations, from a histogram's cumulative counts by ``le``.

    None where nothing was observed, or where only the last, open bucket holds it.
    """
    bounds = sorted((float(bound), count) for bound, count in buckets.items())
    if not bounds or bounds[-1][1] <= 0:
        return None
    wanted = share * bounds[-1][1]
    found = next(bound for bound, count in bounds if count >= wanted)
    return found if math.isfinite(found) else None


class Sampler:
    """Reads a registry again and again, on a thread of its own until `close()`, and keeps the last readings.

    Args:
        registry: What is read; its collectors are called from the thread.
        step_s: Time between readings.
        num_readings: How many are kept.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        step_s: float = 2.0,
        num_readings: int = 150,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step_s = step_s
        self._registry = registry
        self._clock = clock
        self._readings: deque[Reading] = deque(maxlen=num_readings)
        self._has_read = threading.Event()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status sampler", daemon=True)
        self._thread.start()

    def readings(self) -> list[Reading]:
        """The readings kept, oldest first; waits for the first one."""
        self._has_read.wait(_FIRST_READING_S)
        return list(self._readings)

    def sample(self) -> None:
        """Take a reading now."""
        samples: dict[str, dict[Labels, float]] = {}
        for family in self._registry.collect():
            for sample in family.samples:
                labels = tuple(sorted(sample.labels.items()))
                samples.setdefault(sample.name, {})[labels] = sample.value
        self._readings.append(Reading(clock_s=self._clock(), samples=samples))
        self._has_read.set()

    def close(self) -> None:
        """Take no more readings and wait for the thread."""
        self._is_closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closing.is_set():
            try:
                self.sample()
            except Exception:
                logger.exception("the metrics could not be read for the status page")
            self._is_closing.wait(self.step_s)
