"""Which jobs are due for a pass: each at most once at a time, many side by side, failures ever later.

Any number of events of one job before its pass becomes one pass; events during it become one more.
Used by `influence_operator.reconciler`, filled by the watches and by the resync.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

FIRST_BACKOFF = 0.5
"""Seconds after the first failure; doubled with each that follows."""
LAST_BACKOFF = 30.0
SPACING = 0.2
"""Seconds between the beginnings of two passes: what happens meanwhile becomes one."""
EVENT_BACKOFF = 2.0
"""An event may shorten the wait after a failure to this."""


class WorkQueue(Generic[Key]):
    """A queue of keys for the passes of one event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due: dict[Key, float] = {}
        """Keys that wait for a pass, since when, in that order."""
        self._later: dict[Key, float] = {}
        """The earliest time at which a key falls due by itself."""
        self._times: list[tuple[float, int, Key]] = []
        self._count = 0
        self._running: set[Key] = set()
        self._began: dict[Key, float] = {}
        """When the last pass of each key began."""
        self._again: set[Key] = set()
        """Keys that an event named while their pass ran."""
        self._failures: dict[Key, int] = {}
        self._failed_at: dict[Key, float] = {}
        self._changed = asyncio.Event()

    def add(self, key: Key, changed: bool = False) -> None:
        """The key is due now, or soon if its last pass failed: nothing is retried hot.

        Args:
            key: what something happened to.
            changed: its user changed it, which may be the cure and ends the wait after a failure.
        """
        if changed:
            self._failures.pop(key, None)
        if key in self._running:
            self._again.add(key)
            return
        earliest = self._began.get(key, float("-inf")) + SPACING
        if key in self._failures:
            earliest = max(earliest, self._failed_at[key] + EVENT_BACKOFF)
        if changed or earliest <= self._clock():
            self._make_due(key)
        else:
            self.add_after(key, earliest - self._clock())

    def add_after(self, key: Key, seconds: float) -> None:
        """The key is due after so many seconds, if no event makes it due before."""
        time = self._clock() + seconds
        if time >= self._later.get(key, float("inf")):
            return
        self._later[key] = time
        self._count += 1
        heapq.heappush(self._times, (time, self._count, key))
        self._changed.set()

    def take_now(self) -> Key | None:
        """Gives away a key that is due, if there is one; `done` or `failed` must follow."""
        self._ripen()
        if not self._due:
            return None
        key = next(iter(self._due))
        del self._due[key]
        self._running.add(key)
        self._began[key] = self._clock()
        return key

    async def take(self) -> Key:
        """Waits for a key that is due and gives it away."""
        while (key := self.take_now()) is None:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._next())
        return key

    def done(self, key: Key) -> None:
        """The pass over this key succeeded."""
        self._failures.pop(key, None)
        self._failed_at.pop(key, None)
        self._running.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def failed(self, key: Key) -> float:
        """The pass failed; returns the seconds until the next."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        self._failed_at[key] = self._clock()
        delay = min(LAST_BACKOFF, FIRST_BACKOFF * 2 ** min(failures - 1, 16))
        self._running.discard(key)
        self._later.pop(key, None)
        self.add_after(key, min(delay, EVENT_BACKOFF) if key in self._again else delay)
        self._again.discard(key)
        return delay

    def forget(self, key: Key) -> None:
        """Nothing is left of the key: no pass of its own accord any more."""
        self._later.pop(key, None)
        self._failures.pop(key, None)
        self._failed_at.pop(key, None)
        self._began.pop(key, None)

    def depth(self) -> int:
        """Keys that are due."""
        return len(self._due)

    def oldest(self) -> float:
        """Seconds for which the first of them has been due."""
        return self._clock() - next(iter(self._due.values())) if self._due else 0.0

    def _make_due(self, key: Key) -> None:
        if key in self._running:
            self._again.add(key)
            return
        self._later.pop(key, None)
        self._due.setdefault(key, self._clock())
        self._changed.set()

    def _ripen(self) -> None:
        """Makes due what has become so."""
        while self._times and self._times[0][0] <= self._clock():
            time, _, key = heapq.heappop(self._times)
            if self._later.get(key) == time:
                del self._later[key]
                self._make_due(key)

    def _next(self) -> float | None:
        """Seconds until a key falls due by itself; None if none will."""
        return max(0.0, self._times[0][0] - self._clock()) if self._times else None
