"""The Arnoldi method against explicit eigendecompositions in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import oracle
from influence_calculator.maths import region
from influence_calculator.maths.arnoldi import Arnoldi
from influence_calculator.maths.blocks import BlockMode, Relative
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.errors import NotFiniteError, SingularCurvatureError
from influence_calculator.maths.method import FitState, Fitted, SolverStatus, fit
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.perturbation import perturbations
from model_cases import CASES, CONV2D, LINEAR, MLP, TRANSFORMER, ModelCase
from references import REGULARIZATIONS, reference
from training_sets import TrainingSet

MODES = list(SecondOrderMode)
FULL_RANK = 200
GAUSS_NEWTON = SecondOrderMode.GENERALIZED_GAUSS_NEWTON


def fit_case(case: ModelCase, method: Arnoldi, size: int = 5, dtype: torch.dtype = torch.float64) -> FitState:
    x, y = (part.to(dtype) if part.is_floating_point() else part for part in case.train())
    return fit(method, xy_objective(case.model(dtype), case.loss), TrainingSet((x, y), size))


def fitted_case(case: ModelCase, method: Arnoldi, state: FitState | None = None) -> Fitted:
    objective = xy_objective(case.model(), case.loss)
    return method.fitted(objective, state if state is not None else fit_case(case, method), None)


def left_of(fitted: Fitted, case: ModelCase) -> dict[str, Tensor]:
    gradients = fitted.gradients(xy_objective(case.model(), case.loss), case.test())
    return fitted.solve(gradients).left


def truncated(curvature: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`Vᵀ S V` of the eigenpairs of largest modulus, and `VᵀV`; below them must be a gap."""
    eigenvalues, vectors = torch.linalg.eigh(curvature)
    order = eigenvalues.abs().argsort(descending=True)
    kept, moduli = order[:rank], eigenvalues.abs()[order]
    assert float(moduli[rank - 1] - moduli[rank]) > 1e-4 * float(moduli[0])
    own = vectors[:, kept]
    return own @ torch.diag(eigenvalues[kept]) @ own.T, own @ own.T


@pytest.mark.parametrize("case", [*CASES, TRANSFORMER], ids=repr)
@pytest.mark.parametrize("mode", MODES)
def test_at_full_rank_it_is_the_direct_solve(case: ModelCase, mode: SecondOrderMode) -> None:
    expected = reference(case, mode)
    method = Arnoldi(1.0, rank=FULL_RANK, second_order=mode)
    state = fit_case(case, method)
    for λ in REGULARIZATIONS:
        # Another λ needs no new pass over the data.
        for complement in (True, False):
            fitted = fitted_case(case, replace(method, regularization=λ, complement=complement), state)
            left = left_of(fitted, case)
            oracle.assert_close(fitted.layout.flatten(left), expected.factors(λ), expected.bound(λ))
            scores = region.influences(fitted, left, case.train(), micro_batch=6)
            oracle.assert_close(scores, expected.influences(λ), expected.bound(λ))
            assert fitted.notes == ()


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("mode", MODES)
def test_at_full_rank_perturbations_are_the_inputs_gradients(case: ModelCase, mode: SecondOrderMode) -> None:
    fitted = fitted_case(case, Arnoldi(0.1, FULL_RANK, second_order=mode))
    objective = xy_objective(case.model(), case.loss)
    x, y = (part[:3] for part in case.train())
    left = left_of(fitted, case)
    expected = oracle.perturbations(objective.model, case.loss, reference(case, mode).factors(0.1), x, y)
    limit = reference(case, mode).bound(0.1)
    oracle.assert_close(perturbations(fitted, objective, left, (x, y), 2), expected, limit)


@pytest.mark.parametrize("case", [MLP, CONV2D, TRANSFORMER], ids=repr)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [2, 5])
def test_of_low_rank_it_is_the_truncated_eigendecomposition(
    case: ModelCase, mode: SecondOrderMode, rank: int
) -> None:
    expected = reference(case, mode)
    curvature, projection = truncated(expected.curvature, rank)
    method = Arnoldi(0.1, rank, krylov_dimension=rank + 8, tol=1e-9, max_iter=200, second_order=mode)
    state = fit_case(case, method)
    fitted = fitted_case(case, method, state)
    assert fitted.notes == ()
    oracle.assert_close(left_of(fitted, case)[""], oracle.factors(curvature, 0.1, expected.test), 1e-6)

    without = fitted_case(case, replace(method, complement=False), state)
    inside = oracle.factors(curvature, 0.1, expected.test) @ projection
    oracle.assert_close(left_of(without, case)[""], inside, 1e-6)

    narrow = fitted_case(case, replace(method, complement=False).narrow(), state)
    left = left_of(narrow, case)
    assert left[""].shape == (len(case.test()[0]), rank)
    assert narrow.layout.factor_widths == {"": rank}
    scores = region.influences(narrow, left, case.train(), micro_batch=6)
    oracle.assert_close(scores, inside @ expected.train.T, 1e-6)
    factors = narrow.factors(left)
    oracle.assert_close(factors[""], inside, 1e-6)
    oracle.assert_close(narrow.left(factors)[""], left[""], 1e-6)


@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_float32_stays_within_its_bound(λ: float) -> None:
    expected = reference(MLP, GAUSS_NEWTON)
    method = Arnoldi(λ, FULL_RANK, second_order=GAUSS_NEWTON)
    objective = xy_objective(MLP.model(torch.float32), MLP.loss)
    fitted = method.fitted(objective, fit_case(MLP, method, dtype=torch.float32), None)
    x, y = MLP.test()
    left = fitted.solve(fitted.gradients(objective, (x.float(), y))).left[""]
    assert left.dtype is torch.float32
    oracle.assert_close(left, expected.factors(λ), expected.bound(λ, torch.float32))


BLOCKS: dict[str, Any] = {
    "layer-wise": BlockMode.LAYER_WISE,
    "parameter-wise": BlockMode.PARAMETER_WISE,
    "custom": {"ends": ["4.weight", "0.bias"], "middle": ["2.weight"]},
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("mode", MODES)
def test_blocks_have_their_own_eigenpairs(mode: SecondOrderMode, blocks: str) -> None:
    """Some are multiplied as a whole, others searched: they settle after different passes."""
    expected = reference(MLP, mode)
    method = Arnoldi(0.1, 3, krylov_dimension=9, tol=1e-9, blocks=BLOCKS[blocks], second_order=mode)
    fitted = fitted_case(MLP, method)
    left = left_of(fitted, MLP)
    for block in fitted.layout.blocks:
        names = tuple(slot.name for slot in fitted.layout.slots_of(block))
        own = oracle.columns_of(MLP.model(), names)
        matrix = expected.curvature[own[:, None], own]
        curvature = truncated(matrix, 3)[0] if len(own) > 3 else matrix
        solved = oracle.factors(curvature, 0.1, expected.test[:, own])
        oracle.assert_close(left[block], solved, 1e-6)


def test_each_block_takes_its_own_regularization_and_a_relative_one_follows_the_trace() -> None:
    blocks = {"first": ["0.weight", "0.bias"], "rest": ["2.weight", "4.weight", "4.bias"]}
    method = Arnoldi(1.0, rank=4, blocks=blocks, second_order=GAUSS_NEWTON)
    by_block = replace(method, regularization={"first": 0.5, "rest": 0.1})
    relative = replace(method, regularization=Relative(0.3))
    both = left_of(fitted_case(MLP, by_block), MLP)
    for block, λ in (("first", 0.5), ("rest", 0.1)):
        assert torch.equal(
            both[block], left_of(fitted_case(MLP, replace(method, regularization=λ)), MLP)[block]
        )
    curvature = reference(MLP, GAUSS_NEWTON).curvature
    left = left_of(fitted_case(MLP, relative), MLP)
    for block, names in blocks.items():
        own = oracle.columns_of(MLP.model(), tuple(names))
        λ = 0.3 * float(curvature.diagonal()[own].mean())
        same = left_of(fitted_case(MLP, replace(method, regularization=λ)), MLP)[block]
        oracle.assert_close(left[block], same, 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_batches_and_their_order_do_not_matter(mode: SecondOrderMode) -> None:
    """Mistake 1: with 23 examples, batches of 22 leave a last batch of one."""
    method = Arnoldi(0.1, 4, krylov_dimension=12, tol=1e-8, second_order=mode)
    expected = left_of(fitted_case(MLP, method), MLP)[""]
    for size in (1, 22, 23):
        state = fit_case(MLP, method, size)
        oracle.assert_close(left_of(fitted_case(MLP, method, state), MLP)[""], expected, 1e-7)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(5))
    x, y = MLP.train()
    state = fit(method, xy_objective(MLP.model(), MLP.loss), TrainingSet((x[order], y[order]), 4))
    oracle.assert_close(left_of(fitted_case(MLP, method, state), MLP)[""], expected, 1e-7)


@pytest.mark.parametrize("complement", [True, False])
def test_influences_are_symmetric(complement: bool) -> None:
    """Of a on b as of b on a, transposed, also when the search ended early."""
    method = Arnoldi(0.1, 4, krylov_dimension=6, max_iter=0, complement=complement)
    fitted = fitted_case(MLP, method if complement else method.narrow())
    objective = xy_objective(MLP.model(), MLP.loss)
    a, b = MLP.test(), MLP.train()
    solved = [fitted.solve(fitted.gradients(objective, side)).left for side in (a, b)]
    oracle.assert_close(fitted.score(solved[0], b), fitted.score(solved[1], a).T, 1e-10)


def test_ranges_summed_in_order_give_what_one_pass_gives() -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    x, y = MLP.train()
    ranges = [TrainingSet((x[a:b], y[a:b]), 4) for a, b in ((0, 8), (8, 16), (16, 23))]
    method = Arnoldi(0.1, 4, krylov_dimension=12, tol=1e-9, second_order=GAUSS_NEWTON)
    several = fit(method, objective, TrainingSet((x, y), 4), ranges)
    one, other = (left_of(fitted_case(MLP, method, state), MLP)[""] for state in (several, None))
    oracle.assert_close(one, other, 1e-7)


def test_a_fit_that_has_found_its_eigenpairs_reads_no_more_and_keeps_nothing_else() -> None:
    data = TrainingSet(MLP.train(), 5)
    method = Arnoldi(0.1, 3, krylov_dimension=12, second_order=GAUSS_NEWTON)
    state = fit(method, xy_objective(MLP.model(), MLP.loss), data)
    assert 1 < data.passes < len(method.passes())
    assert list(state) == [f"krylov-{data.passes - 1}"]
    assert set(next(iter(state.values()))[""]) == {
        *("eigenvalues", "eigenvectors", "residuals", "converged", "settled")
    }


def test_the_seed_starts_the_search_and_does_not_change_its_answer() -> None:
    method = Arnoldi(0.1, 3, krylov_dimension=12, tol=1e-9, second_order=GAUSS_NEWTON)
    first, again, other = (fit_case(MLP, replace(method, seed=seed)) for seed in (0, 0, 1))
    one, same, another = (list(state.values())[-1][""]["eigenvectors"] for state in (first, again, other))
    assert torch.equal(one, same)
    assert not torch.equal(one, another)
    factors = [left_of(fitted_case(MLP, method, state), MLP)[""] for state in (first, other)]
    oracle.assert_close(factors[0], factors[1], 1e-7)


def test_a_search_that_did_not_converge_is_told_for_the_fit_and_for_every_row() -> None:
    method = Arnoldi(0.1, 5, krylov_dimension=7, max_iter=0)
    fitted = fitted_case(MLP, method)
    (note,) = fitted.notes
    assert "block '': the 5 eigenpairs of largest modulus have not converged in 7 passes" in note
    assert "raise max_iter or krylov_dimension" in note
    report = fitted.solve(fitted.gradients(xy_objective(MLP.model(), MLP.loss), MLP.test())).report
    assert report.status.tolist() == [SolverStatus.MAX_ITERATIONS] * 7
    assert report.iterations.tolist() == [7] * 7
    assert (report.residual > 1e-6).all()


def test_a_test_gradient_that_is_not_finite_concerns_its_row_only() -> None:
    method = Arnoldi(0.1, 3, complement=False, second_order=GAUSS_NEWTON)
    state = fit_case(MLP, method)
    for fitted in (fitted_case(MLP, method, state), fitted_case(MLP, method.narrow(), state)):
        gradients = fitted.gradients(xy_objective(MLP.model(), MLP.loss), MLP.test())
        expected = fitted.solve(gradients).left[""]
        gradients[""][3, 1] = torch.nan
        solved = fitted.solve(gradients)
        others = [i for i in range(7) if i != 3]
        oracle.assert_close(solved.left[""][others], expected[others], 1e-12)
        assert solved.left[""][3].isnan().all()
        assert solved.report.status.tolist() == [
            SolverStatus.NOT_FINITE if i == 3 else SolverStatus.CONVERGED for i in range(7)
        ]


def test_nothing_to_invert_is_refused_with_the_cure() -> None:
    """Cross-entropy has a direction without curvature: all logits shift."""
    method = Arnoldi(0.0, FULL_RANK, complement=False, second_order=GAUSS_NEWTON)
    with pytest.raises(SingularCurvatureError, match="larger regularization or a lower rank"):
        fitted_case(MLP, method)


def test_without_regularization_and_complement_the_largest_eigenpairs_suffice() -> None:
    method = Arnoldi(None, 2, krylov_dimension=9, tol=1e-9, complement=False, second_order=GAUSS_NEWTON)
    expected = reference(MLP, GAUSS_NEWTON)
    curvature, _ = truncated(expected.curvature, 2)
    inverse = torch.linalg.pinv(curvature, rtol=1e-9)
    oracle.assert_close(left_of(fitted_case(MLP, method), MLP)[""], expected.test @ inverse, 1e-6)


def test_a_training_example_that_is_not_finite_is_named_as_the_cause() -> None:
    x, y = LINEAR.train()
    x[4] = torch.nan
    with pytest.raises(NotFiniteError, match="a training example"):
        fit(Arnoldi(0.1), xy_objective(LINEAR.model(), LINEAR.loss), TrainingSet((x, y), 5))


def test_a_loss_that_means_and_one_that_sums_are_alike() -> None:
    summed = replace(MLP, loss=lambda outputs, y: F.cross_entropy(outputs, y, reduction="sum"))
    method = Arnoldi(0.1, 4, second_order=GAUSS_NEWTON)
    state = fit(method, xy_objective(MLP.model(), summed.loss), TrainingSet(MLP.train(), 5))
    one, other = (left_of(fitted_case(MLP, method, given), MLP)[""] for given in (state, None))
    oracle.assert_close(one, other, 1e-9)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rank": 0}, "rank: expected a whole number of at least 1, got 0"),
        ({"rank": 1.5}, "rank: expected a whole number of at least 1, got 1.5"),
        ({"rank": 10**9}, "rank: expected at most 100000, got 1000000000"),
        ({"seed": 0.5}, "seed: expected a whole number, got 0.5"),
        ({"rank": 5, "krylov_dimension": 5}, "krylov_dimension: expected more than rank = 5, got 5"),
        ({"tol": 0.0}, "tol: expected a number above 0"),
        ({"max_iter": -1}, "max_iter: expected at least 0"),
        ({"regularization": -1.0}, "regularization"),
        ({"regularization": 0.0}, "regularization: expected numbers above 0, got 0.0: outside of the eigen"),
        ({"regularization": {"a": 0.1, "b": 0.0}}, "regularization: expected numbers above 0, got 0.0"),
        ({"in_eigenspace": True}, "in_eigenspace: only without the complement"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Arnoldi(**{"regularization": 0.1, **arguments})


def test_a_state_of_another_fit_is_refused() -> None:
    state = fit_case(MLP, Arnoldi(0.1, 3))
    with pytest.raises(ValueError, match=r"expected 'eigenvectors' \[4, 60\] of block ''"):
        fitted_case(MLP, Arnoldi(0.1, 4), state)
