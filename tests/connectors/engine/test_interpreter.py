"""The switch interval of the process: lowered, never raised."""

import sys

import pytest

from tq_connectors.engine.interpreter import SWITCH_INTERVAL_S, share_interpreter


@pytest.fixture(autouse=True)
def _restored():
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(("before_s", "after_s"), [(0.005, SWITCH_INTERVAL_S), (0.0001, 0.0001)])
def test_it_is_lowered_where_it_is_longer(before_s, after_s):
    sys.setswitchinterval(before_s)
    share_interpreter()
    assert sys.getswitchinterval() == pytest.approx(after_s)
