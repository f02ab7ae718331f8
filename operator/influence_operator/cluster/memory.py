"""What passes over a job remember for the next one. Lost at a restart, which costs a request or two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from influence_operator.cluster.errors import ClusterError
from influence_operator.decisions.snapshot import Conflict, DriverReport


@dataclass(frozen=True)
class Outcome:
    """How the actions of one pass went."""

    done: int = 0
    """Actions that changed something."""
    conflicts: tuple[Conflict, ...] = ()
    refusals: tuple[str, ...] = ()
    unretired: str = ""
    """Why the scheduler did not choose all workers that were to go. That fails no pass: the rest of the job
    goes on, and the next decision says when to ask again."""
    error: ClusterError | None = None
    """Why the rest was not done; also set for conflicts and refusals."""


@dataclass
class Memory:
    """What stood in the way of the last pass, and what it wrote."""

    conflicts: tuple[Conflict, ...] = ()
    refusals: tuple[str, ...] = ()
    unretired: str = ""
    written: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None
    """The status that was wanted, and what the API server made of it."""
    driver: tuple[float, DriverReport] | None = None
    """When the driver was last asked, and what it said."""
    looked: datetime | None = None
    """When the last pass was carried through, if one is due by the clock."""

    def learn(self, standing: tuple[Conflict, ...], outcome: Outcome) -> None:
        """Takes up how a pass went; `standing` are the conflicts that it found still there."""
        self.conflicts = tuple(dict.fromkeys(standing + outcome.conflicts))
        well = outcome.done > 0 and outcome.error is None
        if outcome.refusals or well:
            self.refusals = outcome.refusals
        if outcome.unretired or well:
            self.unretired = outcome.unretired
