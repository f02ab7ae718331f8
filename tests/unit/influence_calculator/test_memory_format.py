"""Convolutions captured with channels last in memory give the numbers that they give otherwise."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from influence_calculator.maths import ekfac
from influence_calculator.maths.capture import captured_gradients, record
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.ekfac_passes import CORRECTION
from influence_calculator.maths.logra import Logra
from influence_calculator.maths.memory_format import laid_out
from influence_calculator.maths.method import FitState, Fitted, Method, fit
from influence_calculator.maths.objective import Objective, xy_objective
from influence_calculator.torch import EkfacInfluence
from model_cases import CAPTURED_CASES, ModelCase
from training_sets import TrainingSet

N, T = 23, 6


class Frames(nn.Module):
    """Several images per example, one layer called twice, by keyword too, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(1, 2))
        self.again = nn.Conv2d(4, 4, 3, padding="same", bias=False)
        self.never = nn.Conv2d(2, 2, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        images = self.again(input=self.again(self.conv(x.flatten(0, 1)).tanh()).tanh())
        return self.head(images.mean((2, 3)).unflatten(0, (x.shape[0], -1)).mean(1))


class Flattened(nn.Module):
    """Outputs of a convolution as rows, taken however the model does."""

    def __init__(self, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.head = nn.Linear(5 * 16, 3)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(self.conv(x).tanh()))


def _kinds() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 4, (3, 2), stride=2, padding_mode="circular", padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, groups=2, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, (2, 1)),
        nn.Flatten(),
        nn.Linear(10, 3),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "kinds": (_kinds, (2, 8, 7)),
    "frames": (Frames, (2, 2, 5, 6)),
    "one channel": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(6, 3)
        ),
        (1, 6, 4),
    ),
    "one image of one pixel": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4, 3)),
        (3, 1, 1),
    ),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def _model(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MODELS[name][0]().double().eval()


def _data(features: tuple[int, ...], count: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *features, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def _both(model: nn.Module) -> tuple[Objective, Objective]:
    objective = xy_objective(model, F.cross_entropy)
    return objective, replace(objective, channels_last=True)


def _assert_same_as_autograd(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> None:
    objective = replace(xy_objective(model, loss), channels_last=True)
    expected = oracle.example_gradients(model, loss, x, y)
    captured = dict(captured_gradients(objective, (x, y)))
    for name, columns in oracle.columns(model).items():
        torch.testing.assert_close(captured[name], expected[:, columns], rtol=1e-10, atol=1e-14)


@EVERY_MODEL
def test_gradients_are_those_of_autograd(name: str) -> None:
    _assert_same_as_autograd(_model(name), F.cross_entropy, *_data(MODELS[name][1], T))


@pytest.mark.parametrize("case", CAPTURED_CASES, ids=repr)
def test_layers_of_every_kind_are_captured_beside_them(case: ModelCase) -> None:
    _assert_same_as_autograd(case.model(), case.loss, *case.test())


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "4.bias", "7.weight"])
def test_the_tracked_part_of_a_layer_is_captured_alone(frozen: str) -> None:
    model = _model("kinds")
    model.get_parameter(frozen).requires_grad_(False)
    _assert_same_as_autograd(model, F.cross_entropy, *_data(MODELS["kinds"][1], T))


def test_what_a_users_hook_makes_of_a_layers_inputs_is_captured() -> None:
    model = _model("kinds")
    x, y = _data(MODELS["kinds"][1], T)
    model[2].register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    _assert_same_as_autograd(model, F.cross_entropy, x, y)


def test_what_is_captured_lies_side_by_side() -> None:
    """Else it would be copied again by everything that multiplies it."""
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 4, 2, stride=2), nn.AvgPool2d(2)
    ).double()
    _, objective = _both(model)
    recording = record(objective, _data((2, 8, 6), T))
    for calls in recording.backward([recording.outputs], [torch.ones_like(recording.outputs)]):
        layer = calls.captured()
        assert layer.activations.is_contiguous()
        assert layer.gradients.is_contiguous()


def _fitted(method: Method, objective: Objective, x: Tensor, y: Tensor) -> tuple[FitState, Fitted]:
    state = fit(method, objective, TrainingSet((x, y), 9))
    return state, method.fitted(objective, state, None)


def _assert_close(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for block, rows in expected.items():
        torch.testing.assert_close(found[block], rows, rtol=1e-7, atol=1e-9 * float(rows.abs().max()))


@EVERY_MODEL
@pytest.mark.parametrize("by_parameter", [False, True])
@pytest.mark.parametrize("weights", ["tracked", "frozen"])
def test_ekfac_is_the_same_in_every_form(
    name: str, by_parameter: bool, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ekfac, "scored_by_parameter", lambda _, layer, __: by_parameter and layer.groups == 1)
    model = _model(name)
    if weights == "frozen":
        next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.requires_grad_(False)
    train, test = _data(MODELS[name][1], N), _data(MODELS[name][1], T, seed=4)
    found = []
    for objective in _both(model):
        state, fitted = _fitted(Ekfac(regularization=0.1), objective, *train)
        left = fitted.solve(fitted.gradients(objective, test)).left
        factors = fitted.factors(left)
        # There and back again.
        _assert_close(fitted.left(factors), left)
        compact = fitted.compact(objective, test)
        found.append((state, factors, fitted.score(fitted.scored(left), train), compact))
    (state, factors, scores, compact), (state_last, factors_last, scores_last, compact_last) = found
    for layer, left_behind in state[CORRECTION].items():
        found_last = state_last[CORRECTION][layer]["eigenvalues"]
        torch.testing.assert_close(found_last.sum(), left_behind["eigenvalues"].sum())
    _assert_close(factors_last, factors)
    torch.testing.assert_close(scores_last, scores, rtol=1e-7, atol=1e-9 * float(scores.abs().max()))
    if by_parameter and compact is not None:
        # What travels between processes and is stored does not depend on how it was captured.
        torch.testing.assert_close(compact_last.rows, compact.rows, rtol=1e-6, atol=1e-9)


@EVERY_MODEL
def test_covariances_are_of_the_weights_columns(name: str) -> None:
    train = _data(MODELS[name][1], N)
    sums = []
    for objective in _both(_model(name)):
        step = Ekfac().passes()[0]
        sums.append(step.accumulate(objective, list(TrainingSet(train, 9).batches()), {}))
    for layer, expected in sums[0].items():
        for what, total in expected.items():
            torch.testing.assert_close(sums[1][layer][what], total, rtol=1e-10, atol=1e-12)


@EVERY_MODEL
def test_a_projection_of_layers_is_the_same(name: str) -> None:
    train, test = _data(MODELS[name][1], N), _data(MODELS[name][1], T, seed=4)
    found = []
    for objective in _both(_model(name)):
        _, fitted = _fitted(Logra(rank=3, regularization=0.1), objective, *train)
        left = fitted.solve(fitted.gradients(objective, test)).left
        found.append((fitted.factors(left), fitted.score(fitted.scored(left), train)))
    _assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])


def test_a_loss_that_takes_a_view_of_the_outputs_gets_them_as_ever() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 1)).double()
    x, y = _data((2, 5, 4), T)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.view(len(outputs), -1), labels)

    _assert_same_as_autograd(model, loss, x, y)


def _checked(images: Tensor) -> Tensor:
    assert images.is_contiguous()
    return images


def _tried(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    return laid_out(xy_objective(model, F.cross_entropy), lambda: (x[:1], y[:1])).channels_last


def test_convolutions_in_float32_are_laid_out_with_channels_last() -> None:
    x, y = _data(MODELS["kinds"][1], 1)
    assert _tried(_model("kinds").float(), x.float(), y)
    assert not _tried(_model("kinds"), x, y)


@pytest.mark.parametrize(
    ("build", "features"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), (2, 4)),
        (lambda: nn.Sequential(nn.Conv1d(2, 3, 4), nn.Flatten()), (2, 4)),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3)), (2, 3, 3)),
    ],
)
def test_other_layers_are_not_tried(build: Any, features: tuple[int, ...]) -> None:
    model = build()
    model.register_forward_hook(lambda *_: pytest.fail("the model was called"))
    assert not _tried(model, *_data(features, 1))


class Pooled(nn.Module):
    """Takes a mean by a view that outputs with channels last have only if they are of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        images = self.conv(x).tanh()
        return self.head(images.view(len(x) * 4, -1).mean(1).view(len(x), 4))


def test_larger_images_than_were_tried_are_captured_in_another_way() -> None:
    model = Pooled().float()
    x, y = _data((2, 3, 3), N)
    large, y_large = _data((2, 7, 6), N)
    assert _tried(model, x.float(), y)
    fitted = EkfacInfluence(model, hessian_regularization=0.1, loss=F.cross_entropy).fit(
        [(x.float(), y), (large.float(), y_large)]
    )
    assert fitted.objective.channels_last
    expected = EkfacInfluence(deepcopy(model).double(), hessian_regularization=0.1, loss=F.cross_entropy).fit(
        [(x, y), (large, y_large)]
    )
    found = fitted.influences(large.float(), y_large, large.float(), y_large)
    wide = expected.influences(large, y_large, large, y_large)
    torch.testing.assert_close(found, wide.float(), rtol=1e-3, atol=1e-4 * float(wide.abs().max()))


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a view": lambda images: images.view(images.shape[0], -1),
    "a view that one example has": lambda images: images.view(-1, 4, 4).contiguous().view(len(images), -1),
    "memory that is checked": lambda images: _checked(images).flatten(1),
    "memory as it lies": lambda images: images.as_strided((len(images), 80), (80, 1)),
}


@pytest.mark.parametrize("rows", ROWS)
def test_a_model_that_relies_on_its_memory_is_left_alone(rows: str) -> None:
    x, y = _data((2, 6, 6), N)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Flattened(ROWS[rows])
    assert not _tried(model, x.float(), y)
    usual = Flattened(lambda images: images.flatten(1))
    usual.load_state_dict(model.state_dict())
    assert _tried(usual, x.float(), y)
    found, expected = (
        EkfacInfluence(own, hessian_regularization=0.1, loss=F.cross_entropy)
        .fit([(x.float(), y)])
        .influences(x.float(), y, x.float(), y)
        for own in (model, usual)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
