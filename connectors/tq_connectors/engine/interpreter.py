"""Sharing Python's interpreter with an engine's scheduler that seldom rests."""

import sys

SWITCH_INTERVAL_S = 0.0002
"""A thread of ours that gave up the interpreter's lock, to copy or to wait for the store, has it back after a
switch interval: by default 5 ms, in which 20 pages could be loaded. Our threads hold it for less than this at
a time, and only while pages move, so the scheduler loses little."""


def share_interpreter() -> None:
    """Lower this process's switch interval to ours, where it is longer."""
    if sys.getswitchinterval() > SWITCH_INTERVAL_S:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
