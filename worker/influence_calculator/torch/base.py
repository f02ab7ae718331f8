"""Models of influence for torch: an objective, a method of the maths, and what its fit left behind.

Every concrete model is a constructor with pyDVL's arguments around a `Method`; nothing is computed
here that the maths computes.

Shapes: t test examples, n training examples, P parameters, P_b parameters of block b, F... feature
dimensions of x.
"""

from __future__ import annotations

import math
import operator
from abc import ABC
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from influence_calculator.base_influence_function_model import FitsInParts, InfluenceFunctionModel
from influence_calculator.errors import NotFittedException, SolverWarning
from influence_calculator.maths import region
from influence_calculator.maths.blocks import BlockMode, Regularization
from influence_calculator.maths.by_token import influences_by_token
from influence_calculator.maths.capture import measure
from influence_calculator.maths.checkpoints import Checkpoints
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import (
    CompactFitted,
    FitPass,
    FitState,
    Fitted,
    Method,
    Solved,
    Sums,
    fit,
)
from influence_calculator.maths.objective import (
    IndexedBatch,
    Objective,
    Seen,
    batch_size,
    micro_batches,
    on_device,
    xy_objective,
)
from influence_calculator.maths.own_modes import own_modes
from influence_calculator.maths.perturbation import perturbations
from influence_calculator.maths.probe import probe, refuse_training_mode
from influence_calculator.maths.training_batches import JoinedBatches, KeptBatches
from influence_calculator.memory import available_bytes
from influence_calculator.torch.block_mapper import TorchBlockMapper, TorchOperatorGradientComposition
from influence_calculator.torch.buffers import by_reference, packed, unpacked, with_state
from influence_calculator.torch.composable import TorchComposableInfluence
from influence_calculator.torch.gradient_provider import TorchBatch, TorchGradientProvider
from influence_calculator.torch.solver_warnings import warn_of_report
from influence_calculator.torch.tensor_operator import (
    DictBilinearForm,
    LowRankBilinearForm,
    OperatorBilinearForm,
    TensorDictOperator,
    TensorOperator,
    TorchOperatorType,
)
from influence_calculator.torch.training_data import IterableTrainingData
from influence_calculator.torch.user_warnings import warn_user
from influence_calculator.torch.util import LossType, factor_dtype_of, require_factor_width, versions_of
from influence_calculator.types import InfluenceMode, as_mode

__all__ = [
    "DictBilinearForm",
    "GivenBlocks",
    "GivenRegularization",
    "LowRankBilinearForm",
    "OperatorBilinearForm",
    "TensorDictOperator",
    "TensorOperator",
    "TorchBatch",
    "TorchBlockMapper",
    "TorchComposableInfluence",
    "TorchGradientProvider",
    "TorchInfluenceFunctionModel",
    "TorchOperatorGradientComposition",
    "TorchOperatorType",
    "regularization_of",
]

GivenRegularization = Regularization | Mapping[str, float | None] | None
"""λ: a number, one per block (None means 0), `Relative`, or None for 0."""

GivenBlocks = BlockMode | Mapping[str, Sequence[str]]

GRADIENT_BYTES = 2**28
"""256 MiB for one parameter's per-example gradients of the examples differentiated at once."""

CACHED_GRADIENT_BYTES = 2**25
"""32 MiB of them on a processor: what is computed from them is read again while its cache holds it."""

KEPT_SHARE = 4
"""A fit keeps one part in so many of the memory that its device has left, from one pass to the next."""

LEAST_EXAMPLES = 32
"""Differentiated at once where there is memory: fewer cost more than the cache gains."""

PIECED_EXAMPLES = 128
"""The same of a method that forms their gradients in pieces: the cache gains by no shorter batch."""

CAPTURED_BYTES = 2**30
"""1 GiB for what such a batch captures."""


class TorchInfluenceFunctionModel(InfluenceFunctionModel[Tensor, Iterable[Any]], FitsInParts[Tensor], ABC):
    """Influence with respect to the parameters of `model` that require grad.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        method: the inverse curvature.
        warn_on_max_iteration: warn when solves do not converge.

    Not thread-safe: differentiating puts hooks on the model's layers.
    """

    def __init__(
        self, model: nn.Module, loss: LossType, method: Method, warn_on_max_iteration: bool = True
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected a torch.nn.Module, got {type(model).__name__}; "
                "wrap what answers for examples in one"
            )
        if not callable(loss):
            raise TypeError(
                f"loss: expected a function, loss(model(x), y), got {type(loss).__name__}; give "
                "torch.nn.functional.cross_entropy, for one"
            )
        self.model = model
        self.loss = loss
        self.method = method
        self.warn_on_max_iteration = warn_on_max_iteration
        self.checkpoints: Checkpoints | None = None
        self._seen = Seen()
        self._tracked: tuple[str, ...] | None = None
        self._state: FitState | None = None
        self._data: IterableTrainingData | None = None
        self._fitted: Fitted | None = None

    @property
    def objective(self) -> Objective:
        """What is differentiated: the loss of one example; once fitted, by the parameters of the fit."""
        return self._objective_by(self._tracked)

    def _objective_by(self, names: tuple[str, ...] | None) -> Objective:
        """By parameters of these names; None: by those that require grad now."""
        objective = xy_objective(self.model, self.loss, names)
        return replace(objective, checkpoints=self.checkpoints).with_seen(self._seen)

    @property
    def layout(self) -> Layout:
        """Where each parameter's columns lie in the factors."""
        return self.method.layout(self.objective)

    @override
    def as_of_now(self) -> Hashable:
        """By the model's tensors too: whoever trains on changes them in place."""
        return self.revision, versions_of(self.model)

    @property
    def n_parameters(self) -> int:
        """P: number of tracked parameters that the method treats."""
        return self.layout.width

    @property
    def is_thread_safe(self) -> bool:
        """False: hooks on a module belong to one thread at a time."""
        return False

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` has run."""
        return self._state is not None

    @property
    def model_device(self) -> torch.device:
        """Where the model's parameters are, and where batches are moved."""
        return next(self.model.parameters()).device

    @property
    def model_dtype(self) -> torch.dtype:
        """Dtype of the model's parameters."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Another name of `model_device`, as in pyDVL."""
        return self.model_device

    @property
    def dtype(self) -> torch.dtype:
        """Another name of `model_dtype`, as in pyDVL."""
        return self.model_dtype

    @property
    def model_params(self) -> dict[str, Tensor]:
        """Tracked parameters by name, detached."""
        return self.objective.parameters()

    @property
    def factor_dtype(self) -> np.dtype[Any]:
        """The tracked parameters' dtype; float32 for half precision."""
        return factor_dtype_of(self.objective.dtype)

    @own_modes()
    def fit(self, data: Iterable[Any]) -> Self:
        """Fits the method to training data: a DataLoader (shuffled or not) or any iterable of (x, y).

        First compares the batched gradients of a few examples with autograd's, so that a layer the
        capture does not see, dropout or batch statistics fail here and not in the numbers. What the next
        pass over the data needs of a batch is kept in up to a quarter of the device's free memory.

        Raises:
            OneShotIterableError: data that can be read once, for a method that reads it more often.
            ValueError: a model or a batch that cannot be differentiated example by example.
        """
        passes = len(self.method.passes()) + (2 if self.method.needs_data else 0)
        training = IterableTrainingData(data, self.model_device, passes)
        self._look_at(training.first())
        batches = JoinedBatches(self.objective, training)
        kept = KeptBatches(batches) if len(self.method.passes()) > 1 else batches
        spare = available_bytes(self.model_device) // KEPT_SHARE
        state = fit(self.method, self.objective, kept, kept_bytes=spare)
        self._take(state, training if self.method.needs_data else None)
        return self

    def _look_at(self, first: tuple[Any, Any]) -> None:
        objective = self._objective_by(None)
        seen = self.method.looked_at(probe(objective, first), lambda: first)
        self.method.try_on(seen, first)
        self._tracked, self._seen = objective.names, seen.seen

    def _take(self, state: FitState, data: IterableTrainingData | None) -> None:
        self._state, self._data = state, data
        self._refresh()
        self._tell_notes()

    @own_modes()
    def begin_fit(self, x: Tensor, y: Tensor) -> tuple[FitPass, ...]:
        """As `fit` begins, with the first training examples, for a fit whose passes others run.

        Raises:
            ValueError: a method that reads the training data whenever it solves, or a model or a batch that
                cannot be differentiated example by example.
        """
        if self.method.needs_data:
            raise ValueError(
                f"{type(self).__name__} reads its training data whenever it solves, so that no worker is "
                f"given a part of it; fit it with all of it, model.fit(loader)"
            )
        self._look_at(self._batch(x, y))
        return self.method.passes()

    def fit_units(self, step: FitPass) -> tuple[str, ...]:
        """What a pass sums and finishes independently, in a fixed order."""
        return step.units(self.objective)

    @own_modes()
    def fit_sums(self, step: FitPass, state: FitState, start: int, x: Tensor, y: Tensor) -> Sums:
        """A pass's sums over consecutive training examples, the first of which has the index `start`."""
        objective, batch = self.objective, self._batch(x, y)
        pieces = micro_batches(IndexedBatch(start, batch), self._micro_batch(batch))
        return step.accumulate(objective, pieces, self._on_device(state))

    @own_modes()
    def fitted_unit(
        self, step: FitPass, unit: str, sums: Mapping[str, Tensor], length: int, state: FitState
    ) -> dict[str, Tensor]:
        """What a pass leaves of one unit, from its sums over all `length` examples."""
        return step.finish(unit, self._on_device(sums), length, self._on_device(state))

    def end_fit(self, state: FitState) -> None:
        """Takes what the passes left: the model is fitted."""
        self._take(self._on_device(state), None)

    def to(self, device: torch.device | str) -> Self:
        """Moves the model and its fit to a device, and returns this influence model."""
        self.model.to(device)
        if self.checkpoints is not None:
            self.checkpoints.to(device)
        if self._data is not None:
            self._data.device = self.model_device
        if self._state is not None:
            self._state = self._on_device(self._state)
            self._refresh()
        return self

    @own_modes()
    def solve(self, x: Tensor, y: Tensor) -> Solved:
        """Factors of each example by block (`left`), and how each right-hand side ended.

        `report.status[i]` is a `SolverStatus`; iterations and the relative residual stand beside it.

        Raises:
            NotFittedException: `fit` has not run.
        """
        solved = self._solved(x, y)
        return replace(solved, left=self._require_fitted().factors(solved.left))

    def _solved(self, x: Tensor, y: Tensor) -> Solved:
        """The left representation, in the coordinates that the method solves in."""
        return self._noted(self._require_fitted().solve(self._gradients(x, y)))

    def _gradients(self, x: Tensor, y: Tensor) -> Left:
        """Of each example by block, in the coordinates that the method solves in."""
        fitted, batch = self._require_fitted(), self._batch(x, y)
        if batch_size(batch) > 0:
            return fitted.gradients(self.objective, batch)
        # Not every model answers for no example.
        dtype = accumulation_dtype(self.objective.dtype)
        widths = fitted.layout.factor_widths
        return {b: torch.zeros(0, width, dtype=dtype, device=self.device) for b, width in widths.items()}

    def _influence_factors(self, x: Tensor, y: Tensor) -> Tensor:
        return self._require_fitted().layout.flatten(self.solve(x, y).left)

    @own_modes()
    def left(self, x: Tensor, y: Tensor) -> Tensor:
        """The method's left representation of each example: `[t, P]`, or `[t, K]` in a narrower form.

        Raises:
            NotFittedException: `fit` has not run.
        """
        fitted = self._require_fitted()
        if isinstance(fitted, CompactFitted) and batch_size((x, y)) > 0:
            compact = fitted.compact(self.objective, self._batch(x, y))
            if compact is not None:
                self._noted(Solved({}, compact.report))
                return compact.rows
        return fitted.layout.flatten_left(fitted.scored(self._solved(x, y).left))

    @own_modes()
    def expanded(self, left: Tensor) -> Tensor:
        """What is scored of what `left` returned: `[t, P]`, or in the coordinates of the method.

        Raises:
            NotFittedException: `fit` has not run.
            ValueError: rows of another width.
        """
        fitted = self._require_fitted()
        if isinstance(fitted, CompactFitted) and left.dim() == 2 and fitted.is_compact(left.shape[1]):
            return fitted.expanded(left.to(self.model_device))
        return self._checked(left, left=True)

    @own_modes()
    def left_of_factors(self, z_test_factors: Tensor) -> Tensor:
        """The same from factors `[t, P]` that `influence_factors` returned.

        Raises:
            NotFittedException: `fit` has not run.
            ValueError: factors of another width.
        """
        fitted, factors = self._require_fitted(), self._checked(z_test_factors)
        left = factors.new_empty(0, fitted.layout.left_width)
        at_once = max(1, GRADIENT_BYTES // (factors.shape[1] * factors.element_size()))
        for start in range(0, len(factors), at_once):
            rows = slice(start, start + at_once)
            given = fitted.layout.split(factors[rows])
            turned = fitted.scored(fitted.left(given))
            if turned is given:
                return factors
            flat = fitted.layout.flatten_left(turned)
            left = left if start else factors.new_empty(len(factors), flat.shape[1])
            left[rows] = flat
        return left

    @own_modes()
    def influences_from_left(self, left: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Influences `[t, n]` of (x, y) from what `expanded` or `left_of_factors` of this model returned.

        Raises:
            NotFittedException: `fit` has not run.
            ValueError: rows of another width.
        """
        rows = self._require_fitted().layout.split_left(self._checked(left, left=True))
        return self._scores(rows, self._batch(x, y), InfluenceMode.Up)

    def _influences(
        self,
        x_test: Tensor,
        y_test: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> Tensor:
        if x is None and mode is InfluenceMode.Up:
            return self._on_each_other(x_test, y_test)
        return self._scores(*self._sides(x_test, y_test, x, y, mode), mode)

    @own_modes()
    def _on_each_other(self, x: Tensor, y: Tensor) -> Tensor:
        """`[t, t]`: each example is differentiated once, its gradient being the training side too."""
        fitted, gradients = self._require_fitted(), self._gradients(x, y)
        left = self._noted(fitted.solve(gradients)).left
        return torch.stack([left[block] @ gradients[block].T for block in fitted.layout.blocks]).sum(0)

    @own_modes()
    def self_influences(self, x: Tensor, y: Tensor) -> Tensor:
        """`z_i · g_i` of each example of (x, y), `[n]`; each is differentiated once.

        Raises:
            NotFittedException: `fit` has not run.
        """
        fitted, gradients = self._require_fitted(), self._gradients(x, y)
        return region.self_influences(self._noted(fitted.solve(gradients)).left, gradients)

    @own_modes()
    def influences_by_token(self, x_test: Tensor, y_test: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The part of each token of (x, y) in `influences`, `[t, n, S]`; over S they sum to it.

        A token's part is what the layers did at it, `Σ_layers g_sᵀ Z a_s` (see `maths.by_token`): not the
        influence of that token's own loss.

        Raises:
            NotFittedException: `fit` has not run.
            UnsupportedModelError: a tracked parameter of a layer that has no tokens; names it.
        """
        factors, batch = self.solve(x_test, y_test).left, self._batch(x, y)
        return influences_by_token(
            self._require_fitted(), self.objective, factors, batch, self._micro_batch(batch)
        )

    def influences_from_factors(
        self, z_test_factors: Tensor, x: Tensor, y: Tensor, mode: InfluenceMode = InfluenceMode.Up
    ) -> Tensor:
        """Influences of (x, y) from factors `[t, P]`: Up `[t, n]`, Perturbation `[t, n, F...]`.

        Raises:
            NotFittedException: `fit` has not run.
            ValueError: factors of another width; integer x in mode perturbation.
        """
        mode = as_mode(mode)
        factors = self._require_fitted().layout.split(self._checked(z_test_factors))
        return self._scores(self._scored(factors, mode), self._batch(x, y), mode)

    def _checked(self, z_test_factors: Tensor, *, left: bool = False) -> Tensor:
        """Factors, or a left representation, on the model's device, if they are of the width expected."""
        layout = self._require_fitted().layout
        require_factor_width(z_test_factors, layout.left_width if left else layout.width)
        return z_test_factors.detach().to(self.model_device)

    @own_modes()
    def _scores(self, rows: Left, batch: tuple[Tensor, Tensor], mode: InfluenceMode) -> Tensor:
        """Influences of `rows`: a left representation as it is scored in mode Up, factors in mode
        Perturbation.
        """
        fitted = self._require_fitted()
        if mode is InfluenceMode.Up:
            return region.influences(fitted, rows, batch, self._scored_at_once(batch))
        return perturbations(fitted, self.objective, rows, batch, self._micro_batch(batch))

    @own_modes()
    def _scored(self, factors: Left, mode: InfluenceMode) -> Left:
        """What `_scores` takes in place of factors."""
        fitted = self._require_fitted()
        return fitted.scored(fitted.left(factors)) if mode is InfluenceMode.Up else factors

    @own_modes()
    def _sides(
        self, x_test: Tensor, y_test: Tensor, x: Tensor | None, y: Tensor | None, mode: InfluenceMode
    ) -> tuple[Left, tuple[Tensor, Tensor]]:
        """What `_scores` takes: of the test examples, and the training batch (the test examples without)."""
        if mode is InfluenceMode.Up:
            rows = self._require_fitted().scored(self._solved(x_test, y_test).left)
        else:
            rows = self.solve(x_test, y_test).left
        return rows, self._batch(x_test, y_test) if x is None or y is None else self._batch(x, y)

    def _batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """The examples on the model's device; x is whatever pytree `model(x)` takes."""
        refuse_training_mode(self.model)
        moved: tuple[Any, Any] = on_device((x, y), self.model_device)
        return moved

    def _on_device(self, tensors: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf.to(self.model_device), tensors)

    def _scored_at_once(self, batch: tuple[Tensor, Tensor]) -> int:
        """`_micro_batch` for scores, which a method may form in pieces."""
        n, usual = batch_size(batch), self._micro_batch(batch)
        if usual >= n or not self._require_fitted().forms_pieces:
            return usual
        shapes = measure(self.objective, batch)

        def captured(examples: int) -> int:
            return self.method.footprint(shapes, examples, 1).capture

        each = max(1, captured(2) - captured(1))
        return _alike(n, max(usual, min(PIECED_EXAMPLES, CAPTURED_BYTES // each)))

    def _micro_batch(self, batch: tuple[Tensor, Tensor]) -> int:
        """Examples differentiated at once, so that one parameter's gradients stay below a limit."""
        example = self.model_dtype.itemsize * max(
            value.numel() for value in self.objective.parameters().values()
        )
        most = GRADIENT_BYTES // example
        if self.model_device.type == "cpu":
            most = min(most, max(LEAST_EXAMPLES, CACHED_GRADIENT_BYTES // example))
        return _alike(batch_size(batch), most)

    def _noted(self, solved: Solved) -> Solved:
        self.solver_report = solved.report
        warn_of_report(solved.report, only_not_finite=not self.warn_on_max_iteration)
        return solved

    def _refresh(self) -> None:
        """Builds what solves and scores from the fit's state; the numbers may have changed."""
        self._fitted = None
        if self._state is not None:
            self._require_fitted()
        self.revision += 1

    def _tell_notes(self) -> None:
        """Warns of what the fit cannot promise."""
        for note in self._fitted.notes if self._fitted is not None else ():
            warn_user(note, SolverWarning)

    def _require_fitted(self) -> Fitted:
        if self._state is None:
            raise NotFittedException(type(self))
        if self._fitted is None:
            self._fitted = self.method.fitted(self.objective, self._state, self._data)
        return self._fitted

    def at_rest(self) -> Callable[[], Self]:
        """Makes copies of this model as it is now, which share its tensors, also while it differentiates:
        its modules hold other parameters meanwhile.
        """
        kind, state = type(self), by_reference(self.__getstate__())
        return lambda: with_state(kind, state())

    def __getstate__(self) -> dict[str, Any]:
        # A worker builds solvers and their caches itself, from the fit's state.
        return {**self.__dict__, "_fitted": None}

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # Below 5, of which copies are made too, memory cannot stay beside the pickle.
        if operator.index(protocol) < 5:
            return super().__reduce_ex__(protocol)
        return _restored, (type(self), *packed(self.__getstate__()))


def _restored(
    kind: type[TorchInfluenceFunctionModel], pickled: bytes, buffers: Sequence[Any]
) -> TorchInfluenceFunctionModel:
    return with_state(kind, unpacked(pickled, buffers))


def regularization_of(value: GivenRegularization) -> Regularization:
    """PyDVL's regularization (None means 0, also per block) as the maths'."""
    if value is None:
        return 0.0
    if isinstance(value, Mapping):
        return {block: 0.0 if λ is None else λ for block, λ in value.items()}
    return value


def _alike(n: int, most: int) -> int:
    """How long pieces of n examples are that hold at most so many and are alike."""
    n, most = max(1, n), max(1, most)
    return math.ceil(n / math.ceil(n / most))
