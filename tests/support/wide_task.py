"""A task whose gradients are large enough that a worker's memory tells what it holds of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_job.data import ArraySource
from influence_job.task import InfluenceTask

FEATURES, CLASSES = 64, 10


def task(hidden: int = 1200, train: int = 256, test: int = 48, buffer: int = 0) -> InfluenceTask:
    """An MLP 64-hidden-hidden-10 on random points; at 1200 a gradient takes 6 MB. `buffer`: of how many."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(train + test, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (train + test,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(hidden, CLASSES)).eval()
        model.register_buffer("table", torch.ones(buffer))
    return InfluenceTask(
        model, loss, train=ArraySource(x[:train], y[:train]), test=ArraySource(x[train:], y[train:])
    )


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])
