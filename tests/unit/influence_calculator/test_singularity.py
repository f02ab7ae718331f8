"""A curvature that is singular but for rounding is refused without λ, and never with an ordinary one."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from influence_calculator import InfluenceFunctionModel
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import DenseSolver
from influence_calculator.maths.errors import SingularCurvatureError
from influence_calculator.maths.kronecker import DiagonalSolver
from influence_calculator.maths.singularity import is_singular, rounding_of_squares, rounding_of_sums
from influence_calculator.maths.spectral import InverseEverywhere, Spectrum
from influence_calculator.torch import ArnoldiInfluence, DirectInfluence, EkfacInfluence

FEATURES, CLASSES, N = 6, 4, 60
ORDINARY = {torch.float32: 1e-5, torch.float64: 1e-12}
"""λ relative to the largest eigenvalue."""
SEEDS = range(3)
"""Rounding is of either sign."""
EVERY_DTYPE = pytest.mark.parametrize("dtype", ORDINARY, ids=str)


def _softmax(dtype: torch.dtype, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A softmax classifier, whose logits may all shift without any curvature, and its training data."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (N,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(FEATURES, CLASSES)
    return model.to(dtype), (x.to(dtype), y)


def _of(method: str, model: nn.Module, λ: float) -> InfluenceFunctionModel:
    match method:
        case "EK-FAC":
            return EkfacInfluence(model, update_diagonal=True, hessian_regularization=λ, expectation="exact")
        case "KFAC":
            return EkfacInfluence(model, update_diagonal=False, hessian_regularization=λ, expectation="exact")
        case "Arnoldi":
            return ArnoldiInfluence(
                model, F.cross_entropy, λ, rank=FEATURES * CLASSES, second_order_mode=_mode("hessian")
            )
        case _:
            return DirectInfluence(model, F.cross_entropy, λ, second_order_mode=_mode(method))


def _mode(name: str) -> SecondOrderMode:
    return SecondOrderMode(name)


@EVERY_DTYPE
@pytest.mark.parametrize("method", ["EK-FAC", "KFAC", *SecondOrderMode])
def test_a_softmax_without_regularization_is_refused(method: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        model, data = _softmax(dtype, seed)
        with pytest.raises(SingularCurvatureError, match="larger regularization"):
            _of(method, model, 0.0).fit([data])


@EVERY_DTYPE
@pytest.mark.parametrize("method", ["EK-FAC", "KFAC", "Arnoldi", *SecondOrderMode])
def test_an_ordinary_regularization_is_taken(method: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        model, data = _softmax(dtype, seed)
        largest = torch.linalg.eigvalsh(oracle.hessian(model, F.cross_entropy, *data).double()).max()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a search that has not converged
            _of(method, model, ORDINARY[dtype] * float(largest)).fit([data])


def _spread(dtype: torch.dtype, width: int) -> Tensor:
    """A matrix with eigenvalues 1 to 0, the last a null space but for rounding."""
    Q, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(4)).double())
    values = torch.linspace(1, 0, width, dtype=torch.float64)
    return ((Q * values) @ Q.T).to(dtype)


@EVERY_DTYPE
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [10, 300])
def test_a_dense_matrix_is_refused_at_no_more_than_rounding(
    width: int, symmetric: bool, dtype: torch.dtype
) -> None:
    matrix = _spread(dtype, width)
    with pytest.raises(SingularCurvatureError, match="λ = 0"):
        DenseSolver("", matrix, 0.0, symmetric=symmetric)
    DenseSolver("", matrix, ORDINARY[dtype], symmetric=symmetric)
    indefinite = matrix - 0.5001 * torch.eye(width, dtype=dtype)
    DenseSolver("", indefinite, 0.0, symmetric=symmetric)


@EVERY_DTYPE
def test_squares_are_refused_where_their_roots_are_rounding(dtype: torch.dtype) -> None:
    ε = torch.finfo(dtype).eps
    for smallest, refused in (((50 * ε) ** 2, True), ((200 * ε) ** 2, False)):
        eigenvalues = torch.tensor([[3.0, 1.0], [1.0, 3 * smallest]], dtype=dtype)
        if refused:
            with pytest.raises(SingularCurvatureError, match=r"layer: .*λ = 0"):
                DiagonalSolver("layer", eigenvalues, 0.0)
        else:
            DiagonalSolver("layer", eigenvalues, 0.0)
        DiagonalSolver("layer", eigenvalues, ORDINARY[dtype])


@EVERY_DTYPE
def test_eigenpairs_are_refused_where_one_is_rounding_of_the_largest_or_of_λ(dtype: torch.dtype) -> None:
    for eigenvalues, λ, refused in (
        ([2.0, 1.0, 2 * torch.finfo(dtype).eps], 0.0, True),
        ([2.0, 1.0, 100 * torch.finfo(dtype).eps], 0.0, False),
        ([2.0, 1.0, -1.0], 1.0, True),
        ([2.0, 1.0, -1.0], 1.01, False),
    ):
        known = torch.tensor(eigenvalues, dtype=torch.float64)
        spectrum = Spectrum("block", known, torch.eye(3, dtype=dtype), λ)
        if refused:
            with pytest.raises(SingularCurvatureError, match="block 'block'"):
                spectrum.shifted()
        else:
            torch.testing.assert_close(spectrum.shifted(), known + λ)


def test_an_ordinary_regularization_is_above_all_rounding() -> None:
    for dtype, λ in ORDINARY.items():
        assert rounding_of_sums(dtype, λ) < λ
        assert rounding_of_squares(dtype) < λ
        assert not is_singular(torch.tensor([1.0, λ], dtype=dtype), rounding_of_sums(dtype, λ))


def test_what_is_zero_throughout_or_nan_is_singular_and_what_has_no_value_is_not() -> None:
    assert is_singular(torch.zeros(3), 0.0)
    assert is_singular(torch.tensor([1.0, torch.nan]), 0.0)
    assert not is_singular(torch.empty(0), 0.0)
    assert not is_singular(torch.full((3,), 1e-30), rounding_of_sums(torch.float32, 0.0))


def test_eigenvalues_on_both_sides_of_zero_are_no_singularity() -> None:
    """A Hessian may be indefinite beyond λ: the method inverts what it keeps of it."""
    spectrum = Spectrum("", torch.tensor([-2.0, 1.0]).double(), torch.eye(2, 3).double(), 0.5)
    assert spectrum.shifted().tolist() == [-1.5, 1.5]
    solved, _ = InverseEverywhere(spectrum).solve(torch.ones(1, 3).double())
    assert torch.allclose(solved, torch.tensor([[-1 / 1.5, 1 / 1.5, 2]]).double())
