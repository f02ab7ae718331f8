"""Handwritten digits: a small network, trained in a second, whose mistakes are traced to its training images.

The 1797 images of 8 × 8 pixels are the test set of "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0), those that scikit-learn calls digits. A fixed
permutation gives 1400 of them to training, 300 to testing; the last 97 are not used. The network trains on
ONE thread from fixed seeds, so that every call in every process returns the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_job.data import ArraySource
from influence_job.task import InfluenceTask

TRAIN = 1400
TEST = 300


def task(
    hidden: int = 64,
    epochs: int = 30,
    learning_rate: float = 0.1,
    weight_decay: float = 0.001,
    seed: int = 0,
) -> InfluenceTask:
    """A trained network 64-hidden-10 and the digits.

    Args:
        hidden: width of the hidden layer.
        epochs: passes over the training images, in mini-batches of 100.
        learning_rate: of gradient descent with momentum 0.9.
        weight_decay: of the descent; the traced loss is cross-entropy alone.
        seed: of the weights and of the order of the mini-batches. The split is the same for all.
    """
    images, labels = _digits()
    with _one_thread():
        model = _train(images[:TRAIN], labels[:TRAIN], hidden, epochs, learning_rate, weight_decay, seed)
    return InfluenceTask(
        model=model.eval(),
        loss=_loss,
        train=ArraySource(images[:TRAIN], labels[:TRAIN]),
        test=ArraySource(images[TRAIN:], labels[TRAIN:]),
        annotate=_annotate,
        data_version="scikit-learn digits, split 1",
    )


def _digits() -> tuple[Tensor, Tensor]:
    """Images `[1700, 64]` scaled to 0…1 and labels `[1700]`, training images first."""
    with np.load(Path(__file__).with_suffix(".npz")) as stored:
        images, labels = (torch.from_numpy(stored[name]) for name in ("images", "labels"))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: TRAIN + TEST]
    return images[order].float() / 16, labels[order].long()


def _train(
    images: Tensor,
    labels: Tensor,
    hidden: int,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    # The layers' own start values come from torch's global generator, which is left as it was.
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(images.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, 10))
    for parameter in model.parameters():
        bound = parameter.shape[-1] ** -0.5
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    # Plain momentum: torch.optim loads torch's compiler, seconds in every process that calls this.
    parameters = list(model.parameters())
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(100):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, momentum, gradient in zip(parameters, momenta, gradients, strict=True):
                    momentum.mul_(0.9).add_(gradient).add_(parameter, alpha=weight_decay)
                    parameter.sub_(momentum, alpha=learning_rate)
    return model


def _loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def _annotate(batch: tuple[Tensor, Tensor], outputs: Tensor) -> Mapping[str, Tensor]:
    return {"label": batch[1], "predicted": outputs.argmax(dim=1)}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums on several threads are added in another order, which changes bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
