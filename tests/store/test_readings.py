import logging
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from store.running_server import wait_until

from tq_store.server.readings import Reading, Sampler, quantile


def test_samples_are_summed_by_their_labels() -> None:
    samples = {
        "calls": {
            (("method", "Get"), ("status", "OK")): 5.0,
            (("method", "Get"), ("status", "ABORTED")): 2.0,
            (("method", "Put"), ("status", "OK")): 1.0,
        }
    }
    reading = Reading(clock_s=0.0, samples=samples)
    assert reading.total("calls") == 8
    assert reading.total("calls", method="Get") == 7
    assert reading.total("calls", method="Get", status="OK") == 5
    assert reading.total("unknown") == 0
    assert reading.by("calls", "method") == {"Get": 7, "Put": 1}
    assert reading.by("calls", "status", method="Get") == {"OK": 5, "ABORTED": 2}
    assert reading.by("calls", "tier") == {}


def test_a_quantile_is_the_bound_of_its_bucket() -> None:
    buckets = {"0.1": 50.0, "1.0": 98.0, "+Inf": 100.0}
    assert quantile(buckets, 0.5) == 0.1
    assert quantile(buckets, 0.51) == 1.0
    assert quantile(buckets, 0.99) is None
    assert quantile({"0.1": 0.0, "+Inf": 0.0}, 0.5) is None
    assert quantile({}, 0.5) is None


def test_readings_follow_each_other_until_the_sampler_is_closed() -> None:
    registry = CollectorRegistry()
    counter = Counter("turns", "Turns.", registry=registry)
    sampler = Sampler(registry, step_s=0.001, num_readings=3)
    assert sampler.readings()[0].total("turns_total") == 0
    counter.inc(7)
    wait_until(lambda: [reading.total("turns_total") for reading in sampler.readings()] == [7, 7, 7])
    clocks = [reading.clock_s for reading in sampler.readings()]
    assert clocks == sorted(clocks)
    sampler.close()
    assert "status sampler" not in {thread.name for thread in threading.enumerate()}


def test_a_reading_that_fails_is_logged_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Collector):
        num_calls = 0

        def collect(self) -> Iterator[Metric]:
            self.num_calls += 1
            if self.num_calls == 1:
                raise RuntimeError("no")
            return iter(())

    registry = CollectorRegistry(auto_describe=False)
    broken = Broken()
    registry.register(broken)
    broken.num_calls = 0
    with caplog.at_level(logging.ERROR):
        sampler = Sampler(registry, step_s=0.001)
        wait_until(lambda: len(sampler.readings()) > 0)
        sampler.close()
    assert "the metrics could not be read for the status page" in caplog.text
