"""How long the next attempt waits: 10 s after the first counted failure, doubling to 5 minutes."""

from __future__ import annotations

from datetime import timedelta

FIRST_SECONDS = 10
LONGEST_SECONDS = 300


def delay(counted_failures: int, counted: bool) -> timedelta:
    """The delay after an attempt; one that does not count waits the shortest time.

    Args:
        counted_failures: of the job, the attempt that ended included.
        counted: whether that attempt is one of them.
    """
    if not counted:
        return timedelta(seconds=FIRST_SECONDS)
    doublings = min(max(0, counted_failures - 1), 10)
    return timedelta(seconds=min(FIRST_SECONDS * 2**doublings, LONGEST_SECONDS))
