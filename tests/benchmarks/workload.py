"""What is computed: models and data, the same numbers for every side of a comparison.

Each is prepared once per run into one `.npz` file that every side reads in its own process. Imported by
all virtual environments: numpy and torch only (scikit-learn where the digits' file is made).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CG_REGULARIZATION = 0.1
CG_RTOL = 1e-4

Data = tuple[Tensor, Tensor]
"""Inputs and labels, examples first."""


class Loaded(NamedTuple):
    """Model, in eval mode, and data as tensors."""

    model: nn.Module
    train: Data
    test: Data


@dataclass(frozen=True)
class Workload:
    """A model, what it is trained on and what it is asked; the loss is cross-entropy."""

    name: str
    build: Callable[[], nn.Module]
    """The model with the same start values each time."""
    data: Callable[[], Data]
    """Training examples, then test examples."""
    train: int
    test: int
    epochs: int
    chunk: int = 64
    """Examples per batch and per chunk, in training too."""
    regularization: float = 0.01

    def prepare(self, folder: Path) -> None:
        """Trains the model and writes weights and data into `folder`."""
        model, (x, y) = self.build(), self.data()
        generator = torch.Generator().manual_seed(0)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=3e-3, weight_decay=1e-3)
        for _ in range(self.epochs):
            for batch in torch.randperm(self.train, generator=generator).split(self.chunk):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        stored = {f"parameter.{name}": value.detach() for name, value in model.named_parameters()}
        stored |= {"x": x, "y": y}
        arrays = {name: tensor.numpy() for name, tensor in stored.items()}
        np.savez(self._file(folder), allow_pickle=False, **arrays)

    def load(self, folder: Path) -> Loaded:
        """The workload as `prepare` left it."""
        with np.load(self._file(folder)) as stored:
            model = self.build()
            names = [name for name, _ in model.named_parameters()]
            model.load_state_dict({name: torch.from_numpy(stored[f"parameter.{name}"]) for name in names})
            x, y = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"])
        return Loaded(model.eval(), (x[: self.train], y[: self.train]), (x[self.train :], y[self.train :]))

    def _file(self, folder: Path) -> Path:
        return folder / f"{self.name}.npz"


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, summed over an example's tokens.

    So gradients at drawn labels (Kronfluence) have the Gauss-Newton matrix as their second moment.
    """
    return F.cross_entropy(outputs, labels, reduction="sum")


def initialised(model: nn.Module) -> nn.Module:
    """The model with start values from a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            most = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -most, most, generator=generator)
    return model


def mlp() -> nn.Module:
    """64-128-64-10, 17 226 parameters."""
    layers = [[nn.Linear(i, o), nn.ReLU()] for i, o in pairwise((64, 128, 64, 10))]
    return initialised(nn.Sequential(*chain.from_iterable(layers))[:-1])


def digits() -> Data:
    """Handwritten digits of 64 pixels, in a random order."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).numpy()
    order = order[: DIGITS.train + DIGITS.test]
    x = torch.as_tensor(images[order] / 16, dtype=torch.float32)
    return x, torch.as_tensor(labels[order], dtype=torch.int64)


DIGITS = Workload("digits", mlp, digits, train=1536, test=256, epochs=20)
WORKLOADS = {workload.name: workload for workload in (DIGITS,)}
