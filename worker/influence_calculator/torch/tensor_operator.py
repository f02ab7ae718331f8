"""Linear operators on torch tensors, and the bilinear forms that they stand for.

`apply` takes a vector `[P]` or rows `[q, P]`. An operator of your own derives from `TensorOperator` and says
what it does to one vector.

Shapes: q rows, t and n examples, P input size, r directions of a low-rank operator, F... feature dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.conjugate_gradients import Rows
from influence_calculator.maths.layout import Layout, columns_of, rows_of, tensors_of
from influence_calculator.maths.method import SolverReport
from influence_calculator.maths.own_modes import own_modes
from influence_calculator.torch.gradient_provider import TorchBatch, TorchGradientProvider
from influence_calculator.types import BilinearForm, Operator

if TYPE_CHECKING:
    from influence_calculator.torch.operator import LowRankOperator


class OperatorBilinearForm(BilinearForm[Tensor, TorchBatch, TorchGradientProvider]):
    """`⟨Op(left), right⟩`; the operator is applied to the left side, whichever is shorter.

    Args:
        operator: need not be symmetric.
    """

    def __init__(self, operator: TensorOperator) -> None:
        self.operator = operator

    @override
    def inner_prod(self, left: Tensor, right: Tensor | None) -> Tensor:
        """`[t, P]` with `[n, F..., P]`: `[t, n, F...]`; without `right`, of `left` with itself."""
        transformed = self.operator.apply(left)
        right = (left if right is None else right).to(transformed)
        return torch.tensordot(transformed, right, dims=([-1], [-1]))

    @override
    def mixed_grads_inner_prod(
        self, left: TorchBatch, right: TorchBatch | None, gradient_provider: TorchGradientProvider
    ) -> Tensor:
        """`∇x ⟨Op(g_i), g_j(x)⟩`, `[t, n, F...]`, by the right examples' inputs; forms no mixed gradients."""
        transformed = self.operator.apply(gradient_provider.flat_grads(left))
        return gradient_provider.mixed_grads_prod(left if right is None else right, transformed)


class DictBilinearForm(OperatorBilinearForm):
    """The same by way of `apply_to_dict`, for operators that take gradients by parameter."""

    operator: TensorDictOperator

    def __init__(self, operator: TensorDictOperator) -> None:
        super().__init__(operator)

    @override
    def grads_inner_prod(
        self, left: TorchBatch, right: TorchBatch | None, gradient_provider: TorchGradientProvider
    ) -> Tensor:
        left_grads = gradient_provider.grads(left)
        right_grads = left_grads if right is None else gradient_provider.grads(right)
        transformed = self.operator.apply_to_dict(left_grads)
        parts = [rows_of(rows) @ rows_of(right_grads[name]).T for name, rows in transformed.items()]
        return torch.stack(parts).sum(0)

    @override
    def mixed_grads_inner_prod(
        self, left: TorchBatch, right: TorchBatch | None, gradient_provider: TorchGradientProvider
    ) -> Tensor:
        transformed = self.operator.apply_to_dict(gradient_provider.grads(left))
        rows = torch.cat([rows_of(values) for values in transformed.values()], dim=1)
        return gradient_provider.mixed_grads_prod(left if right is None else right, rows)


class LowRankBilinearForm(OperatorBilinearForm):
    """`⟨Vᵀg_i, (D + λ)^-1 Vᵀg_j⟩` where the part outside of V does not count: no gradient is held whole."""

    operator: LowRankOperator

    def __init__(self, operator: LowRankOperator) -> None:
        super().__init__(operator)

    @override
    def grads_inner_prod(
        self, left: TorchBatch, right: TorchBatch | None, gradient_provider: TorchGradientProvider
    ) -> Tensor:
        if self.operator.exact:
            return super().grads_inner_prod(left, right, gradient_provider)
        vectors = self.operator.low_rank_representation.projections.T
        left_coordinates = gradient_provider.jacobian_prod(left, vectors)
        right_coordinates = (
            left_coordinates if right is None else gradient_provider.jacobian_prod(right, vectors)
        )
        return self.operator.solve_coordinates(left_coordinates.T) @ right_coordinates


OperatorBilinearFormType = TypeVar("OperatorBilinearFormType", bound=OperatorBilinearForm)


class TensorOperator(Operator[Tensor, OperatorBilinearForm], ABC):
    """A linear operator on torch tensors."""

    solver_report: SolverReport | None = None
    """How the last `apply` ended for each row; None: the operator does not solve."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the operator is, and where tensors are moved."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of what the operator is made of."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Moves the operator to a device, and returns it."""

    @abstractmethod
    def _apply_to_vec(self, vec: Tensor) -> Tensor:
        """The operator of one vector `[P]`."""

    def _apply_to_mat(self, mat: Tensor) -> Tensor:
        """The operator of every row of `[q, P]`; one after another, unless an operator knows better."""
        return torch.stack([self._apply_to_vec(row) for row in mat]) if len(mat) else mat

    def products(self) -> Rows:
        """What multiplies rows `[q, P]` again and again while nothing changes, for solvers.

        The answers are the caller's to overwrite.
        """
        return lambda rows: self.apply(rows).clone()

    @override
    def _validate_tensor_input(self, tensor: Tensor) -> None:
        if tensor.ndim not in (1, 2) or tensor.shape[-1] != self.input_size:
            raise ValueError(
                f"tensor: expected a vector [{self.input_size}] or rows [q, {self.input_size}], got "
                f"{list(tensor.shape)}; the last dimension has one entry per parameter"
            )

    @override
    @own_modes()
    def _apply(self, tensor: Tensor) -> Tensor:
        here = tensor.detach().to(self.device)
        applied = self._apply_to_vec(here) if here.ndim == 1 else self._apply_to_mat(here)
        return applied.detach()

    @override
    def as_bilinear_form(self) -> OperatorBilinearForm:
        """`⟨Op(left), right⟩`."""
        return OperatorBilinearForm(self)


class RowsOperator(TensorOperator, ABC):
    """An operator that treats all rows at once; a vector is one row."""

    @abstractmethod
    def _rows(self, rows: Tensor) -> Tensor:
        """The operator of every row of `[q, P]`."""

    @override
    def _apply_to_vec(self, vec: Tensor) -> Tensor:
        return self._rows(vec[None])[0]

    @override
    def _apply_to_mat(self, mat: Tensor) -> Tensor:
        return self._rows(mat)


class TensorDictOperator(TensorOperator, ABC):
    """An operator that also takes vectors by parameter: name -> `[q, *shape]`, or `[*shape]` for one."""

    @property
    @abstractmethod
    def input_dict_structure(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape, in the order of the columns of a flat vector."""

    def apply_to_dict(self, mat: dict[str, Tensor]) -> dict[str, Tensor]:
        """The operator of vectors by parameter; shapes as given.

        Raises:
            ValueError: other parameters, or other shapes.
        """
        flat = FlatDict(self.input_dict_structure, mat)
        return flat.as_given(self.apply(flat.rows))

    @override
    def as_bilinear_form(self) -> DictBilinearForm:
        """`⟨Op(left), right⟩`, of gradients by parameter."""
        return DictBilinearForm(self)


class FlatDict:
    """Vectors by parameter as rows `[q, P]`.

    Raises:
        ValueError: other parameters than the structure's, or shapes that are not all with or without q.
    """

    def __init__(self, structure: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
        self._slots = Layout.of(structure, {"": tuple(structure)}).slots
        given = {name: tuple(value.shape) for name, value in tensors.items()}
        self._is_single = given == dict(structure)
        if not self._is_single and (
            given.keys() != structure.keys()
            or {shape[1:] == structure[name] for name, shape in given.items()} != {True}
            or len({shape[:1] for shape in given.values()}) != 1
        ):
            raise ValueError(
                f"tensors by parameter: expected the shapes {dict(structure)}, each with one more dimension "
                f"in front for several vectors, got {given}; give one tensor for every parameter"
            )
        batched = {name: value[None] if self._is_single else value for name, value in tensors.items()}
        self.rows = columns_of(batched, self._slots, next(iter(tensors.values())).dtype)

    def as_given(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows by parameter, with the dimension q where it was given."""
        tensors = tensors_of(rows, self._slots, rows.dtype)
        return {name: value[0] for name, value in tensors.items()} if self._is_single else tensors


TorchOperatorType = TypeVar("TorchOperatorType", bound=TensorOperator)
