"""The measure of `benchmarks/tenant_timing.py` tells a difference from none."""

import random

from benchmarks.tenant_timing import area_under_curve


def test_the_timing_of_tenants_would_show_a_difference() -> None:
    rng = random.Random(1)
    same, slower, absent = ([rng.random() + shift for _ in range(1000)] for shift in (0.0, 0.2, 0.0))
    area, error = area_under_curve([*same, *absent])
    assert abs(area - 0.5) < 4 * error
    area, error = area_under_curve([*slower, *absent])
    assert area - 0.5 > 4 * error
    assert area_under_curve([2.0, 3.0, 0.0, 1.0])[0] == 1.0
    assert area_under_curve([0.0, 1.0, 2.0, 3.0])[0] == 0.0
