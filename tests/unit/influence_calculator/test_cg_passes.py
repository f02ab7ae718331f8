"""Conjugate gradients by passes over ranges: the numbers, how they end, what stands between two passes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from influence_calculator.maths.blocks import BlockMode, Relative
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.method import (
    SETTLED,
    FitPass,
    FitState,
    PassesFitted,
    Solved,
    SolverStatus,
    Sums,
    add_sums,
    fit,
)
from influence_calculator.maths.objective import Objective, slice_batch, xy_objective
from influence_calculator.maths.preconditioners import JacobiPreconditioner, NystroemPreconditioner
from model_cases import LOGISTIC, MLP, ModelCase
from references import CASES_AND_MODES, REGULARIZATIONS, reference
from training_sets import TrainingSet

MODES = list(SecondOrderMode)
RANGES = 3


@dataclass
class Solving:
    """A test batch of a case that is solved by passes over some ranges of its training data."""

    case: ModelCase
    method: Cg
    ranges: int = RANGES

    def __post_init__(self) -> None:
        self.objective: Objective = xy_objective(self.case.model(), self.case.loss)
        data = TrainingSet(self.case.train(), 5)
        fitted = self.method.fitted(self.objective, fit(self.method, self.objective, data), data)
        assert isinstance(fitted, PassesFitted)
        self.fitted = fitted
        self.length = data.length
        self.gradients = fitted.gradients(self.objective, self.case.test())

    def steps(self, states: dict[str, dict[str, Tensor]] | None = None) -> Iterator[Any]:
        """What stands between the passes, from the beginning or from given states to the end."""
        state = self.fitted.begun(self.gradients) if states is None else states
        yield state
        while not all(bool(unit[SETTLED]) for unit in state.values()):
            step = self.fitted.solving_pass("next", "before")
            state = self.after(step, {"before": state})
            yield state

    def after(self, step: FitPass, before: FitState) -> dict[str, dict[str, Tensor]]:
        total: Sums | None = None
        for start in range(0, self.length, size := math.ceil(self.length / self.ranges)):
            piece = TrainingSet(slice_batch(self.case.train(), start, min(start + size, self.length)), 4)
            total = add_sums(total, step.accumulate(self.objective, piece.batches(), before))
        sums = total or {}
        units = step.units(self.objective)
        return {unit: step.finish(unit, sums[unit], self.length, before) for unit in units}

    def solve(self) -> Solved:
        *_, last = self.steps()
        return self.fitted.solved(last)


def by_passes(λ: Any, **settings: Any) -> Cg:
    return Cg(λ, rtol=1e-10, solves_by_passes=True, **settings)


@pytest.mark.parametrize(
    ("case", "mode"), [(case, mode) for case, mode in CASES_AND_MODES if case in (LOGISTIC, MLP)], ids=str
)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_factors_are_those_of_the_explicit_matrix(case: ModelCase, mode: SecondOrderMode, λ: float) -> None:
    expected = reference(case, mode)
    solved = Solving(case, by_passes(λ, second_order=mode)).solve()
    assert (solved.report.status == SolverStatus.CONVERGED).all()
    oracle.assert_close(solved.left[""], expected.factors(λ), expected.bound(λ))


def assert_same_solution(found: Tensor, expected: Tensor) -> None:
    """Rows may stop one iteration apart, at residuals of 1e-10: more of entries near 0 than of the row."""
    assert ((found - expected).norm(dim=1) <= 1e-8 * expected.norm(dim=1)).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"preconditioner": JacobiPreconditioner(2)},
        {"preconditioner": NystroemPreconditioner(8)},
        {"blocks": BlockMode.LAYER_WISE},
        {"blocks": {"some": ["2.weight", "4.bias"], "one": ["0.bias"]}},
        {"blocks": BlockMode.LAYER_WISE, "preconditioner": NystroemPreconditioner(3)},
    ],
    ids=["jacobi", "nystroem", "layer-wise", "custom", "layer-wise and nystroem"],
)
@pytest.mark.parametrize("mode", MODES)
def test_one_process_and_passes_make_the_same_iterations(mode: SecondOrderMode, settings: Any) -> None:
    solving = Solving(MLP, by_passes(0.05, second_order=mode, **settings))
    expected, solved = solving.fitted.solve(solving.gradients), solving.solve()
    for block, rows in expected.left.items():
        assert_same_solution(solved.left[block], rows)
    assert torch.equal(solved.report.status, expected.report.status)
    assert (solved.report.iterations - expected.report.iterations).abs().max() <= 1
    assert (solved.report.residual <= 1e-10).all()


def test_one_range_of_the_same_batches_gives_the_bits_of_one_process() -> None:
    """The recursion is one: only the order of sums may differ."""
    case, method = LOGISTIC, Cg(0.1, rtol=1e-10, second_order=SecondOrderMode.HESSIAN)
    solving = Solving(case, method, ranges=1)
    whole = TrainingSet(case.train(), 10**6)
    one = method.fitted(solving.objective, {}, whole)
    expected = one.solve(solving.gradients)
    state = solving.fitted.begun(solving.gradients)
    while not bool(state[""][SETTLED]):
        step = solving.fitted.solving_pass("next", "before")
        sums = step.accumulate(solving.objective, whole.batches(), {"before": state})
        state = {"": step.finish("", sums[""], whole.length, {"before": state})}
    solved = solving.fitted.solved(state)
    assert torch.equal(solved.left[""], expected.left[""])
    assert torch.equal(solved.report.iterations, expected.report.iterations)
    assert torch.equal(solved.report.residual, expected.report.residual)


def test_a_regularization_relative_to_the_trace_is_taken_over() -> None:
    solving = Solving(MLP, by_passes(Relative(0.5), second_order=SecondOrderMode.GENERALIZED_GAUSS_NEWTON))
    expected, solved = solving.fitted.solve(solving.gradients), solving.solve()
    assert_same_solution(solved.left[""], expected.left[""])


def test_a_pass_leaves_what_it_follows_as_it_was() -> None:
    """A pass that is broken off is made again from what is in memory."""
    solving = Solving(MLP, by_passes(0.05))
    steps = solving.steps()
    next(steps)
    before = next(steps)
    kept = {name: value.clone() for name, value in before[""].items()}
    once = solving.after(solving.fitted.solving_pass("next", "before"), {"before": before})
    again = solving.after(solving.fitted.solving_pass("next", "before"), {"before": before})
    assert all(torch.equal(value, before[""][name]) for name, value in kept.items())
    assert all(torch.equal(value, once[""][name]) for name, value in again[""].items())


def test_another_process_goes_on_from_what_a_pass_left() -> None:
    steps = list(Solving(MLP, by_passes(0.05)).steps())
    other = list(Solving(MLP, by_passes(0.05)).steps(steps[4]))
    assert len(other) == len(steps) - 4
    for one, two in zip(steps[4:], other, strict=True):
        assert all(torch.equal(value, two[""][name]) for name, value in one[""].items())


def test_right_hand_sides_that_are_done_are_multiplied_no_more() -> None:
    solving = Solving(LOGISTIC, Cg(0.01, rtol=1e-3, solves_by_passes=True))
    zero = solving.gradients[""].clone()
    zero[1] = 0
    solving.gradients = {"": zero}
    multiplied = [len(state[""]["next"]) for state in solving.steps()]
    assert multiplied[0] == len(zero) - 1
    assert multiplied == sorted(multiplied, reverse=True)
    assert len(set(multiplied)) > 2, "all ended at once"
    solved = solving.solve()
    assert not solved.left[""][1].any()
    assert (solved.report.status[1], solved.report.iterations[1], solved.report.residual[1]) == (0, 0, 0)


def test_gradients_that_are_all_zero_take_no_pass() -> None:
    solving = Solving(LOGISTIC, by_passes(0.1))
    solving.gradients = {"": torch.zeros_like(solving.gradients[""])}
    assert len(list(solving.steps())) == 1
    assert not solving.solve().left[""].any()


def test_a_block_that_is_done_waits_for_the_others_as_it_is() -> None:
    solving = Solving(MLP, by_passes(0.05, blocks=BlockMode.LAYER_WISE))
    steps = list(solving.steps())
    last = [next(i for i, s in enumerate(steps) if bool(s[block][SETTLED])) for block in steps[0]]
    assert len(set(last)) > 1, "all blocks ended at once"
    for block, number in zip(steps[0], last, strict=True):
        assert all(torch.equal(v, steps[-1][block][name]) for name, v in steps[number][block].items())


def test_one_example_is_solved() -> None:
    expected = reference(MLP, "hessian")
    solving = Solving(MLP, by_passes(0.1))
    solving.gradients = {"": solving.gradients[""][:1]}
    oracle.assert_close(solving.solve().left[""], expected.factors(0.1)[:1], expected.bound(0.1))


def test_rows_that_are_solved_one_after_another_are_refused() -> None:
    with pytest.raises(ValueError, match=r"simultaneous: expected True with solves_by_passes"):
        Cg(0.1, simultaneous=False, solves_by_passes=True)
