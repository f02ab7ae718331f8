"""Perturbations as a sum over blocks of parameters, each block's part on its own.

Shapes: t test rows, n training examples, F... feature dimensions.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from influence_calculator.maths.layout import Left
from influence_calculator.maths.method import Fitted
from influence_calculator.maths.objective import Batch, Objective
from influence_calculator.maths.perturbation import perturbations


def perturbations_by_block(
    fitted: Fitted, objective: Objective, factors: Left, batch: Batch, micro_batch: int
) -> OrderedDict[str, Tensor]:
    """Block -> `∇x (z_b · g_b(x))`, `[t, n, F...]`: the influence of factors that are zero elsewhere."""
    nothing = {block: torch.zeros_like(rows) for block, rows in factors.items()}
    return OrderedDict(
        (block, perturbations(fitted, objective, {**nothing, block: factors[block]}, batch, micro_batch))
        for block in fitted.layout.blocks
    )
