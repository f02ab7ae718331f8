"""TRAK in a random projection: what the projection promises, and every score against an explicit S."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from explicit_projections import explicit_projection
from influence_calculator import SingularCurvatureError, SolverStatus, TrakInfluence
from influence_calculator.maths import projection, region
from influence_calculator.maths.blocks import Relative
from influence_calculator.maths.method import Fitted, add_sums, fit
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.perturbation import perturbations
from influence_calculator.maths.projection import Projection
from influence_calculator.maths.trak import Trak
from model_cases import CASES, MLP, TRANSFORMER, ModelCase
from references import REGULARIZATIONS, reference
from training_sets import TrainingSet

LIKE = torch.zeros((), dtype=torch.float64)
RANK = 8


def fitted(case: ModelCase, method: Trak, size: int = 5) -> Fitted:
    objective = xy_objective(case.model(), case.loss)
    return method.fitted(objective, fit(method, objective, TrainingSet(case.train(), size)))


def solved(own: Fitted, case: ModelCase) -> Any:
    return own.solve(own.gradients(xy_objective(case.model(), case.loss), case.test()))


def expected_factors(case: ModelCase, λ: float, S: Tensor) -> Tensor:
    """`S ((1/N) Σ φ φᵀ + λI)^-1 Sᵀ g` of every test example."""
    explicit = reference(case, "empirical_fisher")
    φ, tests = explicit.train @ S, explicit.test @ S
    return oracle.factors(φ.T @ φ / len(φ), λ, tests) @ S.T


class TestProjection:
    @pytest.mark.parametrize(("width", "rank", "seed"), [(7, 5, 0), (150, 130, 2**53), (70, 64, 3)])
    def test_every_entry_follows_from_the_seed_and_its_place(self, width: int, rank: int, seed: int) -> None:
        made = Projection(width, rank, seed, LIKE)
        S = explicit_projection(width, rank, seed)
        assert torch.equal(made.project(torch.eye(width, dtype=torch.float64)), S)

    @pytest.mark.parametrize("kept", [0, 1 << 26])
    @pytest.mark.parametrize("drawn", [1, 8 * 130 * 7, 1 << 23])
    def test_neither_parts_nor_memory_matter(
        self, kept: int, drawn: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(projection, "KEPT_BYTES", kept)
        monkeypatch.setattr(projection, "DRAWN_BYTES", drawn)
        S = explicit_projection(150, 130, 1)
        rows = torch.randn(4, 150, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        made = Projection(150, 130, 1, LIKE)
        oracle.assert_close(made.project(rows), rows @ S, 1e-12)
        by_parts = torch.zeros(4, 130, dtype=torch.float64)
        for start, stop in ((60, 150), (0, 13), (13, 60)):
            made.add(by_parts, start, rows[:, start:stop])
        oracle.assert_close(by_parts, rows @ S, 1e-12)
        oracle.assert_close(made.back(by_parts), rows @ S @ S.T, 1e-12)
        oracle.assert_close(made.gram(), S.T @ S, 1e-12)

    def test_products_are_kept_on_average_over_seeds(self) -> None:
        """For signs Var = (‖a‖² ‖b‖² + (a·b)² − 2 Σ a²b²) / k; their mean lies within 4 standard errors."""
        a, b = torch.randn(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        seeds, k = 400, 16
        pairs = [Projection(200, k, seed, LIKE).project(torch.stack([a, b])) for seed in range(seeds)]
        products = torch.stack([one @ other for one, other in pairs])
        variance = (a @ a * (b @ b) + (a @ b) ** 2 - 2 * (a**2 * b**2).sum()) / k
        assert abs(float(products.mean() - a @ b)) < 4 * float(variance / seeds) ** 0.5
        assert 0.8 < float(products.var() / variance) < 1.25

    def test_lengths_are_kept_exactly_on_the_diagonal(self) -> None:
        """Each row has length 1, so that the trace of a projected matrix is about its own."""
        S = Projection(50, 12, 0, LIKE).project(torch.eye(50, dtype=torch.float64))
        oracle.assert_close(S.square().sum(1), torch.ones(50, dtype=torch.float64), 1e-12)

    def test_as_many_columns_as_parameters_are_the_identity(self) -> None:
        rows = torch.eye(6, dtype=torch.float64)
        for rank in (6, 9):
            made = Projection(6, rank, 0, LIKE)
            for found in (made.project(rows), made.back(rows), made.gram()):
                assert torch.equal(found, rows)


@pytest.mark.parametrize("case", [*CASES, TRANSFORMER], ids=repr)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_scores_are_those_of_the_explicit_projection(case: ModelCase, λ: float) -> None:
    explicit = reference(case, "empirical_fisher")
    S = explicit_projection(explicit.train.shape[1], RANK, 7)
    expected = expected_factors(case, λ, S)
    by_parameter, by_coordinate = Trak(λ, RANK, 7), Trak(λ, RANK, 7).narrow()
    for method in (by_parameter, by_coordinate):
        own = fitted(case, method)
        answer = solved(own, case)
        oracle.assert_close(own.factors(answer.left)[""], expected, 1e-9)
        scores = region.influences(own, answer.left, case.train(), micro_batch=6)
        oracle.assert_close(scores, expected @ explicit.train.T, 1e-9)
        oracle.assert_close(own.left(own.factors(answer.left))[""], answer.left[""], 1e-9)
        assert (answer.report.status == SolverStatus.CONVERGED).all()
    assert answer.left[""].shape == (7, RANK)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_with_enough_columns_it_is_the_empirical_fisher(case: ModelCase, λ: float) -> None:
    explicit = reference(case, "empirical_fisher")
    model = TrakInfluence(case.model(), case.loss, λ, 10_000).fit([case.train()])
    found = model.influences(*case.test(), *case.train())
    oracle.assert_close(found, explicit.influences(λ), explicit.bound(λ))


def test_a_perturbation_is_the_inputs_gradient_of_the_influence() -> None:
    own, objective = fitted(MLP, Trak(0.1, RANK)), xy_objective(MLP.model(), MLP.loss)
    x, y = (part[:5] for part in MLP.train())
    z = expected_factors(MLP, 0.1, explicit_projection(60, RANK, 0))
    expected = oracle.perturbations(objective.model, MLP.loss, z, x, y)
    oracle.assert_close(perturbations(own, objective, solved(own, MLP).left, (x, y), 3), expected, 1e-9)


@pytest.mark.parametrize("size", [1, 4, 22, 23])
@pytest.mark.parametrize("ranges", [1, 3])
def test_batches_and_ranges_do_not_matter(size: int, ranges: int) -> None:
    """Mistake 1: averages over batches that are not weighted by their size."""
    objective, method = xy_objective(MLP.model(), MLP.loss), Trak(0.01, RANK)
    x, y = MLP.train()
    cuts = [0, 9, 13, 23] if ranges == 3 else [0, 23]
    pieces = [TrainingSet((x[a:b], y[a:b]), size) for a, b in pairwise(cuts)]
    (step,) = method.passes()
    total = None
    for piece in pieces:
        total = add_sums(total, step.accumulate(objective, piece.batches(), {}))
    assert total is not None
    own = method.fitted(objective, {step.name: {"": step.finish("", total[""], 23, {})}})
    expected = expected_factors(MLP, 0.01, explicit_projection(60, RANK, 0))
    oracle.assert_close(solved(own, MLP).left[""], expected, 1e-9)


def test_another_seed_is_another_projection() -> None:
    one, other = (solved(fitted(MLP, Trak(0.1, RANK, seed)), MLP).left[""] for seed in (0, 1))
    assert oracle.relative_error(one, other) > 0.1


def test_a_relative_regularization_follows_the_projected_trace() -> None:
    explicit, S = reference(MLP, "empirical_fisher"), explicit_projection(60, RANK, 0)
    λ = 0.1 * float((explicit.train @ S).square().sum(1).mean()) / RANK
    found = solved(fitted(MLP, Trak(Relative(0.1), RANK)), MLP).left[""]
    oracle.assert_close(found, expected_factors(MLP, λ, S), 1e-9)


def test_another_regularization_needs_no_new_fit() -> None:
    model = TrakInfluence(MLP.model(), MLP.loss, 1.0, RANK).fit([MLP.train()]).with_regularization(0.01)
    expected = expected_factors(MLP, 0.01, explicit_projection(60, RANK, 0))
    oracle.assert_close(model.influence_factors(*MLP.test()), expected, 1e-9)


def test_float32_stays_near_float64() -> None:
    (x, y), (a, b) = MLP.train(), MLP.test()
    model = TrakInfluence(MLP.model(torch.float32), MLP.loss, 0.01, RANK).fit([(x.float(), y)])
    found = model.influence_factors(a.float(), b)
    assert found.dtype is torch.float32
    oracle.assert_close(found, expected_factors(MLP, 0.01, explicit_projection(60, RANK, 0)), 1e-4)


def test_without_a_regularization_a_singular_matrix_is_refused() -> None:
    x = MLP.train()[0][:1]
    y = MLP.model()(x).detach()  # no gradient at all
    with pytest.raises(SingularCurvatureError, match="give a larger regularization"):
        TrakInfluence(MLP.model(), torch.nn.functional.mse_loss, None, RANK).fit([(x, y)])


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "3", None])
def test_a_rank_that_is_no_whole_number_above_zero_is_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match=f"rank: expected a whole number of at least 1, got {rank!r}"):
        Trak(0.1, rank)


@pytest.mark.parametrize("seed", [1.5, False, "a", None])
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=f"seed: expected a whole number, got {seed!r}"):
        Trak(0.1, 3, seed)


def test_a_method_travels_by_pickle() -> None:
    method = Trak(Relative(0.1), RANK, 3).narrow()
    assert pickle.loads(pickle.dumps(method)) == method
