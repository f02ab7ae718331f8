"""TracIn: products of gradients, summed over states that the model had while it was trained.

`Σ_c η_c g_c(test) · g_c(train)` over C checkpoints with learning rates η (Pruthi et al. 2020, TracInCP).
Both representations hold one block of columns per checkpoint, `checkpoint_<c>`, so that a training chunk is
read once and differentiated C times, for all test examples together.

Shapes: t test examples, n training examples, P parameters, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import BlockMode, block_layout
from influence_calculator.maths.checkpoints import Checkpoints
from influence_calculator.maths.footprints import capture_bytes, row_bytes
from influence_calculator.maths.grad_dot import Scaled
from influence_calculator.maths.gradient_methods import BlockSolver, solve_by_block
from influence_calculator.maths.gradients import collected, per_sample_gradients
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import FitPass, FitState, Fitted, Footprint, Method, Part, Solved
from influence_calculator.maths.objective import Batch, Objective, TrainingData
from influence_calculator.maths.shapes import ModelShapes


@dataclass(frozen=True)
class TracIn(Method):
    """`η_c g_c` of every checkpoint of the objective; the model itself counts only if it is one of them."""

    needs_data = False
    sums_checkpoints = True

    @override
    def layout(self, objective: Objective) -> Layout:
        """Every parameter once per checkpoint, by the name `checkpoint_<c>/<name>`."""
        own = block_layout(objective, BlockMode.FULL)
        blocks = _blocks(_checkpoints_of(objective))
        structure = {block: tuple(f"{block}/{slot.name}" for slot in own.slots) for block in blocks}
        shapes = {f"{block}/{slot.name}": slot.shape for block in blocks for slot in own.slots}
        return Layout.of(shapes, structure)

    @override
    def passes(self) -> tuple[FitPass, ...]:
        return ()

    @override
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None = None) -> Fitted:
        return _TracInFitted(self.layout(objective), objective)

    @override
    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        capture = capture_bytes(shapes, micro_batch)
        row = shapes.checkpoints * row_bytes(shapes, shapes.width)
        return Footprint(
            fit=0,
            # The gradients, and beside them the last micro-batch or all once more, joined or weighted.
            factors=rows * row + max(rows * row, capture_bytes(shapes, min(micro_batch, rows))),
            capture=capture,
            factor_row=row,
            resident=0,
            stored=0,
        )


class _TracInFitted(Fitted):
    """One block per checkpoint: left `η_c g_c`, right `g_c`."""

    def __init__(self, layout: Layout, objective: Objective) -> None:
        self.layout = layout
        self._objective = objective
        rates: list[float] = _checkpoints_of(objective).learning_rates.tolist()
        self._solvers: dict[str, BlockSolver] = {
            block: Scaled(rate) for block, rate in zip(layout.blocks, rates, strict=True)
        }

    @override
    def gradients(self, objective: Objective, batch: Batch) -> Left:
        found: dict[str, Tensor] = {}
        for own, layout in at_each_checkpoint(objective):
            found |= collected(own, batch, layout)
        return found

    @override
    def solve(self, gradients: Left) -> Solved:
        return solve_by_block(self._solvers, gradients)

    @override
    def right(self, batch: Batch) -> Iterator[Part]:
        for own, layout in at_each_checkpoint(self._objective):
            yield from per_sample_gradients(own, batch, layout)

    @override
    def factors(self, left: Left) -> Left:
        return left

    @override
    def left(self, factors: Left) -> Left:
        return factors


def at_each_checkpoint(objective: Objective) -> Iterator[tuple[Objective, Layout]]:
    """The objective in the state of each checkpoint, and the layout of this checkpoint's block alone."""
    checkpoints = _checkpoints_of(objective)
    shapes = {name: tuple(value.shape) for name, value in objective.parameters().items()}
    for model, block in zip(checkpoints.models, _blocks(checkpoints), strict=True):
        yield objective.in_state_of(model), Layout.of(shapes, {block: objective.names})


def summed_states(objective: Objective, layout: Layout) -> Iterator[tuple[Objective, Layout]]:
    """What an influence is a sum over: the model as it is, or each checkpoint with its own blocks."""
    if objective.checkpoints is None:
        yield objective, layout
    else:
        yield from at_each_checkpoint(objective)


def _blocks(checkpoints: Checkpoints) -> tuple[str, ...]:
    return tuple(f"checkpoint_{c}" for c in range(len(checkpoints)))


def _checkpoints_of(objective: Objective) -> Checkpoints:
    if objective.checkpoints is None:
        raise ValueError(
            "checkpoints: expected at least one, got none; TracIn sums over states of the model: give them, "
            "or take GradDot"
        )
    return objective.checkpoints
