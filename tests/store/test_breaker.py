from tq_store.backends.breaker import Breaker


def test_three_failures_in_a_row_open_it_once() -> None:
    breaker = Breaker()
    assert [breaker.failed() for _ in range(5)] == [False, False, True, False, False]
    assert breaker.is_open


def test_two_failures_now_and_then_do_not() -> None:
    breaker = Breaker()
    for _ in range(50):
        assert not breaker.failed()
        assert not breaker.failed()
        for _ in range(4):
            breaker.succeeded()
    assert not breaker.is_open


def test_every_second_call_failing_does() -> None:
    breaker = Breaker()
    num_failures = 0
    while not breaker.is_open:
        breaker.failed()
        breaker.succeeded()
        num_failures += 1
    assert 3 < num_failures < 10


def test_a_call_that_was_under_way_does_not_close_it() -> None:
    breaker = Breaker()
    for _ in range(3):
        breaker.failed()
    for _ in range(10):
        breaker.succeeded()
    assert breaker.is_open


def test_a_probe_closes_it_and_the_score_starts_again() -> None:
    breaker = Breaker()
    for _ in range(3):
        breaker.failed()
    assert breaker.last_failed
    breaker.close()
    assert not breaker.is_open
    assert not breaker.last_failed
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
