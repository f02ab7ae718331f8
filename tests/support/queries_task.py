"""The traced task with test examples to choose, for jobs that score several test sets from one store.

QUERIES_NO_TRAIN in the environment stands for training data that are gone: reading any raises.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from torch import Tensor

import checkpoints_task
import traced_task
from influence_calculator import Checkpoint
from influence_job.data import ArraySource
from influence_job.task import InfluenceTask

TRAIN, TEST = 96, 24
"""Training examples, and test examples to choose from."""


class Gone:
    """Data that were there once."""

    def __len__(self) -> int:
        return TRAIN

    def read(self, start: int, stop: int) -> Any:
        raise RuntimeError(f"training examples {start} to {stop - 1} are gone")


def task(first: int = 0, test: int = 8, double: bool = False, measured: bool = False) -> InfluenceTask:
    """Test examples from `first` on, and two checkpoints.

    `double`: in double precision. `measured`: the test side has a loss of its own.
    """
    own = traced_task.task(train=TRAIN, test=TEST)
    rates = (0.5, 2.0)
    checkpoints = tuple(Checkpoint(checkpoints_task.state(own, i), rate) for i, rate in enumerate(rates))
    x, y = own.test.read(first, first + test)
    train = own.train.read(0, TRAIN)
    if double:
        own.model.double()
        x, train = x.double(), (train[0].double(), train[1])
    return replace(
        own,
        train=Gone() if "QUERIES_NO_TRAIN" in os.environ else ArraySource(*train),
        test=ArraySource(x, y),
        checkpoints=checkpoints,
        measurement=_squares if measured else None,
    )


def _squares(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().sum()
