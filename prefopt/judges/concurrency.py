"""How many requests may be under way at once: the answer changes with what the service says.

Starts low, doubles with every round of successes until the service first objects, then grows by one
a round and halves on every objection (Jacobson 1988: slow start, then additive increase and
multiplicative decrease). It knows nothing of requests; it is told what became of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class AdaptiveLimit:
    """A limit on what is under way.

    Args:
        most: the limit never exceeds this.
        start: where it begins.
        sleep: waits a number of seconds.

    Attributes:
        limit: how many may be under way now.
        under_way: how many are.
    """

    def __init__(
        self,
        most: int,
        *,
        start: int = 8,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.most = most
        self.limit = min(start, most)
        self.under_way = 0
        self._sleep = sleep
        self._cautious = False  # after the first objection
        self._successes = 0
        self._epoch = 0
        self._pause_s = 0.0
        self._waiting: list[asyncio.Future[None]] = []
        self._pausing: asyncio.Task[None] | None = None

    async def acquire(self) -> int:
        """Wait for a place; returns a number to hand back to `release`."""
        while self.under_way >= self.limit or self._paused:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self.under_way += 1
        return self._epoch

    def release(self) -> None:
        """Free a place."""
        self.under_way -= 1
        self._wake()

    def succeeded(self) -> None:
        """A request was answered: allow one more after a round of them (each one, at first)."""
        self._successes += 1
        if self.limit < self.most and (not self._cautious or self._successes >= self.limit):
            self.limit += 1
            self._successes = 0
            self._wake()

    def congested(self, epoch: int, pause_s: float = 0.0) -> None:
        """The service objected to a request begun at `epoch`: halve, once for all of that round."""
        if epoch == self._epoch:
            self._epoch += 1
            self._cautious = True
            self._successes = 0
            self.limit = max(self.limit // 2, 1)
        if pause_s > 0:
            self.pause(pause_s)

    def at_most(self, remaining: int) -> None:
        """The service said how many more it takes for now."""
        self.limit = max(min(self.limit, remaining), 1)

    def pause(self, seconds: float) -> None:
        """Begin nothing new for a while. A longer pause replaces a shorter one."""
        if self._pausing is not None:
            if seconds <= self._pause_s:
                return
            self._pausing.cancel()
        self._pause_s = seconds
        self._pausing = asyncio.get_running_loop().create_task(self._pause(seconds))

    async def _pause(self, seconds: float) -> None:
        try:
            await self._sleep(seconds)
        finally:
            if self._pausing is asyncio.current_task():
                self._pausing = None
                self._wake()

    @property
    def _paused(self) -> bool:
        # One that was cut off with its event loop must not hold up the next one for ever.
        return self._pausing is not None and not self._pausing.done()

    def open_gates(self) -> None:
        """Let everyone through, so that those who wait can see that all is over."""
        if self._pausing is not None:
            self._pausing.cancel()
            self._pausing = None
        self.limit = self.most + len(self._waiting) + self.under_way
        self._wake()

    def _wake(self) -> None:
        free = self.limit - self.under_way
        while self._waiting and free > 0 and not self._paused:
            turn = self._waiting.pop(0)
            if not turn.done():
                turn.set_result(None)
                free -= 1
