"""What the models by eigenpairs and by a sketch have of their own; the rest is in `test_models`."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from influence_calculator import (
    ArnoldiInfluence,
    NystroemSketchInfluence,
    OneShotIterableError,
    SecondOrderMode,
    SolverStatus,
    SolverWarning,
)
from model_cases import MLP
from references import reference

X, Y = MLP.train()
X_TEST, Y_TEST = MLP.test()
FISHER: dict[str, Any] = {
    "regularization": 0.1,
    "second_order_mode": SecondOrderMode.GENERALIZED_GAUSS_NEWTON,
}


def batches(size: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


def arnoldi(**changes: Any) -> ArnoldiInfluence:
    return ArnoldiInfluence(MLP.model(), MLP.loss, **{**FISHER, **changes})


def test_the_defaults_are_pydvls() -> None:
    method = ArnoldiInfluence(MLP.model(), MLP.loss).method
    assert (method.regularization, method.rank, method.krylov_dimension) == (0.0, 10, None)
    assert (method.tol, method.max_iter, method.complement) == (1e-6, None, False)


def test_the_old_name_of_the_rank_is_accepted_with_a_deprecation_warning() -> None:
    with pytest.warns(DeprecationWarning, match="rank_estimate is called rank"):
        assert arnoldi(rank_estimate=7).method.rank == 7


def test_an_argument_without_effect_is_told() -> None:
    with pytest.warns(UserWarning, match="eigen_computation_on_gpu has no effect"):
        arnoldi(eigen_computation_on_gpu=True)


def test_woodbury_without_regularization_is_refused_before_any_fit() -> None:
    with pytest.raises(ValueError, match="regularization: expected numbers above 0"):
        arnoldi(regularization=None, use_woodbury=True)
    model = arnoldi(use_woodbury=True).fit(batches())
    before = model.influences(X_TEST, Y_TEST)
    with pytest.raises(ValueError, match="regularization: expected numbers above 0"):
        model.with_regularization(0.0)
    assert torch.equal(model.influences(X_TEST, Y_TEST), before)


@pytest.mark.parametrize("use_woodbury", [False, True])
def test_what_is_outside_of_the_eigenvectors_counts_only_with_woodbury(use_woodbury: bool) -> None:
    expected = reference(MLP, "generalized_gauss_newton")
    eigenvalues, vectors = torch.linalg.eigh(expected.curvature)
    own = vectors[:, -5:]
    kept = own @ torch.diag(1 / (eigenvalues[-5:] + 0.1)) @ own.T
    outside = (torch.eye(60, dtype=torch.float64) - own @ own.T) / 0.1
    model = arnoldi(rank=5, tol=1e-9, max_iter=200, use_woodbury=use_woodbury).fit(batches())
    factors = model.influence_factors(X_TEST, Y_TEST)
    oracle.assert_close(factors, expected.test @ (kept + use_woodbury * outside), 1e-6)
    influences = model.influences_from_factors(factors, X, Y)
    oracle.assert_close(influences, factors @ expected.train.T, 1e-9)


def test_eigenpairs_that_have_not_converged_are_told_by_fit_and_by_the_report() -> None:
    model = arnoldi(rank=5, krylov_dimension=7, max_iter=0)
    with pytest.warns(SolverWarning, match="have not converged in 7 passes"):
        model.fit(batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SolverWarning)  # said once
        report = model.solve(X_TEST, Y_TEST).report
    assert report.status.tolist() == [SolverStatus.MAX_ITERATIONS] * len(X_TEST)
    with pytest.warns(SolverWarning, match="have not converged"):
        model.with_regularization(1.0)


def test_a_search_that_converges_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SolverWarning)
        arnoldi(rank=4, max_iter=200).fit(batches())


def test_an_indefinite_hessian_is_told_at_every_regularization() -> None:
    smallest = oracle.smallest_eigenvalue(reference(MLP, "hessian").curvature)
    model = NystroemSketchInfluence(MLP.model(), MLP.loss, -smallest / 2, 6)
    for tell in (lambda: model.fit(batches()), lambda: model.with_regularization(-2 * smallest)):
        with pytest.warns(SolverWarning, match="takes negative curvature for 0") as told:
            tell()
        assert [warning.filename for warning in told] == [__file__]


def test_an_iterator_is_refused_where_a_hessian_is_probed() -> None:
    model = NystroemSketchInfluence(MLP.model(), MLP.loss, 0.1, 6)
    with pytest.raises(OneShotIterableError, match="data: expected"):
        model.fit(iter(batches()))
