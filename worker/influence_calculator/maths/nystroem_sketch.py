"""The Nyström method: the curvature from its product with a few random rows.

`H ≈ HΩ (ΩᵀHΩ)^+ ΩᵀH = Uᵀ S U`, plus λ, inverted by Woodbury's formula. Meant for a positive curvature: what
the sketch has of negative eigenvalues is dropped, and with a Hessian a search says how negative they are.

Shapes: t test examples, P_b parameters of block b, r the sketch's rank.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from influence_calculator.maths.curvature_passes import CurvaturePass, TracePass, fitted_regularization
from influence_calculator.maths.flat import flat_note
from influence_calculator.maths.footprints import (
    block_widths,
    capture_bytes,
    collect_bytes,
    gathered_bytes,
    row_bytes,
    workspace,
)
from influence_calculator.maths.gradient_methods import BlockwiseFitted, fitted_tensor
from influence_calculator.maths.krylov import Krylov, Wanted
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
from influence_calculator.maths.preconditioners import NystroemPreconditioner, sketch_bytes
from influence_calculator.maths.seeded_rows import require_rank_and_seed
from influence_calculator.maths.shapes import ModelShapes
from influence_calculator.maths.spectral import InverseEverywhere, Spectrum

PROBE = Krylov(rank=1, dimension=48, restarts=0, wanted=Wanted.SMALLEST)
"""Twelve passes of four products: finds negative eigenvalues from about a hundredth of the largest one on."""

NEGATIVE = 1e-3
"""Beside the largest eigenvalue: less of a negative curvature is not told, for no more is looked for."""


@dataclass(frozen=True)
class NystroemSketch(CurvatureMethod):
    """`g/λ − Uᵀ S/(λ(S + λ)) U g` with the sketch `Uᵀ S U` of each block."""

    regularization: Regularization | None
    """λ > 0: a number, one per block, or `Relative(c)`."""
    rank: int
    """r, at least 1; more than a block's width means the width, and the sketch is the curvature itself."""
    blocks: BlockStructure = BlockMode.FULL
    second_order: SecondOrderMode = SecondOrderMode.HESSIAN
    seed: int = 0

    needs_data = False

    def __post_init__(self) -> None:
        require_positive(self.regularization, "outside of the sketch the inverse is 1/λ")
        require_rank_and_seed(self.rank, self.seed, usual=10)

    @override
    def layout(self, objective: Objective) -> Layout:
        return regularized_layout(objective, self.blocks, self.regularization)

    def _sketch(self) -> CurvaturePass:
        """That of the preconditioner."""
        return NystroemPreconditioner(self.rank, self.seed).fit_pass(self.blocks, self.second_order)

    def _probe(self) -> tuple[KrylovPass, ...]:
        """The search for the smallest eigenvalue, where it may be negative."""
        if self.second_order is not SecondOrderMode.HESSIAN:
            return ()
        return krylov_passes("probe", PROBE, self.blocks, self.second_order, self.seed)

    @override
    def passes(self) -> tuple[FitPass, ...]:
        relative = needs_trace(checked_regularization(self.regularization))
        trace = (TracePass(self.blocks, self.second_order),) if relative else ()
        return (*trace, self._sketch(), *self._probe())

    @override
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None = None) -> Fitted:
        layout = self.layout(objective)
        spectra, notes, negative = {}, [], False
        for block, width in layout.widths.items():
            λ = fitted_regularization(self.regularization, state, block, width)
            smallest, bound = self._smallest_eigenvalue(state, block, width)
            spectra[block] = spectrum = self._spectrum(objective, state, block, width, λ, smallest)
            negative = negative or smallest < 0
            if -smallest > NEGATIVE * float(spectrum.eigenvalues.max()):
                notes.append(_indefinite(block, bound, λ))
        solvers = {block: InverseEverywhere(spectrum) for block, spectrum in spectra.items()}
        if not negative:  # else there was something, which the sketch takes for 0
            notes.extend(flat_note(spectrum.eigenvalues for spectrum in spectra.values()))
        return BlockwiseFitted(layout, objective, solvers, tuple(notes))

    def _spectrum(
        self, objective: Objective, state: FitState, block: str, width: int, λ: float, smallest: float
    ) -> Spectrum:
        name, rank = self._sketch().name, min(self.rank, width)
        basis = fitted_tensor(state, name, block, "basis", (rank, width)).to(objective.device)
        eigenvalues = fitted_tensor(state, name, block, "eigenvalues", (rank,)).to(objective.device)
        status = SolverStatus.INDEFINITE if smallest < -λ else SolverStatus.CONVERGED
        return Spectrum(block, eigenvalues.double(), basis, λ, status)

    def _smallest_eigenvalue(self, state: FitState, block: str, width: int) -> tuple[float, float]:
        """Of the curvature without λ: a proof that it is so low, and how low it may be; 0 if not negative."""
        if not self._probe():
            return 0.0, 0.0
        found, _ = found_eigenpairs(self._probe(), state, block, width)
        return float(found.eigenvalues[0]), float(found.eigenvalues[0] - found.residuals[0])

    @override
    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        widths = block_widths(shapes, self.blocks)
        row = row_bytes(shapes, sum(widths))
        sketch = sum(min(self.rank, width) * row_bytes(shapes, width) for width in widths)
        collect = collect_bytes(shapes, micro_batch, sum(widths))
        product = workspace(shapes, micro_batch)
        if self.second_order is SecondOrderMode.EMPIRICAL_FISHER:
            product = max(product, collect)
        fit = sketch_bytes(shapes, widths, self.rank, product)
        stored = sketch
        for probe in self._probe()[:1]:
            fit = max(fit, sketch + krylov_fit_bytes(probe, shapes, micro_batch))
            stored = max(stored, krylov_stored_bytes(probe, shapes))
        return Footprint(
            fit=fit,
            factors=sketch + max(gathered_bytes(shapes, micro_batch, rows, sum(widths)), 2 * rows * row),
            capture=capture_bytes(shapes, micro_batch),
            factor_row=row,
            resident=sketch,
            stored=stored,
        )


def _indefinite(block: str, bound: float, λ: float) -> str:
    return (
        f"block {block!r}: the Hessian has an eigenvalue of about {bound:.2g}, and the sketch takes negative "
        f"curvature for 0, which is wrong beside λ = {λ:g}; take another second-order mode, none of which "
        "has any, or conjugate gradients, Arnoldi or Direct, which solve with it"
    )
