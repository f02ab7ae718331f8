"""A random projection of gradients that nobody stores: its rows are drawn again whenever they are needed.

`S`, `[P, k]`, has entries ±1/√k, so that `E[(Sᵀa)·(Sᵀb)] = a·b`. Row p depends on the seed and on p alone: it
is the same for every batch, process and device. Where k ≥ P there is nothing to gain, and S is the identity.

Shapes: P parameters, k columns, n rows of gradients, w columns of them that are given at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from influence_calculator.maths.draws import signs

DRAWN_BYTES = 8 << 20
"""Of the int64 numbers behind the rows that are drawn at once; three times as much is alive meanwhile."""
KEPT_BYTES = 64 << 20
"""A projection that fits is drawn once."""


class Projection:
    """`S` for rows in the dtype and on the device of `like`."""

    def __init__(self, width: int, rank: int, seed: int, like: Tensor) -> None:
        self.width = width
        """P."""
        self.rank = min(rank, width)
        """k."""
        self._seed = seed
        self._like = like
        self._keeps = self.width * self.rank * like.element_size() <= KEPT_BYTES
        self._whole: Tensor | None = None
        self._gram: Tensor | None = None

    @property
    def is_identity(self) -> bool:
        """Whether coordinates are the parameters themselves."""
        return self.rank == self.width

    def project(self, rows: Tensor) -> Tensor:
        """`rows · S`, `[n, k]`, of whole rows `[n, P]`."""
        coordinates = self._like.new_zeros(len(rows), self.rank)
        self.add(coordinates, 0, rows)
        return coordinates

    def add(self, coordinates: Tensor, start: int, values: Tensor) -> None:
        """Adds to coordinates `[n, k]` what columns `start` to `start + w`, `[n, w]`, are to them."""
        if self.is_identity:
            coordinates[:, start : start + values.shape[1]] += values
            return
        for first, drawn in self._drawn(start, start + values.shape[1]):
            own = values[:, first - start : first - start + len(drawn)]
            coordinates.addmm_(own.to(drawn.dtype), drawn)

    def back(self, coordinates: Tensor) -> Tensor:
        """`a Sᵀ`, `[n, P]`: what scores against gradients as `a` does against their coordinates."""
        if self.is_identity:
            return coordinates
        rows = self._like.new_empty(len(coordinates), self.width)
        for first, drawn in self._drawn(0, self.width):
            rows[:, first : first + len(drawn)] = coordinates.to(drawn.dtype) @ drawn.T
        return rows

    def gram(self) -> Tensor:
        """`SᵀS`, `[k, k]`."""
        if self.is_identity:
            return torch.eye(self.rank, dtype=self._like.dtype, device=self._like.device)
        total = self._like.new_zeros(self.rank, self.rank)
        for _, drawn in self._drawn(0, self.width):
            total.addmm_(drawn.T, drawn)
        return total

    def coordinates_of(self, factors: Tensor) -> Tensor:
        """`a` of factors `z = a Sᵀ`, `[t, P]`: `z S (SᵀS)^-1`."""
        if self._gram is None:
            self._gram = self.gram()
        return torch.linalg.solve(self._gram, self.project(factors).T).T

    def _drawn(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Rows `start` to `stop` of S, some at a time, each time with the first one's place."""
        if not self._keeps:
            yield from self._draw(start, stop)
            return
        if self._whole is None:
            self._whole = torch.cat([drawn for _, drawn in self._draw(0, self.width)])
        yield start, self._whole[start:stop]

    def _draw(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        at_once = max(1, DRAWN_BYTES // (8 * self.rank))
        for first in range(start, stop, at_once):
            places = torch.arange(first, min(first + at_once, stop), device=self._like.device)
            yield first, signs(self._seed, places, self.rank).to(self._like.dtype).mul_(self.rank**-0.5)


def projection_bytes(width: int, rank: int, itemsize: int) -> int:
    """What a projection takes on the device: what it keeps, or draws at once."""
    rank = min(rank, width)
    if rank == width:
        return 0
    whole = width * rank * itemsize
    return (whole if whole <= KEPT_BYTES else 0) + 3 * min(DRAWN_BYTES, 8 * width * rank)
