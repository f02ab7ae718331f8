"""A building block takes the inputs that its model takes: a tensor, or a dict of tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from influence_calculator.torch.operator import HessianOperator
from influence_calculator.torch.restricted_model import RestrictedModel

X, Y = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 2
INPUTS = {"left": X[:, :1], "right": X[:, 1:]}


class OfDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner = nn.Linear(3, 2)

    def forward(self, x: dict[str, Tensor] | Tensor) -> Tensor:
        return self.inner(torch.cat([x["left"], x["right"]], dim=1) if isinstance(x, dict) else x)


def test_an_operator_of_a_dict_of_inputs_is_that_of_the_tensor_they_make():
    rows = torch.eye(8)
    operators = [HessianOperator(OfDict(), nn.functional.cross_entropy, [(x, Y)]) for x in (INPUTS, X)]
    of_dict, of_tensor = (operator.apply(rows) for operator in operators)
    assert torch.allclose(of_dict, of_tensor, atol=1e-6)


def test_an_input_that_is_no_tensor_is_refused_by_its_place():
    restricted = RestrictedModel(OfDict(), nn.functional.cross_entropy, None)
    with pytest.raises(ValueError, match=r"batch\[0\]\['right'\]: expected tensors .*got ndarray"):
        restricted.batch({**INPUTS, "right": X[:, 1:].numpy()}, Y)
