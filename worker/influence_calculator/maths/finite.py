"""Which rows hold numbers alone."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_rows(rows: Tensor) -> Tensor:
    """`[n]`: whether a row of `[n, P]` has neither NaN nor infinity; nothing of the rows' size is made."""
    # A sum is finite only if all of its terms are, and costs a fraction of looking at each.
    finite = torch.isfinite(rows.sum(dim=1))
    for row in (~finite).nonzero().flatten().tolist():
        finite[row] = torch.isfinite(rows[row]).all()
    return finite
