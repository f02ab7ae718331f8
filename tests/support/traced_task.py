"""A task that computes in a second: a small network on random numbers, with annotations.

The environment changes what the arguments do not say, for the tests that a store of other inputs is
recognized by the numbers themselves: TRACED_MODEL_SCALE, TRACED_DATA_SHIFT.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import barriers
from influence_job.data import ArraySource
from influence_job.task import InfluenceTask

barriers.install()

TRAIN, TEST, FEATURES, CLASSES = 640, 24, 6, 3


def task(hidden: int = 5, train: int = TRAIN, test: int = TEST, double: bool = False) -> InfluenceTask:
    """A network 6-hidden-3 that classifies random points, in float64 if told so."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(train + test, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(dim=1)
    x += float(os.environ.get("TRACED_DATA_SHIFT", "0"))
    model = network(hidden, generator)
    if double:
        x, model = x.double(), model.double()
    return InfluenceTask(
        model=model.eval(),
        loss=loss,
        train=ArraySource(x[:train], y[:train]),
        test=ArraySource(x[train:], y[train:]),
        annotate=annotate,
    )


def network(hidden: int, generator: torch.Generator) -> nn.Module:
    """The network with weights that a generator draws."""
    model = nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))
    scale = float(os.environ.get("TRACED_MODEL_SCALE", "0.5"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def annotate(batch: tuple[Tensor, Tensor], outputs: Tensor) -> Mapping[str, Tensor]:
    return {"label": batch[1], "confidence": outputs.softmax(dim=1).amax(dim=1)}
