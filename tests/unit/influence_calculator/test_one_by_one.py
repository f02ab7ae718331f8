"""The few numbers of each gradient that a look at a model compares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_calculator.maths import one_by_one
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.one_by_one import PIECE, gradients_one_by_one, mismatched

SIZES = (PIECE - 1, PIECE, 2 * PIECE + 5)


def _model(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 2), nn.Linear(2, 3, bias=False)).double()


def _few(inputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, inputs, generator=generator).double(), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("inputs", SIZES)
@pytest.mark.parametrize("places", [(0, 1), (3, PIECE + 3), (0, -1), (7, PIECE // 2)], ids=str)
def test_two_entries_that_changed_places_are_noticed(
    inputs: int, places: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they stand: in the same piece of the gradient, at the same place of two, at its end."""
    objective, few = xy_objective(_model(inputs), F.cross_entropy), _few(inputs)
    expected = gradients_one_by_one(objective, few)
    assert mismatched(objective, few, expected) == []
    right = one_by_one.per_sample_gradients

    def swapped(*given: object):
        for part in right(*given):
            values = part.values.clone()
            if part.block == "0.weight":
                one, other = (place % values.shape[1] for place in places)
                values[:, [one, other]] = values[:, [other, one]]
            yield part._replace(values=values)

    monkeypatch.setattr(one_by_one, "per_sample_gradients", swapped)
    assert mismatched(objective, few, expected) == ["0.weight"]
