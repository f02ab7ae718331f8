"""When a curvature plus λ counts as singular: where a value of it is rounding of the largest one.

Without λ (pyDVL's default is 0) what should be zero is as large as rounding makes it, and its inverse decides
every number. An ordinary λ is far above: a thousandth of the largest eigenvalue in float32, a millionth in
float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_COLUMNS = 32
"""Rounding is taken to be of at least so many: few columns are sums over many examples too."""

MOST_COLUMNS = 4096
"""Of which rounding is taken to add up: 5e-4 of the largest value in float32, less than an ordinary λ."""


def rounding_of_sums(dtype: torch.dtype, columns: int) -> float:
    """Relative to the largest: of eigenvalues of a matrix of so many columns that was summed."""
    return min(max(columns, LEAST_COLUMNS), MOST_COLUMNS) * torch.finfo(dtype).eps


def rounding_of_squares(dtype: torch.dtype) -> float:
    """The same of means of squares, whose roots have a rounding of 100 ε."""
    return (100 * torch.finfo(dtype).eps) ** 2


def is_singular(values: Tensor, rounding: float, largest: float | None = None) -> bool:
    """Whether one of them is so small beside the largest, zero, negative or NaN.

    `largest` is given where another was added up to make them.
    """
    if values.numel() == 0:
        return False
    beside = float(values.max()) if largest is None else largest
    return not bool((values > rounding * beside).all())
