"""A search for eigenpairs as a series of passes over the training data, one product of every block each.

Shapes: b rows per product, P_b parameters of block b, r eigenpairs wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import BlockStructure, block_layout
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.errors import NotFiniteError
from influence_calculator.maths.finite import finite_rows
from influence_calculator.maths.footprints import block_widths, collect_bytes, row_bytes, workspace
from influence_calculator.maths.gradient_methods import fitted_tensor
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.krylov import Eigenpairs, Krylov, Search, eigenpairs
from influence_calculator.maths.method import SETTLED, FitPass, FitState, Sums
from influence_calculator.maths.objective import IndexedBatch, Objective
from influence_calculator.maths.seeded_rows import generator
from influence_calculator.maths.shapes import ModelShapes
from influence_calculator.maths.training_products import PRODUCTS, summed_products


@dataclass(frozen=True)
class KrylovPass(FitPass):
    """One step of the search in every block that is not settled."""

    name: str
    step: int
    search: Krylov
    blocks: BlockStructure
    second_order: SecondOrderMode
    seed: int
    follows: str | None = None

    def units(self, objective: Objective) -> tuple[str, ...]:
        return block_layout(objective, self.blocks).blocks

    @override
    def accumulate(self, objective: Objective, batches: Iterable[IndexedBatch], state: FitState) -> Sums:
        layout = block_layout(objective, self.blocks)
        like = torch.zeros((), dtype=accumulation_dtype(objective.dtype), device=objective.device)
        searches = {block: self._before(block, width, like, state) for block, width in layout.widths.items()}
        rows = {block: found["next"] for block, found in searches.items() if not found[SETTLED]}
        return summed_products(self.second_order, objective, layout, batches, rows)

    @override
    def finish(
        self, unit: str, sums: Mapping[str, Tensor], length: int, state: FitState
    ) -> dict[str, Tensor]:
        if PRODUCTS not in sums:
            return dict(state[self.follows or ""][unit])
        products = sums[PRODUCTS].div_(length)
        if not finite_rows(products).all():
            raise NotFiniteError(
                f"block {unit!r}: expected finite products with the curvature, got NaN or infinity; a "
                "training example has a loss or gradient that is not finite"
            )
        before = self._before(unit, products.shape[1], products, state)
        drawn_by = generator(self.seed, unit, self.step + 1)
        is_last = self.step + 1 == self.search.steps
        return self.search.continued(before, products, drawn_by, is_last=is_last)

    def _before(self, block: str, width: int, like: Tensor, state: FitState) -> Search:
        if self.follows is not None:
            return dict(state[self.follows][block])
        return self.search.begun(self.search.start(width, generator(self.seed, block, 0), like))


def krylov_passes(
    series: str, search: Krylov, blocks: BlockStructure, second_order: SecondOrderMode, seed: int
) -> tuple[KrylovPass, ...]:
    """As many passes as the search may take; it ends earlier when every block is settled."""
    names = [f"{series}-{step}" for step in range(search.steps)]
    return tuple(
        KrylovPass(name, step, search, blocks, second_order, seed, before)
        for step, (name, before) in enumerate(zip(names, [None, *names], strict=False))
    )


def found_eigenpairs(
    passes: tuple[KrylovPass, ...], state: FitState, block: str, width: int
) -> tuple[Eigenpairs, int]:
    """What a series found in one block, and how many passes it took.

    Raises:
        ValueError: the fit's state holds none of its passes, or not to the end.
    """
    last = next((step for step in reversed(passes) if step.name in state), passes[0])
    shape = (min(last.search.rank, width), width)
    fitted_tensor(state, last.name, block, "eigenvectors", shape)
    return eigenpairs(state[last.name][block]), last.step + 1


def krylov_fit_bytes(step: KrylovPass, shapes: ModelShapes, micro_batch: int) -> int:
    """The largest pass of a series: what the pass before left, and the larger of its two halves."""
    widths = block_widths(shapes, step.blocks)
    search = step.search
    product = workspace(shapes, micro_batch)
    if step.second_order is SecondOrderMode.EMPIRICAL_FISHER:
        product = max(product, collect_bytes(shapes, micro_batch, sum(widths)))
    multiplied = _multiplied_bytes(step, shapes)
    kept = sum(search.size * row_bytes(shapes, w) for w in widths if not search.is_dense(w))
    # Finishing a block: the basis with the new rows, the Ritz vectors before and after they are normalised.
    longest = max((w for w in widths if not search.is_dense(w)), default=0)
    finishing = (search.size + 3 * search.kept + 3 * search.block) * row_bytes(shapes, longest)
    return kept + max(product + 3 * multiplied, finishing, 4 * multiplied)


def krylov_stored_bytes(step: KrylovPass, shapes: ModelShapes) -> int:
    """Partial sums of one range, and a pass's share of the two states of the search that are in the store."""
    state = (step.search.size + step.search.block) * row_bytes(shapes, sum(block_widths(shapes, step.blocks)))
    return _multiplied_bytes(step, shapes) + 2 * state // step.search.steps


def _multiplied_bytes(step: KrylovPass, shapes: ModelShapes) -> int:
    """All rows that one pass multiplies."""
    search = step.search
    return sum(
        (width if search.is_dense(width) else search.block) * row_bytes(shapes, width)
        for width in block_widths(shapes, step.blocks)
    )
