"""Scores from gradients of the training examples that are kept: as if they were formed anew."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import oracle
from explicit_projections import explicit_projection
from influence_calculator.maths import region
from influence_calculator.maths.arnoldi import Arnoldi
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.expectation import Expectation
from influence_calculator.maths.grad_dot import GradDot
from influence_calculator.maths.layout import Left
from influence_calculator.maths.logra import Logra
from influence_calculator.maths.method import Fitted, Method, fit
from influence_calculator.maths.nystroem_sketch import NystroemSketch
from influence_calculator.maths.objective import IndexedBatch, micro_batches, xy_objective
from influence_calculator.maths.trak import Trak
from model_cases import CASES, MLP, SHARED, TRANSFORMER, ModelCase
from references import REGULARIZATIONS, reference
from training_sets import TrainingSet

FISHER = SecondOrderMode.EMPIRICAL_FISHER
METHODS: dict[str, Method] = {
    "Trak": Trak(0.1, 5, 3).narrow(),
    "Logra": Logra(0.1, 2, 3).narrow(),
    "Arnoldi by coordinates": Arnoldi(0.1, 4, complement=False, second_order=FISHER).narrow(),
    "Arnoldi": Arnoldi(0.1, 4, second_order=FISHER),
    "NystroemSketch": NystroemSketch(0.1, 4, second_order=FISHER),
    "Direct": Direct(0.1, second_order=FISHER),
    "Ekfac": Ekfac(0.1, expectation=Expectation.EXACT, unsupported="diagonal"),
    "GradDot": GradDot(),
}


@dataclass(frozen=True)
class Sides:
    """What a job stores of each side."""

    own: Fitted
    left: Left
    gradients: Left

    @classmethod
    def of(cls, case: ModelCase, method: Method, micro_batch: int) -> Sides:
        objective = xy_objective(case.model(), case.loss)
        own = method.fitted(objective, fit(method, objective, TrainingSet(case.train(), 5)), None)
        left = own.solve(own.gradients(objective, case.test())).left
        pieces = [
            own.gradients(objective, piece.batch)
            for piece in micro_batches(IndexedBatch(0, case.train()), micro_batch)
        ]
        return cls(own, left, {block: torch.cat([p[block] for p in pieces]) for block in own.layout.blocks})


@pytest.mark.parametrize("case", [MLP, SHARED, TRANSFORMER], ids=repr)
@pytest.mark.parametrize("name", METHODS)
def test_kept_gradients_score_as_those_that_are_formed_while_scoring(name: str, case: ModelCase) -> None:
    sides = Sides.of(case, METHODS[name], micro_batch=7)
    assert {block: rows.shape[1] for block, rows in sides.gradients.items()} == sides.own.layout.factor_widths
    found = region.influences_from_gradients(sides.left, sides.gradients)
    oracle.assert_close(found, region.influences(sides.own, sides.left, case.train(), micro_batch=6), 1e-9)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_the_scores_are_those_of_explicit_projections(case: ModelCase, λ: float) -> None:
    """`φ_test · ((1/N) Σ φ φᵀ + λI)^-1 φ_train`."""
    explicit = reference(case, "empirical_fisher")
    φ, tests = (side @ explicit_projection(side.shape[1], 5, 3) for side in (explicit.train, explicit.test))
    sides = Sides.of(case, Trak(λ, 5, 3).narrow(), micro_batch=7)
    oracle.assert_close(sides.gradients[""], φ, 1e-9)
    expected = oracle.influences(φ.T @ φ / len(φ), λ, tests, φ)
    oracle.assert_close(region.influences_from_gradients(sides.left, sides.gradients), expected, 1e-9)


def test_halves_are_summed_in_float32() -> None:
    """Factors that wait in bfloat16, against gradients in float32."""
    left = {"": torch.ones(2, 4097, dtype=torch.bfloat16)}
    found = region.influences_from_gradients(left, {"": torch.ones(3, 4097)})
    assert found.dtype is torch.float32
    assert found.tolist() == [[4097.0] * 3] * 2  # bfloat16 has no such number
