"""Memory of values is written again when nobody holds them, and never before."""

import io

import pytest

from tq_store.backends.used_values import UsedValues

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def used() -> UsedValues:
    return UsedValues()


def handed_out(used: UsedValues, num_bytes: int, fill: bytes) -> bytes:
    """A value as a reader makes it: written in place, then known as used."""
    written = io.BytesIO(used.take(num_bytes))
    written.getbuffer()[:] = fill * num_bytes
    value = written.getvalue()
    used.add(value)
    return value


def test_a_value_that_nobody_holds_is_written_again(used: UsedValues) -> None:
    first = handed_out(used, MIB, b"a")
    place = id(first)
    del first
    second = handed_out(used, MIB, b"b")
    assert id(second) == place
    assert second == b"b" * MIB


def test_a_value_that_somebody_holds_stays_as_it_is(used: UsedValues) -> None:
    first = handed_out(used, MIB, b"a")
    view = memoryview(handed_out(used, MIB, b"b"))[10:]
    third = handed_out(used, MIB, b"c")
    assert first == b"a" * MIB
    assert view == b"b" * (MIB - 10)
    assert third == b"c" * MIB
    del first
    fourth = handed_out(used, MIB, b"d")
    assert (view[0], third[0], fourth[0]) == (ord("b"), ord("c"), ord("d"))


def test_values_of_other_lengths_are_made_anew(used: UsedValues) -> None:
    del (first := [handed_out(used, MIB, b"a")])[:]
    assert not first
    assert handed_out(used, MIB + 1, b"b") == b"b" * (MIB + 1)
    assert handed_out(used, 0, b"") == b""
    assert handed_out(used, 3, b"c") == b"ccc"


def test_few_bytes_are_kept(used: UsedValues) -> None:
    for number in range(100):
        handed_out(used, (1 + number % 7) * MIB, b"a")
        assert used._num_bytes == sum(map(len, used._values)) <= 24 * MIB
    handed_out(used, 25 * MIB, b"a")
    assert all(len(value) < 25 * MIB for value in used._values)
    small = len(used._values)
    handed_out(used, 100 * KIB, b"a")
    assert len(used._values) == small
