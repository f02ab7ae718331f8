"""Which jobs are due for a pass: each at most once at a time, many side by side, failures ever later.

Any number of events of one job before its pass becomes one pass; events during it become one more.
Used by `influence_operator.reconciler`, filled by the watches and by the resync.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

FIRST_BACKOFF = 0.5
"""Seconds after the first failure; doubled with each that follows."""
LAST_BACKOFF = 30.0
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
        if key in self._failures and key not in self._running:
            self.add_after(key, max(0.0, self._failed_at[key] + EVENT_BACKOFF - self._clock()))
        else:
            self._make_due(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """The key is due after so many seconds, if no event makes it due before."""
        time = self._clock() + seconds
        if time >= self._later.get(key, float("inf")):
            return
        self._later[key] = time
        self._count += 1
        heapq.heappush(self._times, (time, self._count, key))
        self._changed.set()

    async def take(self) -> Key:
        """Waits for a key that is due and gives it away; `done` or `failed` must follow."""
        while True:
            wait = self._ripen()
            if self._due:
                key = next(iter(self._due))
                del self._due[key]
                self._running.add(key)
                return key
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), wait)
            except TimeoutError:
                continue

    def done(self, key: Key) -> None:
        """The pass over this key succeeded."""
        self._failures.pop(key, None)
        self._failed_at.pop(key, None)
        self._finish(key)

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

    def depth(self) -> int:
        """Keys that are due."""
        return len(self._due)

    def oldest(self) -> float:
        """Seconds for which the first of them has been due."""
        return self._clock() - next(iter(self._due.values())) if self._due else 0.0

    def _finish(self, key: Key) -> None:
        self._running.discard(key)
        if key in self._again:
            self._again.discard(key)
            self._make_due(key)

    def _make_due(self, key: Key) -> None:
        if key in self._running:
            self._again.add(key)
            return
        self._later.pop(key, None)
        self._due.setdefault(key, self._clock())
        self._changed.set()

    def _ripen(self) -> float | None:
        """Makes due what has become so; returns the seconds until the next, None if there is none."""
        now = self._clock()
        while self._times:
            time, _, key = self._times[0]
            if self._later.get(key) == time:
                if time > now:
                    return time - now
                del self._later[key]
                self._make_due(key)
            heapq.heappop(self._times)
        return None
