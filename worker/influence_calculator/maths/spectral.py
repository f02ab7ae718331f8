"""Solving with an approximation of the curvature by eigenpairs, `H ≈ Vᵀ S V`, by Woodbury's formula.

Shapes: t right-hand sides, n training examples, P_b parameters of block b, r eigenpairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.errors import NotFiniteError, SingularCurvatureError
from influence_calculator.maths.gradient_methods import solve_by_block
from influence_calculator.maths.gradients import projected
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import Fitted, Part, Solved, SolverReport, SolverStatus
from influence_calculator.maths.objective import Batch, Objective
from influence_calculator.maths.singularity import is_singular, rounding_of_sums


@dataclass(frozen=True)
class Spectrum:
    """What a fit knows of one block, with its λ."""

    block: str
    eigenvalues: Tensor
    """`S`, `[r]`, float64."""
    eigenvectors: Tensor
    """`V`, `[r, P_b]`, orthonormal (or zero where the eigenvalue is)."""
    λ: float
    status: SolverStatus = SolverStatus.CONVERGED
    """How the fit ended; every right-hand side ends alike."""
    iterations: int = 0
    residual: float = 0.0

    def shifted(self) -> Tensor:
        """`S + λ`, `[r]`.

        Raises:
            SingularCurvatureError: for one of them it is zero, or rounding of the largest.
            NotFiniteError: a training example spoiled the fit.
        """
        shifted = self.eigenvalues + self.λ
        if not torch.isfinite(shifted).all():
            raise NotFiniteError(
                f"block {self.block!r}: expected finite eigenvalues, got NaN or infinity; a training example "
                "has a loss or gradient that is not finite"
            )
        largest = max(self.λ, float(self.eigenvalues.abs().max()))
        rounding = rounding_of_sums(self.eigenvectors.dtype, self.λ)
        if is_singular(shifted.abs(), rounding, largest):
            smallest = float(shifted.abs().min())
            raise SingularCurvatureError(
                f"block {self.block!r}: H + λI is singular at λ = {self.λ:g}: an eigenvalue that the method "
                f"keeps is {smallest:.1g} with it; give a larger regularization or a lower rank"
            )
        return shifted

    def report(self, t: int) -> SolverReport:
        """The same for each of t right-hand sides."""
        exact = SolverReport.exact(t)
        return SolverReport(
            torch.full_like(exact.status, self.status),
            torch.full_like(exact.iterations, self.iterations),
            torch.full_like(exact.residual, self.residual),
        )


class InverseInEigenspace:
    """`(S + λ)^-1` of coordinates by the eigenvectors, `[t, r]`."""

    def __init__(self, spectrum: Spectrum) -> None:
        self._spectrum = spectrum
        self._weights = (1 / spectrum.shifted()).to(spectrum.eigenvectors.dtype)

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        solved = right_hand_sides * self._weights
        return solved.to(right_hand_sides.dtype), self._spectrum.report(len(right_hand_sides))


class InverseOnEigenspace:
    """`Vᵀ (S + λ)^-1 V g`, `[t, P_b]`; what is outside of the eigenvectors counts as 0."""

    def __init__(self, spectrum: Spectrum) -> None:
        self._inner = InverseInEigenspace(spectrum)
        self._vectors = spectrum.eigenvectors

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        given = right_hand_sides.to(self._vectors.dtype)
        coordinates, report = self._inner.solve(given @ self._vectors.T)
        return (coordinates @ self._vectors).to(right_hand_sides.dtype), report


class InverseEverywhere:
    """`Vᵀ (S + λ)^-1 V g + (1/λ)(I − VᵀV) g = g/λ − Vᵀ S/(λ(S + λ)) V g`, `[t, P_b]`; λ > 0."""

    def __init__(self, spectrum: Spectrum) -> None:
        if spectrum.λ <= 0:
            raise SingularCurvatureError(
                f"block {spectrum.block!r}: expected λ > 0, got {spectrum.λ:g}: outside of the eigenvectors "
                "the inverse is 1/λ; give a regularization"
            )
        self._spectrum = spectrum
        self._weights = spectrum.eigenvalues / (spectrum.λ * spectrum.shifted())

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        vectors = self._spectrum.eigenvectors
        given = right_hand_sides.to(vectors.dtype)
        coordinates = (given @ vectors.T).mul_(self._weights.to(vectors.dtype))
        solved = torch.addmm(given, coordinates, vectors, beta=1 / self._spectrum.λ, alpha=-1)
        return solved.to(right_hand_sides.dtype), self._spectrum.report(len(given))


class EigenspaceFitted(Fitted):
    """Both representations by the eigenvectors, `[t, r]` and `[n, r]`: `(S + λ)^-1 V g` and `V g`."""

    def __init__(
        self,
        layout: Layout,
        objective: Objective,
        spectra: Mapping[str, Spectrum],
        notes: tuple[str, ...],
    ) -> None:
        self.layout = layout
        self.notes = notes
        self._objective = objective
        self._vectors = {block: spectrum.eigenvectors for block, spectrum in spectra.items()}
        self._solvers = {block: InverseInEigenspace(spectrum) for block, spectrum in spectra.items()}

    @override
    def gradients(self, objective: Objective, batch: Batch) -> Left:
        """`V g`, `[n, r]` by block: no gradient is held as a whole."""
        return projected(objective, batch, self.layout, self._vectors)

    @override
    def solve(self, gradients: Left) -> Solved:
        return solve_by_block(self._solvers, gradients)

    @override
    def right(self, batch: Batch) -> Iterator[Part]:
        for block, values in self.gradients(self._objective, batch).items():
            yield Part(block, 0, values)

    @override
    def factors(self, left: Left) -> Left:
        """`Vᵀ a`, `[t, P_b]`, of coordinates `a`."""
        return {block: rows.to(self._vectors[block]) @ self._vectors[block] for block, rows in left.items()}

    @override
    def left(self, factors: Left) -> Left:
        """`V z`, `[t, r]`, of factors `z`, which lie in the space of the eigenvectors."""
        return {
            block: rows.to(self._vectors[block]) @ self._vectors[block].T for block, rows in factors.items()
        }
