"""Methods that solve with a second-order matrix of the loss, which a few examples are tried with first.

Shapes: P parameters.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable

import torch
from typing_extensions import override

from influence_calculator.maths.blocks import BlockMode, block_layout
from influence_calculator.maths.curvature import SecondOrderMode, products
from influence_calculator.maths.errors import CaptureMismatchError, UnsupportedModelError
from influence_calculator.maths.method import Method
from influence_calculator.maths.objective import Batch, Objective, slice_batch
from influence_calculator.maths.one_by_one import TOLERANCE
from influence_calculator.maths.probe import PROBED
from influence_calculator.maths.seeded_rows import generator, normal_rows


class CurvatureMethod(Method, ABC):
    """A method with a second-order mode."""

    second_order: SecondOrderMode

    @override
    def looked_at(self, objective: Objective, first: Callable[[], Batch]) -> Objective:
        """Tries two products, which nobody else compares with anything.

        Raises:
            UnsupportedModelError: an operation of the model or the loss has no second derivative.
            CaptureMismatchError: the Hessian is not symmetric, as when torch's second derivative of an
                operation is wrong (of `weight_norm` it was, in version 2.15 on a processor).
        """
        if self.second_order is SecondOrderMode.EMPIRICAL_FISHER:
            return objective
        layout = block_layout(objective, BlockMode.FULL)
        [(block, width)] = layout.widths.items()
        like = torch.zeros((), dtype=objective.dtype, device=objective.device)
        u, v = rows = normal_rows(2, width, generator(0, "tried"), like)
        try:
            few = slice_batch(first(), 0, PROBED)
            Hu, Hv = products(self.second_order, objective, layout, few, {block: rows})[block]
        except (NotImplementedError, RuntimeError) as error:
            if "not implemented" not in str(error):
                raise
            raise UnsupportedModelError(
                f"second_order_mode: {self.second_order} takes derivatives of gradients, and an operation of "
                f"the model or its loss has none: {str(error).splitlines()[0]} Take empirical_fisher, or "
                "leave the parameters of that module out (requires_grad_(False))"
            ) from error
        difference = float(u @ Hv - v @ Hu)
        # Of random directions |Hu| is about the Frobenius norm of H, and u·Hv not more. Errors of operations
        # are of order 1; those of TF32 are below a thousandth, of half precision they are too large to tell.
        allowed = 0.3 * TOLERANCE.get(objective.dtype, float("inf")) * float(Hu.norm() + Hv.norm())
        if self.second_order is SecondOrderMode.HESSIAN and abs(difference) > allowed:
            raise CaptureMismatchError(
                "second_order_mode: expected a symmetric Hessian, got products u·Hv and v·Hu that differ by "
                f"{abs(difference):.2g} where |Hv| is {float(Hv.norm()):.2g}: torch's second derivative of "
                "some operation of the model is wrong, as of weight_norm on a processor. Take "
                "generalized_gauss_newton or empirical_fisher, which need none, or write that operation out"
            )
        return objective
