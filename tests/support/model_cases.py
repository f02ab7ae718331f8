"""Models that tests run on, as data: a small trained model, its loss, a training and a test set.

Every case is deterministic and takes milliseconds. Models with a nonlinearity are trained to near a
minimum, where the Hessian is nearly positive, and remembered, so that a suite trains each once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
Data = tuple[Tensor, Tensor]

TRAIN, TEST = 23, 7
"""Sizes without a common divisor, so that last batches are short."""


@dataclass(frozen=True)
class ModelCase:
    """One model with its data, in float64."""

    name: str
    build: Callable[[], nn.Module]
    """The model before training."""
    loss: Loss
    features: tuple[int, ...]
    """Shape of one input."""
    classes: int | None
    """Number of labels; None for targets that are real vectors of `targets` entries."""
    targets: int = 1
    steps: int = 200
    """Steps of LBFGS."""
    penalty: float = 3e-3
    """Weight decay during training only: keeps separable data from infinite weights."""
    captured: bool = True
    """Whether every layer is one that hooks capture (Linear, convolutions)."""
    vocabulary: int | None = None
    """Number of token ids, for inputs that are token ids."""

    def __repr__(self) -> str:
        return self.name

    def data(self, count: int, seed: int) -> Data:
        """Inputs and targets; a fixed linear map with noise gives the targets."""
        generator = torch.Generator().manual_seed(seed)
        x = self._inputs(count, generator)
        values = (x if self.vocabulary is None else F.one_hot(x, self.vocabulary).double()).reshape(count, -1)
        width = self.classes or self.targets
        weight = torch.randn(
            values.shape[1], width, generator=torch.Generator().manual_seed(99), dtype=torch.float64
        )
        noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
        signal = values @ weight / values.shape[1] ** 0.5 + 0.5 * noise
        return x, signal.argmax(1) if self.classes else signal

    def _inputs(self, count: int, generator: torch.Generator) -> Tensor:
        if self.vocabulary is not None:
            return torch.randint(self.vocabulary, (count, *self.features), generator=generator)
        return torch.randn(count, *self.features, generator=generator, dtype=torch.float64)

    def train(self) -> Data:
        return self.data(TRAIN, seed=1)

    def test(self) -> Data:
        return self.data(TEST, seed=2)

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A fresh copy of the trained model."""
        return copy.deepcopy(_trained(self)).to(dtype)


@cache
def _trained(case: ModelCase) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.build().double()
    x, y = case.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=case.steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum(((p**2).sum() for p in parameters), torch.zeros(()))
        value = case.loss(model(x), y) + case.penalty / 2 * decay
        value.backward()
        return value

    optimizer.step(closure)
    optimizer.zero_grad()
    return model.eval()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))


class _Shared(nn.Module):
    """A frozen layer; two layers with one weight, of which the second is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(self.frozen(x).tanh()).tanh())
        answer: Tensor = self.head(self.second(hidden.tanh()).tanh())
        return answer


def _conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(6, 3)
    )


def _conv2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def _conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


class _Transformer(nn.Module):
    """An embedding of four tokens and one layer with one head of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.place = nn.Parameter(torch.randn(4, 4) / 2)
        self.norm = nn.LayerNorm(4)
        self.query, self.key, self.value = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        own = self.embedding(tokens) + self.place
        normed = self.norm(own)
        seen = F.scaled_dot_product_attention(self.query(normed), self.key(normed), self.value(normed))
        answer: Tensor = self.head((own + seen).mean(1))
        return answer


class _Attention(nn.Module):
    """Modules of which hooks see nothing or only a part, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=0)
        self.place = nn.Parameter(torch.randn(4, 4) / 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.layer_norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.batch_norm.running_mean = torch.randn(4) / 4
        self.batch_norm.running_var = 0.5 + torch.rand(4)
        self.shift = nn.Conv1d(4, 4, 1, groups=4)
        self.shift.weight.requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        own = self.embedding(tokens) + self.place
        seen = self.layer_norm(own + self.attention(own, own, own, need_weights=False)[0])
        answer: Tensor = self.head(self.batch_norm(self.shift(seen.mT).tanh().mean(2)))
        return answer


class _Sequence(nn.Module):
    """A layer with two heads of attention over vectors, whose projections are modules."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.out, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = [part(x).unflatten(2, (2, 2)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        seen = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        answer: Tensor = self.head((x + self.out(seen)).tanh().mean(1))
        return answer


class _MultiheadSequence(nn.Module):
    """The same with torch's module, of whose projections hooks see nothing, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.out, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        answer: Tensor = self.head(self.out(seen).tanh().mean(1))
        return answer


def _images() -> nn.Module:
    """Kernels, strides and images of which height and width differ."""
    return nn.Sequential(
        nn.Conv2d(2, 2, (3, 2), stride=(1, 2), padding=(1, 0)),
        nn.Tanh(),
        nn.Conv2d(2, 4, (2, 3), groups=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


LINEAR = ModelCase("linear regression", lambda: nn.Linear(4, 2), F.mse_loss, (4,), None, targets=2)
LOGISTIC = ModelCase("logistic regression", lambda: nn.Linear(4, 3), F.cross_entropy, (4,), 3)
MLP = ModelCase("mlp", _mlp, F.cross_entropy, (4,), 3)
MLP_REGRESSION = ModelCase(
    "mlp regression",
    lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
    F.mse_loss,
    (4,),
    None,
    targets=2,
)
SHARED = ModelCase("mlp with frozen and shared parameters", _Shared, F.cross_entropy, (4,), 3, captured=False)
CONV1D = ModelCase("conv1d", _conv1d, F.cross_entropy, (2, 7), 3)
CONV2D = ModelCase("conv2d", _conv2d, F.cross_entropy, (2, 6, 6), 3)
CONV3D = ModelCase("conv3d", _conv3d, F.cross_entropy, (1, 3, 3, 3), 3)
TRANSFORMER = ModelCase(
    "transformer", _Transformer, F.cross_entropy, (4,), 3, steps=1000, captured=False, vocabulary=5
)
"""Not among CASES, whose inputs can be perturbed."""
ATTENTION = ModelCase(
    "attention",
    lambda: _Attention().eval(),
    F.cross_entropy,
    (4,),
    3,
    steps=1000,
    captured=False,
    vocabulary=5,
)
"""As TRANSFORMER."""
SEQUENCE = ModelCase("sequence of vectors", _Sequence, F.cross_entropy, (3, 4), 3, steps=1000)
MULTIHEAD_SEQUENCE = ModelCase(
    "sequence of vectors, multihead",
    _MultiheadSequence,
    F.cross_entropy,
    (3, 4),
    3,
    steps=1000,
    captured=False,
)
"""Transformers whose inputs can be perturbed. They take a second to train, so that CASES do without them."""
IMAGES = ModelCase("images", _images, F.cross_entropy, (2, 4, 6), 3)
"""For what depends on the shape of an image alone."""

CASES = (LINEAR, LOGISTIC, MLP, MLP_REGRESSION, SHARED, CONV1D, CONV2D, CONV3D)
CAPTURED_CASES = tuple(case for case in CASES if case.captured)


def linear_regression_curvature(x: Tensor, targets: int) -> Tensor:
    """`nn.Linear` with a bias under mean squared error: `(2/d) I ⊗ E[x̃ x̃ᵀ]`, the weights' columns first."""
    n, features = x.shape
    inputs = torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1)
    moment = 2 / targets * inputs.T @ inputs / n
    curvature = torch.zeros(targets * (features + 1), targets * (features + 1), dtype=x.dtype)
    for output in range(targets):
        weight = torch.arange(output * features, (output + 1) * features)
        own = torch.cat([weight, torch.tensor([targets * features + output])])
        curvature[own[:, None], own] = moment
    return curvature
