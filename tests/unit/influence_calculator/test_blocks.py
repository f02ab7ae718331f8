"""Block structures and the regularization of each block."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_calculator.maths.blocks import (
    BlockMode,
    Relative,
    block_layout,
    block_regularization,
    check_coverage,
    checked_regularization,
)
from influence_calculator.maths.objective import xy_objective


class _WithOwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
        self.head = nn.Linear(2, 2)
        self.head.bias.requires_grad_(False)
        self.twin = nn.Linear(2, 2, bias=False)
        self.twin.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(self.head(self.body(x) * self.scale))


@pytest.fixture
def objective() -> Any:
    return xy_objective(_WithOwnParameter(), F.cross_entropy)


def _names(objective: Any, structure: Any) -> dict[str, list[str]]:
    layout = block_layout(objective, structure)
    return {block: [slot.name for slot in layout.slots_of(block)] for block in layout.blocks}


TRACKED = ["scale", "body.0.weight", "body.0.bias", "body.1.weight", "head.weight"]


def test_the_full_structure_is_one_block_of_all_tracked_parameters(objective: Any) -> None:
    assert _names(objective, BlockMode.FULL) == {"": TRACKED}


def test_layer_wise_blocks_are_the_direct_children_and_the_roots_own_parameters(objective: Any) -> None:
    assert _names(objective, BlockMode.LAYER_WISE) == {
        "": ["scale"],
        "body": TRACKED[1:4],
        "head": ["head.weight"],
    }


def test_parameter_wise_blocks_hold_one_parameter_each(objective: Any) -> None:
    assert _names(objective, BlockMode.PARAMETER_WISE) == {name: [name] for name in TRACKED}


def test_a_custom_structure_may_leave_parameters_out_and_keeps_the_models_order(objective: Any) -> None:
    structure = {"last": ["head.weight"], "first": ["body.0.bias", "body.0.weight"]}
    assert _names(objective, structure) == {
        "last": ["head.weight"],
        "first": ["body.0.weight", "body.0.bias"],
    }
    assert block_layout(objective, structure).width == 4 + 12 + 4


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"a": ["scale"], "b": ["scale"]}, "'scale' stands in block 'a' and in 'b'"),
        ({"a": ["body.0.wieght"]}, "did you mean 'body.0.weight'"),
        ({"a": ["head.bias"]}, "does not require grad"),
        ({"a": ["twin.weight"]}, "tied to 'head.weight'"),
        ({"a": []}, "at least one parameter name"),
        ({"a": "scale"}, "list of at least one parameter name"),
        ({}, "at least one block"),
        (
            "layerwise",
            "block_structure: expected one of 'full', 'layer_wise', 'parameter_wise', or a mapping",
        ),
        (["scale"], "block_structure: expected one of 'full'"),
    ],
)
def test_a_custom_structure_that_cannot_be_meant_is_refused(
    objective: Any, structure: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        block_layout(objective, structure)


def test_a_model_without_tracked_parameters_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="at least one parameter that requires grad"):
        block_layout(xy_objective(model, F.cross_entropy), BlockMode.FULL)


def test_a_dict_that_covers_every_block_is_accepted() -> None:
    """Mistake 7: pyDVL refuses exactly the dicts that are right."""
    regularization = {"a": 0.1, "b": 0.2}
    check_coverage(regularization, ["a", "b"])
    assert block_regularization(regularization, "b", trace=7.0, dim=3) == 0.2


def test_a_dict_that_misses_or_adds_blocks_is_refused_with_their_names() -> None:
    with pytest.raises(ValueError, match=r"missing: \['b'\], unknown: \['c'\]"):
        check_coverage({"a": 0.1, "c": 0.1}, ["a", "b"])


def test_a_relative_regularization_is_the_mean_of_the_diagonal_times_c() -> None:
    assert block_regularization(Relative(0.1), "a", trace=6.0, dim=3) == pytest.approx(0.2)


@pytest.mark.parametrize("value", [-1.0, float("nan"), {"a": -0.1}, Relative(-1.0), float("inf")])
def test_a_regularization_that_is_negative_or_not_finite_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="finite numbers that are not negative"):
        checked_regularization(value)


@pytest.mark.parametrize("value", ["0.1", [0.1], 1j, {"a": "x"}, Relative("x"), torch.ones(2)], ids=repr)
def test_a_regularization_that_is_no_number_is_refused_with_what_came(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^regularization: expected finite numbers .*, got ('|\[|1j|tensor)"
    ):
        checked_regularization(value)


def test_no_regularization_is_zero() -> None:
    assert checked_regularization(None) == 0.0
