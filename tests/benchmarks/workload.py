"""The workload W1: digits through an MLP 64-128-64-10, the same numbers for every side of a comparison.

Prepared once per run into one `.npz` file that each side reads in its own process. Imported by both
virtual environments: numpy and torch only (scikit-learn where the file is made).

Shapes: 1536 training and 256 test images of 64 pixels; P = 17 226 parameters.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 64, 10)
TRAIN, TEST, CHUNK = 1536, 256, 64
REGULARIZATION = 0.01
CG_REGULARIZATION = 0.1
CG_RTOL = 1e-4
EPOCHS = 20


class Workload(NamedTuple):
    """Model and data as tensors."""

    model: nn.Sequential
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def build() -> nn.Sequential:
    """The model with start values of its own generator."""
    generator = torch.Generator().manual_seed(0)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layer = nn.Linear(inputs, outputs)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def prepare(path: Path) -> None:
    """Trains the model on the digits and writes weights and data to `path`."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)[: TRAIN + TEST].numpy()
    x = torch.as_tensor(images[order] / 16, dtype=torch.float32)
    y = torch.as_tensor(labels[order], dtype=torch.int64)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN, generator=generator).split(CHUNK):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    stored = {f"parameter.{name}": value.detach() for name, value in model.named_parameters()}
    stored |= {"x": x, "y": y}
    np.savez(path, allow_pickle=False, **{name: tensor.numpy() for name, tensor in stored.items()})


def load(path: Path) -> Workload:
    """The workload as `prepare` left it."""
    with np.load(path) as stored:
        model = build()
        state = {name: torch.from_numpy(stored[f"parameter.{name}"]) for name, _ in model.named_parameters()}
        model.load_state_dict(state)
        x, y = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"])
    return Workload(model.eval(), (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:]))
