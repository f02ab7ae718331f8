"""Products with a matrix that one batch of examples defines, and their averages over batches.

A matrix here is the mean over the batch's examples. Over several batches `PointAveraging` therefore weighs
each by its number of examples: only then the batches do not matter.

Shapes: n examples of a batch, q rows, P parameters restricted to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from influence_calculator.maths.blocks import require_positive
from influence_calculator.maths.curvature import SecondOrderMode, products
from influence_calculator.maths.gradients import collected
from influence_calculator.maths.inverse_harmonic_mean import add_rank_one_parts, mean_of_inverses
from influence_calculator.maths.objective import Batch
from influence_calculator.torch.gradient_provider import TorchBatch
from influence_calculator.torch.restricted_model import RestrictedBlock, RestrictedModel, RestrictTo
from influence_calculator.torch.tensor_operator import FlatDict
from influence_calculator.torch.util import LossType


class BatchOperation(RestrictedBlock, ABC):
    """`M(batch) v` for a matrix M that is a mean over the examples of a batch.

    Args:
        model: in eval mode.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        restrict_to: parameters by name, in the order of the columns; None: all that require grad. The names
            count: the model's own values are used.
    """

    may_be_indefinite: bool = True
    """Whether the matrix may have negative eigenvalues."""

    def __init__(self, model: nn.Module, loss: LossType, restrict_to: RestrictTo | None = None) -> None:
        self._restricted = RestrictedModel(model, loss, restrict_to)

    @property
    def input_dict_structure(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape, in the order of the columns."""
        return self._restricted.structure

    @property
    def input_size(self) -> int:
        """P."""
        return self._restricted.layout.width

    def apply(self, batch: TorchBatch, tensor: Tensor) -> Tensor:
        """`M v` of a vector `[P]`, or of every row of `[q, P]`; the same shape.

        Raises:
            ValueError: another shape, or an empty batch.
        """
        if tensor.ndim not in (1, 2) or tensor.shape[-1] != self.input_size:
            raise ValueError(
                f"tensor: expected a vector [{self.input_size}] or rows [q, {self.input_size}], got "
                f"{list(tensor.shape)}; the last dimension has one entry per parameter"
            )
        if len(batch) == 0:
            raise ValueError("batch: expected at least one example, got none; leave empty batches out")
        rows = self._restricted.rows(tensor if tensor.ndim == 2 else tensor[None])
        applied = self._apply_to_mat(TorchBatch(*self._restricted.batch(*batch)), rows)
        return applied if tensor.ndim == 2 else applied[0]

    def apply_to_dict(self, batch: TorchBatch, mat_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """`M v` of vectors by parameter, name -> `[q, *shape]`, or `[*shape]` for one; shapes as given.

        Raises:
            ValueError: other parameters, or other shapes.
        """
        flat = FlatDict(self.input_dict_structure, mat_dict)
        return flat.as_given(self.apply(batch, flat.rows))

    @abstractmethod
    def _apply_to_mat(self, batch: TorchBatch, mat: Tensor) -> Tensor:
        """`M v` of every row of `[q, P]`, all on the model's device."""


class _CurvatureBatchOperation(BatchOperation):
    second_order: SecondOrderMode

    @override
    def _apply_to_mat(self, batch: TorchBatch, mat: Tensor) -> Tensor:
        own = self._restricted
        pair: Batch = (batch.x, batch.y)
        summed = products(self.second_order, own.objective, own.layout, pair, {"": mat})
        return summed[""].div_(len(batch))


class HessianBatchOperation(_CurvatureBatchOperation):
    """`(1/n) Σ_i ∇²θ ℓ_i v` over the examples of a batch."""

    second_order = SecondOrderMode.HESSIAN


class GaussNewtonBatchOperation(_CurvatureBatchOperation):
    """`(1/n) Σ_i g_i g_iᵀ v` over the examples of a batch, at the labels given.

    The empirical Fisher matrix, under pyDVL's name.
    """

    second_order = SecondOrderMode.EMPIRICAL_FISHER
    may_be_indefinite = False


class InverseHarmonicMeanBatchOperation(BatchOperation):
    """`(1/n) Σ_i (g_i g_iᵀ + λI)^-1 v` over the examples of a batch, by the Sherman-Morrison formula.

    Args:
        model: in eval mode.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        regularization: λ > 0; may be changed.
        restrict_to: parameters by name, in the order of the columns; None: all that require grad.

    Raises:
        ValueError: a λ that is not above 0.
    """

    may_be_indefinite = False

    def __init__(
        self,
        model: nn.Module,
        loss: LossType,
        regularization: float,
        restrict_to: RestrictTo | None = None,
    ) -> None:
        super().__init__(model, loss, restrict_to)
        self.regularization = regularization

    @property
    def regularization(self) -> float:
        """λ."""
        return self._regularization

    @regularization.setter
    def regularization(self, value: float) -> None:
        require_positive(value, "the inverse of one example's g gᵀ exists with λ only")
        self._regularization = value

    @override
    def _apply_to_mat(self, batch: TorchBatch, mat: Tensor) -> Tensor:
        own = self._restricted
        gradients = collected(own.objective, (batch.x, batch.y), own.layout)[""]
        total = torch.zeros_like(mat)
        add_rank_one_parts(total, mat, gradients, self.regularization)
        mean_of_inverses(total, mat, len(batch), self.regularization)
        return total


BatchOperationType = TypeVar("BatchOperationType", bound=BatchOperation)


Weighted = Iterable[tuple[float, Tensor]]
"""Tensors, each with its weight, not normalised."""


class TensorAveraging(ABC):
    """The average of tensors of one shape, each the result of a batch."""

    @abstractmethod
    def weights(self, tensors: Iterable[Tensor], points: Iterable[int] | None) -> Weighted:
        """Every tensor with its weight."""

    def __call__(self, tensors: Iterable[Tensor], points: Iterable[int] | None = None) -> Tensor:
        """`Σ w_b t_b / Σ w_b`; `points` are the numbers of examples of the batches.

        Raises:
            ValueError: no tensor.
        """
        total: Tensor | None = None
        whole = 0.0
        for weight, tensor in self.weights(tensors, points):
            total = tensor * weight if total is None else total.add_(tensor, alpha=weight)
            whole += weight
        if total is None:
            raise ValueError("tensors: expected at least one, got none; the training data is empty")
        return total.div_(whole)

    def as_dict_averaging(self) -> DictAveraging:
        """The same average of tensors by name."""
        return DictAveraging(self)


class DictAveraging:
    """The average of dictionaries of tensors, name by name."""

    def __init__(self, averaging: TensorAveraging) -> None:
        self._averaging = averaging

    def __call__(
        self, tensor_dicts: Iterable[dict[str, Tensor]], points: Iterable[int] | None = None
    ) -> dict[str, Tensor]:
        """`Σ w_b t_b / Σ w_b` of every name.

        Raises:
            ValueError: no dictionary.
        """
        dicts, counts = list(tensor_dicts), None if points is None else list(points)
        if not dicts:
            raise ValueError("tensor_dicts: expected at least one, got none; the training data is empty")
        return {name: self._averaging([tensors[name] for tensors in dicts], counts) for name in dicts[0]}


class ChunkAveraging(TensorAveraging):
    """Every tensor counts the same, whatever its batch's length: right for batches of one length only."""

    @override
    def weights(self, tensors: Iterable[Tensor], points: Iterable[int] | None) -> Weighted:
        return ((1.0, tensor) for tensor in tensors)


class PointAveraging(TensorAveraging):
    """Every example counts the same: a tensor weighs what its batch has examples, which `points` says."""

    @override
    def weights(self, tensors: Iterable[Tensor], points: Iterable[int] | None) -> Weighted:
        if points is None:
            raise ValueError(
                "points: expected the number of examples of every batch, got None: results of batches do not "
                "tell it; give it, or average with ChunkAveraging"
            )
        return ((float(count), tensor) for tensor, count in zip(tensors, points, strict=True))
