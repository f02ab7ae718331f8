"""A task whose first layer is called at so many positions that EK-FAC scores its gradients by parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from influence_job.task import InfluenceTask
from random_tasks import random_task

TRAIN, TEST = 260, 6
POSITIONS, WIDTH = 32, 24
BY_PARAMETER, TURNED = "0", "3"
"""Names of the layers."""


def task() -> InfluenceTask:
    """In double precision."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), Mean(), nn.Linear(WIDTH, 3))
    return random_task(model, (POSITIONS, WIDTH), TRAIN, TEST, torch.float64)


class Mean(nn.Module):
    """Over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)
