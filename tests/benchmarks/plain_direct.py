"""Solving with the dense Hessian of `torch.func` in float64: what numbers are held to.

Uses nothing of the library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from plain_cg import Data, per_example_gradients
from torch import Tensor, nn
from torch.func import functional_call, hessian


def plain_direct(model: nn.Module, train: Data, test: Data, regularization: float) -> Tensor:
    """Influences `[T, N]` of every training example on every test example."""
    model = model.double()
    (x, y), (x_test, y_test) = ((inputs.double(), labels) for inputs, labels in (train, test))
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def mean_loss(values: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    rows = [
        torch.cat([block.reshape(own.numel(), -1) for block in row.values()], dim=1)
        for row, own in zip(hessian(mean_loss)(parameters).values(), parameters.values(), strict=True)
    ]
    H = torch.cat(rows)
    H.diagonal().add_(regularization)
    test_gradients = per_example_gradients(model, parameters, (x_test, y_test))
    return torch.linalg.solve(H, test_gradients.T).T @ per_example_gradients(model, parameters, (x, y)).T
