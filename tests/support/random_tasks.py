"""What tasks of random numbers share: parameters that are drawn, and examples of three classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_job.data import ArraySource
from influence_job.task import InfluenceTask


def random_task(
    model: nn.Module, features: tuple[int, ...], train: int, test: int, dtype: torch.dtype
) -> InfluenceTask:
    """The model, with parameters drawn anew, and so many examples; always the same."""
    generator = torch.Generator().manual_seed(0)
    model = model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    x = torch.randn(train + test, *features, generator=generator).to(dtype)
    y = torch.randint(3, (train + test,), generator=generator)
    return InfluenceTask(
        model=model.eval(),
        loss=loss,
        train=ArraySource(x[:train], y[:train]),
        test=ArraySource(x[train:], y[train:]),
    )


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])
