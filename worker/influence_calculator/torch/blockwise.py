"""Models of influence for torch whose method works block by block: what all methods of the library share.

Shapes: t test examples, n training examples, P_b parameters of block b, F... feature dimensions of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any, Self

from torch import Tensor
from torch.utils import _pytree as pytree

from influence_calculator.base_influence_function_model import ComposableInfluence, require_both_or_none
from influence_calculator.maths import region
from influence_calculator.maths.blocks import Regularization
from influence_calculator.maths.layout import Left
from influence_calculator.maths.method import Fitted, Method
from influence_calculator.maths.own_modes import own_modes
from influence_calculator.maths.perturbation import perturbations_by_block
from influence_calculator.torch.base import TorchInfluenceFunctionModel, regularization_of
from influence_calculator.torch.util import require_block_widths
from influence_calculator.types import InfluenceMode, as_mode


class TorchInfluenceByBlock(TorchInfluenceFunctionModel, ABC):
    """A method of the maths whose influences are a sum over blocks of parameters, or of checkpoints."""

    @property
    def block_names(self) -> list[str]:
        """The blocks, in order; the full block structure has the one block `""`."""
        return list(self.layout.blocks)

    def influence_factors_by_block(self, x: Tensor, y: Tensor) -> OrderedDict[str, Tensor]:
        """Block -> factors `[t, P_b]`."""
        left = self.solve(x, y).left
        return OrderedDict((block, left[block]) for block in self.block_names)

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
        mode = as_mode(mode)
        return self._scores_by_block(*self._sides(x_test, y_test, x, y, mode), mode)

    def influences_from_factors_by_block(
        self,
        z_test_factors: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> OrderedDict[str, Tensor]:
        """Block -> influences from this block's factors `[t, P_b]`.

        Raises:
            ValueError: factors of other blocks, or of other widths.
        """
        require_block_widths(z_test_factors, self.layout.widths)
        mode = as_mode(mode)
        factors = {block: rows.detach().to(self.model_device) for block, rows in z_test_factors.items()}
        return self._scores_by_block(self._scored(factors, mode), self._batch(x, y), mode)

    @own_modes()
    def _scores_by_block(
        self, rows: Left, batch: tuple[Tensor, Tensor], mode: InfluenceMode
    ) -> OrderedDict[str, Tensor]:
        fitted, pieces = self._require_fitted(), self._micro_batch(batch)
        if mode is InfluenceMode.Up:
            parts = list(region.influences_by_block(fitted, rows, batch, pieces))
        else:
            found = perturbations_by_block(fitted, self.objective, rows, batch, pieces)
            parts = [pytree.tree_map_only(Tensor, itemgetter(b), found) for b in range(len(self.block_names))]
        return OrderedDict(zip(fitted.layout.blocks, parts, strict=True))


class TorchBlockwiseInfluence(TorchInfluenceByBlock, ComposableInfluence[Tensor, Iterable[Any]], ABC):
    """A method of the maths that treats blocks of parameters one by one, with a λ that may be changed."""

    @abstractmethod
    def _regularized(self, regularization: Regularization) -> Method:
        """The method with another λ."""

    def with_regularization(self, regularization: Regularization | Mapping[str, float | None]) -> Self:
        """Changes λ (one number, one per block, or `Relative`) without a new fit, and returns this model.

        Raises:
            ValueError: a negative λ, or a mapping that does not name every block and nothing else.
        """
        method = self._regularized(regularization_of(regularization))
        method.layout(self.objective)
        before, self.method = self.method, method
        try:
            self._refresh()
        except Exception:
            self.method = before
            raise
        self._tell_notes()
        return self

    def _fitted_at(self, regularization: float) -> Fitted:
        """What solves with another λ, from the same fit."""
        self._require_fitted()
        method = self._regularized(regularization)
        return method.fitted(self.objective, self._state or {}, self._data)
