"""Extreme eigenpairs of a symmetric matrix from its products with a few rows at a time.

Block Lanczos with full reorthogonalisation and thick restarts. `V [m, P_b]` are orthonormal rows and
`Q [b, P_b]` the next ones, with `V H = T V + E Q`: every step multiplies Q, moves it into V and finds the
next Q. A full basis is replaced by its best Ritz vectors. All of a search stands in one dictionary of
tensors, so that a step needs only what the step before left.

A Krylov space never holds more than b copies of a repeated eigenvalue. What has converged is therefore
tried once more from fresh random rows, and counts only if nothing else turns up.

Shapes: P_b parameters of block b; m rows of the basis, b rows per product, r eigenpairs wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from influence_calculator.maths.errors import NotFiniteError
from influence_calculator.maths.finite import finite_rows
from influence_calculator.maths.method import SETTLED
from influence_calculator.maths.seeded_rows import generator, normal_rows

LARGEST_BLOCK = 4
"""Rows per product at most: a pass over the data costs as much as several rows, a longer block converges
more slowly for its number of products."""
MOST_RESTARTS = 30
"""The default's upper limit; spectra that fall off need two or three."""
LEAST_DIMENSION = 20

Search = dict[str, Tensor]
"""While it goes on: `basis` V, `projected` T, `next` Q, `dropped` (of each row of V H what is outside of V
and Q), and `found` once all has converged. At its end: what `Eigenpairs` holds. Always SETTLED."""


class Wanted(Enum):
    """Which end of the spectrum."""

    LARGEST_MODULUS = auto()
    SMALLEST = auto()


class Eigenpairs(NamedTuple):
    """Of the largest modulus, or the smallest, in that order."""

    eigenvalues: Tensor
    """`[r]`, float64."""
    eigenvectors: Tensor
    """`[r, P_b]`, orthonormal."""
    residuals: Tensor
    """`[r]`, float64, `‖H v − θ v‖`."""
    converged: bool


@dataclass(frozen=True)
class Krylov:
    """How a search goes: frozen, without tensors."""

    rank: int
    """r, at least 1; more than a block's width means the width."""
    dimension: int | None = None
    """Rows of the basis at most, more than the rank; None: `max(2r + 1, 20)`."""
    tol: float = 1e-6
    """An eigenpair has converged at `‖H v − θ v‖ ≤ tol |θ|` (or at what rounding allows)."""
    restarts: int = MOST_RESTARTS
    wanted: Wanted = Wanted.LARGEST_MODULUS

    @property
    def size(self) -> int:
        """Rows of the basis at most."""
        return self.dimension or max(2 * self.rank + 1, LEAST_DIMENSION)

    @property
    def block(self) -> int:
        """B."""
        return max(1, min(LARGEST_BLOCK, (self.size - self.rank) // 2))

    @property
    def kept(self) -> int:
        """Ritz vectors that a restart keeps: the wanted ones and some more, with room for two products."""
        return max(self.rank, min(self.rank + self.block, self.size - 2 * self.block))

    @property
    def steps(self) -> int:
        """Products at most, each with b rows."""
        return self.size // self.block + self.restarts * ((self.size - self.kept) // self.block)

    def is_dense(self, width: int) -> bool:
        """Whether a block of P_b parameters is multiplied as a whole: a basis would hold nearly all."""
        return width < self.size + self.block

    def start(self, width: int, drawn_by: torch.Generator, like: Tensor) -> Tensor:
        """The first rows to be multiplied: seeded ones, or all unit vectors."""
        if self.is_dense(width):
            return torch.eye(width, dtype=like.dtype, device=like.device)
        return _orthonormal(normal_rows(self.block, width, drawn_by, like))

    def begun(self, rows: Tensor) -> Search:
        """A search that has multiplied nothing yet."""
        nothing = rows.new_zeros(0, dtype=torch.float64)
        return {
            "basis": rows[:0],
            "projected": nothing.reshape(0, 0),
            "dropped": nothing,
            "next": rows,
            SETTLED: torch.tensor(False),
        }

    def continued(
        self, search: Search, products: Tensor, drawn_by: torch.Generator, *, is_last: bool
    ) -> Search:
        """The search after `products`, which are `H` times its `next`; overwrites them."""
        if self.is_dense(products.shape[1]):
            return self._solved(products)
        basis = torch.cat([search["basis"], search["next"]])
        projected = _extended(search["projected"], _orthogonalised(products, basis))
        dropped = torch.cat([search["dropped"], projected.new_zeros(self.block)])
        scale = float(torch.linalg.eigvalsh(projected).abs().max())
        fresh = normal_rows(self.block, products.shape[1], drawn_by, products)
        following, coupling = _next_rows(products, basis, fresh, rounding(products) * scale)
        longer = {**search, "basis": basis, "projected": projected, "dropped": dropped, "next": following}
        if not is_last and len(basis) + self.block <= self.size:
            return longer
        return self._at_full_length(longer, coupling, fresh, scale, is_last=is_last)

    def _solved(self, matrix: Tensor) -> Search:
        """From the whole matrix."""
        eigenvalues, vectors = torch.linalg.eigh(((matrix + matrix.T) / 2).double())
        best = self._order(eigenvalues)[: self.rank]
        rows = vectors[:, best].T.to(matrix).contiguous()
        return _settled(Eigenpairs(eigenvalues[best], rows, eigenvalues.new_zeros(len(best)), True))

    def _at_full_length(
        self, search: Search, coupling: Tensor, fresh: Tensor, scale: float, *, is_last: bool
    ) -> Search:
        """The Ritz pairs: the result, or what the next round starts from."""
        values, weights = torch.linalg.eigh(search["projected"])
        order = self._order(values)
        values, weights = values[order], weights[:, order]
        residuals = torch.linalg.norm(coupling.T @ weights[-self.block :], dim=0)
        residuals += weights.abs().T @ search["dropped"]
        best, own = values[: self.rank], residuals[: self.rank]
        allowed = (self.tol * best.abs()).clamp(min=rounding(fresh) * scale)
        found = search.get("found")
        stable = found is not None and bool(((best - found).abs() <= allowed).all())
        converged = stable and bool((own <= allowed).all())
        ritz = _orthonormal(weights[:, : self.kept].T.to(fresh) @ search["basis"])
        if converged or is_last:
            return _settled(Eigenpairs(best, ritz[: self.rank], own, converged))
        if not stable and bool((own <= allowed / 2).all()):
            return self._tried_again(ritz[: self.rank], best, own, fresh)
        restarted = {
            "basis": ritz,
            "projected": torch.diag(values[: self.kept]),
            "dropped": weights[:, : self.kept].abs().T @ search["dropped"],
            "next": search["next"],
            SETTLED: search[SETTLED],
        }
        return {**restarted, "found": found} if stable and found is not None else restarted

    def _tried_again(self, vectors: Tensor, values: Tensor, residuals: Tensor, fresh: Tensor) -> Search:
        """From what has converged, to half of what is allowed, and fresh rows: the rest is dropped."""
        following, _ = _next_rows(fresh, vectors, fresh, 0.0)
        return {
            "basis": vectors,
            "projected": torch.diag(values),
            "dropped": residuals,
            "next": following,
            "found": values,
            SETTLED: torch.tensor(False),
        }

    def _order(self, eigenvalues: Tensor) -> Tensor:
        if self.wanted is Wanted.SMALLEST:
            return eigenvalues.argsort()
        return eigenvalues.abs().argsort(descending=True)


def eigenpairs(search: Mapping[str, Tensor]) -> Eigenpairs:
    """What a search that has ended found."""
    return Eigenpairs(
        search["eigenvalues"], search["eigenvectors"], search["residuals"], bool(search["converged"])
    )


def search_in(search: Krylov, product: Callable[[Tensor], Tensor], like: Tensor, seed: int) -> Eigenpairs:
    """A whole search in a matrix that is known by its products with rows; `like` a `[P]`.

    The products are overwritten.

    Raises:
        NotFiniteError: a product is not finite.
    """
    state = search.begun(search.start(len(like), generator(seed, "", 0), like))
    for step in range(search.steps):
        products = product(state["next"])
        if not finite_rows(products).all():
            raise NotFiniteError(
                "product: expected finite numbers, got NaN or infinity; look for them in the data"
            )
        drawn_by = generator(seed, "", step + 1)
        state = search.continued(state, products, drawn_by, is_last=step + 1 == search.steps)
        if state[SETTLED]:
            break
    return eigenpairs(state)


def rounding(rows: Tensor) -> float:
    """Relative to the largest eigenvalue: what is below counts as zero."""
    return 10 * torch.finfo(rows.dtype).eps


def _settled(found: Eigenpairs) -> Search:
    return {
        "eigenvalues": found.eigenvalues,
        "eigenvectors": found.eigenvectors,
        "residuals": found.residuals,
        "converged": torch.tensor(found.converged),
        SETTLED: torch.tensor(True),
    }


def _orthonormal(rows: Tensor) -> Tensor:
    """The same span, orthonormal; the signs of the rows stay."""
    factor, triangle = torch.linalg.qr(rows.T)
    return (factor * triangle.diagonal().sign()).T.contiguous()


def _orthogonalised(rows: Tensor, basis: Tensor) -> Tensor:
    """Takes the basis out of the rows, in place and twice; the coefficients, float64."""
    coefficients = rows.new_zeros(len(rows), len(basis), dtype=torch.float64)
    for _ in range(2):
        part = rows @ basis.T
        rows -= part @ basis
        coefficients += part
    return coefficients


def _extended(projected: Tensor, coefficients: Tensor) -> Tensor:
    """`T` with the rows that b new products gave: `[[T, Cᵀ], [C, D]]`."""
    m, b = len(projected), len(coefficients)
    whole = projected.new_zeros(m + b, m + b)
    whole[:m, :m] = projected
    whole[m:] = coefficients
    whole[:m, m:] = coefficients[:, :m].T
    whole[m:, m:] = (coefficients[:, m:] + coefficients[:, m:].T) / 2
    return whole


def _next_rows(rows: Tensor, basis: Tensor, fresh: Tensor, zero: float) -> tuple[Tensor, Tensor]:
    """Orthonormal rows beside the basis, `Q'`, and the coupling `R [b, b]` with `rows = R Q'`.

    Where a row has nothing left but rounding, the space is exhausted: a fresh one takes its place.
    """
    found = rows.new_zeros(rows.shape)
    coupling = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for i in range(len(rows)):
        row = rows[i : i + 1].clone()
        _orthogonalised(row, basis)
        coupling[i, :i] = _orthogonalised(row, found[:i])[0]
        length = float(row.norm())
        if length > zero:
            coupling[i, i] = length
        else:
            row = fresh[i : i + 1].clone()
        found[i] = _unit_beside(row, basis, found[:i])
    return found, coupling


def _unit_beside(row: Tensor, *spans: Tensor) -> Tensor:
    """The row's direction outside of the spans; again, for a short rest of a long row is mostly rounding."""
    for _ in range(2):
        row = row / row.norm()
        for span in spans:
            _orthogonalised(row, span)
    return row / row.norm()
