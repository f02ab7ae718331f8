"""Hooks give every example's own gradient, leave the model alone, and are measured as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import oracle
from influence_calculator.maths.capture import (
    captured_gradients,
    measure,
    record,
    supported_layers,
    uncaptured_parameters,
)
from influence_calculator.maths.errors import UnsupportedModelError
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.shapes import LayerShape
from model_cases import CAPTURED_CASES, CONV2D, MLP, ModelCase


class Sequences(nn.Module):
    """One Linear over tokens, called twice, by keyword too; in-place nonlinearities."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = F.softplus(self.shared(x)).tanh_()
        return self.head(self.shared(input=first).tanh_()).mean(1)


class Frames(nn.Module):
    """Several images per example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(1, 2))
        self.same = nn.Conv2d(4, 2, (2, 3), padding="same", dilation=2, groups=2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        images = self.same(self.conv(x.flatten(0, 1)).tanh()).tanh()
        return self.head(images.mean((2, 3)).unflatten(0, (x.shape[0], -1)).mean(1))


class SometimesCalled(nn.Module):
    """A tracked layer that this input never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(4, 3)
        self.always = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x)


class TwoNames(nn.Module):
    """One module under two names, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 2, 2, padding="same")
        self.again = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.first(x).tanh()).tanh().flatten(1))


class ByKeyword(nn.Module):
    """Hugging Face's layer names its argument otherwise than torch's do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv1D(5, 4), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=self.first(x=x).tanh())


class Detached(nn.Module):
    """A layer whose second call passes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.layer(x).sigmoid()
        return self.head(self.layer(x).tanh() * gate)


class _OwnName(Conv1D):
    """A subclass that computes what Hugging Face's layer does."""


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _double(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build().double().eval()


MODELS = {
    "sequences": (Sequences, (6, 4)),
    "frames": (Frames, (2, 2, 5, 6)),
    "circular": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"), nn.Flatten(), nn.Linear(45, 3)
        ),
        (2, 3, 3),
    ),
    "channels last": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 2, groups=2), nn.Conv2d(4, 4, 2, groups=4), nn.Flatten(), nn.Linear(8, 3)
        ).to(memory_format=torch.channels_last),
        (4, 3, 4),
    ),
    "inplace": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (4,)),
    "two names": (TwoNames, (2, 3)),
    "sometimes called": (SometimesCalled, (4,)),
    "detached": (Detached, (4,)),
    "transposed": (lambda: nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(3, 5)), (4,)),
    "by keyword": (ByKeyword, (4,)),
    "transposed tokens": (lambda: nn.Sequential(_OwnName(5, 4), nn.Tanh(), Conv1D(3, 5), _Mean()), (6, 4)),
}


def _data(features: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, *features, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (5,), generator=generator)


def _assert_same_as_autograd(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> None:
    captured = dict(captured_gradients(xy_objective(model, loss), (x, y)))
    expected = oracle.example_gradients(model, loss, x, y)
    assert list(captured) == list(oracle.columns(model))
    for name, columns in oracle.columns(model).items():
        torch.testing.assert_close(captured[name], expected[:, columns], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", CAPTURED_CASES, ids=repr)
def test_captured_gradients_are_those_of_batches_of_one(case: ModelCase) -> None:
    _assert_same_as_autograd(case.model(), case.loss, *case.test())


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_captured_wherever_and_however_often_they_are_called(name: str) -> None:
    build, features = MODELS[name]
    _assert_same_as_autograd(_double(build), F.cross_entropy, *_data(features))


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "4.bias"])
def test_the_tracked_part_of_a_layer_is_captured_alone(frozen: str) -> None:
    model = MLP.model()
    model.get_parameter(frozen).requires_grad_(False)
    _assert_same_as_autograd(model, MLP.loss, *MLP.test())


def test_a_batch_of_one_example_keeps_its_dimension() -> None:
    x, y = MLP.test()
    _assert_same_as_autograd(MLP.model(), MLP.loss, x[:1], y[:1])


def test_capturing_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        captured = dict(captured_gradients(xy_objective(MLP.model(), MLP.loss), MLP.test()))
    assert all(float(values.abs().sum()) > 0 for values in captured.values())


def test_a_users_hook_that_changes_an_output_counts() -> None:
    model = MLP.model()
    model[0].register_forward_hook(lambda _, __, output: output * 3)
    x, y = MLP.test()
    captured = dict(captured_gradients(xy_objective(model, MLP.loss), (x, y)))
    F.cross_entropy(model(x[:1]), y[:1]).backward()
    torch.testing.assert_close(captured["0.weight"][0], model[0].weight.grad.flatten())


def test_the_model_is_left_as_it_was() -> None:
    model = MLP.model()
    model[2].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    dict(captured_gradients(xy_objective(model, MLP.loss), MLP.test()))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_with_two_names_keeps_its_parameters() -> None:
    """Torch's `functional_call` leaves such a module the tensors that it was called with."""
    model = _double(TwoNames)
    before = dict(model.named_parameters())
    assert xy_objective(model, F.cross_entropy).outputs((_data((2, 3))[0],)).shape == (5, 3)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_hooks_are_gone_after_an_error() -> None:
    model = MLP.model()
    with pytest.raises(RuntimeError):
        record(
            xy_objective(model, MLP.loss), (torch.zeros(2, 99, dtype=torch.float64), torch.zeros(2).long())
        )
    assert not any(module._forward_hooks for module in model.modules())


class _Counting(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _Counting.calls += 1
        return gradient * 2


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Counting.apply(x)


def test_nothing_below_the_first_tracked_layer_is_differentiated() -> None:
    model = _double(lambda: nn.Sequential(nn.Linear(4, 4), _Doubled(), nn.Linear(4, 3), _Doubled()))
    model[0].requires_grad_(False)
    x, y = _data((4,))
    _Counting.calls = 0
    recording = record(xy_objective(model, F.cross_entropy), (x.requires_grad_(), y))
    list(recording.backward([recording.outputs.sum()], [None]))
    assert _Counting.calls == 1


def test_autograd_forms_no_weight_gradient() -> None:
    """The recorded graph reaches no parameter: its only leaf is an empty one that starts it."""
    recording = record(xy_objective(CONV2D.model(), CONV2D.loss), CONV2D.test())
    pending, leaves = [recording.outputs.grad_fn], []
    while pending:
        node = pending.pop()
        if type(node).__name__ == "AccumulateGrad":
            leaves.append(tuple(node.variable.shape))
        pending += [below for below, _ in node.next_functions if below is not None]
    assert leaves == [(0,)]


def test_inputs_that_do_not_count_examples_first_are_refused() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x.sum() + self.positions(torch.ones(3, 4, dtype=x.dtype)).sum(0) * torch.ones(len(x), 3)

    x, y = _data((4,))
    with pytest.raises(UnsupportedModelError, match=r"'positions'.*5 examples"):
        dict(captured_gradients(xy_objective(_double(Broadcast), F.cross_entropy), (x, y)))


class _Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _OwnTransposed(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _Another(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.square()


_Another.__name__ = "Conv1D"


UNCAPTURED = {
    "attention's output projection": (
        lambda: nn.MultiheadAttention(4, 2),
        ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"],
    ),
    "a subclass with a forward of its own": (lambda: nn.Sequential(_Own(2, 2)), ["0.weight", "0.bias"]),
    "a subclass of Hugging Face's Conv1D with a forward of its own": (
        lambda: nn.Sequential(_OwnTransposed(2, 2)),
        ["0.weight", "0.bias"],
    ),
    "a Conv1D of another package": (lambda: nn.Sequential(_Another()), ["0.weight"]),
    "a transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 2)), ["0.weight", "0.bias"]),
    "a layer norm": (lambda: nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)), ["0.weight", "0.bias"]),
    "a parametrized weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))),
        ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
    ),
}


@pytest.mark.parametrize("name", UNCAPTURED)
def test_parameters_that_hooks_cannot_see_are_known(name: str) -> None:
    build, expected = UNCAPTURED[name]
    objective = xy_objective(build(), F.cross_entropy)
    assert sorted(uncaptured_parameters(objective)) == sorted(expected)


def test_a_weight_that_two_layers_share_is_captured_from_neither() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    objective = xy_objective(model, F.cross_entropy)
    assert [layer.name for layer in supported_layers(objective)] == ["2"]
    assert uncaptured_parameters(objective) == ("0.weight", "0.bias", "1.bias")


def test_measured_sizes_are_the_models() -> None:
    model = CONV2D.model()
    model[2].weight.requires_grad_(False)
    shapes = measure(xy_objective(model, CONV2D.loss), CONV2D.train())
    assert shapes.layers == (
        LayerShape("0", inputs=18, outputs=3, tokens=9, bias=False),
        LayerShape("2", inputs=0, outputs=2, tokens=4, bias=True),
        LayerShape("5", inputs=8, outputs=3, tokens=1, bias=True),
    )
    assert list(shapes.parameters) == ["0.weight", "2.bias", "5.weight", "5.bias"]
    assert shapes.itemsize == 8
    assert shapes.model_bytes == 8 * sum(p.numel() for p in model.parameters())
    assert shapes.example_bytes == 8 * 2 * 6 * 6 + 8
    assert shapes.outputs == 3


def test_a_transposed_weight_is_measured_by_what_goes_in_and_out() -> None:
    model = nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(3, 5))
    shapes = measure(xy_objective(model, F.cross_entropy), (torch.randn(4, 4), torch.randint(3, (4,))))
    assert shapes.layers == (
        LayerShape("0", inputs=4, outputs=5, tokens=1, bias=True),
        LayerShape("2", inputs=5, outputs=3, tokens=1, bias=True),
    )


def test_what_a_forward_pass_keeps_is_measured_per_example() -> None:
    """Outputs of both nonlinearities (shared with the next layer), logits, and at most 100 bytes of loss."""
    model = nn.Sequential(nn.Linear(8, 100), nn.Tanh(), nn.Linear(100, 50), nn.Tanh(), nn.Linear(50, 3))
    x, y = torch.randn(4, 8), torch.randint(3, (4,))
    kept = measure(xy_objective(model, F.cross_entropy), (x, y)).activation_bytes
    assert 4 * (100 + 50 + 3) <= kept <= 4 * (100 + 50 + 3) + 100


def test_tokens_are_counted_over_all_calls() -> None:
    x, y = _data((6, 4))
    shapes = measure(xy_objective(_double(Sequences), F.cross_entropy), (x, y))
    assert {layer.name: layer.tokens for layer in shapes.layers} == {"shared": 12, "head": 6}
