"""When a curvature plus λ counts as singular: where a value of it is rounding of the largest one.

Without λ (pyDVL's default is 0) what should be zero is as large as rounding makes it, and its inverse decides
every number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounding_of_sums(dtype: torch.dtype, λ: float) -> float:
    """Relative to the largest: of eigenvalues of a matrix that was summed over examples.

    A λ above 0 somebody gave on purpose: it is taken as long as adding it changes anything.
    """
    return (32 if λ == 0 else 1) * torch.finfo(dtype).eps


def rounding_of_products(dtype: torch.dtype) -> float:
    """The same of products of two matrices' eigenvalues, of which both may be small."""
    return torch.finfo(dtype).eps


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
