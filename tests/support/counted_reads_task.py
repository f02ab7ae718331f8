"""The traced task, whose training data note in the file READS what is read of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import traced_task
from influence_calculator.maths import training_batches
from influence_job.task import DataSource, InfluenceTask

READS = "COUNTED_READS"
"""The variable that names the file: a line `start stop` per read."""


@dataclass(frozen=True)
class Noted:
    """A source that notes its reads, from however many processes."""

    source: DataSource
    file: Path

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> Any:
        with self.file.open("a") as reads:
            reads.write(f"{start} {stop}\n")
        return self.source.read(start, stop)


def task(keeps: bool = True, **arguments: Any) -> InfluenceTask:
    """If not told so, a solver that goes over the training set again and again keeps nothing of it."""
    if not keeps:
        training_batches.KEPT_BYTES = 0
    own = traced_task.task(**arguments)
    return replace(own, train=Noted(own.train, Path(os.environ[READS])))
