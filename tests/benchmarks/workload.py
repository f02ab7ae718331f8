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

VOCABULARY, TOKENS = 64, 64

CG_REGULARIZATION = 0.1
CG_RTOL = 1e-4

FEW_RESIDUAL = 1e-4
"""Norm of the residual at which conjugate gradients end on `FEW_PARAMETERS`."""

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
        train, test = slice(self.train), slice(self.train, self.train + self.test)
        return Loaded(model.eval(), (x[train], y[train]), (x[test], y[test]))

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
    return perceptron(64, 128, 64, 10)


def small_mlp() -> nn.Module:
    """64-24-10, 1 810 parameters."""
    return perceptron(64, 24, 10)


def perceptron(*widths: int) -> nn.Module:
    """Linear layers between these widths, with ReLUs."""
    layers = [[nn.Linear(i, o), nn.ReLU()] for i, o in pairwise(widths)]
    return initialised(nn.Sequential(*chain.from_iterable(layers))[:-1])


def conv_net() -> nn.Module:
    """Four 3×3 convolutions from 3×32×32 to 10 classes, 242 122 parameters."""
    layers: list[nn.Module] = []
    for (inputs, outputs), stride in zip(pairwise((3, 32, 64, 128, 128)), (1, 2, 2, 2), strict=True):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]
    return initialised(nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 10)))


class Block(nn.Module):
    """A layer with normalisation first: causal attention of 4 heads, then an MLP 4 times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = 4
        self.normalise = nn.LayerNorm(width, elementwise_affine=False)
        self.attend = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """`[n, S, width]` to the same."""
        n, S, width = h.shape
        each = self.attend(self.normalise(h)).view(n, S, 3, self.heads, -1)
        query, key, value = each.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        h = h + self.merge(attended.transpose(1, 2).reshape(n, S, width))
        return h + self.down(F.gelu(self.up(self.normalise(h))))


class Transformer(nn.Module):
    """Reads ids `[n, S]`, returns logits `[n, C, S]` of the id that follows.

    Ids and positions are embedded at random and stay so: no peer treats embeddings.
    """

    def __init__(self, vocabulary: int, tokens: int, width: int, depth: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Embedding(vocabulary, width).requires_grad_(False)
        self.place = nn.Parameter(torch.empty(tokens, width), requires_grad=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.embed(ids) + self.place))
        return logits.mT


def transformer() -> nn.Module:
    """4 layers of width 256, 3 171 392 tracked parameters."""
    return initialised(Transformer(VOCABULARY, TOKENS, width=256, depth=4))


def digits() -> Data:
    """Handwritten digits of 64 pixels, in a random order; all there are."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).numpy()
    x = torch.as_tensor(images[order] / 16, dtype=torch.float32)
    return x, torch.as_tensor(labels[order], dtype=torch.int64)


def smooth_images() -> Data:
    """Images 3×32×32 of 10 classes: each class has a smooth pattern, each image a smooth one of its own."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (IMAGES.train + IMAGES.test,), generator=generator)
    coarse = torch.randn(10, 3, 4, 4, generator=generator)[y]
    coarse = coarse + torch.randn(len(y), 3, 4, 4, generator=generator)
    return F.interpolate(coarse, size=(32, 32), mode="bilinear"), y


def sentences() -> Data:
    """Ids drawn from a random chain in which each id has some likely successors, and what follows each."""
    generator = torch.Generator().manual_seed(0)
    chance = (3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)).softmax(1)
    ids = torch.randint(VOCABULARY, (SENTENCES.train + SENTENCES.test, 1), generator=generator)
    for _ in range(TOKENS):
        following = torch.multinomial(chance[ids[:, -1]], 1, generator=generator)
        ids = torch.cat([ids, following], dim=1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


DIGITS = Workload("digits", mlp, digits, train=1536, test=256, epochs=20)
FEW_PARAMETERS = Workload(
    "few_parameters", small_mlp, digits, train=1536, test=128, epochs=20, regularization=0.1
)
IMAGES = Workload("images", conv_net, smooth_images, train=1024, test=128, epochs=2)
SENTENCES = Workload("sentences", transformer, sentences, train=512, test=64, epochs=1, chunk=32)
WORKLOADS = {workload.name: workload for workload in (DIGITS, FEW_PARAMETERS, IMAGES, SENTENCES)}
