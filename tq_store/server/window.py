"""A bound on the bytes of blocks that are on their way, over all calls together."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from tq_store.errors import BackendFull


class ByteWindow:
    """A number of bytes, shared; who finds too few left waits for them, first come, first served.

    Bound to one event loop. A share larger than the whole window is let in when nothing else is, so that no
    block is too large to pass.

    Args:
        name: The setting that says how large the window is, for the error.
        limit_bytes: How large it is.
        patience_s: How long a share is waited for.
        on_change: Told the bytes in use whenever they change.
    """

    def __init__(
        self, name: str, *, limit_bytes: int, patience_s: float, on_change: Callable[[int], None]
    ) -> None:
        self.limit_bytes = limit_bytes
        self._name = name
        self._patience_s = patience_s
        self._on_change = on_change
        self._used_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._steps: dict[asyncio.Timeout, float] = {}

    @property
    def free_bytes(self) -> int:
        """What a share may have at once; nothing while others wait for room."""
        return 0 if self._waiting else max(0, self.limit_bytes - self._used_bytes)

    @asynccontextmanager
    async def step(self, *, stall_s: float, hurry_s: float) -> AsyncIterator[None]:
        """One step of a peer that holds a share: at most `stall_s`, and `hurry_s` while others wait for room.

        So peers that stand still cannot keep all the others out.

        Raises:
            TimeoutError: It took longer.
        """
        async with asyncio.timeout(hurry_s if self._waiting else stall_s) as deadline:
            self._steps[deadline] = asyncio.get_running_loop().time() + hurry_s
            try:
                yield
            finally:
                del self._steps[deadline]

    async def take(self, num_bytes: int) -> None:
        """Have a share, at once or when its turn comes.

        Raises:
            BackendFull: It did not come in time. The others were slow; nothing is wrong with this call.
        """
        if not self._waiting and self._has_room(num_bytes):
            self.adjust(num_bytes)
            return
        turn = asyncio.get_running_loop().create_future()
        place = (num_bytes, turn)
        self._waiting.append(place)
        self._hurry()
        try:
            async with asyncio.timeout(self._patience_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.give(num_bytes)  # its turn came together with what ended the wait
            else:
                with suppress(ValueError):
                    self._waiting.remove(place)
                self.adjust(0)  # it may have stood before a smaller one
            if isinstance(error, TimeoutError):
                raise BackendFull(
                    f"{num_bytes} bytes found no room in {self._name} of {self.limit_bytes} bytes within "
                    f"{self._patience_s:g} s, as other calls are slow; try again"
                ) from None
            raise

    def give(self, num_bytes: int) -> None:
        """Hand a share back, or a part of it."""
        self.adjust(-num_bytes)

    def adjust(self, num_bytes: int) -> None:
        """Add bytes to a share that turned out larger than it was taken, whatever room there is."""
        self._used_bytes += num_bytes
        while self._waiting and self._has_room(self._waiting[0][0]):
            waited_bytes, turn = self._waiting.popleft()
            if not turn.done():  # cancelled, by a caller that has not run since
                self._used_bytes += waited_bytes
                turn.set_result(None)
        self._on_change(self._used_bytes)

    def _hurry(self) -> None:
        """Shorten the steps under way: somebody waits now."""
        for deadline, when_s in self._steps.items():
            planned_s = deadline.when()
            if not deadline.expired() and planned_s is not None and when_s < planned_s:
                deadline.reschedule(when_s)

    def _has_room(self, num_bytes: int) -> bool:
        return not self._used_bytes or self._used_bytes + num_bytes <= self.limit_bytes
