"""What the calculators ask of a model of influence, whatever framework computes it.

The calculators know this contract and nothing else; `influence_calculator.torch` implements it. A
framework or method of your own is a subclass of `InfluenceFunctionModel`.

Shapes: t test examples, n training examples, P parameters, F... feature dimensions of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from functools import wraps
from typing import Any, Generic, Self

import numpy as np

from influence_calculator.errors import NotFittedException, NotImplementedLayerRepresentationException
from influence_calculator.maths.method import FitPass, FitState, SolverReport, Sums
from influence_calculator.types import DataLoaderType, InfluenceMode, TensorType, as_mode

__all__ = [
    "ComposableInfluence",
    "FitsInParts",
    "InfluenceFunctionModel",
    "NotFittedException",
    "NotImplementedLayerRepresentationException",
]


class InfluenceFunctionModel(Generic[TensorType, DataLoaderType], ABC):
    """Influence of training examples on test examples, chunk by chunk."""

    solver_report: SolverReport | None = None
    """How the solves of the last call of `influence_factors` ended; None: the model does not iterate."""

    revision: int = 0
    """Raised by whatever changes the numbers (fit, regularization, device), so that a calculator sends
    a changed model to its workers again."""

    def as_of_now(self) -> Hashable:
        """Differs from what it was when the numbers may have changed since."""
        return self.revision

    @property
    @abstractmethod
    def n_parameters(self) -> int:
        """P: width of the influence factors."""

    @property
    @abstractmethod
    def is_thread_safe(self) -> bool:
        """Whether several threads may use one instance at once."""

    @property
    @abstractmethod
    def is_fitted(self) -> bool:
        """Whether `fit` has run."""

    @property
    def factor_dtype(self) -> np.dtype[Any]:
        """Dtype of factors and influences as numpy arrays.

        float64 unless a subclass says otherwise: the one dtype that truncates no framework's numbers.
        """
        return np.dtype(np.float64)

    def at_rest(self) -> Callable[[], Self]:
        """Makes copies of this model as it is now: a worker sends one on while a thread of its own computes.

        The model itself, unless a subclass says otherwise: right for one that computing does not change.
        """
        return lambda: self

    @abstractmethod
    def fit(self, data: DataLoaderType) -> InfluenceFunctionModel[TensorType, DataLoaderType]:
        """Estimates the curvature H from the training data and returns the model."""

    @staticmethod
    def fit_required(method: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates a method that needs a fitted model.

        Raises:
            NotFittedException: when the method is called before `fit`.
        """

        @wraps(method)
        def checked(self: InfluenceFunctionModel[Any, Any], *args: Any, **kwargs: Any) -> Any:
            if not self.is_fitted:
                raise NotFittedException(type(self))
            return method(self, *args, **kwargs)

        return checked

    def influence_factors(self, x: TensorType, y: TensorType) -> TensorType:
        """Factors `z = (H + λI)^-1 g` of each example of (x, y), `[t, P]`.

        Raises:
            NotFittedException: `fit` has not run.
        """
        if not self.is_fitted:
            raise NotFittedException(type(self))
        return self._influence_factors(x, y)

    @abstractmethod
    def _influence_factors(self, x: TensorType, y: TensorType) -> TensorType:
        """The model's own `influence_factors`."""

    def influences(
        self,
        x_test: TensorType,
        y_test: TensorType,
        x: TensorType | None = None,
        y: TensorType | None = None,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> TensorType:
        """Influences of the training examples (x, y) on the test examples; without x and y, of the test
        examples on each other.

        Up: `z_test · g_train`, `[t, n]`; positive: the training example helps, removing it raises the
        test loss by about score / N. Perturbation: `∇x (z_test · g_train(x))`, `[t, n, F...]`. Neither
        is negated or divided by N.

        Raises:
            NotFittedException: `fit` has not run.
            UnsupportedInfluenceModeException: an unknown mode.
            ValueError: one of x and y without the other.
        """
        if not self.is_fitted:
            raise NotFittedException(type(self))
        require_both_or_none(x, y)
        return self._influences(x_test, y_test, x, y, as_mode(mode))

    @abstractmethod
    def _influences(
        self,
        x_test: TensorType,
        y_test: TensorType,
        x: TensorType | None = None,
        y: TensorType | None = None,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> TensorType:
        """The model's own `influences`."""

    def self_influences(self, x: TensorType, y: TensorType) -> TensorType:
        """Each example's influence on itself, `z_i · g_i`, `[n]`.

        Large where the model would answer an example much worse without it: outliers and wrong labels among
        training examples. Here the diagonal of `influences`; a model of yours may do without the rest of it.

        Raises:
            NotFittedException: `fit` has not run.
        """
        diagonal: TensorType = self.influences(x, y).diagonal()  # type: ignore[attr-defined]
        return diagonal

    def left(self, x: TensorType, y: TensorType) -> TensorType:
        """One row per example of (x, y), of which `expanded` makes what `influences_from_left` scores.

        The influence factors, unless a model has coordinates of its own in which scoring costs less, or
        rows that are narrower to send.

        Raises:
            NotFittedException: `fit` has not run.
        """
        return self.influence_factors(x, y)

    def expanded(self, left: TensorType) -> TensorType:
        """What `influences_from_left` scores, `[t, P]`, from rows of `left`; the rows themselves unless
        those are narrower.
        """
        return left

    def left_of_factors(self, z_test_factors: TensorType) -> TensorType:
        """The same from influence factors `[t, P]`; the factors themselves without coordinates of its own."""
        return z_test_factors

    def influences_from_left(self, left: TensorType, x: TensorType, y: TensorType) -> TensorType:
        """Influences `[t, n]` of (x, y) in mode Up, from what `expanded` or `left_of_factors` of this
        model returned.
        """
        return self.influences_from_factors(left, x, y)

    @abstractmethod
    def influences_from_factors(
        self,
        z_test_factors: TensorType,
        x: TensorType,
        y: TensorType,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> TensorType:
        """Influences of (x, y) from factors `[t, P]` that `influence_factors` returned; shapes, sign and
        scale as in `influences`.
        """


class ComposableInfluence(InfluenceFunctionModel[TensorType, DataLoaderType], ABC):
    """A model whose curvature is a block-diagonal matrix over disjoint sets of parameters.

    Influences are the sum over the blocks of the influences by block.
    """

    @abstractmethod
    def with_regularization(
        self, regularization: float | Mapping[str, float | None]
    ) -> ComposableInfluence[TensorType, DataLoaderType]:
        """Changes λ (one number, or one per block) without a new fit, and returns the model."""

    @abstractmethod
    def influence_factors_by_block(self, x: TensorType, y: TensorType) -> Mapping[str, TensorType]:
        """Block -> factors `[t, P_b]`."""

    @abstractmethod
    def influences_by_block(
        self,
        x_test: TensorType,
        y_test: TensorType,
        x: TensorType | None = None,
        y: TensorType | None = None,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> Mapping[str, TensorType]:
        """Block -> the part of `influences` that comes from this block's parameters."""

    @abstractmethod
    def influences_from_factors_by_block(
        self,
        z_test_factors: Mapping[str, TensorType],
        x: TensorType,
        y: TensorType,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> Mapping[str, TensorType]:
        """Block -> influences from this block's factors `[t, P_b]`."""


class FitsInParts(Generic[TensorType], ABC):
    """A model whose fit is a few passes over the training data, each of which several processes may share.

    A pass is a sum over examples, taken range by range; what is made of it, unit by unit, is the state of
    the next. `DaskInfluenceCalculator.fit` runs it.
    """

    @abstractmethod
    def begin_fit(self, x: TensorType, y: TensorType) -> tuple[FitPass, ...]:
        """The passes, after a look at some of the training examples.

        Raises:
            ValueError: a model that cannot be differentiated, or that is not fitted in parts.
        """

    @abstractmethod
    def fit_units(self, step: FitPass) -> tuple[str, ...]:
        """What a pass sums and finishes independently, in a fixed order."""

    @abstractmethod
    def fit_sums(self, step: FitPass, state: FitState, start: int, x: TensorType, y: TensorType) -> Sums:
        """A pass's sums over consecutive training examples, the first of which has the index `start`."""

    @abstractmethod
    def fitted_unit(
        self, step: FitPass, unit: str, sums: Mapping[str, TensorType], length: int, state: FitState
    ) -> dict[str, TensorType]:
        """What a pass leaves of one unit, from its sums over all `length` examples."""

    @abstractmethod
    def end_fit(self, state: FitState) -> None:
        """Takes what the passes left: the model is fitted."""


def require_both_or_none(x: object, y: object) -> None:
    """Inputs and labels of the training side come together.

    Raises:
        ValueError: one without the other.
    """
    if (x is None) == (y is None):
        return
    given, missing = ("y", "x") if x is None else ("x", "y")
    raise ValueError(
        f"{missing}: expected it beside {given}, got None; pass both, or neither for the test examples' "
        f"influences on each other"
    )
