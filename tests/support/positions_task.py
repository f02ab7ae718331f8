"""A task whose first layer is called at so many positions that EK-FAC scores its gradients by parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_job.data import ArraySource
from influence_job.task import InfluenceTask

TRAIN, TEST = 260, 6
POSITIONS, WIDTH = 32, 24
BY_PARAMETER, TURNED = "0", "3"
"""Names of the layers."""


def task() -> InfluenceTask:
    """In double precision."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), Mean(), nn.Linear(WIDTH, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    x = torch.randn(TRAIN + TEST, POSITIONS, WIDTH, generator=generator).double()
    y = torch.randint(3, (TRAIN + TEST,), generator=generator)
    return InfluenceTask(
        model=model.eval(),
        loss=loss,
        train=ArraySource(x[:TRAIN], y[:TRAIN]),
        test=ArraySource(x[TRAIN:], y[TRAIN:]),
    )


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


class Mean(nn.Module):
    """Over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)
