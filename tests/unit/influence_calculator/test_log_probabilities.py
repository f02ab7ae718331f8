"""A model that answers with log-probabilities has the curvature of one that answers with logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_calculator.maths.blocks import BlockMode, block_layout
from influence_calculator.maths.curvature import SecondOrderMode, products
from influence_calculator.maths.expectation import Expectation
from influence_calculator.maths.log_probabilities import continued
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.recognised_losses import is_recognised
from influence_calculator.torch import DirectInfluence, EkfacInfluence

N, C, MANY = 7, 4, 5000

Loss = Callable[[Tensor, Tensor], Tensor]
CASES: dict[str, tuple[Loss, Loss, tuple[int, ...]]] = {
    "mean": (F.nll_loss, F.cross_entropy, ()),
    "module": (nn.NLLLoss(), nn.CrossEntropyLoss(), ()),
    "weighted": (
        lambda f, y: F.nll_loss(f, y, torch.arange(C).to(f), reduction="sum"),
        lambda f, y: F.cross_entropy(f, y, torch.arange(C).to(f), reduction="sum"),
        (),
    ),
    "tokens, one class ignored": (
        lambda f, y: F.nll_loss(f.transpose(1, 2), y, ignore_index=1),
        lambda f, y: F.cross_entropy(f.transpose(1, 2), y, ignore_index=1),
        (3,),
    ),
    "scaled": (lambda f, y: 2 * F.nll_loss(f, y), lambda f, y: 2 * F.cross_entropy(f, y), ()),
    "masked": (
        lambda f, y: (F.nll_loss(f.mT, y, reduction="none") * (y > 0)).sum(),
        lambda f, y: (F.cross_entropy(f.mT, y, reduction="none") * (y > 0)).sum(),
        (3,),
    ),
    "as older code says it": (
        lambda f, y: F.nll_loss(f, y, size_average=False),
        lambda f, y: F.cross_entropy(f, y, reduction="sum"),
        (),
    ),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


def _models() -> tuple[nn.Module, nn.Module]:
    """One that answers with log-probabilities, and the same with logits."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        logits = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C)).double()
    return nn.Sequential(*logits, nn.LogSoftmax(-1)), logits


def _data(tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, *tokens, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(C, (N, *tokens), generator=generator)
    if tokens:
        y[:, 0] = 2  # never is everything ignored
    return x, y


@EVERY_CASE
@pytest.mark.parametrize("expectation", [Expectation.EXACT, Expectation.SAMPLED], ids=str)
def test_ekfac_is_that_of_the_logits(name: str, expectation: str) -> None:
    nll, cross_entropy, tokens = CASES[name]
    x, y = _data(tokens)
    found, expected = (
        EkfacInfluence(model, hessian_regularization=0.01, loss=loss, expectation=expectation)
        .fit([(x, y)])
        .influences(x, y)
        for model, loss in zip(_models(), (nll, cross_entropy), strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@EVERY_CASE
def test_the_gauss_newton_matrix_is_that_of_the_logits(name: str) -> None:
    nll, cross_entropy, tokens = CASES[name]
    batch = _data(tokens)
    mode = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
    found = []
    for model, loss in zip(_models(), (nll, cross_entropy), strict=True):
        objective = xy_objective(model, loss)
        layout = block_layout(objective, BlockMode.FULL)
        found.append(products(mode, objective, layout, batch, {"": torch.eye(layout.width).double()})[""])
    assert float(found[1].norm()) > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_other_curvatures_are_left_as_they_are() -> None:
    """The Hessian by the parameters is the same by itself, as is the Fisher at the labels."""
    x, y = _data(())
    for mode in (SecondOrderMode.HESSIAN, SecondOrderMode.EMPIRICAL_FISHER):
        found, expected = (
            DirectInfluence(model, loss, 1.0, second_order_mode=mode).fit([(x, y)]).influences(x, y)
            for model, loss in zip(_models(), (F.nll_loss, F.cross_entropy), strict=True)
        )
        torch.testing.assert_close(found, expected)


@EVERY_CASE
def test_what_is_continued_has_the_same_values_where_probabilities_sum_to_one(name: str) -> None:
    nll, _, tokens = CASES[name]
    x, y = _data(tokens)
    objective = xy_objective(_models()[0], nll)
    outputs = objective.outputs((x, y))
    losses = objective.losses(outputs, (x, y))
    torch.testing.assert_close(continued(objective).losses(outputs, (x, y)), losses)
    other = objective.losses(outputs + 1, (x, y))
    torch.testing.assert_close(continued(objective).losses(outputs + 1, (x, y)), other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda f, y: F.nll_loss(F.log_softmax(f, 1), y), True),
        (lambda f, y: F.nll_loss(f.log_softmax(dim=-1), y), True),
        (lambda f, y: F.nll_loss(torch.log_softmax(f.float(), 1), y), True),
        (lambda f, y: F.nll_loss(f, y), True),
        (lambda f, y: F.nll_loss(f.log_softmax(0), y), False),
        (lambda f, y: F.nll_loss(f.log_softmax(1).log_softmax(1), y), False),
        (lambda f, y: F.nll_loss(f.log_softmax(1).detach(), y), False),
        (lambda f, y: F.cross_entropy(f.log_softmax(1), y), False),
        (lambda f, y: F.mse_loss(f.log_softmax(1), y[:, None].to(f).expand_as(f)), False),
        (lambda f, y: F.nll_loss(f, y, reduction="none").sum(), True),
    ],
)
def test_log_softmax_is_followed_right_before_the_loss_alone(loss: Loss, expected: bool) -> None:
    x, y = _data(())
    objective = xy_objective(_models()[1], loss)
    assert is_recognised(objective, objective.outputs((x, y)), (x, y)) is expected


@pytest.mark.parametrize("normalised_by", ["the model", "the loss"])
def test_a_language_models_outputs_are_taken(normalised_by: str) -> None:
    x, y = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0, 1, MANY - 1])
    linear = nn.Linear(2, MANY, bias=False).double()
    if normalised_by == "the model":
        model, loss = nn.Sequential(linear, nn.LogSoftmax(1)), F.nll_loss
    else:
        model, loss = nn.Sequential(linear), lambda f, y: F.nll_loss(F.log_softmax(f, 1), y)
    V = torch.randn(1, 2 * MANY, dtype=torch.float64)
    found = []
    for own, its_loss in ((model, loss), (nn.Sequential(linear), F.cross_entropy)):
        objective = xy_objective(own, its_loss)
        layout = block_layout(objective, BlockMode.FULL)
        mode = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
        found.append(products(mode, objective, layout, (x, y), {"": V})[""])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-14)
