"""What one policy contributes to a pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from influence_operator.decisions.actions import Action

SHORTEST_SECONDS = 1.0
"""No policy asks for the next pass sooner."""


@dataclass(frozen=True)
class Step:
    """Actions, in order, and when the policy wants to be asked again though nothing changes."""

    actions: tuple[Action, ...] = ()
    due: tuple[float, ...] = ()
    """Seconds from now."""


def together(steps: Iterable[Step]) -> Step:
    """The steps one after the other."""
    taken = list(steps)
    return Step(tuple(a for s in taken for a in s.actions), tuple(d for s in taken for d in s.due))


def soonest(due: Iterable[float]) -> float | None:
    """Seconds until the first of them."""
    return min((max(SHORTEST_SECONDS, seconds) for seconds in due), default=None)
