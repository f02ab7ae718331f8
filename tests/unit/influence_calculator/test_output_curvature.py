"""The loss's second derivative by a model's outputs: of losses with a closed form, and of all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from influence_calculator.maths.blocks import BlockMode, block_layout
from influence_calculator.maths.curvature import SecondOrderMode, products
from influence_calculator.maths.directional import GRAPH_COPIES, WORKSPACE_BYTES
from influence_calculator.maths.errors import UnsupportedLossError
from influence_calculator.maths.expectation import Expectation, OutputExpectation
from influence_calculator.maths.objective import IndexedBatch, xy_objective
from influence_calculator.maths.output_curvature import _SecondDerivatives, output_curvature
from influence_calculator.torch import EkfacInfluence

Loss = Callable[[Tensor, Tensor], Tensor]
N, Q, MANY = 5, 3, 5000
GAUSS_NEWTON = SecondOrderMode.GENERALIZED_GAUSS_NEWTON

RECOGNISED = {
    *("cross-entropy", "of tokens, some ignored", "squared error", "binary", "weighted classes", "scaled"),
    *("smoothed labels", "soft labels", "soft labels of tokens", "soft labels of any sign"),
    *("soft labels of tokens of any sign", "negated soft labels"),
    *("one per example", "masked tokens", "weighted tokens", "negative weights", "weighted squares"),
    *("weighted bits", "picked log-probabilities", "picked scores"),
    *("weighted in place", "divided in place", "masked in place", "a part in place", "added up in place"),
    *("selected by a mask", "selected by a mask before", "selected bits", "another call by the label"),
    *("weighted classes of tokens", "of the same logits twice"),
}
INDEFINITE = {
    "a negative class",
    "concave in part",
    "one over, by keyword",
    "weighted by the outputs",
    "one over",
    "times the outputs",
}
"""At some of the outputs; losses that are recognised do not count what they clip."""


def _of_tokens(f: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of two tokens of three classes, `[n, 2]`."""
    return F.cross_entropy(f.view(-1, 2, 3).mT, torch.stack([y % 3, y % 2], 1), reduction="none")


def _squares(f: Tensor, y: Tensor) -> Tensor:
    """Squared errors of some of the examples, `[n, 2, 3]`."""
    errors = F.mse_loss(f, torch.ones_like(f), reduction="none")
    return torch.where(y[:, None] > 2, errors, 0).view(-1, 2, 3)


def _in_place(change: Callable[[Tensor, Tensor], object]) -> Loss:
    """Cross-entropy of two tokens, changed by the labels before it is added up."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        losses = _of_tokens(f, y)
        change(losses, y)
        return losses.sum()

    return loss


def _where_above_one(losses: Tensor, y: Tensor) -> None:
    losses[losses > 1] = 0


def _some(y: Tensor) -> Tensor:
    """Which tokens of an example count: none, one or both."""
    return y[:, None] > torch.tensor([0, 2])


def _of_the_same_twice(f: Tensor, y: Tensor, sign: int) -> Tensor:
    """Two labels of one prediction, the second counted with a sign."""
    twice = f.expand(2, *f.shape).flatten(0, 1)
    losses = F.cross_entropy(twice, torch.cat([y, (y + 1) % 6]), reduction="none")
    losses[len(y) :] *= sign
    return losses.sum()


def _added_up(f: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros((), dtype=f.dtype)
    total += F.cross_entropy(f, y)
    return total


def _twice_in_place(f: Tensor, y: Tensor) -> Tensor:
    total = _added_up(f, y)
    total += F.mse_loss(f, torch.zeros_like(f))
    return total


def _halved(f: Tensor, y: Tensor) -> Tensor:
    """Outputs changed where they are: the loss of a copy, which the reference takes more than once."""
    f = f.clone().view(-1, 3)
    f /= 2
    return F.cross_entropy(f.view(-1, 6), y)


def _squared(loss: Tensor) -> Tensor:
    return torch.mul(loss, other=loss)


@torch.jit.script
def _scripted(values: Tensor) -> Tensor:
    return (values**4).sum()


def _times_script(loss: Tensor) -> Tensor:
    return loss * _scripted(loss)


def _times_copy(losses: Tensor) -> Tensor:
    copy = torch.zeros_like(losses)
    copy[:] = losses
    return (losses * copy).sum()


LOSSES: dict[str, Loss] = {
    "cross-entropy": F.cross_entropy,
    "of tokens, some ignored": lambda f, y: F.cross_entropy(
        f.unflatten(1, (2, 3)).mT, torch.stack([y % 3, torch.full_like(y, -100)], 1)
    ),
    "squared error": lambda f, y: F.mse_loss(f, y[:, None] * torch.ones_like(f)),
    "binary": lambda f, y: F.binary_cross_entropy_with_logits(f, (y[:, None] % 2).to(f).expand_as(f)),
    "weighted classes": lambda f, y: F.cross_entropy(f, y, torch.arange(1.0, 7).to(f)),
    "weighted classes of tokens": lambda f, y: F.cross_entropy(
        f.view(-1, 3), torch.stack([y % 3, y % 2], 1).flatten(), f.new_tensor([1, 2, 0]), label_smoothing=0.2
    ),
    "a negative class": lambda f, y: F.cross_entropy(
        f, y, torch.tensor([1, 2, 1, 1, -1, 1]).to(f), reduction="sum"
    ),
    "smoothed labels": lambda f, y: F.cross_entropy(f, y, label_smoothing=0.3),
    "soft labels": lambda f, y: F.cross_entropy(
        f, (y[:, None] - torch.arange(6).to(f)).abs(), torch.arange(6.0).to(f), label_smoothing=0.1
    ),
    "soft labels of tokens": lambda f, y: F.cross_entropy(
        f.unflatten(1, (3, 2)), (y[:, None, None] * torch.arange(1.0, 7).to(f).view(1, 3, 2)).cos() + 1
    ),
    "soft labels of any sign": lambda f, y: F.cross_entropy(f, (y[:, None] - torch.arange(6)).to(f)),
    "soft labels of tokens of any sign": lambda f, y: F.cross_entropy(
        f.unflatten(1, (3, 2)), (y[:, None, None] * torch.arange(1.0, 7).to(f).view(1, 3, 2)).cos()
    ),
    "negated soft labels": lambda f, y: -2 * F.cross_entropy(f, (y[:, None] - torch.arange(6)).to(f)),
    "weighted by the outputs": lambda f, y: F.cross_entropy(f, F.one_hot(y, 6).to(f), f[0]),
    "scaled": lambda f, y: 3 * F.cross_entropy(f, y) / len(f) - 1,
    "one per example": lambda f, y: F.cross_entropy(f, y, reduction="none"),
    "masked tokens": lambda f, y: _of_tokens(f, y).masked_fill(y[:, None] == 1, 0).mean(),
    "weighted tokens": lambda f, y: (
        (_of_tokens(f, y) * (y[:, None] > torch.tensor([1, 3]))).sum() / (1 + y.sum())
    ),
    "negative weights": lambda f, y: (_of_tokens(f, y) @ f.new_tensor([1.0, -2.0])).sum(),
    "weighted squares": lambda f, y: (_squares(f, y)[:, 1] * torch.arange(3).to(f)).mean(),
    "weighted bits": lambda f, y: (
        -(-F.binary_cross_entropy_with_logits(f, torch.zeros_like(f), reduction="none")).mean(1) * y
    ).sum(),
    "weighted in place": _in_place(lambda losses, y: losses.mul_(y[:, None] - 1)),
    "divided in place": _in_place(lambda losses, y: losses.__itruediv__(2 + y[:, None])),
    "masked in place": _in_place(lambda losses, y: losses.__setitem__(y[:, None] < torch.tensor([2, 4]), 0)),
    "a part in place": _in_place(lambda losses, y: losses[:, 1].mul_(3 + y)),
    "added up in place": _added_up,
    "added up twice in place": _twice_in_place,
    "squared in place": _in_place(lambda losses, y: losses.pow_(2)),
    "large ones masked in place": _in_place(_where_above_one),
    "outputs in place": _halved,
    "selected by a mask": lambda f, y: _of_tokens(f, y)[_some(y)].sum() / 2,
    "selected by a mask before": lambda f, y: F.cross_entropy(
        f.view(-1, 2, 3)[_some(y)], torch.stack([y % 3, y % 2], 1)[_some(y)], reduction="sum"
    ),
    "of the same logits twice": lambda f, y: _of_the_same_twice(f, y, 1),
    "of the same logits by contrast": lambda f, y: _of_the_same_twice(f, y, -1),
    "selected bits": lambda f, y: (
        F.binary_cross_entropy_with_logits(f, torch.zeros_like(f), reduction="none")
        .masked_select(f.new_tensor([1, 0, 1, 1, 0, 0]) > 0)
        .mean()
    ),
    "another call by the label": lambda f, y: (
        F.cross_entropy(f, y) if y.max() > 1 else F.mse_loss(f, torch.zeros_like(f))
    ),
    "another loss by the label": lambda f, y: F.cross_entropy(f, y) if y.max() < 4 else f.exp().sum(),
    "picked log-probabilities": lambda f, y: F.nll_loss(f.log_softmax(1), y, reduction="none").sum(),
    "focal": lambda f, y: F.nll_loss((1 - f.softmax(1)) ** 2 * f.log_softmax(1), y),
    "score beside a normalisation": lambda f, y: f.logsumexp(1).sum() + F.nll_loss(f, y),
    "half a log-probability": lambda f, y: F.nll_loss(f.log_softmax(1) / 2, y),
    "picked log-sigmoid": lambda f, y: F.nll_loss(F.logsigmoid(f), y),
    "some of the classes": lambda f, y: F.nll_loss(f.log_softmax(1)[:, :4], y % 4),
    "softplus of a score": lambda f, y: F.softplus(F.nll_loss(f, y)),
    "picked scores": lambda f, y: F.nll_loss(f.unsqueeze(2), y[:, None]),
    "large scores": lambda f, y: F.relu(1 + F.nll_loss(1e3 * f, y)) + f.pow(2).sum(),
    "plus what a map makes": lambda f, y: F.cross_entropy(f, y) + torch.vmap(lambda r: (r**4).sum())(f).sum(),
    "plus what a map makes of some": lambda f, y: (
        F.cross_entropy(f, y) + ((y == 1) * torch.vmap(lambda r: (r**4).sum())(f)).sum()
    ),
    "times what a map makes of some": lambda f, y: (
        F.cross_entropy(f, y) * (1 + (y == 1) * torch.vmap(lambda r: (r**4).sum())(f)).sum()
    ),
    "plus a gradient": lambda f, y: F.cross_entropy(f, y) + torch.func.grad(lambda g: (g**3).sum())(f).sum(),
    "plus a script": lambda f, y: F.cross_entropy(f, y) + _scripted(f),
    "times a script": lambda f, y: _times_script(F.cross_entropy(f, y)),
    "copied": lambda f, y: _times_copy(F.mse_loss(f, torch.zeros_like(f), reduction="none")),
    "one over, by keyword": lambda f, y: torch.div(
        other=F.cross_entropy(f, y), input=torch.ones_like(f)
    ).sum(),
    "squared": lambda f, y: F.cross_entropy(f, y) ** 2,
    "multiplied by itself": lambda f, y: _squared(F.cross_entropy(f, y)),
    "one over": lambda f, y: 1 / F.cross_entropy(f, y),
    "times the outputs": lambda f, y: F.cross_entropy(f, y) * f.sum(),
    "clamped": lambda f, y: F.mse_loss(f, torch.zeros_like(f), reduction="none").clamp(max=1).sum(),
    "twice": lambda f, y: F.cross_entropy(f, y) + F.mse_loss(f, torch.zeros_like(f)),
    "concave in part": lambda f, y: (f[:, 0] * f[:, 1] + f[:, 2] ** 4).sum() + 0 * y.sum(),
}


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 4, 5])


def _linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(4, 6).double()


@pytest.mark.parametrize("name", LOSSES)
def test_products_are_those_of_the_clipped_matrices(name: str) -> None:
    x, y = _data()
    objective = xy_objective(_linear(), LOSSES[name])
    curvature = output_curvature(objective, (x, y))
    vectors = torch.randn(Q, N, 6, dtype=torch.float64)
    found = curvature.products(vectors)
    clipped = 0
    for i in range(N):
        matrix = oracle.output_hessian(LOSSES[name], objective.model(x[i : i + 1]).detach(), y[i : i + 1])
        values, Q_f = torch.linalg.eigh(matrix)
        clipped += int((values < -1e-9).sum())
        expected = vectors[:, i] @ (Q_f * values.clamp(min=0)) @ Q_f.T
        torch.testing.assert_close(found[:, i], expected, rtol=1e-9, atol=1e-12)
    assert isinstance(curvature, _SecondDerivatives) == (name in RECOGNISED)
    if name not in RECOGNISED:
        assert curvature.clipped == clipped
        assert (clipped > 0) == (name in INDEFINITE)


@pytest.mark.parametrize("name", LOSSES)
def test_exact_pseudo_gradients_sum_to_the_clipped_matrices(name: str) -> None:
    x, y = _data()
    objective = xy_objective(_linear(), LOSSES[name])
    outputs = objective.model(x).detach()
    made = OutputExpectation(Expectation.EXACT).pseudo_gradients(objective, outputs, IndexedBatch(0, (x, y)))
    v = torch.stack([made.at(k)[0] for k in range(made.count)])
    for i in range(N):
        values, Q_f = torch.linalg.eigh(oracle.output_hessian(LOSSES[name], outputs[i : i + 1], y[i : i + 1]))
        expected = (Q_f * values.clamp(min=0)) @ Q_f.T
        torch.testing.assert_close(v[:, i].T @ v[:, i], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("of", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_a_mean_of_what_a_mask_leaves_of_no_example_has_no_curvature(of: Any) -> None:
    """As of targets that are missing; torch divides by their number too, which may be 0."""

    def selected(f: Tensor, y: Tensor, reduction: str) -> Tensor:
        some = f.view(-1, 2, 3)[_some(y)]
        return of(some, torch.ones_like(some), reduction=reduction)

    def by_hand(f: Tensor, y: Tensor) -> Tensor:
        return selected(f, y, "sum") / max(1, 3 * int(_some(y).sum()))

    x, y = _data()
    vectors = torch.randn(Q, N, 6, dtype=torch.float64)
    mean, summed = (xy_objective(_linear(), loss) for loss in (lambda f, y: selected(f, y, "mean"), by_hand))
    found, expected = (output_curvature(objective, (x, y)).products(vectors) for objective in (mean, summed))
    torch.testing.assert_close(found, expected)
    assert found[:, 0].count_nonzero() == 0
    for objective in (mean, summed):
        made = OutputExpectation(Expectation.EXACT).pseudo_gradients(
            objective, objective.model(x).detach(), IndexedBatch(0, (x, y))
        )
        v = torch.stack([made.at(k)[0] for k in range(made.count)])
        found = torch.einsum("kni,knj,qnj->qni", v, v, vectors)
        torch.testing.assert_close(found, expected)


def test_soft_labels_in_half_precision_are_as_exact_as_their_outputs() -> None:
    generator = torch.Generator().manual_seed(4)
    x, labels = torch.randn(N, 4, generator=generator), torch.rand(N, 10, generator=generator)
    model = nn.Linear(4, 10).bfloat16()
    batch, vectors = (x.bfloat16(), labels.bfloat16()), torch.randn(Q, N, 10, generator=generator)
    found = output_curvature(xy_objective(model, F.cross_entropy), batch).products(vectors.bfloat16())
    outputs = model(batch[0]).detach().double()
    p, c = outputs.softmax(1), batch[1].double().sum(1, keepdim=True)
    expected = c * (p * vectors - p * (p * vectors).sum(-1, keepdim=True))
    assert (found.double() - expected).norm() / expected.norm() < 0.025


def test_label_gradients_are_those_of_a_loss_that_changes_the_outputs_in_place() -> None:
    x, y = _data()
    given = OutputExpectation(Expectation.EMPIRICAL), IndexedBatch(0, (x, y))
    found, expected = (
        given[0].pseudo_gradients(objective, objective.model(x).detach(), given[1]).at(0)[0]
        for loss in (lambda f, y: F.cross_entropy(f.div_(2), y), lambda f, y: F.cross_entropy(f / 2, y))
        for objective in [xy_objective(_linear(), loss)]
    )
    torch.testing.assert_close(found, expected)


def test_a_gauss_newton_product_takes_as_many_outputs_as_a_language_model_has() -> None:
    """Of a linear model, `Σ_i (diag p_i − p_i p_iᵀ) V x_i x_iᵀ`; no matrix of its outputs would fit."""
    x, y = _data()
    model = nn.Linear(4, MANY, bias=False).double()
    objective = xy_objective(model, F.cross_entropy)
    layout = block_layout(objective, BlockMode.FULL)
    V = torch.randn(MANY, 4, dtype=torch.float64)
    found = products(GAUSS_NEWTON, objective, layout, (x, y), {"": V.reshape(1, -1)})[""]
    expected = torch.zeros_like(V)
    for row in x:
        p = model(row).softmax(0).detach()
        pushed = V @ row
        expected += torch.outer(p * pushed - p * (p @ pushed), row)
    torch.testing.assert_close(found.view_as(V), expected, rtol=1e-9, atol=1e-14)


def test_probabilities_have_the_second_derivative_at_their_labels() -> None:
    """That of the loss by what the model answers, which is positive; by the logit before it is `(p − y)²`."""
    x, y = _data()
    target = (y % 2).double()[:, None]
    bits = nn.Linear(4, 1, bias=False).double()
    p = bits(x).sigmoid().detach()
    V = torch.randn(Q, 4, dtype=torch.float64)
    of_bits = {
        F.binary_cross_entropy: (nn.Sequential(bits, nn.Sigmoid()), (p - target) ** 2),
        F.binary_cross_entropy_with_logits: (bits, p * (1 - p)),
    }
    for loss, (model, curvature) in of_bits.items():
        objective = xy_objective(model, loss)
        layout = block_layout(objective, BlockMode.FULL)
        found = products(GAUSS_NEWTON, objective, layout, (x, target), {"": V})[""]
        torch.testing.assert_close(found, V @ (x.T @ (curvature * x)), rtol=1e-9, atol=1e-12)


def _masked(f: Tensor, y: Tensor) -> Tensor:
    mask = y != 3
    return (F.cross_entropy(f.mT, y, reduction="none") * mask).sum() / mask.sum()


def _masked_in_place(f: Tensor, y: Tensor) -> Tensor:
    mask = y != 3
    losses = F.cross_entropy(f.mT, y, reduction="none")
    losses *= mask
    losses /= mask.sum()
    return losses.sum()


def _selected(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f.mT, y, reduction="none")[y != 3].mean()


def _selected_before(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f[y != 3], y[y != 3])


@pytest.mark.parametrize("loss", [_masked, _masked_in_place, _selected, _selected_before])
def test_a_masked_loss_of_tokens_is_the_one_that_ignores_them(loss: Loss) -> None:
    """Over more outputs than have a second derivative that could be formed."""
    x = torch.randn(N, 3, 4, dtype=torch.float64)
    y = torch.tensor([[1, 3, 5], [3, 3, 7], [0, 1, 2], [3, 1998, 0], [4, 4, 3]])
    model = nn.Linear(4, 2000, bias=False).double()
    outputs, V = model(x).detach(), torch.randn(1, 4 * 2000, dtype=torch.float64)
    found, estimates = [], []
    for own in (loss, lambda f, y: F.cross_entropy(f.mT, y, ignore_index=3)):
        objective = xy_objective(model, own)
        layout = block_layout(objective, BlockMode.FULL)
        found.append(products(GAUSS_NEWTON, objective, layout, (x, y), {"": V})[""])
        made = OutputExpectation().pseudo_gradients(objective, outputs, IndexedBatch(0, (x, y)))
        estimates.append(made.at(0)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-14)
    # Other positions have other signs, which squares do not show.
    assert torch.equal(estimates[0] != 0, estimates[1] != 0)
    if loss in (_masked, _masked_in_place):
        torch.testing.assert_close(estimates[0], estimates[1], rtol=1e-9, atol=1e-14)


def test_as_few_products_are_made_at_once_as_the_outputs_let(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model itself keeps, four inputs of an example, would let all go through together."""
    objective = xy_objective(nn.Linear(4, MANY, bias=False).double(), F.cross_entropy)
    asked: list[int] = []
    products_of = _SecondDerivatives.products

    def counted(self: _SecondDerivatives, vectors: Tensor) -> Tensor:
        asked.append(len(vectors))
        return products_of(self, vectors)

    monkeypatch.setattr(_SecondDerivatives, "products", counted)
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.zeros(40, dtype=torch.int64)
    vectors = {"": torch.ones(12, 4 * MANY, dtype=torch.float64)}
    products(GAUSS_NEWTON, objective, block_layout(objective, BlockMode.FULL), (x, y), vectors)
    assert sum(asked) == 12
    assert max(asked) * GRAPH_COPIES * 40 * MANY * 8 <= WORKSPACE_BYTES["cpu"]


def test_another_loss_over_many_outputs_is_refused_with_what_would_do() -> None:
    objective = xy_objective(nn.Linear(4, MANY).double(), LOSSES["concave in part"])
    with pytest.raises(UnsupportedLossError, match=r"4096.*got 5000.*cross_entropy.*empirical_fisher"):
        output_curvature(objective, _data())


UNDERIVED: dict[str, Loss] = {
    "ctc": lambda f, y: F.ctc_loss(
        f.unflatten(1, (3, 2)).transpose(0, 1).log_softmax(2),
        torch.ones_like(y)[:, None],
        torch.full_like(y, 3),
        torch.ones_like(y),
    ),
    "margins": F.multi_margin_loss,
}


@pytest.mark.parametrize("name", UNDERIVED)
def test_a_loss_that_torch_differentiates_once_is_refused_with_what_would_do(name: str) -> None:
    x, y = _data()
    objective = xy_objective(_linear(), UNDERIVED[name])
    outputs = objective.model(x).detach()
    told = r"derivative for .* is not implemented; .*empirical_fisher.*expectation empirical"
    with pytest.raises(UnsupportedLossError, match=told):
        output_curvature(objective, (x, y))
    for kind in (Expectation.EXACT, Expectation.SAMPLED):
        with pytest.raises(UnsupportedLossError, match=told):
            OutputExpectation(kind).pseudo_gradients(objective, outputs, IndexedBatch(0, (x, y)))
    made = OutputExpectation(Expectation.EMPIRICAL).pseudo_gradients(
        objective, outputs, IndexedBatch(0, (x, y))
    )
    assert made.at(0)[0].any()


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError])
def test_what_a_loss_of_the_users_raises_comes_through_as_it_is(kind: type[RuntimeError]) -> None:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        raise kind("no loss of labels like these is not implemented")

    with pytest.raises(kind, match="of labels like these") as raised:
        output_curvature(xy_objective(_linear(), loss), _data())
    assert raised.type is kind


class _Complex(nn.Module):
    def forward(self, f: Tensor) -> Tensor:
        return torch.view_as_complex(f.unflatten(1, (3, 2)))


class _Both(nn.Module):
    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        return f, _Complex()(f)


@pytest.mark.parametrize("end", [_Complex(), _Both()], ids=["alone", "beside real ones"])
def test_complex_outputs_are_refused_with_what_would_do(end: nn.Module) -> None:
    """They have no second derivative in the sense of `∇²_f ℓ`; as pairs of real numbers they have."""

    def loss(f: Tensor | tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return (f[1] if isinstance(f, tuple) else f).abs().square().sum()

    x, y = _data()
    objective = xy_objective(nn.Sequential(_linear(), end), loss)
    with pytest.raises(UnsupportedLossError, match=r"complex.*view_as_real"):
        output_curvature(objective, (x, y))
    for expectation in Expectation:
        influence = EkfacInfluence(
            objective.model, True, 0.1, loss=loss, expectation=expectation, unsupported="exclude"
        )
        with pytest.raises(UnsupportedLossError, match=r"complex.*view_as_real"):
            influence.fit([(x, y)])
