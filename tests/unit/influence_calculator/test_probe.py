"""A few examples show whether hooks and batches can be trusted with a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_calculator import GradDotInfluence
from influence_calculator.maths.capture import captured_gradients
from influence_calculator.maths.errors import (
    CalculatorError,
    CaptureMismatchError,
    TrainingModeError,
    UnsupportedModelError,
)
from influence_calculator.maths.objective import Objective, xy_objective
from influence_calculator.maths.probe import probe
from model_cases import CASES, ModelCase


def _objective(model: nn.Module) -> Objective:
    return xy_objective(model.double(), F.cross_entropy)


def _batch(*features: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, *features, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=generator)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_models_whose_gradients_agree_pass(case: ModelCase, dtype: torch.dtype) -> None:
    x, y = case.train()
    targets = y.to(dtype) if y.is_floating_point() else y
    probe(xy_objective(case.model(dtype), case.loss), (x.to(dtype), targets))


class Attention(nn.Module):
    """`out_proj` is used as a function inside `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


def test_attention_is_differentiated_right_although_its_projection_is_never_called() -> None:
    """Mistake 11: a hook on `out_proj` would see nothing and answer 0."""
    objective = _objective(Attention().eval())
    probe(objective, _batch(5, 4))
    assert not any("out_proj" in name for name, _ in captured_gradients(objective, _batch(5, 4)))


def test_a_transformer_layer_passes() -> None:
    """Its fast path, which calls no module, is not taken while layers are recorded."""
    model = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(20, 3)
    ).eval()
    probe(_objective(model), _batch(5, 4))


class Functional(nn.Module):
    """A layer's weight, used once by calling the layer and once as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.layer(x).tanh(), self.layer.weight))


class NeverCalled(nn.Module):
    """A layer that exists for its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


class Mixing(nn.Module):
    """Examples see the mean of their batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - 0.5 * x.mean(0))


class TimeFirst(nn.Module):
    """Tokens before examples inside; as many tokens as examples are probed, so that shapes cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.transpose(0, 1)).tanh().transpose(0, 1).mean(1))


MISMATCHES = {
    "functional": (Functional, (4,), "layer.weight"),
    "never called": (NeverCalled, (4,), "layer.weight, layer.bias"),
    "mixing": (Mixing, (4,), "layer.weight, layer.bias"),
    "time first": (TimeFirst, (4, 4), "layer.weight, layer.bias"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_gradients_that_hooks_miss_are_refused_by_name(name: str) -> None:
    build, features, parameters = MISMATCHES[name]
    with pytest.raises(CaptureMismatchError, match=f"^{parameters}: .*Usual causes.*Call the module"):
        probe(_objective(build()), _batch(*features))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("one_shot", [True, False])
def test_a_loader_of_short_batches_hides_no_mismatch(size: int, one_shot: bool) -> None:
    """Short batches are joined later; one of one example alone would be compared with itself."""
    x, y = _batch(4)
    batches = list(zip(x.split(size), y.split(size), strict=True))
    model = GradDotInfluence(Mixing().double(), F.cross_entropy)
    with pytest.raises(CaptureMismatchError, match=r"layer\.weight, layer\.bias"):
        model.fit(iter(batches) if one_shot else batches)


def test_parameters_that_hooks_see_rightly_are_not_named() -> None:
    with pytest.raises(CaptureMismatchError) as caught:
        probe(_objective(Functional()), _batch(4))
    assert "head" not in str(caught.value)
    assert "layer.bias" not in str(caught.value)


TRAINING = {
    "dropout": nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5)), nn.Linear(4, 3)),
    "batch norm": nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4)), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_mode_is_refused_naming_the_module_and_the_cure(name: str) -> None:
    model = TRAINING[name].train()
    with pytest.raises(TrainingModeError, match=r"1\.0.*model\.eval\(\)"):
        probe(_objective(model), _batch(4))
    probe(_objective(model.eval()), _batch(4))


def test_dropout_inside_attention_is_refused() -> None:
    model = Attention()
    model.attention.dropout = 0.1
    with pytest.raises(TrainingModeError, match="attention"):
        probe(_objective(model.train()), _batch(5, 4))


def test_batch_statistics_without_running_ones_are_refused_in_evaluation_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
    with pytest.raises(TrainingModeError, match=r"1: .*track_running_stats"):
        probe(_objective(model.eval()), _batch(4))


class RandomOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5)


def test_outputs_that_differ_from_pass_to_pass_are_refused() -> None:
    torch.manual_seed(0)  # two passes may drop the same outputs by chance
    with pytest.raises(TrainingModeError, match="two passes of the same examples"):
        probe(_objective(RandomOutputs().eval()), _batch(4))


def test_an_example_that_is_not_finite_is_no_mismatch() -> None:
    """What becomes of it is said where its index is known: in the fit, and in its row."""
    x, y = _batch(4)
    x[0] = torch.nan
    probe(_objective(nn.Linear(4, 3)), (x, y))


def test_a_model_without_tracked_parameters_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="requires_grad_"):
        probe(_objective(nn.Linear(4, 3).requires_grad_(False)), _batch(4))


SPARSE: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(12, 3)),
    "EmbeddingBag": lambda: nn.Sequential(nn.EmbeddingBag(5, 3, mode="sum", sparse=True), nn.Linear(3, 3)),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_gradients_are_refused_naming_the_module_and_the_cure(kind: str) -> None:
    """Autograd's own error, of a sparse tensor that cannot be viewed, names neither."""
    ids, y = torch.arange(24).view(6, 4) % 5, torch.arange(6) % 3
    model = SPARSE[kind]()
    with pytest.raises(UnsupportedModelError, match=rf"^0 \({kind}\): .*got sparse=True; .*sparse=False"):
        probe(_objective(model), (ids, y))
    model[0].sparse = False
    probe(_objective(model), (ids, y))


def test_a_frozen_embedding_may_be_sparse() -> None:
    ids, y = torch.arange(24).view(6, 4) % 5, torch.arange(6) % 3
    model = SPARSE["Embedding"]()
    model[0].requires_grad_(False)
    probe(_objective(model), (ids, y))


def test_a_probe_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    probe(_objective(model), _batch(4))
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_refusals_are_value_errors() -> None:
    assert issubclass(CalculatorError, ValueError)
