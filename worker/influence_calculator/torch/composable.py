"""A base for influence models that users compose: per block of parameters an operator and gradients.

Unlike the models that come with the library, which are configurations of the maths, such a model is told what
to do with a block in `_create_block`.

Shapes: t test examples, n training examples, P_b parameters of block b, F... feature dimensions of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from influence_calculator.base_influence_function_model import (
    ComposableInfluence,
    require_both_or_none,
)
from influence_calculator.errors import NotFittedException
from influence_calculator.maths.blocks import (
    BlockMode,
    Relative,
    check_coverage,
    checked_regularization,
    model_layout,
)
from influence_calculator.maths.gradient_methods import worst
from influence_calculator.maths.layout import Layout
from influence_calculator.torch.block_mapper import TorchBlockMapper, TorchOperatorGradientComposition
from influence_calculator.torch.buffers import by_reference, with_state
from influence_calculator.torch.data_operators import InverseHarmonicMeanOperator
from influence_calculator.torch.gradient_provider import TorchBatch, TorchGradientProvider
from influence_calculator.torch.inverse_operators import InverseOperator
from influence_calculator.torch.iterative_operators import CgOperator, LissaOperator
from influence_calculator.torch.tensor_operator import TensorDictOperator, TensorOperator
from influence_calculator.torch.training_data import drawn_once
from influence_calculator.torch.util import (
    factor_dtype_of,
    require_block_widths,
    require_factor_width,
    versions_of,
)
from influence_calculator.types import InfluenceMode, as_mode


class TorchComposableInfluence(ComposableInfluence[Tensor, Iterable[Any]], ABC):
    """Influence by blocks of parameters, each treated as `_create_block` says.

    A subclass gives `_create_block` and `is_thread_safe` (False for one that uses the library's gradient
    providers: they put hooks on the model's layers). Influences are the sum over the blocks.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        block_structure: which parameters are treated together.
        regularization: λ given to `_create_block`: one number, or one per block; None stays None.

    Raises:
        ValueError: a negative λ, `Relative`, a mapping that does not name every block and nothing else, or
            blocks that overlap, are empty or name what is not tracked.
    """

    def __init__(
        self,
        model: nn.Module,
        block_structure: BlockMode | Mapping[str, Sequence[str]] = BlockMode.FULL,
        regularization: float | Mapping[str, float | None] | None = None,
    ) -> None:
        self.model = model
        tracked = tuple(name for name, p in model.named_parameters() if p.requires_grad)
        self.layout: Layout = model_layout(model, tracked, block_structure)
        self.regularization = self._by_block(regularization)
        self.block_mapper: TorchBlockMapper | None = None

    @abstractmethod
    def _create_block(
        self, block_params: dict[str, Tensor], data: Iterable[Any], regularization: float | None
    ) -> TorchOperatorGradientComposition[Any]:
        """What is done to the gradients of one block, and where they come from.

        `block_params` are the block's parameters, detached, in the order of columns: pass them on as
        `restrict_to`. `data` is what `fit` was given; of a shuffled loader, one whose order stays.
        """

    @property
    def block_names(self) -> list[str]:
        """The blocks, in order; the full block structure has the one block `""`."""
        return list(self.layout.blocks)

    @property
    def parameter_dict(self) -> dict[str, dict[str, Tensor]]:
        """Block -> its parameters by name, detached."""
        own = dict(self.model.named_parameters())
        return {
            block: {slot.name: own[slot.name].detach() for slot in self.layout.slots_of(block)}
            for block in self.layout.blocks
        }

    @property
    def n_parameters(self) -> int:
        """P: number of parameters in blocks."""
        return self.layout.width

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` has run."""
        return self.block_mapper is not None

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's parameters."""
        return next(self.model.parameters()).dtype

    @property
    def factor_dtype(self) -> np.dtype[Any]:
        """The parameters' dtype; float32 for half precision."""
        return factor_dtype_of(self.dtype)

    def at_rest(self) -> Callable[[], Self]:
        """Makes copies of this model as it is now, which share its tensors, also while it differentiates."""
        kind, state = type(self), by_reference(self.__dict__)
        return lambda: with_state(kind, state())

    def fit(self, data: Iterable[Any]) -> Self:
        """Creates every block from training data: anything that iterates over (x, y).

        All blocks see the same examples, also of a loader that draws them.

        Raises:
            ValueError: a block's operator or gradients are not by its parameters, in their order.
        """
        drawn = drawn_once(data)
        blocks = [
            (block, self._create_block(parameters, drawn, self.regularization[block]))
            for block, parameters in self.parameter_dict.items()
        ]
        self._check_columns(blocks)
        self.block_mapper = TorchBlockMapper(OrderedDict(blocks))
        self.revision += 1
        return self

    def to(self, device: torch.device | str) -> Self:
        """Moves the model and its blocks to a device, and returns this influence model."""
        self.model.to(device)
        if self.block_mapper is not None:
            self.block_mapper = self.block_mapper.to(device)
        self.revision += 1
        return self

    def with_regularization(self, regularization: float | Mapping[str, float | None]) -> Self:
        """Changes λ (one number, or one per block) of every block's operator, and returns this model.

        A subclass whose operators have no λ overrides it, and raises `revision` where numbers change.

        Raises:
            ValueError: as the constructor; an operator without a λ, or one that refuses this one. Nothing is
                changed then.
        """
        changed = self._by_block(regularization)
        operators = {} if self.block_mapper is None else {k: b.op for k, b in self.block_mapper.items()}
        before: dict[str, float | None] = {}
        for block, operator in operators.items():
            if not isinstance(operator, InverseOperator | InverseHarmonicMeanOperator):
                raise ValueError(
                    f"block {block!r}: expected an operator whose regularization can be changed, got "
                    f"{type(operator).__name__}; override with_regularization, or fit a new model"
                )
            before[block] = operator.regularization
        try:
            for block, operator in operators.items():
                operator.regularization = changed[block]
        except Exception:
            for block, operator in operators.items():
                operator.regularization = before[block]
            raise
        self.regularization = changed
        self.revision += 1
        return self

    def as_of_now(self) -> Hashable:
        """By the model's tensors and the operators' λ too, which may be changed from outside."""
        blocks = {} if self.block_mapper is None else dict(self.block_mapper.items())
        λ = tuple(getattr(block.op, "regularization", None) for block in blocks.values())
        return self.revision, λ, versions_of(self.model)

    def influence_factors_by_block(self, x: Tensor, y: Tensor) -> OrderedDict[str, Tensor]:
        """Block -> factors `[t, P_b]`; how its solves ended is in `solver_report` afterwards."""
        return self._reported(lambda blocks: blocks.transformed_grads(TorchBatch(x, y)))

    def influences_by_block(
        self,
        x_test: Tensor,
        y_test: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> OrderedDict[str, Tensor]:
        """Block -> its part of `influences`; over the blocks they sum to it."""
        require_both_or_none(x, y)
        left, right = TorchBatch(x_test, y_test), None if x is None or y is None else TorchBatch(x, y)
        return self._reported(lambda blocks: blocks.interactions(left, right, as_mode(mode)))

    def influences_from_factors_by_block(
        self,
        z_test_factors: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> OrderedDict[str, Tensor]:
        """Block -> influences from this block's factors `[t, P_b]`.

        Raises:
            NotFittedException: `fit` has not run.
            ValueError: factors of other blocks, or of other widths.
        """
        blocks = self._blocks
        require_block_widths(z_test_factors, self.layout.widths)
        factors = OrderedDict((block, z_test_factors[block]) for block in self.block_names)
        return blocks.interactions_from_transformed_grads(factors, TorchBatch(x, y), as_mode(mode))

    def influences_from_factors(
        self, z_test_factors: Tensor, x: Tensor, y: Tensor, mode: InfluenceMode = InfluenceMode.Up
    ) -> Tensor:
        """Influences of (x, y) from factors `[t, P]`: Up `[t, n]`, Perturbation `[t, n, F...]`.

        Raises:
            NotFittedException: `fit` has not run.
            ValueError: factors of another width.
        """
        require_factor_width(z_test_factors, self.n_parameters)
        by_block = self.layout.split(z_test_factors)
        return _sum(self.influences_from_factors_by_block(by_block, x, y, mode))

    def _influence_factors(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layout.flatten(self.influence_factors_by_block(x, y))

    def _influences(
        self,
        x_test: Tensor,
        y_test: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> Tensor:
        return _sum(self.influences_by_block(x_test, y_test, x, y, mode))

    @property
    def _blocks(self) -> TorchBlockMapper:
        if self.block_mapper is None:
            raise NotFittedException(type(self))
        return self.block_mapper

    def _reported(
        self, solve: Callable[[TorchBlockMapper], OrderedDict[str, Tensor]]
    ) -> OrderedDict[str, Tensor]:
        """What `solve` answers; how the operators' solves ended is in `solver_report`."""
        operators = [block.op for _, block in self._blocks.items()]
        for operator in operators:
            operator.solver_report = None
        solved = solve(self._blocks)
        reports = [operator.solver_report for operator in operators]
        told = [report for report in reports if report is not None]
        self.solver_report = worst(told) if told else None
        return solved

    def _by_block(self, given: float | Mapping[str, float | None] | None) -> dict[str, float | None]:
        values = list(given.values()) if isinstance(given, Mapping) else [given]
        if any(isinstance(value, Relative) for value in values):
            raise ValueError(
                "regularization: expected numbers, one or one per block, got Relative: only your operators "
                "know the curvature that it is relative to; compute λ in _create_block"
            )
        if isinstance(given, Mapping):
            checked_regularization({block: λ or 0.0 for block, λ in given.items()})
            check_coverage({block: λ or 0.0 for block, λ in given.items()}, self.layout.blocks)
            return dict(given)
        checked_regularization(given)
        return dict.fromkeys(self.layout.blocks, given)

    def _check_columns(self, blocks: list[tuple[str, TorchOperatorGradientComposition[Any]]]) -> None:
        """As many as the block has, and as far as parts tell, of its parameters in their order."""
        for block, created in blocks:
            width = self.layout.widths[block]
            if created.op.input_size != width:
                raise ValueError(
                    f"block {block!r}: expected an operator of {width} columns, one per parameter of the "
                    f"block, got {created.op.input_size}; give it restrict_to=block_params"
                )
            names = [slot.name for slot in self.layout.slots_of(block)]
            for part, own in (("an operator", _names_of(created.op)), ("gradients", _names_of(created.gp))):
                if own is not None and own != names:
                    raise ValueError(
                        f"block {block!r}: expected {part} by the block's parameters in their order, "
                        f"{', '.join(names)}, got {', '.join(own)}; give it restrict_to=block_params"
                    )


def _names_of(part: TensorOperator | TorchGradientProvider) -> list[str] | None:
    """The parameters that columns belong to, in order; None of one that does not know them."""
    match part:
        case CgOperator(operator=inner):
            return _names_of(inner)
        case LissaOperator(batch_operation=operation):
            return list(operation.input_dict_structure)
        case TensorDictOperator():
            return list(part.input_dict_structure)
        case TorchGradientProvider():
            return list(part.params_to_restrict_to)
        case _:
            return None


def _sum(by_block: Mapping[str, Tensor]) -> Tensor:
    """The sum over the blocks: of one tensor each, or of several inputs that move, in their structure."""
    first, *others = by_block.values()

    def added(*parts: Tensor | None) -> Tensor | None:
        told = [part for part in parts if part is not None]
        return torch.stack(told).sum(0) if told else None

    total: Tensor = pytree.tree_map(added, first, *others)
    return total
