"""Products with the curvature of the whole training set, or of a part of it, for solvers that iterate.

Shapes: q rows, P_b parameters of the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from influence_calculator.maths.conjugate_gradients import Rows
from influence_calculator.maths.curvature import BlockCurvature, SecondOrderMode, curvatures
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.method import Sums
from influence_calculator.maths.objective import IndexedBatch, Objective, batch_size
from influence_calculator.maths.training_batches import KEPT_BYTES, TrainingBatches

PRODUCTS = "products"


def summed_products(
    second_order: SecondOrderMode,
    objective: Objective,
    layout: Layout,
    batches: Iterable[IndexedBatch],
    rows: Mapping[str, Tensor],
) -> Sums:
    """Block -> PRODUCTS -> `Σ_i H_i v` over the examples of a range, for every row v of `[q, P_b]`.

    Of a block without rows nothing is summed.
    """
    sums: Sums = {block: {} for block in layout.blocks}
    for block, vectors in rows.items():
        sums[block][PRODUCTS] = torch.zeros_like(vectors)
    treated = layout.among(rows)
    for _, batch in batches:
        for block, curvature in curvatures(second_order, objective, treated, batch):
            sums[block][PRODUCTS].add_(curvature.products(rows[block]))
    return sums


def training_product(
    second_order: SecondOrderMode, objective: Objective, layout: Layout, batches: TrainingBatches
) -> Rows:
    """`v → (1/N) Σ_i H_i v` of one block; keeps graphs as long as it lives."""
    return TrainingProducts(second_order, objective, layout, batches).mean


class TrainingProducts:
    """`v → H_b v` of one block, whose layout it is given alone; keeps graphs as long as it lives."""

    def __init__(
        self, second_order: SecondOrderMode, objective: Objective, layout: Layout, batches: TrainingBatches
    ) -> None:
        self._second_order = second_order
        self._objective = objective
        self._layout = layout
        self._batches = batches
        self._kept: dict[tuple[int, int], BlockCurvature] = {}
        self._budget = KEPT_BYTES - batches.kept_bytes

    def mean(self, rows: Tensor) -> Tensor:
        """`(1/N) Σ_i H_i v` over the whole training set, for every row v of `[q, P_b]`."""
        return self.sum_over(self._batches.batches(), rows).div_(self._batches.length)

    def sum_over(self, pieces: Iterable[IndexedBatch], rows: Tensor) -> Tensor:
        """`Σ_i H_i v` over the examples of some batches."""
        total = torch.zeros_like(rows)
        for piece in pieces:
            total += self._curvature(piece).products(rows)
        return total

    def _curvature(self, piece: IndexedBatch) -> BlockCurvature:
        key = (piece.start, batch_size(piece.batch))
        if key in self._kept:
            return self._kept[key]
        ((_, curvature),) = curvatures(self._second_order, self._objective, self._layout, piece.batch)
        if curvature.nbytes <= self._budget:
            self._budget -= curvature.nbytes
            self._kept[key] = curvature
        return curvature
