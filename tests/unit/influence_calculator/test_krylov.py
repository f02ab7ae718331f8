"""The search for eigenpairs, against the eigendecomposition of explicit matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from influence_calculator.maths.krylov import Eigenpairs, Krylov, eigenpairs
from influence_calculator.maths.method import SETTLED
from influence_calculator.maths.nystroem_sketch import PROBE
from influence_calculator.maths.seeded_rows import generator


def with_spectrum(eigenvalues: Tensor) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    width = len(eigenvalues)
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    basis = torch.linalg.qr(drawn).Q
    return basis @ torch.diag(eigenvalues.double()) @ basis.T


def searched(search: Krylov, matrix: Tensor) -> tuple[Eigenpairs, int]:
    """What the search finds, and after how many products."""
    width, like = len(matrix), matrix.new_zeros(())
    state = search.begun(search.start(width, generator(0, 0), like))
    for step in range(search.steps):
        products = state["next"] @ matrix
        drawn_by = generator(0, step + 1)
        state = search.continued(state, products, drawn_by, is_last=step + 1 == search.steps)
        if state[SETTLED]:
            break
    return eigenpairs(state), step + 1


def best(matrix: Tensor, rank: int) -> Tensor:
    eigenvalues = torch.linalg.eigvalsh(matrix)
    return eigenvalues[eigenvalues.abs().argsort(descending=True)][:rank]


SPECTRA = {
    "falling": 0.8 ** torch.arange(100),
    "of both signs": 0.9 ** torch.arange(100) * (-1.0) ** torch.arange(100),
    "of low rank": torch.cat([torch.tensor([5.0, 3.0, 1.0]), torch.zeros(97)]),
    "of two values": torch.cat([torch.full((9,), 2.0), torch.full((91,), 0.1)]),
    "with more copies than a product has rows": torch.cat([torch.full((9,), 2.0), 0.8 ** torch.arange(91)]),
    "all alike": torch.ones(100),
    "zero": torch.zeros(100),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 6, 12])
def test_the_eigenpairs_of_largest_modulus_are_found(name: str, rank: int) -> None:
    matrix = with_spectrum(SPECTRA[name])
    scale = float(SPECTRA[name].abs().max())
    found, _ = searched(Krylov(rank), matrix)
    assert found.converged
    torch.testing.assert_close(
        found.eigenvalues.abs(), best(matrix, rank).abs(), rtol=1e-10, atol=1e-10 * scale
    )
    vectors = found.eigenvectors
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    residual = vectors @ matrix - found.eigenvalues[:, None] * vectors
    assert (residual.norm(dim=1) <= 1.001e-6 * found.eigenvalues.abs() + 1e-14 * scale).all()
    assert (residual.norm(dim=1) <= found.residuals + 1e-13 * scale).all()


@pytest.mark.parametrize(("rank", "dimension"), [(1, 2), (3, 4), (5, 7), (10, 40)])
def test_any_dimension_above_the_rank_will_do(rank: int, dimension: int) -> None:
    matrix = with_spectrum(SPECTRA["falling"])
    search = Krylov(rank, dimension, restarts=300)
    found, products = searched(search, matrix)
    assert found.converged
    assert products <= search.steps
    torch.testing.assert_close(found.eigenvalues, best(matrix, rank), rtol=1e-10, atol=0)


def test_the_smallest_eigenvalue_is_found_from_above() -> None:
    matrix = with_spectrum(torch.cat([torch.linspace(0, 3, 199), torch.tensor([-0.2])]))
    found, _ = searched(PROBE, matrix)
    assert -0.2 - 1e-12 <= float(found.eigenvalues[0]) <= -0.15
    assert -0.4 <= float(found.eigenvalues[0] - found.residuals[0]) <= -0.2


def test_a_search_that_may_not_go_on_says_so() -> None:
    matrix = with_spectrum(torch.linspace(1, 2, 200))
    found, products = searched(Krylov(10, restarts=1), matrix)
    assert not found.converged
    assert products == Krylov(10, restarts=1).steps
    residual = (found.eigenvectors @ matrix - found.eigenvalues[:, None] * found.eigenvectors).norm(dim=1)
    torch.testing.assert_close(residual, found.residuals, rtol=1e-6, atol=1e-10)
    assert float(residual.max()) > 1e-3


@pytest.mark.parametrize("width", [1, 5, 23])
def test_a_matrix_hardly_wider_than_the_basis_is_multiplied_as_a_whole(width: int) -> None:
    matrix = with_spectrum(torch.linspace(-1, 2, width))
    found, products = searched(Krylov(10), matrix)
    assert products == 1
    torch.testing.assert_close(found.eigenvalues, best(matrix, min(10, width)))


def test_float32_products_suffice() -> None:
    matrix = with_spectrum(SPECTRA["falling"])
    found, _ = searched(Krylov(8), matrix.float())
    assert found.converged
    torch.testing.assert_close(found.eigenvalues, best(matrix, 8), rtol=1e-5, atol=0)
