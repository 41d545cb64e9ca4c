"""A circuit breaker: when a server has failed often enough to be left alone."""

_MAX_SCORE = 3.0
_FORGIVEN = 0.5


class Breaker:
    """Counts how the calls to one server end. Pure state; whoever owns it decides when to probe.

    A failure adds one to the score, a success takes a half away, at three it opens: after three failures in
    a row, or when more than a third of all calls fail for long. While it is open no call is made but a
    probe's, and only a probe that succeeds closes it; so no caller waits for a server that is known to be
    dead.
    """

    def __init__(self) -> None:
        self._score = 0.0
        self.is_open = False
        self.last_failed = False
        """Whether the last call that ended did so in failure."""

    def succeeded(self) -> None:
        """A call was answered; one that was under way when the breaker opened does not close it."""
        self.last_failed = False
        self._score = max(0.0, self._score - _FORGIVEN)

    def failed(self) -> bool:
        """A call was not answered; True where this opens the breaker."""
        self.last_failed = True
        self._score = min(_MAX_SCORE, self._score + 1)
        if self.is_open or self._score < _MAX_SCORE:
            return False
        self.is_open = True
        return True

    def close(self) -> None:
        """A probe was answered."""
        self._score = 0.0
        self.is_open = self.last_failed = False
