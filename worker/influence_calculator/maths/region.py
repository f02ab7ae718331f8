"""One region: a group of test rows against one chunk of training examples, or a chunk against itself.

The only place where test and training side meet. The Dask calculator, the sequential one and a job's
worker call these functions; which micro-batch they take is part of the stored plan.

Shapes: t test rows, n training examples, B blocks, F... feature dimensions of the training input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_calculator.maths.layout import Left
from influence_calculator.maths.method import Fitted, Part, add_scores, score_dtype
from influence_calculator.maths.objective import Batch, IndexedBatch, batch_size, micro_batches


def influences(fitted: Fitted, left: Left, batch: Batch, micro_batch: int) -> Tensor:
    """Up-weighting: `z_test · g_train`, `[t, n]`; `left` as the method's `scored` returns it.

    Positive means that the training example helps: removing it raises the test loss by about
    score / N. Neither negated nor divided by N.
    """
    rows = next(iter(left.values()))
    scores = rows.new_empty(rows.shape[0], batch_size(batch), dtype=score_dtype(rows))
    for piece in micro_batches(IndexedBatch(0, batch), micro_batch):
        columns = fitted.score(left, piece.batch)
        scores[:, piece.start : piece.start + columns.shape[1]] = columns
    return scores


def influences_by_block(fitted: Fitted, left: Left, batch: Batch, micro_batch: int) -> Tensor:
    """Each block's part of `influences`, `z_b · g_b`, `[B, t, n]`, in the layout's order.

    They sum to `influences`: a method's inverse is block by block. The batch is differentiated once.
    """
    rows = next(iter(left.values()))
    numbers = {block: number for number, block in enumerate(fitted.layout.blocks)}
    scores = rows.new_zeros(len(numbers), rows.shape[0], batch_size(batch), dtype=score_dtype(rows))
    for piece in micro_batches(IndexedBatch(0, batch), micro_batch):
        for part in fitted.right(piece.batch):
            add_scores(scores[numbers[part.block], :, piece.start :], left, part)
            # What comes next is formed while this name lasts.
            del part
    return scores


def influences_from_gradients(left: Left, gradients: Left) -> Tensor:
    """The same as `influences`, `[t, n]`, from training gradients that are there already, on any device.

    They are what the method's `gradients` answers for its own objective, `left` what its `solve` does.
    """
    rows = next(iter(left.values()))
    n = next(iter(gradients.values())).shape[0]
    scores = rows.new_zeros(rows.shape[0], n, dtype=score_dtype(rows))
    for block, values in gradients.items():
        add_scores(scores, left, Part(block, 0, values.to(rows.device)))
    return scores


def self_influences(left: Left, gradients: Left) -> Tensor:
    """Each example's influence on itself, `z_i · g_i`, `[n]`: the diagonal of `influences`, without the rest.

    `gradients` as the method's `gradients` answers for its own objective, `left` as `solve` does for them.
    """
    total: Tensor | None = None
    for block, rows in left.items():
        wide = score_dtype(rows)
        own = torch.einsum("np,np->n", rows.to(wide), gradients[block].to(wide))
        total = own if total is None else total.add_(own)
    if total is None:
        raise ValueError("left representation without blocks: no parameter is tracked")
    return total
