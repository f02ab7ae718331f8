"""The traced task with states that the model had before: what TracIn sums over.

The environment changes what the arguments do not say: CHECKPOINTS_RATE, the last checkpoint's learning rate.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import traced_task
from influence_calculator import Checkpoint
from influence_job.task import InfluenceTask


def task(
    rates: Sequence[float] = (0.5, 2.0),
    train: int = 96,
    test: int = 8,
    shape_of: str = "",
    measured: bool = False,
) -> InfluenceTask:
    """One checkpoint per learning rate.

    `shape_of` names a parameter that the last of them has otherwise; `measured`: the test side has a loss of
    its own.
    """
    own = traced_task.task(train=train, test=test)
    states = [state(own, seed) for seed in range(len(rates))]
    if shape_of:
        states[-1][shape_of] = torch.ones(1)
    given = [*rates[:-1], float(os.environ.get("CHECKPOINTS_RATE", rates[-1]))] if rates else []
    made = replace(own, checkpoints=tuple(map(Checkpoint, states, given)))
    return replace(made, measurement=lambda outputs, _: outputs.square().sum()) if measured else made


def state(own: InfluenceTask, seed: int) -> dict[str, Tensor]:
    """A state of the model with other numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(v.shape, generator=generator) for name, v in own.model.state_dict().items()}
