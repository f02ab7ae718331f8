"""Perturbation: `∇x (z_t · g(x))` against double backward, one pair after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from influence_calculator import (
    DirectInfluence,
    EkfacInfluence,
    GradDotInfluence,
    InfluenceMode,
    NestedTorchCatAggregator,
    SequentialInfluenceCalculator,
    UnsupportedInputError,
)
from influence_calculator.maths.blocks import BlockMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.method import Fitted, fit
from influence_calculator.maths.objective import Batch, Objective, xy_objective
from influence_calculator.maths.perturbation import perturbations, perturbations_by_block
from model_cases import CASES, MLP, ModelCase
from training_sets import TrainingSet


def _fitted(case: ModelCase, blocks: Any = BlockMode.FULL) -> tuple[Objective, Fitted]:
    objective = xy_objective(case.model(), case.loss)
    method = Direct(0.1, blocks)
    return objective, method.fitted(objective, fit(method, objective, TrainingSet(case.train(), 5)), None)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_each_pair_is_the_inputs_gradient_of_its_influence(case: ModelCase) -> None:
    objective, fitted = _fitted(case)
    left = fitted.solve(fitted.gradients(objective, case.test())).left
    x, y = (part[:6] for part in case.train())
    expected = oracle.perturbations(objective.model, case.loss, left[""], x, y)
    assert expected.norm() > 0
    result = perturbations(fitted, objective, left, (x, y), micro_batch=4)
    assert result.shape == (7, 6, *case.features)
    oracle.assert_close(result, expected, 1e-10)


@pytest.mark.parametrize("blocks", [BlockMode.LAYER_WISE, {"b": ["4.weight"], "a": ["0.bias", "0.weight"]}])
def test_factors_come_in_any_block_structure(blocks: Any) -> None:
    objective, fitted = _fitted(MLP, blocks)
    left = fitted.solve(fitted.gradients(objective, MLP.test())).left
    x, y = MLP.train()
    z = torch.zeros(7, 60, dtype=torch.float64)
    for block in fitted.layout.blocks:
        names = tuple(slot.name for slot in fitted.layout.slots_of(block))
        z[:, oracle.columns_of(objective.model, names)] = left[block]
    expected = oracle.perturbations(objective.model, MLP.loss, z, x, y)
    oracle.assert_close(perturbations(fitted, objective, left, (x, y), 23), expected, 1e-10)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_blocks_part_is_what_its_own_factors_give(case: ModelCase) -> None:
    objective, fitted = _fitted(case, BlockMode.LAYER_WISE)
    left = fitted.solve(fitted.gradients(objective, case.test())).left
    batch = tuple(part[:6] for part in case.train())
    parts = perturbations_by_block(fitted, objective, left, batch, micro_batch=4)
    assert parts.shape == (len(fitted.layout.blocks), 7, 6, *case.features)
    for block, part in zip(fitted.layout.blocks, parts, strict=True):
        own = oracle.columns_of(objective.model, tuple(slot.name for slot in fitted.layout.slots_of(block)))
        z = torch.zeros(7, fitted.layout.width, dtype=torch.float64)
        z[:, own] = left[block]
        oracle.assert_close(part, oracle.perturbations(objective.model, case.loss, z, *batch), 1e-9)
    oracle.assert_close(parts.sum(0), perturbations(fitted, objective, left, batch, 4), 1e-12)


@pytest.mark.parametrize(("t", "n"), [(7, 1), (1, 5), (5, 2), (3, 3)])
def test_test_and_training_chunks_may_differ_in_length_in_any_way(t: int, n: int) -> None:
    """Mistake 3: a test chunk longer than the train chunk."""
    objective, fitted = _fitted(MLP)
    left = {"": torch.randn(t, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    x, y = (part[:n] for part in MLP.train())
    expected = oracle.perturbations(objective.model, MLP.loss, left[""], x, y)
    oracle.assert_close(perturbations(fitted, objective, left, (x, y), 2), expected, 1e-10)


def test_a_bounded_workspace_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, fitted = _fitted(MLP)
    left = fitted.solve(fitted.gradients(objective, MLP.test())).left
    expected = perturbations(fitted, objective, left, MLP.train(), 23)
    monkeypatch.setattr("influence_calculator.maths.directional.WORKSPACE_BYTES", {"cpu": 1, "cuda": 1})
    oracle.assert_close(perturbations(fitted, objective, left, MLP.train(), 3), expected, 1e-12)


def _dict_objective(model: nn.Module) -> Objective:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["pixels"])

    def loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch["label"])

    return Objective(model, loss, forward, tuple(name for name, _ in model.named_parameters()))


def test_the_input_of_a_dict_is_its_only_floating_entry() -> None:
    objective, fitted = _fitted(MLP)
    left = fitted.solve(fitted.gradients(objective, MLP.test())).left
    x, y = MLP.train()
    expected = perturbations(fitted, objective, left, (x, y), 8)
    of_dict = _dict_objective(objective.model)
    result = perturbations(fitted, of_dict, left, {"label": y, "pixels": x}, 8)
    oracle.assert_close(result, expected, 1e-12)


class _Halves(nn.Module):
    """Of the inputs `p` and `q`, beside which ids come along, what a network makes of them side by side."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        moved = torch.cat([inputs["p"], inputs["q"].flatten(1)], dim=1)
        return self.network(moved + 0.0 * inputs["id"][:, None])


def _halves(x: Tensor) -> Any:
    return {"id": torch.arange(len(x)), "p": x[:, :1], "q": x[:, 1:, None]}


def _of_halves(kind: Any, **arguments: Any) -> tuple[Any, Any]:
    """A fitted model of the network alone, and one of the same network behind `_Halves`."""
    x, y = MLP.train()
    models = ((MLP.model(), x), (_Halves(MLP.model()), _halves(x)))
    alone, halved = (kind(model, loss=MLP.loss, **arguments).fit([(inputs, y)]) for model, inputs in models)
    return alone, halved


REGULARIZED = {"regularization": 0.1}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(DirectInfluence, REGULARIZED), (EkfacInfluence, REGULARIZED), (GradDotInfluence, {})],
)
def test_several_inputs_move_each_by_itself(kind: Any, arguments: dict[str, Any]) -> None:
    """In the structure of the inputs, with None for what does not move."""
    alone, halved = _of_halves(kind, **arguments)
    (x, y), (x_test, y_test) = MLP.train(), MLP.test()
    expected = alone.influences(x_test, y_test, x, y, InfluenceMode.Perturbation)
    found = halved.influences(_halves(x_test), y_test, _halves(x), y, InfluenceMode.Perturbation)
    assert found["id"] is None
    oracle.assert_close(found["p"], expected[..., :1], 1e-9)
    oracle.assert_close(found["q"], expected[..., 1:, None], 1e-9)


def test_blocks_of_several_inputs_sum_to_the_whole() -> None:
    _, halved = _of_halves(EkfacInfluence, **REGULARIZED)
    (x, y), (x_test, y_test) = MLP.train(), MLP.test()
    sides = _halves(x_test), y_test, _halves(x), y, InfluenceMode.Perturbation
    blocks, whole = halved.influences_by_block(*sides), halved.influences(*sides)
    for name in ("p", "q"):
        oracle.assert_close(torch.stack([part[name] for part in blocks.values()]).sum(0), whole[name], 1e-9)


def test_a_sequence_of_blocks_takes_one_moving_input_and_names_the_others() -> None:
    _, halved = _of_halves(GradDotInfluence)
    (x, y), (x_test, y_test) = MLP.train(), MLP.test()
    sides = [(_halves(x_test), y_test)], [(_halves(x), y)]
    lazy = SequentialInfluenceCalculator(halved).influences(*sides, InfluenceMode.Perturbation)
    with pytest.raises(UnsupportedInputError, match=r"expected one .*, got \['p'\], \['q'\]; .*`influences`"):
        lazy.compute(aggregator=NestedTorchCatAggregator())


def test_floating_targets_are_not_mistaken_for_inputs() -> None:
    batch = (torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 3))
    objective, fitted = _fitted(MLP)
    with pytest.raises(ValueError, match=r"got 0 among \[0\]: int64"):
        perturbations(fitted, objective, {"": torch.zeros(1, 60)}, batch, 2)


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ({"input_ids": torch.zeros(2, 4, dtype=torch.long)}, r"\['input_ids'\]: int64"),
        ({"a": torch.zeros(2, 4), "b": torch.zeros(2)}, r"got 2 among \['a'\]: float32, \['b'\]: float32"),
    ],
)
def test_inputs_that_cannot_be_moved_are_refused_by_name(batch: Batch, named: str) -> None:
    objective, fitted = _fitted(MLP)
    with pytest.raises(ValueError, match=named):
        perturbations(fitted, objective, {"": torch.zeros(1, 60)}, batch, 2)
