"""Methods that solve with a second-order matrix of the loss, which a few examples are tried with first.

Shapes: P parameters.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.curvature import SecondOrderMode, products
from influence_calculator.maths.errors import CaptureMismatchError, UnsupportedModelError
from influence_calculator.maths.method import Method
from influence_calculator.maths.objective import Batch, Objective, slice_batch
from influence_calculator.maths.one_by_one import PROBED, TOLERANCE
from influence_calculator.maths.output_curvature import has_no_derivative
from influence_calculator.maths.seeded_rows import generator, sign_rows

TRIED = 3
"""Random rows whose products are compared, each with each."""


class CurvatureMethod(Method, ABC):
    """A method with a second-order mode."""

    second_order: SecondOrderMode

    @property
    @override
    def tried_rows(self) -> int:
        match self.second_order:
            case SecondOrderMode.HESSIAN:
                return 6
            case SecondOrderMode.GENERALIZED_GAUSS_NEWTON:
                return 4
            case SecondOrderMode.EMPIRICAL_FISHER:
                return 0

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

        def row(i: int) -> dict[str, Tensor]:
            """Drawn anew at every use: all of them would take as much memory as so many gradients."""
            widths = layout.widths.items()
            return {b: sign_rows(1, width, generator(0, b, "tried", i), like) for b, width in widths}

        def product(i: int) -> Mapping[str, Tensor]:
            try:
                return products(self.second_order, objective, layout, few, row(i))
            except RuntimeError as error:
                if not has_no_derivative(error):
                    raise
                raise UnsupportedModelError(
                    f"second_order_mode: {self.second_order} takes derivatives of gradients, and an "
                    f"operation of the model or its loss has none: {str(error).splitlines()[0]} Take "
                    "empirical_fisher, or leave the parameters of that module out (requires_grad_(False))"
                ) from error

        if not is_compared:
            product(0)
            return
        forms = {block: torch.zeros(TRIED, TRIED, dtype=torch.float64) for block in layout.blocks}
        norms = dict.fromkeys(layout.blocks, 0.0)
        for i in range(TRIED):
            found = product(i)
            for j in range(TRIED):
                for block, own in row(j).items():
                    forms[block][j, i] = float(own @ found[block].T)
            norms = {block: max(norm, float(found[block].norm())) for block, norm in norms.items()}
            del found
        for block in layout.blocks:
            _refuse_asymmetric(forms[block], norms[block], TOLERANCE[objective.dtype])


def _refuse_asymmetric(forms: Tensor, norm: float, tolerance: float) -> None:
    """Of `u·Hv` for random rows u and v, `[q, q]`, and the largest `|Hv|`."""
    difference = float((forms - forms.T).abs().max())
    # |Hu| is about the Frobenius norm of H, and u·Hv not more. Errors of operations are of order 1; those of
    # TF32 are below a thousandth, of half precision they are too large to tell.
    if difference > 0.6 * tolerance * norm:
        raise CaptureMismatchError(
            "second_order_mode: expected a symmetric Hessian, got products u·Hv and v·Hu that differ by "
            f"{difference:.2g} where |Hv| is {norm:.2g}: torch's second derivative of some operation of the "
            "model is wrong, as of weight_norm on a processor. Take generalized_gauss_newton or "
            "empirical_fisher, which need none, or write that operation out"
        )
