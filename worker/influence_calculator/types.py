"""The words that all modules of the public library share, and the pieces that models are composed of.

A custom model is a `BlockMapper`: per block of parameters an `Operator` (mostly an inverse curvature)
composed with a `GradientProvider`. Nothing here knows a framework; `influence_calculator.torch.base` has
the pieces for torch.

Shapes: t test examples, n training examples, q rows, P parameters of a block, F... feature dimensions of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar, cast

from influence_calculator.errors import UnsupportedInfluenceModeException

TensorType = TypeVar("TensorType")
"""A framework's tensor."""

DataLoaderType = TypeVar("DataLoaderType")
"""What a framework's models are fitted to."""


class InfluenceMode(StrEnum):
    """Which change of the training set the influence answers.

    Up: more weight on a training example, `z_test · g_train`, `[T, N]`. Positive means that the example
    helps: removing it raises the test loss by about score / N. Perturbation: a changed training input,
    `∇x (z_test · g_train(x))`, `[T, N, F...]`; moving x along it lowers the test loss.
    """

    Up = "up"
    Perturbation = "perturbation"


def as_mode(mode: InfluenceMode | str) -> InfluenceMode:
    """The mode of that value.

    Raises:
        UnsupportedInfluenceModeException: no such mode.
    """
    try:
        return InfluenceMode(mode)
    except ValueError as error:
        raise UnsupportedInfluenceModeException(mode) from error


@dataclass(frozen=True)
class Batch(Generic[TensorType]):
    """Examples that are treated at once; the first dimension of both counts them."""

    x: TensorType
    y: TensorType


BatchType = TypeVar("BatchType", bound=Batch[Any])


class GradientProvider(Generic[BatchType, TensorType], ABC):
    """Gradients `g(x) = ∇θ ℓ(x, y)` of one example each, by the parameters of one block."""

    @abstractmethod
    def jacobian_prod(self, batch: BatchType, g: TensorType) -> TensorType:
        """`g_k · g(x_i)` of every row of `g` `[q, P]` with every example of the batch, `[q, n]`."""

    @abstractmethod
    def flat_grads(self, batch: BatchType) -> TensorType:
        """`[n, P]`: the gradient of every example."""

    @abstractmethod
    def flat_mixed_grads(self, batch: BatchType) -> TensorType:
        """`[n, F..., P]`: the derivative of every example's gradient by its input."""

    def mixed_grads_prod(self, batch: BatchType, g: TensorType) -> TensorType:
        """`∇x (g_k · g(x_i))` of every row of `g` `[q, P]` with every example of the batch, `[q, n, F...]`.

        Here from `flat_mixed_grads`, n · F · P numbers; a provider that need not form these overrides it.
        """
        mixed, rows = cast(Any, self.flat_mixed_grads(batch)), cast(Any, g)
        flat = rows @ mixed.reshape(-1, mixed.shape[-1]).T
        return cast(TensorType, flat.reshape(rows.shape[0], *mixed.shape[:-1]))


GradientProviderType = TypeVar("GradientProviderType", bound=GradientProvider[Any, Any])


class BilinearForm(Generic[TensorType, BatchType, GradientProviderType], ABC):
    """A product of two gradients."""

    @abstractmethod
    def inner_prod(self, left: TensorType, right: TensorType | None) -> TensorType:
        """`⟨left_i, right_j⟩` over the last dimensions: `[t, P]` with `[n, F..., P]` is `[t, n, F...]`.

        Without `right`, of `left` with itself.
        """

    def grads_inner_prod(
        self, left: BatchType, right: BatchType | None, gradient_provider: GradientProviderType
    ) -> TensorType:
        """`⟨g_i, g_j⟩` of the examples of two batches, `[t, n]`; without `right`, of `left` with itself."""
        left_grads = gradient_provider.flat_grads(left)
        right_grads = left_grads if right is None else gradient_provider.flat_grads(right)
        return self.inner_prod(cast(TensorType, left_grads), cast(TensorType, right_grads))

    def mixed_grads_inner_prod(
        self, left: BatchType, right: BatchType | None, gradient_provider: GradientProviderType
    ) -> TensorType:
        """`⟨g_i, ∂g_j/∂x⟩` of the examples of two batches, `[t, n, F...]`."""
        left_grads = gradient_provider.flat_grads(left)
        mixed = gradient_provider.flat_mixed_grads(left if right is None else right)
        return self.inner_prod(cast(TensorType, left_grads), cast(TensorType, mixed))


BilinearFormType = TypeVar("BilinearFormType", bound=BilinearForm[Any, Any, Any])


class Operator(Generic[TensorType, BilinearFormType], ABC):
    """A linear map of vectors of parameter space."""

    @property
    @abstractmethod
    def input_size(self) -> int:
        """P: length of the vectors."""

    @abstractmethod
    def _validate_tensor_input(self, tensor: TensorType) -> None:
        """Refuses what is no vector `[P]` and no rows `[q, P]`.

        Raises:
            ValueError: another shape.
        """

    def apply(self, tensor: TensorType) -> TensorType:
        """The map of a vector `[P]`, or of every row of `[q, P]`; the same shape.

        Raises:
            ValueError: another shape.
        """
        self._validate_tensor_input(tensor)
        return self._apply(tensor)

    @abstractmethod
    def _apply(self, tensor: TensorType) -> TensorType:
        """`apply` of what was validated."""

    @abstractmethod
    def as_bilinear_form(self) -> BilinearFormType:
        """`⟨Op(left), right⟩`."""


OperatorType = TypeVar("OperatorType", bound=Operator[Any, Any])


class OperatorGradientComposition(Generic[TensorType, BatchType, OperatorType, GradientProviderType]):
    """One block: what is done to gradients, and where they come from.

    Args:
        op: mostly `(H + λI)^-1` of the block's curvature.
        gp: gradients by the block's parameters.
    """

    def __init__(self, op: OperatorType, gp: GradientProviderType) -> None:
        self.op = op
        self.gp = gp

    def interactions(
        self, left_batch: BatchType, right_batch: BatchType | None, mode: InfluenceMode
    ) -> TensorType:
        """The block's influences of the right batch on the left one, `[t, n]` or `[t, n, F...]`.

        Without a right batch, of the left one on itself.

        Raises:
            UnsupportedInfluenceModeException: an unknown mode.
        """
        form = self.op.as_bilinear_form()
        if as_mode(mode) is InfluenceMode.Up:
            return cast(TensorType, form.grads_inner_prod(left_batch, right_batch, self.gp))
        return cast(TensorType, form.mixed_grads_inner_prod(left_batch, right_batch, self.gp))

    def transformed_grads(self, batch: BatchType) -> TensorType:
        """The block's influence factors `Op(g)`, `[n, P]`."""
        return cast(TensorType, self.op.apply(self.gp.flat_grads(batch)))

    def interactions_from_transformed_grads(
        self, left_factors: TensorType, right_batch: BatchType, mode: InfluenceMode
    ) -> TensorType:
        """The block's influences from factors `[t, P]` that `transformed_grads` returned.

        Raises:
            UnsupportedInfluenceModeException: an unknown mode.
        """
        if as_mode(mode) is InfluenceMode.Up:
            return cast(TensorType, self.gp.jacobian_prod(right_batch, left_factors))
        return cast(TensorType, self.gp.mixed_grads_prod(right_batch, left_factors))


OperatorGradientCompositionType = TypeVar(
    "OperatorGradientCompositionType", bound=OperatorGradientComposition[Any, Any, Any, Any]
)


class BlockMapper(Generic[TensorType, BatchType, OperatorGradientCompositionType], ABC):
    """All blocks of a model.

    Args:
        composable_block_dict: block -> its operator and gradients, in order.
    """

    def __init__(self, composable_block_dict: OrderedDict[str, OperatorGradientCompositionType]) -> None:
        self.composable_block_dict = composable_block_dict

    def __getitem__(self, item: str) -> OperatorGradientCompositionType:
        return self.composable_block_dict[item]

    def items(self) -> ItemsView[str, OperatorGradientCompositionType]:
        """Block and its composition, in order."""
        return self.composable_block_dict.items()

    @abstractmethod
    def _split_to_blocks(self, z: TensorType, dim: int = -1) -> OrderedDict[str, TensorType]:
        """Columns of all blocks, one block after another in order, as a tensor per block."""

    def transformed_grads(self, batch: BatchType) -> OrderedDict[str, TensorType]:
        """Block -> influence factors `[n, P]`."""
        return self._by_block(self.generate_transformed_grads(batch))

    def interactions(
        self, left_batch: BatchType, right_batch: BatchType | None, mode: InfluenceMode
    ) -> OrderedDict[str, TensorType]:
        """Block -> its part of the influences of the right batch on the left one."""
        return self._by_block(self.generate_interactions(left_batch, right_batch, mode))

    def interactions_from_transformed_grads(
        self,
        left_factors: TensorType | OrderedDict[str, TensorType],
        right_batch: BatchType,
        mode: InfluenceMode,
    ) -> OrderedDict[str, TensorType]:
        """Block -> its part of the influences, from factors by block or of all blocks side by side."""
        parts = self.generate_interactions_from_transformed_grads(left_factors, right_batch, mode)
        return self._by_block(parts)

    def generate_transformed_grads(self, batch: BatchType) -> Iterator[TensorType]:
        """The factors block after block: one is held at a time."""
        for block in self.composable_block_dict.values():
            yield block.transformed_grads(batch)

    def generate_interactions(
        self, left_batch: BatchType, right_batch: BatchType | None, mode: InfluenceMode
    ) -> Iterator[TensorType]:
        """The influences block after block."""
        for block in self.composable_block_dict.values():
            yield block.interactions(left_batch, right_batch, mode)

    def generate_interactions_from_transformed_grads(
        self,
        left_factors: TensorType | OrderedDict[str, TensorType],
        right_batch: BatchType,
        mode: InfluenceMode,
    ) -> Iterator[TensorType]:
        """The influences block after block, from factors by block or of all blocks side by side."""
        factors = left_factors if isinstance(left_factors, Mapping) else self._split_to_blocks(left_factors)
        for name, block in self.composable_block_dict.items():
            yield block.interactions_from_transformed_grads(factors[name], right_batch, mode)

    def _by_block(self, tensors: Iterator[TensorType]) -> OrderedDict[str, TensorType]:
        return OrderedDict(zip(self.composable_block_dict, tensors, strict=True))


BlockMapperType = TypeVar("BlockMapperType", bound=BlockMapper[Any, Any, Any])

__all__ = [
    "Batch",
    "BatchType",
    "BilinearForm",
    "BilinearFormType",
    "BlockMapper",
    "BlockMapperType",
    "DataLoaderType",
    "GradientProvider",
    "GradientProviderType",
    "InfluenceMode",
    "Operator",
    "OperatorGradientComposition",
    "OperatorGradientCompositionType",
    "OperatorType",
    "TensorType",
    "UnsupportedInfluenceModeException",
    "as_mode",
]
