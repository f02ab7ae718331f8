"""What methods tell of a curvature that has nothing in it, or less than the loss says.

Without anything in it gradients divided by λ pass for influences.

Mostly the loss is such a one. What is 0 but for rounding is none: here every number is 0. Told by methods
whose fit leaves the curvature, or its eigenvalues: products with a solve's right-hand sides may be 0 too.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

FLAT = (
    "the curvature is 0 in every block, so that influences are products of gradients divided by λ: the loss "
    "has no second derivative by the model's outputs, as mean absolute error has none (take the Fisher "
    "matrix at the true labels, second_order_mode empirical_fisher), or no training example has a gradient"
)


def flat_note(of_blocks: Iterable[Tensor]) -> tuple[str, ...]:
    """What is to be told, by each block's eigenvalues, or by whether its matrix holds anything."""
    return () if any(bool(values.any()) for values in of_blocks) else (FLAT,)


def clipped_note(count: int) -> tuple[str, ...]:
    """What is to be told where a generalized Gauss-Newton matrix leaves out `count` negative eigenvalues."""
    if not count:
        return ()
    return (
        f"the loss is not convex in the model's outputs: {count} negative eigenvalues of its second "
        "derivatives by them count as 0 in the generalized Gauss-Newton matrix",
    )
