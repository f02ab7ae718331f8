"""A task of small images in float32, captured with channels last unless its model takes a view of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from influence_job.task import InfluenceTask
from random_tasks import random_task

TRAIN, TEST = 260, 6
TURNED, BY_PARAMETER = "first", "second"
"""How EK-FAC scores the convolutions."""


class Net(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, stride=2)
        self.head = nn.Linear(16 * 25, 3)
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        images = self.second(self.first(x).relu()).relu()
        return self.head(images.view(len(x), -1) if self.view else images.flatten(1))


def task(view: bool = False) -> InfluenceTask:
    """`view`: how the model makes rows of images, a view of which those with channels last do not have."""
    return random_task(Net(view), (3, 12, 12), TRAIN, TEST, torch.float32)
