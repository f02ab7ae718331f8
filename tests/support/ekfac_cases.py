"""What EK-FAC is tested on, as data: layers of every kind, losses of every kind, frozen parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dense_ekfac import Loss, PseudoGradients
from influence_calculator.maths.draws import signs


class Draws(NamedTuple):
    """Which draws."""

    seed: int
    number: int


Sampler = Callable[[Draws, int, Tensor, Tensor], Tensor]
"""(draws, example's index, outputs of a batch of one, its label) -> v of the draw."""


@dataclass(frozen=True)
class EkfacCase:
    """A model with its loss and how the definition draws from it."""

    name: str
    build: Callable[[], nn.Module]
    loss: Loss
    sampler: Sampler
    features: tuple[int, ...]
    labels: Callable[[int, torch.Generator], Tensor]
    """(number of examples, generator) -> labels."""
    frozen: tuple[str, ...] = ()
    vocabulary: int | None = None
    """Number of token ids, for inputs that are token ids."""

    def __repr__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = self.build().double().eval()
        for name in self.frozen:
            model.get_parameter(name).requires_grad_(False)
        return model

    def data(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary is None:
            x = torch.randn(count, *self.features, generator=generator, dtype=torch.float64)
        else:
            x = torch.randint(self.vocabulary, (count, *self.features), generator=generator)
        return x, self.labels(count, generator)

    def sampled(self, seed: int, draw: int) -> PseudoGradients:
        """One draw per example, the one of this number."""
        return lambda index, outputs, y: [self.sampler(Draws(seed, draw), index, outputs, y)]


def _signs(draws: Draws, index: int, count: int) -> Tensor:
    return signs(draws.seed, torch.tensor(index), count, draws.number).double()


def softmax_sampler(mean: bool, ignored: int | None = None) -> Sampler:
    """`(diag(√p) − p √pᵀ) ε / √m` token by token, m tokens that count; tokens stand in dimension 1."""

    def drawn(draws: Draws, index: int, outputs: Tensor, y: Tensor) -> Tensor:
        logits, labels = outputs.reshape(-1, outputs.shape[-1]), y.reshape(-1)
        counted = [s for s in range(len(labels)) if labels[s] != ignored]
        ε = _signs(draws, index, logits.numel()).reshape(logits.shape)
        v = torch.zeros_like(logits)
        for s in counted:
            p = logits[s].softmax(0)
            v[s] = (p.sqrt().diag() - torch.outer(p, p.sqrt())) @ ε[s]
        return (v / (len(counted) if mean else 1) ** 0.5).reshape(outputs.shape)

    return drawn


def scaled_sampler(scale: Callable[[int], float]) -> Sampler:
    """`scale(d) ε`."""

    def drawn(draws: Draws, index: int, outputs: Tensor, _: Tensor) -> Tensor:
        d = outputs.numel()
        return scale(d) * _signs(draws, index, d).reshape(outputs.shape)

    return drawn


def binary_sampler(draws: Draws, index: int, outputs: Tensor, _: Tensor) -> Tensor:
    """`√(p (1 − p) / d) ε`."""
    p = outputs.sigmoid()
    return (p * (1 - p) / p.numel()).sqrt() * _signs(draws, index, p.numel()).reshape(outputs.shape)


def log_cosh(outputs: Tensor, y: Tensor) -> Tensor:
    """Twice differentiable and none of those with a closed form; ∇² is `diag(1 − tanh²)`."""
    return (outputs - y).cosh().log().sum()


def log_cosh_sampler(draws: Draws, index: int, outputs: Tensor, y: Tensor) -> Tensor:
    ε = _signs(draws, index, outputs.numel()).reshape(outputs.shape)
    return (1 - (outputs - y).tanh() ** 2).sqrt() * ε


def per_token(reduction: str, ignored: int = -100) -> Loss:
    """Cross-entropy over tokens of `[n, S, C]`, as language models write it."""

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        flat = outputs.reshape(-1, outputs.shape[-1])
        return F.cross_entropy(flat, y.reshape(-1), reduction=reduction, ignore_index=ignored)

    return loss


def _classes(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda count, generator: torch.randint(3, (count, *shape), generator=generator)


def _some_ignored(count: int, generator: torch.Generator) -> Tensor:
    labels = torch.randint(3, (count, 4), generator=generator)
    labels[:, 1] = 7
    labels[0, 2:] = 7
    return labels


def _reals(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def _bits(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count, 2), generator=generator).double()


def _mlp(outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, outputs)
    )


def _tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


class _Pooled(nn.Module):
    """A layer over tokens, called twice, then a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).tanh()).tanh().mean(1))


class _SelfAttention(nn.Module):
    """One layer of a transformer whose projections are modules."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        answer: Tensor = x + self.out(seen)
        return answer


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 2), bias=False),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, padding="same"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def _conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv1d(3, 2, 2, padding="same", padding_mode="reflect", bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def _conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 2, (2, 2, 1), stride=(1, 2, 1), padding=(0, 1, 0), padding_mode="replicate"),
        nn.Tanh(),
        nn.Conv3d(2, 2, (1, 2, 2), dilation=(1, 1, 2)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


def _groups() -> nn.Module:
    """Two groups of several positions; a group per channel of several; three groups of one position."""
    return nn.Sequential(
        nn.Conv2d(4, 6, 2, groups=2),
        nn.Tanh(),
        nn.Conv2d(6, 6, 2, padding=(1, 0), groups=6, bias=False),
        nn.Tanh(),
        nn.Conv2d(6, 3, (3, 1), groups=3),
        nn.Flatten(),
    )


class _Words(nn.Module):
    """Tokens of which one is padding, places looked up once for all examples, attention that sees padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3, padding_idx=0)
        self.places = nn.Embedding(4, 3)
        self.attention = _SelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        own = self.words(x) + self.places(torch.arange(x.shape[1]))
        seen: Tensor = self.attention(own.tanh()).tanh().mean(1)
        return seen


class _Pairs(nn.Module):
    """An embedding called twice, in a vocabulary of which much is never seen."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 3)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.first(self.words(x[:, :2])).tanh() * self.second(self.words(input=x[:, 2:])).tanh()
        return halves.sum(1)


def _transposed() -> nn.Module:
    """Hugging Face's layers `x @ weight + bias`."""
    return nn.Sequential(Conv1D(5, 4), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), Conv1D(3, 4))


def _transposed_tokens() -> nn.Module:
    return nn.Sequential(Conv1D(5, 3), nn.Tanh(), Conv1D(3, 5))


SOFTMAX = softmax_sampler(mean=True)

MLP_CASE = EkfacCase("mlp", _mlp(3), F.cross_entropy, SOFTMAX, (4,), _classes())
TOKENS_MEAN = EkfacCase("tokens, mean", _tokens, per_token("mean"), SOFTMAX, (4, 3), _classes(4))
WORDS_CASE = EkfacCase("words", _Words, F.cross_entropy, SOFTMAX, (4,), _classes(), vocabulary=5)
GROUPS_CASE = EkfacCase("groups", _groups, F.cross_entropy, SOFTMAX, (4, 3, 3), _classes())

EKFAC_CASES = (
    MLP_CASE,
    EkfacCase("one linear", lambda: nn.Linear(4, 3), nn.CrossEntropyLoss(), SOFTMAX, (4,), _classes()),
    EkfacCase("squared error", _mlp(2), F.mse_loss, scaled_sampler(lambda d: (2 / d) ** 0.5), (4,), _reals),
    EkfacCase(
        "summed squares",
        _mlp(2),
        nn.MSELoss(reduction="sum"),
        scaled_sampler(lambda _: 2**0.5),
        (4,),
        _reals,
    ),
    EkfacCase("binary", _mlp(2), F.binary_cross_entropy_with_logits, binary_sampler, (4,), _bits),
    EkfacCase("any loss", _mlp(2), log_cosh, log_cosh_sampler, (4,), _reals),
    TOKENS_MEAN,
    EkfacCase("tokens, sum", _tokens, per_token("sum"), softmax_sampler(mean=False), (4, 3), _classes(4)),
    EkfacCase(
        "tokens, ignored",
        _tokens,
        per_token("mean", ignored=7),
        softmax_sampler(mean=True, ignored=7),
        (4, 3),
        _some_ignored,
    ),
    EkfacCase("attention", _SelfAttention, per_token("mean"), SOFTMAX, (4, 3), _classes(4)),
    EkfacCase("called twice", _Pooled, F.cross_entropy, SOFTMAX, (4, 3), _classes()),
    EkfacCase("conv", _conv, F.cross_entropy, SOFTMAX, (2, 4, 6), _classes()),
    EkfacCase("conv1d", _conv1d, F.cross_entropy, SOFTMAX, (2, 6), _classes()),
    EkfacCase("conv3d", _conv3d, F.cross_entropy, SOFTMAX, (1, 2, 2, 3), _classes()),
    GROUPS_CASE,
    EkfacCase(
        "groups, frozen parts",
        _groups,
        F.cross_entropy,
        SOFTMAX,
        (4, 3, 3),
        _classes(),
        ("0.bias", "4.weight"),
    ),
    EkfacCase(
        "frozen parts",
        _mlp(3),
        F.cross_entropy,
        SOFTMAX,
        (4,),
        _classes(),
        ("0.weight", "4.bias"),
    ),
    WORDS_CASE,
    EkfacCase("pairs of words", _Pairs, F.cross_entropy, SOFTMAX, (4,), _classes(), vocabulary=6),
    EkfacCase(
        "a category",
        lambda: nn.Sequential(nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, 3)),
        F.cross_entropy,
        SOFTMAX,
        (),
        _classes(),
        vocabulary=6,
    ),
    EkfacCase(
        "an embedding alone, of tokens",
        lambda: nn.Embedding(5, 3, padding_idx=1),
        per_token("mean"),
        SOFTMAX,
        (4,),
        _classes(4),
        vocabulary=4,
    ),
    EkfacCase("transposed", _transposed, F.cross_entropy, SOFTMAX, (4,), _classes()),
    EkfacCase(
        "transposed tokens, frozen parts",
        _transposed_tokens,
        per_token("mean"),
        SOFTMAX,
        (4, 3),
        _classes(4),
        ("0.bias", "2.weight"),
    ),
    EkfacCase("frozen layer", _mlp(3), F.cross_entropy, SOFTMAX, (4,), _classes(), ("0.weight", "0.bias")),
)
