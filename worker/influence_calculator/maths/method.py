"""What a method of influence is: how it is fitted, and the two representations it scores with.

Every method is a pair of representations: `left` of a test chunk and `right` of a training chunk,
and a score `[t, n]` of the two. Both stand in coordinates that the method chooses: the parameters
themselves, or a basis in which it costs less. It may solve in others than it scores in: `scored` leads
from the ones to the others. Influence factors, which the public API shows, are a left representation by
parameter. Fitting is a sequence of passes over the training data, each a map-reduce over contiguous
ranges whose partial results are SUMS, so that any driver (a loop, Dask, a resumable job) may run it and
gets the same bits for the same ranges.

Shapes: t test examples, n training examples of a batch, P_b parameters of block b.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.objective import Batch, IndexedBatch, Objective, TrainingData, batch_size
from influence_calculator.maths.shapes import ModelShapes

Sums = dict[str, dict[str, Tensor]]
"""unit -> name -> partial sum. A *unit* is a layer or block: what can be finished independently."""

FitState = Mapping[str, Mapping[str, Mapping[str, Tensor]]]
"""pass -> unit -> name -> tensor: all that a fit leaves behind, and all that is needed to resume."""


GATHERED_ELEMENTS = 1 << 22
"""Of a left representation, copied at once to face columns that do not stand together: 16 MiB in float32."""

SETTLED = "settled"
"""Name of the boolean that a pass of a series leaves per unit: further passes would change nothing."""


class SolverStatus(IntEnum):
    """How one right-hand side ended; the value is what the store holds."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    INDEFINITE = 2
    """CG met `pᵀ(H + λI)p ≤ 0`; the last iterate is kept."""
    NOT_FINITE = 3
    """NaN or infinity, or an iteration that grows without bound: there is no answer."""


@dataclass(frozen=True)
class SolverReport:
    """How each of t right-hand sides ended."""

    status: Tensor
    """`[t]` int8, values of `SolverStatus`; over blocks the worst."""
    iterations: Tensor
    """`[t]` int32; over blocks the most."""
    residual: Tensor
    """`[t]` float64, `‖r‖ / ‖b‖`; over blocks the largest. 0 for a method that solves exactly."""
    notes: tuple[str, ...] = ()
    """Sentences on what the solver found to be in its way, with the cure."""

    @classmethod
    def exact(cls, t: int) -> SolverReport:
        """The report of a method without iterations."""
        return cls(
            torch.zeros(t, dtype=torch.int8),
            torch.zeros(t, dtype=torch.int32),
            torch.zeros(t, dtype=torch.float64),
        )


@dataclass(frozen=True)
class Solved:
    """A test chunk's left representation and how its solves ended."""

    left: Left
    report: SolverReport


class Compact(NamedTuple):
    """A left representation as one row per example, for the way between processes."""

    rows: Tensor
    """`[t, K]`, or `[t, P]`; a row whose gradient is not finite is NaN."""
    report: SolverReport


class Part(NamedTuple):
    """Columns `start` to `start + width` of block `block` of a right representation, of the examples from
    `row` on, `[rows, width]`; all others are 0.
    """

    block: str
    start: int
    values: Tensor
    row: int = 0
    places: Tensor | None = None
    """Where the columns do not stand together: which of the block's runs of equal width are given."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device above the model itself, for the plan."""

    fit: int
    """Largest pass of the fit, with its sums and one micro-batch."""
    factors: int
    """Solving one chunk of test examples, the fit's state included; representations stay as the method solves
    them.
    """
    capture: int
    """Differentiating one micro-batch of training examples in the score stage."""
    factor_row: int
    """Left representation of one test example."""
    resident: int
    """What the fitted method keeps while it scores."""
    stored: int
    """Partial sums of one range, of the pass that leaves the most: what a job keeps in its store."""
    solving_sums: int = 0
    """The same of a pass that solves; 0 if none does."""
    solving_state: int = 0
    """What such a pass leaves for the next."""
    by_parameter: int = 0
    """Turning the solved chunk into factors by parameter, one block after another, where the method solves in
    other coordinates.
    """


def score_dtype(left: Tensor) -> torch.dtype:
    """The dtype of scores: that of the left representation, float32 for half precision."""
    return torch.promote_types(left.dtype, torch.float32)


def add_scores(scores: Tensor, left: Left, part: Part) -> None:
    """Adds to scores `[t, n]` of a batch what one part of its right representation gives."""
    examples = scores[:, part.row : part.row + part.values.shape[0]]
    for columns, values in _facing(left[part.block], part):
        examples.addmm_(columns.to(scores.dtype), values.to(scores.dtype).T)


def _facing(rows: Tensor, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
    """Columns of a left representation beside those of a right one; copies are bounded."""
    if part.places is None:
        yield rows[:, part.start : part.start + part.values.shape[1]], part.values
        return
    if not len(part.places):
        return
    width = part.values.shape[1] // len(part.places)
    at_once = max(1, GATHERED_ELEMENTS // max(1, rows.shape[0] * width))
    by_run = rows.unflatten(1, (-1, width))
    pieces = part.values.split(at_once * width, dim=1)
    for places, values in zip(part.places.split(at_once), pieces, strict=True):
        yield by_run.index_select(1, places).flatten(1), values


class FitPass(ABC):
    """One pass over the training data, or one of a series of which each takes over from the one before."""

    name: str
    follows: str | None = None
    """The pass before it in its series. What that one left is taken over whole, so that nobody needs it once
    this pass is done; and this pass is left out when all units were `SETTLED` before it."""
    takes_any_sums: bool = False
    """Whether sums that are not finite are a result too, not a mistake in the data alone."""

    @abstractmethod
    def units(self, objective: Objective) -> tuple[str, ...]:
        """What this pass sums and finishes independently: layers or blocks, in a fixed order."""

    @abstractmethod
    def accumulate(self, objective: Objective, batches: Iterable[IndexedBatch], state: FitState) -> Sums:
        """Sums over one contiguous range of the training data, batch after batch in order."""

    @abstractmethod
    def finish(
        self, unit: str, sums: Mapping[str, Tensor], length: int, state: FitState
    ) -> dict[str, Tensor]:
        """What the fit keeps of one unit, from its sums over all `length` training examples.

        The sums are given away: what is kept may be the same tensors, changed in place. Of what earlier
        passes left, `state` may hold this unit alone.
        """


class Fitted(ABC):
    """A fitted method: scores test chunks against training batches."""

    layout: Layout
    forms_pieces: bool = False
    """Whether `right` holds gradients of a bounded piece of the batch at a time, however long that is."""
    notes: tuple[str, ...] = ()
    """What the user must know of the fit: that it did not converge, that the curvature is indefinite."""

    @abstractmethod
    def gradients(self, objective: Objective, batch: Batch) -> Left:
        """Per-example gradients of `objective` (the method's own, or another loss on the same model), in
        the coordinates that it solves in.
        """

    @abstractmethod
    def solve(self, gradients: Left) -> Solved:
        """The left representation of test gradients: `(H + λI)^-1 g` in the method's approximation and
        in the same coordinates.
        """

    def scored(self, left: Left) -> Left:
        """What `solve` answered in the coordinates of `right`, for the blocks given."""
        return left

    @abstractmethod
    def factors(self, left: Left) -> Left:
        """Influence factors by parameter of what `solve` answered, for the blocks given."""

    @abstractmethod
    def left(self, factors: Left) -> Left:
        """The left representation of influence factors: the inverse of `factors`.

        Both return what they were given where the method solves in the parameters themselves.
        """

    @abstractmethod
    def right(self, batch: Batch) -> Iterator[Part]:
        """The right representation of a training batch, part by part, so that one lives at a time: its
        values hold until the next is asked for.
        """

    def score(self, left: Left, batch: Batch) -> Tensor:
        """`left · right(batch)ᵀ`, `[t, n]`, of what `scored` returned, on its device; float32 at least,
        whatever is stored.
        """
        rows = next(iter(left.values()))
        # A training example's scores side by side: products with the longer side of few rows are slow.
        scores = rows.new_zeros(batch_size(batch), rows.shape[0], dtype=score_dtype(rows)).T
        for part in self.right(batch):
            add_scores(scores, left, part)
            # What comes next is formed while this name lasts.
            del part
        return scores


class CompactFitted(Fitted, ABC):
    """A fitted method whose left representation may be sent in fewer numbers than it has."""

    @abstractmethod
    def is_compact(self, columns: int) -> bool:
        """Whether rows `[t, K]` of so many columns are compact ones; never for P."""

    @abstractmethod
    def compact(self, objective: Objective, batch: Batch) -> Compact | None:
        """The left representation of a test batch as compact rows; of examples that have none, whole,
        `[t, P]`, as it is scored, flattened by the layout; None: this model has neither.
        """

    @abstractmethod
    def expanded(self, rows: Tensor) -> Tensor:
        """The left representation `[t, P]`, as it is scored, flattened by the layout, of compact rows
        `[t, K]`.
        """


class PassesFitted(Fitted, ABC):
    """A fitted method that also solves by passes over the training data, each a map-reduce as a fit's are.

    What stands between two passes are tensors by unit and name, so that any number of processes may share
    the ranges, and others go on.
    """

    @abstractmethod
    def begun(self, gradients: Left) -> dict[str, dict[str, Tensor]]:
        """What the first pass follows, of gradients that are finite."""

    @abstractmethod
    def solving_pass(self, name: str, follows: str) -> FitPass:
        """The pass called `name`, after the one called `follows`; due until all units are SETTLED."""

    @abstractmethod
    def solved(self, ended: Mapping[str, Mapping[str, Tensor]]) -> Solved:
        """The result, from what the last pass left."""


class Method(ABC):
    """A method's configuration: frozen, picklable, without tensors."""

    needs_data: bool
    """Whether solving reads the training data again (iterative solvers)."""
    sums_checkpoints: bool = False
    """Whether it differentiates at the objective's checkpoints, in place of the model."""
    solves_by_passes: bool = False
    """Whether whoever runs the passes of its fit is to solve by passes too: `fitted` is a `PassesFitted`."""

    @property
    def tried_rows(self) -> int:
        """How many rows `[P]` `try_on` holds."""
        return 0

    def looked_at(self, objective: Objective, first: Callable[[], Batch]) -> Objective:  # noqa: ARG002
        """The objective with what this method must have seen of the model at work, on the first training
        example; most need to see nothing.

        Raises:
            UnsupportedModelError: a part of it that the method cannot treat.
        """
        return objective

    def try_on(self, objective: Objective, few: Batch) -> None:  # noqa: B027
        """Computes on a few examples what the method relies on and nobody checks, before a model is fitted.

        Most rely on gradients alone, which were tried. It takes `tried_rows` rows `[P]`.

        Raises:
            CalculatorError: a model or a loss that the method has wrong.
        """

    @abstractmethod
    def layout(self, objective: Objective) -> Layout:
        """Blocks and slots of the tracked parameters this method treats."""

    @abstractmethod
    def passes(self) -> tuple[FitPass, ...]:
        """The passes over the training data that fit it, in order; none if it needs no fit."""

    def passes_in_one_process(self, kept_bytes: int) -> tuple[FitPass, ...]:  # noqa: ARG002
        """The same, for one process that runs all of them: they may hand over, beside what they leave, so
        many bytes on the model's device of what the next would compute again.
        """
        return self.passes()

    @abstractmethod
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None) -> Fitted:
        """The fitted method from a fit's state. `data` is needed if `needs_data`."""

    @abstractmethod
    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        """Device memory with `micro_batch` examples per forward pass and `rows` test rows solved at once."""


def fit(
    method: Method,
    objective: Objective,
    data: TrainingData,
    ranges: Sequence[TrainingData] | None = None,
    kept_bytes: int = 0,
) -> FitState:
    """Fits in this process: the reference for every other driver of the passes.

    `ranges` are contiguous pieces of `data`, whose sums are added in order; default: one piece, all of it.
    `kept_bytes` may be kept on the device from one pass to the next; no number depends on it.
    """
    state: dict[str, dict[str, dict[str, Tensor]]] = {}
    for step in method.passes_in_one_process(kept_bytes):
        if not is_due(step, state):
            continue
        total: Sums | None = None
        for piece in ranges or (data,):
            total = add_sums(total, step.accumulate(objective, piece.batches(), state))
        sums = total or {}
        state[step.name] = {
            unit: step.finish(unit, sums[unit], data.length, state) for unit in step.units(objective)
        }
        if step.follows is not None:
            del state[step.follows]
    return state


def is_due(step: FitPass, state: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bool:
    """Whether the passes before it left something to do; True for a pass that is not one of a series."""
    if step.follows is None:
        return True
    before = state.get(step.follows)
    return before is not None and not all(bool(unit[SETTLED]) for unit in before.values())


def add_sums(total: Sums | None, partial: Sums) -> Sums:
    """`total + partial` in place; the first partial becomes the total."""
    if total is None:
        return partial
    for unit, values in partial.items():
        for name, value in values.items():
            total[unit][name].add_(value)
    return total
