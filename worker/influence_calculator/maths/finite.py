"""Which rows hold numbers alone, and what becomes of others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def is_finite_number(value: Any) -> bool:
    """Whether it is a number, or a tensor of one, and neither NaN nor infinite."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):  # no number, or a tensor of several
        return False


def finite_rows(rows: Tensor) -> Tensor:
    """`[n]`: whether a row of `[n, P]` has neither NaN nor infinity; nothing of the rows' size is made."""
    # A sum is finite only if all of its terms are, and costs a fraction of looking at each.
    finite = torch.isfinite(rows.sum(dim=1))
    for row in (~finite).nonzero().flatten().tolist():
        finite[row] = torch.isfinite(rows[row]).all()
    return finite


def spoil(rows: Tensor, spoilt: Tensor) -> None:
    """Makes NaN of the rows of `[n, …]` that `spoilt`, `[n]`, names; no other is read or written."""
    # `rows[spoilt] = nan` goes over all of them.
    rows.index_fill_(0, spoilt.nonzero().flatten(), torch.nan)
