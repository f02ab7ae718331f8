"""Methods that solve with a second-order matrix of the loss, which a few examples are tried with first.

Shapes: P parameters.
"""

from __future__ import annotations

from abc import ABC

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.curvature import SecondOrderMode, products
from influence_calculator.maths.errors import CaptureMismatchError, UnsupportedModelError
from influence_calculator.maths.method import Method
from influence_calculator.maths.objective import Batch, Objective, slice_batch
from influence_calculator.maths.one_by_one import TOLERANCE
from influence_calculator.maths.output_curvature import has_no_derivative
from influence_calculator.maths.probe import PROBED
from influence_calculator.maths.seeded_rows import generator, sign_rows

TRIED = 3
"""Random rows whose products are compared, each with each."""


class CurvatureMethod(Method, ABC):
    """A method with a second-order mode."""

    second_order: SecondOrderMode

    @override
    def try_on(self, objective: Objective, few: Batch) -> None:
        """Tries some products, which nobody else compares with anything.

        Raises:
            UnsupportedModelError: an operation of the model or the loss has no second derivative.
            CaptureMismatchError: the Hessian is not symmetric, as when torch's second derivative of an
                operation is wrong (of `weight_norm` it was, in version 2.15 on a processor).
        """
        if self.second_order is SecondOrderMode.EMPIRICAL_FISHER:
            return
        layout, few = self.layout(objective), slice_batch(few, 0, PROBED)
        like = torch.zeros((), dtype=objective.dtype, device=objective.device)
        is_compared = self.second_order is SecondOrderMode.HESSIAN and objective.dtype in TOLERANCE
        rows = {
            block: sign_rows(TRIED if is_compared else 1, width, generator(0, block, "tried"), like)
            for block, width in layout.widths.items()
        }
        try:
            # One after the other: each takes as much memory as all of them need.
            found = [
                products(
                    self.second_order, objective, layout, few, {b: own[i : i + 1] for b, own in rows.items()}
                )
                for i in range(len(next(iter(rows.values()))))
            ]
        except RuntimeError as error:
            if not has_no_derivative(error):
                raise
            raise UnsupportedModelError(
                f"second_order_mode: {self.second_order} takes derivatives of gradients, and an operation of "
                f"the model or its loss has none: {str(error).splitlines()[0]} Take empirical_fisher, or "
                "leave the parameters of that module out (requires_grad_(False))"
            ) from error
        for block, own in rows.items() if is_compared else ():
            of_block = torch.cat([products_of[block] for products_of in found])
            _refuse_asymmetric(own, of_block, TOLERANCE[objective.dtype])


def _refuse_asymmetric(rows: Tensor, products: Tensor, tolerance: float) -> None:
    """Of random rows and `H` times each of them."""
    found = (rows @ products.T).double()
    difference = float((found - found.T).abs().max())
    norm = float(products.norm(dim=1).max())
    # |Hu| is about the Frobenius norm of H, and u·Hv not more. Errors of operations are of order 1; those of
    # TF32 are below a thousandth, of half precision they are too large to tell.
    if difference > 0.6 * tolerance * norm:
        raise CaptureMismatchError(
            "second_order_mode: expected a symmetric Hessian, got products u·Hv and v·Hu that differ by "
            f"{difference:.2g} where |Hv| is {norm:.2g}: torch's second derivative of some operation of the "
            "model is wrong, as of weight_norm on a processor. Take generalized_gauss_newton or "
            "empirical_fisher, which need none, or write that operation out"
        )
