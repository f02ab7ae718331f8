"""The task of W4: two parameters, so that nothing but the job itself takes time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from influence_job.data import ArraySource
from influence_job.task import InfluenceTask


def task(train: int) -> InfluenceTask:
    """`y ≈ w x + b` on `train` training examples and one test example."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(train + 1, 1, generator=generator)
    y = 2 * x + 0.1 * torch.randn(train + 1, 1, generator=generator)
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1.9)
        model.bias.fill_(0.1)
    return InfluenceTask(
        model=model.eval(),
        loss=_loss,
        train=ArraySource(x[:train], y[:train]),
        test=ArraySource(x[train:], y[train:]),
        data_version=f"line of {train}",
    )


def _loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (outputs - batch[1]).square().mean()
