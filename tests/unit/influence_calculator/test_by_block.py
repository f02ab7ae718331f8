"""Each block's part of the influences: what the block's own curvature and gradients give, and no more."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import oracle
from influence_calculator.maths import region
from influence_calculator.maths.arnoldi import Arnoldi
from influence_calculator.maths.blocks import BlockMode
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.layout import Left
from influence_calculator.maths.method import Fitted, Method, fit
from influence_calculator.maths.objective import Objective, xy_objective
from model_cases import CASES, MLP, TRAIN, TRANSFORMER, ModelCase
from references import REGULARIZATIONS, reference
from training_sets import TrainingSet

MODE = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
CUSTOM = {"ends": ("4.weight", "0.bias"), "middle": ("2.weight",)}
CASES_AND_BLOCKS: list[tuple[ModelCase, Any]] = [
    *((case, BlockMode.LAYER_WISE) for case in (*CASES, TRANSFORMER)),
    (MLP, BlockMode.PARAMETER_WISE),
    (MLP, CUSTOM),
]


def fitted_and_left(case: ModelCase, method: Method) -> tuple[Fitted, Left]:
    return solved_for(xy_objective(case.model(), case.loss), case, method)


def solved_for(objective: Objective, case: ModelCase, method: Method) -> tuple[Fitted, Left]:
    fitted = method.fitted(objective, fit(method, objective, TrainingSet(case.train(), 5)), None)
    return fitted, fitted.solve(fitted.gradients(objective, case.test())).left


@pytest.mark.parametrize(("case", "blocks"), CASES_AND_BLOCKS, ids=str)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_a_part_is_the_influence_by_the_blocks_own_curvature_alone(
    case: ModelCase, blocks: Any, λ: float
) -> None:
    explicit = reference(case, MODE)
    fitted, left = fitted_and_left(case, Direct(λ, blocks, MODE))
    parts = region.influences_by_block(fitted, left, case.train(), micro_batch=6)
    assert len(parts) == len(fitted.layout.blocks)
    for block, part in zip(fitted.layout.blocks, parts, strict=True):
        own = oracle.columns_of(case.model(), tuple(slot.name for slot in fitted.layout.slots_of(block)))
        curvature = explicit.curvature[own[:, None], own]
        expected = oracle.influences(curvature, λ, explicit.test[:, own], explicit.train[:, own])
        oracle.assert_close(part, expected, explicit.bound(λ))
    whole = region.influences(fitted, left, case.train(), micro_batch=6)
    oracle.assert_close(parts.sum(0), whole, 1e-12)


def test_coordinates_of_each_block_are_kept_apart_too() -> None:
    fitted, left = fitted_and_left(
        MLP, Arnoldi(0.1, 3, complement=False, blocks=BlockMode.LAYER_WISE).narrow()
    )
    by_parameter = fitted.factors(left)
    parts = region.influences_by_block(fitted, left, MLP.train(), micro_batch=6)
    gradients = reference(MLP, MODE).train
    for block, part in zip(fitted.layout.blocks, parts, strict=True):
        own = oracle.columns_of(MLP.model(), tuple(slot.name for slot in fitted.layout.slots_of(block)))
        oracle.assert_close(part, by_parameter[block] @ gradients[:, own].T, 1e-9)


@pytest.mark.parametrize("micro_batch", [1, 6, TRAIN])
def test_the_batch_is_differentiated_once_for_all_blocks(micro_batch: int) -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    fitted, left = solved_for(objective, MLP, Direct(0.1, BlockMode.LAYER_WISE, MODE))
    seen: Counter[str] = Counter()
    objective.model.register_forward_hook(lambda _, args, __: seen.update(examples=len(args[0])))
    region.influences_by_block(fitted, left, MLP.train(), micro_batch)
    assert seen["examples"] == TRAIN


def test_factors_in_halves_give_parts_in_float32() -> None:
    fitted, left = fitted_and_left(MLP, Direct(0.1, BlockMode.LAYER_WISE, MODE))
    halves = {block: rows.bfloat16() for block, rows in left.items()}
    parts = region.influences_by_block(fitted, halves, MLP.train(), micro_batch=6)
    assert parts.dtype is torch.float32
    widened = {block: rows.double() for block, rows in halves.items()}
    oracle.assert_close(parts, region.influences_by_block(fitted, widened, MLP.train(), 6), 1e-5)
