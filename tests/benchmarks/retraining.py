"""The digits example trained again on random halves of its training images: what attributions are held to.

`python tests/benchmarks/retraining.py` makes `retrained_digits.npz` beside this file; `lds` reads it.

Shapes: K subsets, R seeds, N training and T test images, M models trained side by side, B images of a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

DATA = Path(__file__).parent / "retrained_digits.npz"
BATCH = 100
MOMENTUM = 0.9


@dataclass(frozen=True)
class Training:
    """How every model is trained: the defaults of `influence_job.examples.digits.task`."""

    hidden: int = 64
    epochs: int = 30
    learning_rate: float = 0.1
    weight_decay: float = 0.001


@dataclass(frozen=True)
class Plan:
    """What the stored data was made with; other numbers need another `retrained_digits.npz`."""

    subsets: int = 128
    """K, halves of the training images drawn without replacement."""
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    """Of weights and order. The model that influences are computed at has seed 0."""
    draw: int = 0
    """Seed of the subsets."""
    train: int = 1400
    test: int = 300


class Retrained(NamedTuple):
    """Subsets and what models trained on them lose."""

    masks: NDArray[np.bool_]
    """`[K, N]`: whether the subset holds the training image."""
    losses: NDArray[np.float32]
    """`[K, R, T]`: cross-entropy of each test image."""


def settings() -> dict[str, object]:
    """Everything that determines the stored numbers but for rounding."""
    return {**asdict(Plan()), **asdict(Training()), "batch": BATCH, "momentum": MOMENTUM}


def subsets(plan: Plan) -> Tensor:
    """`[K, N/2]`: the images of each subset in ascending order."""
    generator = torch.Generator().manual_seed(plan.draw)
    halves = [torch.randperm(plan.train, generator=generator)[: plan.train // 2] for _ in range(plan.subsets)]
    return torch.stack(halves).sort(dim=1).values


def retrained_losses(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], chosen: Tensor, seed: int, training: Training
) -> Tensor:
    """`[M, T]`: test losses of one model per row of `chosen`, all from the same start and in the same order.

    Gradient descent with momentum as in `influence_job.examples.digits`, with the derivatives written out,
    since all models take each step in one batched product.
    """
    images, labels = train
    generator = torch.Generator().manual_seed(seed)
    models, count = chosen.shape
    shapes = [(training.hidden, images.shape[1]), (training.hidden,), (10, training.hidden), (10,)]
    parameters = []
    for shape in shapes:
        bound = shape[-1] ** -0.5
        start = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        parameters.append(start.repeat(models, *[1] * len(shape)))
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    for _ in range(training.epochs):
        for batch in torch.randperm(count, generator=generator).split(BATCH):
            rows = chosen[:, batch]
            gradients = _gradients(parameters, images[rows], labels[rows])
            for parameter, momentum, gradient in zip(parameters, momenta, gradients, strict=True):
                momentum.mul_(MOMENTUM).add_(gradient).add_(parameter, alpha=training.weight_decay)
                parameter.sub_(momentum, alpha=training.learning_rate)
    outputs = _forward(parameters, test[0].expand(models, *test[0].shape))[1]
    return F.cross_entropy(outputs.transpose(1, 2), test[1].expand(models, -1), reduction="none")


def load(path: Path = DATA) -> Retrained:
    """The stored data.

    Raises:
        ValueError: it was made with other settings than this program has.
    """
    with np.load(path) as stored:
        made_with = str(stored["settings"])
        masks = np.unpackbits(stored["masks"], axis=1, count=Plan().train).astype(np.bool_)
        losses = stored["losses"]
    if made_with != repr(settings()):
        raise ValueError(
            f"{path}: expected data made with {settings()}, it was made with {made_with}; "
            f"run `python {Path(__file__).name}`"
        )
    return Retrained(masks, losses)


def save(path: Path, masks: NDArray[np.bool_], losses: NDArray[np.float32]) -> None:
    """Writes masks as bits, losses in float32 and the settings they come from."""
    stored: Mapping[str, NDArray[np.generic]] = {
        "masks": np.packbits(masks, axis=1),
        "losses": losses,
        "settings": np.array(repr(settings())),
    }
    np.savez_compressed(path, allow_pickle=False, **stored)


def main() -> None:
    """Trains K · R models and stores what they lose."""
    # Here, for whoever reads the stored data needs neither the images nor scikit-learn.
    from influence_job.examples import digits

    torch.set_num_threads(1)
    plan, task = Plan(), digits.task(epochs=0)
    train, test = task.train.read(0, plan.train), task.test.read(0, plan.test)
    chosen = subsets(plan)
    losses = []
    for seed in plan.seeds:
        losses.append(retrained_losses(train, test, chosen, seed, Training()))
        print(f"seed {seed}: mean test loss {losses[-1].mean():.4f}", file=sys.stderr, flush=True)
    masks = torch.zeros(plan.subsets, plan.train, dtype=torch.bool).scatter_(1, chosen, value=True)
    save(DATA, masks.numpy(), torch.stack(losses, dim=1).numpy())


def _forward(parameters: list[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden values `[M, B, hidden]` and outputs `[M, B, 10]`."""
    first, first_bias, last, last_bias = parameters
    hidden = torch.baddbmm(first_bias[:, None], images, first.transpose(1, 2)).relu_()
    return hidden, torch.baddbmm(last_bias[:, None], hidden, last.transpose(1, 2))


def _gradients(parameters: list[Tensor], images: Tensor, labels: Tensor) -> list[Tensor]:
    """Of each model's mean cross-entropy over its batch, by its own parameters."""
    hidden, outputs = _forward(parameters, images)
    by_output = (outputs.softmax(dim=2) - F.one_hot(labels, 10)) / images.shape[1]
    by_hidden = by_output.bmm(parameters[2]) * (hidden > 0)
    return [
        by_hidden.transpose(1, 2).bmm(images),
        by_hidden.sum(dim=1),
        by_output.transpose(1, 2).bmm(hidden),
        by_output.sum(dim=1),
    ]


if __name__ == "__main__":
    main()
