"""Second-order matrices of the training data as operators.

A matrix is the mean over all training examples, by the maths that the influence models use too: neither the
loader's batches nor the number of rows that it is applied to matter. An operator differentiates at the values
that the model has when it is applied.

Shapes: q rows, N training examples, P parameters restricted to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from influence_calculator.maths.blocks import require_positive
from influence_calculator.maths.conjugate_gradients import Rows
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.inverse_harmonic_mean import InverseHarmonicMean
from influence_calculator.maths.training_batches import KeptBatches, TrainingBatches
from influence_calculator.maths.training_products import training_product
from influence_calculator.torch.restricted_model import RestrictedModel, RestrictTo
from influence_calculator.torch.tensor_operator import RowsOperator, TensorDictOperator
from influence_calculator.torch.training_data import IterableTrainingData
from influence_calculator.torch.util import LossType


class _DataOperator(RowsOperator, TensorDictOperator, ABC):
    """A matrix `[P, P]` of a model's training data.

    Args:
        model: in eval mode.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        dataloader: the training data, as anything that iterates over (x, y) again and again; a shuffled
            loader keeps its first order. Up to 192 MiB of it are kept.
        restrict_to: parameters by name, in the order of the columns; None: all that require grad. The names
            count: the model's own values are used.

    Raises:
        OneShotIterableError: data that can be read once.
        ValueError: a model or a batch that cannot be differentiated example by example.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossType,
        dataloader: Iterable[Any],
        restrict_to: RestrictTo | None = None,
    ) -> None:
        self._restricted = RestrictedModel(model, loss, restrict_to)
        self.dataloader = dataloader
        self._data = self._read_again()

    def _read_again(self) -> KeptBatches:
        data = IterableTrainingData(self.dataloader, self.device, passes=2)
        self._restricted.batch(*data.first())
        return KeptBatches(data)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._restricted.model

    @property
    @override
    def input_dict_structure(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape, in the order of the columns."""
        return self._restricted.structure

    @property
    @override
    def input_size(self) -> int:
        """P."""
        return self._restricted.layout.width

    @property
    @override
    def device(self) -> torch.device:
        """Where the parameters are, and where batches and vectors are moved."""
        return self._restricted.device

    @property
    @override
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self._restricted.dtype

    @override
    def to(self, device: torch.device | str) -> Self:
        """Moves the model to a device, and returns this operator."""
        self._restricted.to(device)
        self._data = self._read_again()
        return self

    @override
    def products(self) -> Rows:
        """What it keeps of the training data, graphs or gradients, lives as long as this."""
        product = self._product()
        return lambda rows: product(self._restricted.rows(rows))

    @abstractmethod
    def _product(self) -> Rows:
        """The operator of rows that are where the parameters are."""

    @override
    def _rows(self, rows: Tensor) -> Tensor:
        return self.products()(rows)


class _CurvatureOperator(_DataOperator):
    second_order: SecondOrderMode

    @override
    def _product(self) -> Rows:
        own = self._restricted
        batches = TrainingBatches(own.objective, self._data)
        return training_product(self.second_order, own.objective, own.layout, batches)


class HessianOperator(_CurvatureOperator):
    """`(1/N) Σ_i ∇²θ ℓ_i`, without λ. May be indefinite."""

    second_order = SecondOrderMode.HESSIAN


class GaussNewtonOperator(_CurvatureOperator):
    """`(1/N) Σ_i g_i g_iᵀ` at the labels given, without λ.

    The empirical Fisher matrix, under pyDVL's name.
    """

    second_order = SecondOrderMode.EMPIRICAL_FISHER


class InverseHarmonicMeanOperator(_DataOperator):
    """`(1/N) Σ_i (g_i g_iᵀ + λI)^-1`: DataInf's inverse, not the inverse of a mean.

    Args:
        model: in eval mode.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        dataloader: the training data, as anything that iterates over (x, y) again and again.
        regularization: λ > 0; may be changed.
        restrict_to: parameters by name, in the order of the columns; None: all that require grad.

    Raises:
        ValueError: a λ that is not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossType,
        dataloader: Iterable[Any],
        regularization: float,
        restrict_to: RestrictTo | None = None,
    ) -> None:
        self.regularization = regularization
        super().__init__(model, loss, dataloader, restrict_to)

    @property
    def regularization(self) -> float:
        """λ."""
        return self._regularization

    @regularization.setter
    def regularization(self, value: float) -> None:
        require_positive(value, "the inverse of one example's g gᵀ exists with λ only")
        self._regularization = value

    @override
    def _product(self) -> Rows:
        method = InverseHarmonicMean(self.regularization)
        fitted = method.fitted(self._restricted.objective, {}, self._data)

        def product(rows: Tensor) -> Tensor:
            solved = fitted.solve({"": rows})
            self.solver_report = solved.report
            return solved.left[""]

        return product
