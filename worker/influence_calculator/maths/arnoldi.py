"""The Arnoldi method: the curvature by its eigenpairs of largest modulus, found by products with it.

With the complement, everything outside of the eigenvectors has curvature λ alone and factors are `[t, P]`.
Without it that part counts as 0, and both representations are coordinates by the eigenvectors, `[t, r]`.

Shapes: t test examples, P_b parameters of block b, r eigenpairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from influence_calculator.maths.blocks import (
    BlockMode,
    BlockStructure,
    Regularization,
    checked_regularization,
    needs_trace,
    regularized_layout,
    require_positive,
)
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.curvature_methods import CurvatureMethod
from influence_calculator.maths.curvature_passes import TracePass, fitted_regularization
from influence_calculator.maths.flat import flat_note
from influence_calculator.maths.footprints import block_widths, capture_bytes, joined_bytes, row_bytes
from influence_calculator.maths.gradient_methods import BlockSolver, BlockwiseFitted
from influence_calculator.maths.krylov import MOST_RESTARTS, Eigenpairs, Krylov
from influence_calculator.maths.krylov_passes import (
    KrylovPass,
    found_eigenpairs,
    krylov_fit_bytes,
    krylov_passes,
    krylov_stored_bytes,
)
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.method import FitPass, FitState, Fitted, Footprint, SolverStatus
from influence_calculator.maths.objective import Objective, TrainingData
from influence_calculator.maths.seeded_rows import require_rank_and_seed
from influence_calculator.maths.shapes import ModelShapes
from influence_calculator.maths.spectral import (
    EigenspaceFitted,
    InverseEverywhere,
    InverseOnEigenspace,
    Spectrum,
)


@dataclass(frozen=True)
class Arnoldi(CurvatureMethod):
    """`Vᵀ (S + λ)^-1 V g + (1/λ)(I − VᵀV) g` with the r eigenpairs of largest modulus of each block."""

    regularization: Regularization | None
    """λ ≥ 0, above 0 with the complement: a number, one per block, or `Relative(c)`. None is 0."""
    rank: int = 10
    """r, at least 1; a block of at most about `krylov_dimension` parameters is taken as a whole."""
    krylov_dimension: int | None = None
    """Rows that the search keeps, more than the rank; None: `max(2r + 1, 20)`."""
    tol: float = 1e-6
    """An eigenpair has converged at `‖H v − θ v‖ ≤ tol |θ|`."""
    max_iter: int | None = None
    """Restarts of the search at most; None: 30."""
    complement: bool = True
    blocks: BlockStructure = BlockMode.FULL
    second_order: SecondOrderMode = SecondOrderMode.HESSIAN
    seed: int = 0
    in_eigenspace: bool = False
    """Representations of width r, which hold the scores but not the factors; only without the complement."""

    needs_data = False

    def __post_init__(self) -> None:
        checked_regularization(self.regularization)
        if self.complement:
            require_positive(self.regularization, "outside of the eigenvectors the inverse is 1/λ")
        require_rank_and_seed(self.rank, self.seed, usual=10)
        if self.krylov_dimension is not None and self.krylov_dimension <= self.rank:
            raise ValueError(
                f"krylov_dimension: expected more than rank = {self.rank}, got {self.krylov_dimension}; "
                "twice the rank is usual"
            )
        if not self.tol > 0:
            raise ValueError(f"tol: expected a number above 0, got {self.tol}")
        if self.max_iter is not None and self.max_iter < 0:
            raise ValueError(f"max_iter: expected at least 0 or None, got {self.max_iter}")
        if self.in_eigenspace and self.complement:
            raise ValueError("in_eigenspace: only without the complement, which fills the whole space")

    @property
    def search(self) -> Krylov:
        """How the eigenpairs are looked for."""
        restarts = MOST_RESTARTS if self.max_iter is None else self.max_iter
        return Krylov(self.rank, self.krylov_dimension, self.tol, restarts)

    def narrow(self) -> Arnoldi:
        """The same scores from representations as narrow as they can be."""
        return self if self.complement else replace(self, in_eigenspace=True)

    @override
    def layout(self, objective: Objective) -> Layout:
        layout = regularized_layout(objective, self.blocks, self.regularization)
        return layout.of_rank(self.rank) if self.in_eigenspace else layout

    def _series(self) -> tuple[KrylovPass, ...]:
        return krylov_passes("krylov", self.search, self.blocks, self.second_order, self.seed)

    @override
    def passes(self) -> tuple[FitPass, ...]:
        relative = needs_trace(checked_regularization(self.regularization))
        trace = (TracePass(self.blocks, self.second_order),) if relative else ()
        return (*trace, *self._series())

    @override
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None = None) -> Fitted:
        layout = self.layout(objective)
        spectra, notes = {}, []
        for block, width in layout.widths.items():
            found, passes = found_eigenpairs(self._series(), state, block, width)
            λ = fitted_regularization(self.regularization, state, block, width)
            spectra[block] = _spectrum(block, found, passes, λ, objective)
            if not found.converged:
                notes.append(_not_converged(block, found, passes))
        notes.extend(flat_note(spectrum.eigenvalues for spectrum in spectra.values()))
        if self.in_eigenspace:
            return EigenspaceFitted(layout, objective, spectra, tuple(notes))
        kind = InverseEverywhere if self.complement else InverseOnEigenspace
        solvers: dict[str, BlockSolver] = {block: kind(spectrum) for block, spectrum in spectra.items()}
        return BlockwiseFitted(layout, objective, solvers, tuple(notes))

    @override
    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        widths = block_widths(shapes, self.blocks)
        row = row_bytes(shapes, sum(widths))
        vectors = sum(min(self.rank, width) * row_bytes(shapes, width) for width in widths)
        narrow = row_bytes(shapes, sum(min(self.rank, width) for width in widths))
        factor_row, beside = (narrow, narrow) if self.in_eigenspace else (row, 0)
        capture, of_rows = (
            capture_bytes(shapes, n) + n * beside for n in (micro_batch, min(micro_batch, rows))
        )
        return Footprint(
            fit=krylov_fit_bytes(self._series()[0], shapes, micro_batch),
            # The gradients, and beside them the factors.
            factors=vectors
            + max(joined_bytes(rows * factor_row, of_rows, rows > micro_batch), 2 * rows * factor_row),
            capture=capture,
            factor_row=factor_row,
            resident=vectors,
            stored=krylov_stored_bytes(self._series()[0], shapes),
        )


def _spectrum(block: str, found: Eigenpairs, passes: int, λ: float, objective: Objective) -> Spectrum:
    eigenvalues, eigenvectors = (part.to(objective.device) for part in found[:2])
    if found.converged:
        return Spectrum(block, eigenvalues, eigenvectors, λ)
    return Spectrum(
        block, eigenvalues, eigenvectors, λ, SolverStatus.MAX_ITERATIONS, passes, _relative_residual(found)
    )


def _relative_residual(found: Eigenpairs) -> float:
    """The largest `‖H v − θ v‖ / |θ|`, where θ is not zero."""
    return float((found.residuals / found.eigenvalues.abs()).nan_to_num(posinf=0).max())


def _not_converged(block: str, found: Eigenpairs, passes: int) -> str:
    return (
        f"block {block!r}: the {len(found.eigenvalues)} eigenpairs of largest modulus have not converged in "
        f"{passes} passes over the training data, ‖Hv − θv‖ / |θ| is up to {_relative_residual(found):.1g}; "
        "raise max_iter or krylov_dimension, or lower the rank"
    )
