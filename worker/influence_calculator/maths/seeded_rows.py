"""Random rows that depend on a seed alone: the same for every batch, range, worker and device.

Shapes: q rows, P_b parameters of block b.
"""

from __future__ import annotations

import hashlib
from numbers import Integral

import torch
from torch import Tensor

MOST_ROWS = 100_000
"""A rank at most, as in the spec of a job."""


def require_rank_and_seed(rank: int, seed: int, usual: int) -> None:
    """What random rows are made of: whole numbers. `usual` is a rank to begin with.

    Raises:
        ValueError: another rank than a whole number from 1 to `MOST_ROWS`, or a seed that is none.
    """
    if not _is_whole(rank) or rank < 1:
        raise ValueError(f"rank: expected a whole number of at least 1, got {rank!r}; {usual} is a start")
    if rank > MOST_ROWS:
        raise ValueError(f"rank: expected at most {MOST_ROWS}, got {rank}; {usual} is a start")
    if not _is_whole(seed):
        raise ValueError(f"seed: expected a whole number, got {seed!r}; 0 is as good as any")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator for one use of a seed: that of a block, or of a block's k-th pass."""
    text = ":".join(str(part) for part in (seed, *key))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal_rows(q: int, width: int, drawn_by: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal rows, `[q, P_b]`, drawn on the CPU in float64; in dtype and on the device of `like`."""
    return torch.randn(q, width, generator=drawn_by, dtype=torch.float64, device="cpu").to(like)


def sign_rows(q: int, width: int, drawn_by: torch.Generator, like: Tensor) -> Tensor:
    """Rows of random signs, `[q, P_b]`, drawn on the CPU; in dtype and on the device of `like`."""
    signs = torch.randint(0, 2, (q, width), generator=drawn_by, dtype=torch.int8, device="cpu")
    return signs.to(like).mul_(2).sub_(1)


def orthonormal_rows(q: int, width: int, drawn_by: torch.Generator, like: Tensor) -> Tensor:
    """Orthonormal rows, `[q, P_b]`, made on the CPU in float64; in dtype and on the device of `like`.

    By Cholesky's factor of the draws' products, several times faster than Householder's reflections of
    millions of columns.
    """
    rows = torch.rand(q, width, generator=drawn_by, dtype=torch.float32, device="cpu").double().sub_(0.5)
    # Nearly as many rows as columns are far from orthogonal: a second time makes up for rounding.
    for _ in range(1 if 4 * q <= width else 2):
        rows = torch.linalg.solve_triangular(torch.linalg.cholesky(rows @ rows.T), rows, upper=False)
    return rows.to(like).contiguous()
