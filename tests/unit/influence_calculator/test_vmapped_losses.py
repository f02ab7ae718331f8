"""torch's own losses under vmap: the numbers of torch without it, and nothing loaded that takes long."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from influence_calculator.maths import curvature
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.vmapped_losses import GatheredLosses, gathered
from influence_calculator.torch import DirectInfluence, EkfacInfluence

C = 5
GENERATOR = torch.Generator().manual_seed(3)

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": F.cross_entropy,
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "module": torch.nn.CrossEntropyLoss(reduction="sum", ignore_index=2),
    "ignored": lambda z, y: F.cross_entropy(z, y, ignore_index=2),
    "each": lambda z, y: F.cross_entropy(z, y, reduction="none").sum(),
    "weighted": lambda z, y: F.cross_entropy(z, y, weight=torch.arange(1.0, 1 + C, dtype=z.dtype)),
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "log": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y, ignore_index=1),
    "probabilities": lambda z, y: F.cross_entropy(z, torch.eye(C, dtype=z.dtype)[y].movedim(-1, 1)),
}


@pytest.mark.parametrize("positions", [(), (4,), (2, 3)])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_values_and_gradients_are_those_without_vmap(
    loss: Callable[[Tensor, Tensor], Tensor], positions: tuple[int, ...]
):
    logits = torch.randn(6, C, *positions, generator=GENERATOR, dtype=torch.float64)
    labels = torch.randint(C, (6, *positions), generator=GENERATOR)
    labels.view(-1)[0] = 0  # in no example is everything ignored

    def one(z: Tensor, y: Tensor) -> Tensor:
        with GatheredLosses():
            return loss(z[None], y[None])

    gradients, values = vmap(grad_and_value(one))(logits, labels)
    for z, y, gradient, value in zip(logits, labels, gradients, values, strict=True):
        leaf = z.clone().requires_grad_()
        expected = loss(leaf[None], y[None])
        torch.testing.assert_close(value, expected.detach(), equal_nan=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0], equal_nan=True)


def test_an_example_without_classes_dimension_is_taken_as_torch_takes_it():
    z, y = torch.randn(C, generator=GENERATOR), torch.tensor(3)
    torch.testing.assert_close(gathered(F.cross_entropy)(z, y), F.cross_entropy(z, y))


def test_a_label_that_no_class_has_is_refused():
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        gathered(F.cross_entropy)(torch.zeros(1, C), torch.tensor([C]))


LABELS: dict[str, tuple[tuple[int, ...], Tensor]] = {
    "int64": ((), torch.zeros(2, dtype=torch.int64)),
    "uint8": ((), torch.tensor([1, 4], dtype=torch.uint8)),
    "int32": ((), torch.zeros(2, dtype=torch.int32)),
    "int16": ((), torch.zeros(2, dtype=torch.int16)),
    "bool": ((), torch.zeros(2, dtype=torch.bool)),
    "uint8 of positions": ((4,), torch.zeros(2, 4, dtype=torch.uint8)),
    "int32 of positions": ((4,), torch.zeros(2, 4, dtype=torch.int32)),
    "too few": ((4,), torch.zeros(2, 2, dtype=torch.int64)),
    "one for all positions": ((4,), torch.zeros(2, 1, dtype=torch.int64)),
    "a corner": ((2, 3), torch.zeros(2, 1, 2, dtype=torch.int64)),
    "too many": ((4,), torch.zeros(2, 5, dtype=torch.int64)),
    "a dimension more": ((), torch.zeros(2, 1, dtype=torch.int64)),
    "a dimension less": ((4,), torch.zeros(2, dtype=torch.int64)),
}
PICKING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "weighted": lambda z, y: F.cross_entropy(z, y, weight=torch.arange(1.0, 1 + C, dtype=z.dtype)),
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "log": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
    "weighted log": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y, torch.arange(1.0, 1 + C, dtype=z.dtype)),
}


@pytest.mark.parametrize("loss", PICKING.values(), ids=PICKING)
@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_torch_refuses_are_refused_in_its_words_and_others_taken(
    kind: str, loss: Callable[[Tensor, Tensor], Tensor]
):
    positions, y = LABELS[kind]
    z = torch.randn(2, C, *positions, generator=GENERATOR, dtype=torch.float64)
    losses = xy_objective(torch.nn.Linear(1, 1), loss).losses
    refusal: RuntimeError | None = None
    try:
        expected = torch.stack([loss(z[i : i + 1], y[i : i + 1]) for i in range(2)])
    except RuntimeError as refused:
        refusal = refused
    if refusal is None:
        torch.testing.assert_close(losses(z, (z, y)), expected)
        return
    with pytest.raises(RuntimeError) as found:
        losses(z, (z, y))
    assert str(found.value) == str(refusal)


class _Tokens(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mT


@pytest.mark.parametrize("mode", curvature.SecondOrderMode)
@pytest.mark.parametrize("name", ["cross-entropy", "log"])
def test_labels_of_some_of_the_positions_are_refused_by_a_fit_and_by_influences(
    name: str, mode: curvature.SecondOrderMode
):
    x, y = torch.randn(2, 4, 3, generator=GENERATOR), torch.zeros(2, 4, dtype=torch.int64)
    influence = DirectInfluence(_Tokens(3, C), PICKING[name], 0.1, second_order_mode=mode)
    with pytest.raises(RuntimeError, match="Expected target size"):
        influence.fit([(x, y), (x, y[:, :2])])
    with pytest.raises(RuntimeError, match="Expected target size"):
        influence.fit([(x, y)]).influences(x, y, x, y[:, :2])


@pytest.mark.parametrize("name", PICKING)
def test_labels_of_bytes_have_the_curvature_of_others(name: str):
    x, y = torch.randn(6, 3, generator=GENERATOR), torch.tensor([0, 1, 4, 4, 2, 0])
    model = torch.nn.Linear(3, C)
    ekfac = EkfacInfluence(model, True, 0.1, loss=PICKING[name])
    gauss_newton = curvature.SecondOrderMode.GENERALIZED_GAUSS_NEWTON
    direct = DirectInfluence(model, PICKING[name], 0.1, second_order_mode=gauss_newton)
    for influence in (ekfac, direct):
        expected = influence.fit([(x, y)]).influences(x, y)
        torch.testing.assert_close(influence.fit([(x, y.byte())]).influences(x, y.byte()), expected)


WITHOUT_SYMPY = """
import sys
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from influence_calculator.torch import EkfacInfluence

x, y = torch.randn(8, 4), torch.randint(3, (8,))
model = torch.nn.Linear(4, 3)
ekfac = EkfacInfluence(model, regularization=0.1, loss=F.cross_entropy)
ekfac.fit(DataLoader(TensorDataset(x, y), batch_size=4)).influences(x, y, x, y)
assert "sympy" not in sys.modules, "it takes most of a second in every worker"
"""


def test_a_classifiers_ekfac_loads_no_sympy():
    subprocess.run([sys.executable, "-c", WITHOUT_SYMPY], check=True)
