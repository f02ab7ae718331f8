"""TRAK's estimate in a random projection: the empirical Fisher of projected gradients, inverted as it is.

`φ = Sᵀg` with the S of `projection`, `[P, k]`; scores are `φ_test · ((1/N) Σ φ φᵀ + λI)^-1 φ_train`.
After Park et al. 2023, with the loss's own gradients on both sides in place of their margin, and one model.
Where k ≥ P it is the empirical Fisher method.

Shapes: t test examples, n training examples, P parameters, k columns of the projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from typing_extensions import override

from influence_calculator.maths.blocks import (
    BlockMode,
    Regularization,
    block_layout,
    check_coverage,
    checked_regularization,
)
from influence_calculator.maths.footprints import capture_bytes, row_bytes
from influence_calculator.maths.gradient_methods import BlockwiseFitted
from influence_calculator.maths.gradients import per_sample_gradients
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.method import FitPass, FitState, Fitted, Footprint, Method, Part
from influence_calculator.maths.objective import Batch, Objective, TrainingData, batch_size
from influence_calculator.maths.projected_methods import (
    Coordinates,
    FisherPass,
    ProjectedFitted,
    Unprojected,
    coordinates_like,
)
from influence_calculator.maths.projection import Projection, projection_bytes
from influence_calculator.maths.seeded_rows import require_rank_and_seed
from influence_calculator.maths.shapes import ModelShapes

BLOCK = ""
"""All parameters are projected together."""


@dataclass(frozen=True)
class Trak(Method):
    """`S ((1/N) Σ φ φᵀ + λI)^-1 Sᵀ g`."""

    regularization: Regularization | None
    """λ ≥ 0, or `Relative(c)`. None is 0. The projection keeps the trace: λ means what it means elsewhere."""
    rank: int
    """k, at least 1."""
    seed: int = 0
    """Of the projection."""
    projected: bool = False
    """Both representations are coordinates, `[t, k]`; else factors and gradients by parameter, `[t, P]`. The
    same scores."""

    needs_data = False

    def __post_init__(self) -> None:
        checked_regularization(self.regularization)
        require_rank_and_seed(self.rank, self.seed, usual=2048)

    def narrow(self) -> Trak:
        """The same in coordinates."""
        return replace(self, projected=True)

    @override
    def layout(self, objective: Objective) -> Layout:
        layout = block_layout(objective, BlockMode.FULL)
        check_coverage(checked_regularization(self.regularization), layout.blocks)
        return layout.of_rank(self.rank) if self.projected else layout

    @override
    def passes(self) -> tuple[FitPass, ...]:
        return (self._fisher,)

    @property
    def _fisher(self) -> ProjectedPass:
        return ProjectedPass(self.rank, self.seed)

    @override
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None = None) -> Fitted:
        layout = self.layout(objective)
        projection = _projection(objective, layout, self.rank, self.seed)
        solver = self._fisher.solver(objective, state, BLOCK, projection.rank, self.regularization)
        if self.projected:
            parts = partial(_parts, layout, projection)
            return ProjectedFitted(layout, objective, parts, {BLOCK: projection}, {BLOCK: solver})
        return BlockwiseFitted(layout, objective, {BLOCK: Unprojected(projection, solver)})

    @override
    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        k = min(self.rank, shapes.width)
        item = max(4, shapes.itemsize)
        row, narrow, matrix = row_bytes(shapes, shapes.width), row_bytes(shapes, k), k * k * item
        projection = projection_bytes(shapes.width, self.rank, item)
        capture, of_rows = (
            capture_bytes(shapes, n) + n * narrow for n in (micro_batch, min(micro_batch, rows))
        )
        factor_row = narrow if self.projected else row
        return Footprint(
            # The sum and one batch's part of it.
            fit=2 * matrix + projection + capture,
            # The matrix, its factor and a copy while that is made; the gradients, beside them the last
            # micro-batch or the factors, with the coordinates between.
            factors=3 * matrix + projection + rows * (factor_row + narrow) + max(rows * factor_row, of_rows),
            capture=capture if self.projected else capture_bytes(shapes, micro_batch),
            factor_row=factor_row,
            resident=2 * matrix + projection,
            stored=matrix,
        )


@dataclass(frozen=True)
class ProjectedPass(FisherPass):
    """One block."""

    rank: int
    seed: int

    name = "projected"

    @override
    def units(self, objective: Objective) -> tuple[str, ...]:
        return (BLOCK,)

    @override
    def coordinates(self, objective: Objective) -> tuple[Mapping[str, int], Coordinates]:
        layout = block_layout(objective, BlockMode.FULL)
        projection = _projection(objective, layout, self.rank, self.seed)
        return {BLOCK: projection.rank}, partial(_parts, layout, projection)


def _projection(objective: Objective, layout: Layout, rank: int, seed: int) -> Projection:
    return Projection(layout.width, rank, seed, coordinates_like(objective))


def _parts(layout: Layout, projection: Projection, objective: Objective, batch: Batch) -> Iterator[Part]:
    """`φ` of each example, `[n, k]`; no gradient is held as a whole."""
    coordinates = coordinates_like(objective).new_zeros(batch_size(batch), projection.rank)
    for part in per_sample_gradients(objective, batch, layout):
        projection.add(coordinates, part.start, part.values)
    yield Part(BLOCK, 0, coordinates)
