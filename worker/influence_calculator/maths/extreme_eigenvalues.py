"""The ends of a symmetric operator's spectrum, from a few products: what an iteration needs to be told.

Shapes: P unknowns, k steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 64
"""Products that an estimate takes at most: they find an end that is a thousandth of the spectrum's width away
from the rest."""


class Extremes(NamedTuple):
    """Ritz values at both ends: the spectrum reaches at least so far."""

    smallest: float
    largest: float
    smallest_error: float
    """Of an eigenvalue next to `smallest`."""
    largest_error: float


def extreme_eigenvalues(product: Callable[[Tensor], Tensor], like: Tensor, seed: int = 0) -> Extremes | None:
    """The smallest and the largest eigenvalue of `v → Av`, by Lanczos from a seeded start, `like` a `[P]`.

    A Ritz value θ lies inside of the spectrum and has an eigenvalue within its residual β|s|. None if a
    product is not finite. No basis is kept: what rounding repeats of an end that was found does not move it.
    """
    start = torch.randn(
        like.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu"
    )
    current = (start / start.norm()).to(like)
    previous, β = torch.zeros_like(current), 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(STEPS, like.numel())):
        remainder = product(current[None])[0] - β * previous
        α = float(remainder @ current)
        remainder -= α * current
        β = float(remainder.norm())
        diagonal.append(α)
        beside.append(β)
        largest = max(map(abs, (*diagonal, *beside)))
        if not largest < float("inf"):
            return None
        if β <= torch.finfo(like.dtype).eps * largest * like.numel() ** 0.5:
            break
        previous, current = current, remainder / β
    off = torch.tensor(beside[:-1], dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + off.diag(1) + off.diag(-1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    errors = beside[-1] * vectors[-1].abs()
    return Extremes(float(values[0]), float(values[-1]), float(errors[0]), float(errors[-1]))
