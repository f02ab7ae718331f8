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

from influence_calculator.maths.vmapped_losses import GatheredLosses, gathered

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
