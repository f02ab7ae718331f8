"""Influences as a sum over blocks of parameters, each block's part on its own.

Shapes: t test rows, n training examples, P_b parameters of block b, F... feature dimensions.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from influence_calculator.maths.layout import Left
from influence_calculator.maths.method import Fitted
from influence_calculator.maths.objective import Batch, IndexedBatch, Objective, batch_size, micro_batches
from influence_calculator.maths.perturbation import perturbations


def influences_by_block(
    fitted: Fitted, left: Left, batch: Batch, micro_batch: int
) -> OrderedDict[str, Tensor]:
    """Block -> `z_b · g_b`, `[t, n]`, of left representations; the batch is differentiated once."""
    scores = OrderedDict(
        (block, left[block].new_zeros(left[block].shape[0], batch_size(batch)))
        for block in fitted.layout.blocks
    )
    for piece in micro_batches(IndexedBatch(0, batch), micro_batch):
        for part in fitted.right(piece.batch):
            first = piece.start + part.row
            columns = slice(first, first + part.values.shape[0])
            rows = left[part.block][:, part.start : part.start + part.values.shape[1]]
            scores[part.block][:, columns] += rows @ part.values.to(rows.dtype).T
    return scores


def perturbations_by_block(
    fitted: Fitted, objective: Objective, factors: Left, batch: Batch, micro_batch: int
) -> OrderedDict[str, Tensor]:
    """Block -> `∇x (z_b · g_b(x))`, `[t, n, F...]`: the influence of factors that are zero elsewhere."""
    nothing = {block: torch.zeros_like(rows) for block, rows in factors.items()}
    return OrderedDict(
        (block, perturbations(fitted, objective, {**nothing, block: factors[block]}, batch, micro_batch))
        for block in fitted.layout.blocks
    )
