"""A task whose curvature is known, so that every way in which a solve can end happens on purpose.

The loss of every training example is `½ Σ_j D_j θ_j²`, so H = diag(D). The measurement of a test example
is `c · θ`, so its gradient is c: test example i gives right-hand side `RIGHT_HAND_SIDES[i]`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from influence_job.data import ArraySource
from influence_job.task import InfluenceTask

D = torch.tensor([1.0, 2.0, 4.0, -3.0, 2e38])
"""The sum over the training examples of the last one overflows float32."""
RIGHT_HAND_SIDES = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0, 0.0],  # an eigenvector: converges in one iteration
        [1.0, 1.0, 1.0, 0.0, 0.0],  # three eigenvectors: three iterations
        [0.0, 0.0, 0.0, 1.0, 0.0],  # negative curvature
        [0.0, 0.0, 0.0, 0.0, 1.0],  # infinite curvature
    ]
)


class Quadratic(nn.Module):
    """Parameters without inputs; the output is θ for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta + 0 * x


def task(zeros: int = 0) -> InfluenceTask:
    """With so many right-hand sides more that are zero."""
    right_hand_sides = torch.cat([RIGHT_HAND_SIDES, torch.zeros(zeros, 5)])
    return InfluenceTask(
        model=Quadratic().eval(),
        loss=lambda outputs, _: 0.5 * (D * outputs**2).sum(),
        measurement=lambda outputs, batch: (outputs * batch[0]).sum(),
        train=ArraySource(torch.zeros(6, 5)),
        test=ArraySource(right_hand_sides),
    )
