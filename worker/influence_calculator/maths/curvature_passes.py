"""Passes over the training data that sum something of every block's curvature.

Shapes: N training examples, P_b parameters of block b.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import (
    BlockStructure,
    Regularization,
    block_layout,
    block_regularization,
    checked_regularization,
    needs_trace,
)
from influence_calculator.maths.curvature import BlockCurvature, SecondOrderMode, curvatures
from influence_calculator.maths.gradient_methods import fitted_tensor
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.method import FitPass, FitState, Sums
from influence_calculator.maths.objective import IndexedBatch, Objective


@dataclass(frozen=True)
class CurvaturePass(FitPass):
    """One sum per block, to which every batch's curvature adds."""

    blocks: BlockStructure
    second_order: SecondOrderMode

    def units(self, objective: Objective) -> tuple[str, ...]:
        return block_layout(objective, self.blocks).blocks

    @override
    def accumulate(self, objective: Objective, batches: Iterable[IndexedBatch], state: FitState) -> Sums:
        layout = block_layout(objective, self.blocks)
        like = torch.zeros((), dtype=accumulation_dtype(objective.dtype), device=objective.device)
        sums: Sums = {
            block: {**self.zeros(block, width, like), "clipped": torch.zeros((), dtype=torch.int64)}
            for block, width in layout.widths.items()
        }
        directions = {
            block: self.directions(block, like.new_empty(width)) for block, width in layout.widths.items()
        }
        for _, batch in batches:
            for block, curvature in curvatures(self.second_order, objective, layout, batch):
                self.add(curvature, sums[block], directions[block])
                sums[block]["clipped"] += curvature.clipped
        return sums

    @abstractmethod
    def zeros(self, block: str, width: int, like: Tensor) -> dict[str, Tensor]:
        """The sums before the first batch, in dtype and on the device of `like`."""

    def directions(self, block: str, like: Tensor) -> Tensor:  # noqa: ARG002  the block seeds what is drawn
        """Rows as long as `like`, `[P_b]`, that every batch's curvature is multiplied by: none by default."""
        return like.new_empty(0, len(like))

    @abstractmethod
    def add(self, curvature: BlockCurvature, sums: Mapping[str, Tensor], directions: Tensor) -> None:
        """Adds one batch of one block, in place."""


@dataclass(frozen=True)
class MatrixPass(CurvaturePass):
    """The dense matrix of every block: `matrix`, `[P_b, P_b]`, the mean over examples, and how many negative
    eigenvalues by the outputs, `clipped`, it leaves out.
    """

    name = "curvature"

    @override
    def zeros(self, block: str, width: int, like: Tensor) -> dict[str, Tensor]:
        return {"matrix": like.new_zeros(width, width)}

    @override
    def add(self, curvature: BlockCurvature, sums: Mapping[str, Tensor], directions: Tensor) -> None:
        curvature.add_matrix(sums["matrix"])

    @override
    def finish(
        self, unit: str, sums: Mapping[str, Tensor], length: int, state: FitState
    ) -> dict[str, Tensor]:
        # In place: a copy of the largest thing there is would double what a fit takes.
        return {"matrix": sums["matrix"].div_(length), "clipped": sums["clipped"]}


@dataclass(frozen=True)
class TracePass(CurvaturePass):
    """The trace of every block, exact: with a Hessian it takes P_b products, one per unit vector."""

    name = "trace"

    @override
    def zeros(self, block: str, width: int, like: Tensor) -> dict[str, Tensor]:
        return {"trace": like.new_zeros(())}

    @override
    def add(self, curvature: BlockCurvature, sums: Mapping[str, Tensor], directions: Tensor) -> None:
        sums["trace"].add_(curvature.trace())

    @override
    def finish(
        self, unit: str, sums: Mapping[str, Tensor], length: int, state: FitState
    ) -> dict[str, Tensor]:
        return {"trace": sums["trace"] / length}


def fitted_regularization(
    regularization: Regularization | None, state: FitState, block: str, width: int
) -> float:
    """λ of one block; a relative one from what `TracePass` left.

    Raises:
        ValueError: a relative one, and a fit without that pass.
    """
    checked = checked_regularization(regularization)
    trace = 0.0
    if needs_trace(checked):
        trace = float(fitted_tensor(state, TracePass.name, block, "trace", ()))
    return block_regularization(checked, block, trace, width)
