"""A curvature without anything in it, which methods tell of: else gradients divided by λ pass for influences.

Mostly the loss is such a one. What is 0 but for rounding is none: here every number is 0.

Shapes: q rows, P unknowns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

FLAT = (
    "the curvature is 0 in every block, so that influences are products of gradients divided by λ: the loss "
    "has no second derivative by the model's outputs, as mean absolute error has none (take the Fisher "
    "matrix at the true labels, second_order_mode empirical_fisher), or no training example has a gradient"
)


def flat_note(of_blocks: Iterable[Tensor]) -> tuple[str, ...]:
    """What is to be told of the eigenvalues of all blocks."""
    return () if any(bool(values.any()) for values in of_blocks) else (FLAT,)


class SeenProducts:
    """Products with a matrix, and whether there was nothing in any of them."""

    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        self._product = product
        self._are_flat: bool | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """The matrix times every row of `[q, P]`."""
        found = self._product(rows)
        if self._are_flat is not False:
            self._are_flat = not bool(found.any())
        return found

    @property
    def note(self) -> tuple[str, ...]:
        """What is to be told of them; nothing if there was none."""
        return (FLAT,) if self._are_flat else ()
