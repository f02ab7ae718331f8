"""Influences in this process, batch after batch, in bounded memory.

Factors of as many test batches as fit are computed together (a group); then ONE pass over the training
data scores them all. Rows come out in order, and the result is lazy.

Shapes: T test examples, N training examples, P parameters, F... feature dimensions of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from influence_calculator.array import LazyChunkSequence, NestedLazyChunkSequence
from influence_calculator.base_influence_function_model import InfluenceFunctionModel
from influence_calculator.errors import NotFittedException, OneShotIterableError
from influence_calculator.groups import DEFAULT_GROUP_BYTES
from influence_calculator.iterables import Readable, pair_of, require_fixed_order
from influence_calculator.maths.errors import UnsupportedInputError
from influence_calculator.maths.objective import batch_size
from influence_calculator.types import InfluenceMode, as_mode

Pairs = Iterable[Sequence[Tensor]]
"""Anything that iterates over (x, y)."""

Arguments = tuple[Any, ...]
"""Of one test batch: (x, y), or its factors alone."""


class SequentialInfluenceCalculator:
    """Influences of everything that iterates over batches (x, y), in this process.

    Args:
        influence_function_model: a fitted model of `influence_calculator.torch`, or any other whose
            tensors are torch's.

    Attributes:
        group_bytes: memory for the factors of one group of test batches and their scores against the
            training data (default 1 GiB), in mode perturbation with the features of its first batch. Scores
            count where the number of training examples is known, that is of a list or a DataLoader, and are
            not bounded otherwise. Each further group is one more pass over the training data.

    Example:
        ```python
        model = CgInfluence(network, loss, regularization=0.01).fit(train_loader)
        calculator = SequentialInfluenceCalculator(model)
        lazy = calculator.influences(test_loader, train_loader)
        influences = lazy.compute(aggregator=NestedTorchCatAggregator())  # or
        lazy.to_zarr("influences.zarr", TorchNumpyConverter())
        ```
    """

    def __init__(self, influence_function_model: InfluenceFunctionModel[Any, Any]) -> None:
        self.influence_function_model = influence_function_model
        self.group_bytes = DEFAULT_GROUP_BYTES

    def influence_factors(self, data_iterable: Pairs) -> LazyChunkSequence[Tensor]:
        """Factors `z = (H + λI)^-1 g`, lazily: one chunk `[n, P]` per batch.

        Raises:
            NotFittedException: at once.
        """
        self._require_fitted()
        data = Readable("data_iterable", data_iterable)
        return LazyChunkSequence(partial(self._factors, data), data.length)

    def influences(
        self,
        test_data_iterable: Pairs,
        train_data_iterable: Pairs,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> NestedLazyChunkSequence[Tensor]:
        """Influences of the training batches on the test batches, lazily: a row of chunks per test batch.

        Up: chunks `[t, n]` of `z_test · g_train`; positive: the training example helps, removing it raises
        the test loss by about score / N. Perturbation: chunks `[t, n, F...]` of `∇x (z_test · g_train(x))`.
        Neither is negated or divided by N.

        Raises:
            NotFittedException, UnsupportedInfluenceModeException: at once.
            RandomOrderError: at once; a loader in random order, whose rows or columns would mean nothing.
            OneShotIterableError: before computing; training data that can be read once, for test batches
                that need more than one group.
        """
        self._require_fitted()
        mode = as_mode(mode)
        require_fixed_order("test_data_iterable", test_data_iterable)
        require_fixed_order("train_data_iterable", train_data_iterable)
        test = Readable("test_data_iterable", test_data_iterable)
        train = Readable("train_data_iterable", train_data_iterable)
        model = self.influence_function_model
        solve = self._left if mode is InfluenceMode.Up else model.influence_factors
        side = _TestSide(test, partial(pair_of, test.field), solve)
        return NestedLazyChunkSequence(partial(self._rows, side, train, mode), test.length)

    def influences_from_factors(
        self,
        z_test_factors: Iterable[Any] | LazyChunkSequence[Tensor],
        train_data_iterable: Pairs,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> NestedLazyChunkSequence[Tensor]:
        """Influences from factors `[t, P]` (each as such, or wrapped in a list or tuple), lazily.

        What `influence_factors` returned will do, too: its chunks are computed as they are needed. Shapes,
        sign, scale and errors as in `influences`.
        """
        self._require_fitted()
        mode = as_mode(mode)
        require_fixed_order("z_test_factors", z_test_factors)
        require_fixed_order("train_data_iterable", train_data_iterable)
        factors = Readable("z_test_factors", z_test_factors)
        train = Readable("train_data_iterable", train_data_iterable)
        solve = self._left_of_factors if mode is InfluenceMode.Up else _as_given
        side = _TestSide(factors, partial(_factors_of, factors.field), solve)
        return NestedLazyChunkSequence(partial(self._rows, side, train, mode), factors.length)

    def self_influences(self, data_iterable: Pairs) -> LazyChunkSequence[Tensor]:
        """Each example's influence on itself, `z_i · g_i`, lazily: one chunk `[n]` per batch.

        Raises:
            NotFittedException: at once.
            RandomOrderError: at once; a loader in random order, whose rows would mean nothing.
        """
        self._require_fitted()
        require_fixed_order("data_iterable", data_iterable)
        data = Readable("data_iterable", data_iterable)
        return LazyChunkSequence(partial(self._self_influences, data), data.length)

    def _self_influences(self, data: Readable[Any]) -> Iterator[Tensor]:
        for item in data:
            yield self.influence_function_model.self_influences(*pair_of(data.field, item))

    def _factors(self, data: Readable[Any]) -> Iterator[Tensor]:
        for item in data:
            yield self.influence_function_model.influence_factors(*pair_of(data.field, item))

    def _left(self, x: Tensor, y: Tensor) -> Tensor:
        left: Tensor = self.influence_function_model.expanded(self.influence_function_model.left(x, y))
        return left

    def _left_of_factors(self, z_test_factors: Tensor) -> Tensor:
        left: Tensor = self.influence_function_model.left_of_factors(z_test_factors)
        return left

    def _rows(self, test: _TestSide, train: Readable[Any], mode: InfluenceMode) -> Iterator[Iterator[Tensor]]:
        for items, is_last in self._groups(test, train, mode):
            if train.is_one_shot and not is_last:
                raise OneShotIterableError(
                    train.field, f"the test side needs several groups of {self.group_bytes} bytes"
                )
            group = _Group(self.influence_function_model, items, test.solve, train, mode)
            yield from map(group.row, range(len(items)))

    def _groups(
        self, test: _TestSide, train: Readable[Any], mode: InfluenceMode
    ) -> Iterator[tuple[list[Arguments], bool]]:
        """Consecutive test batches that fit together, and whether they are the last."""
        model = self.influence_function_model
        row_bytes = (model.n_parameters + _columns(train, mode)) * model.factor_dtype.itemsize
        items: list[Arguments] = []
        used = 0
        for item in map(test.opened, test.items):
            needed = batch_size(item[0]) * row_bytes
            if items and used + needed > self.group_bytes:
                yield items, False
                items, used = [], 0
            items.append(item)
            used += needed
        if items:
            yield items, True

    def _require_fitted(self) -> None:
        if not self.influence_function_model.is_fitted:
            raise NotFittedException(type(self.influence_function_model))


@dataclass(frozen=True)
class _TestSide:
    """Test batches, or factors, and what is done with them."""

    items: Readable[Any]
    opened: Callable[[Any], Arguments]
    """Of one item: what `solve` takes of it; refuses what is no such item."""
    solve: Callable[..., Tensor]
    """Makes what the model scores in the mode: a left representation or factors."""


def _columns(train: Readable[Any], mode: InfluenceMode) -> int:
    """Numbers in one row of the result, as far as the training data is counted; in mode perturbation with the
    features that the first batch has.
    """
    examples = train.examples or 0
    first = train.first() if examples and mode is InfluenceMode.Perturbation else None
    if first is None:
        return examples
    x, _ = pair_of(train.field, first)
    moving = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return examples * sum(math.prod(leaf.shape[1:]) for leaf in moving)


def _one_array(perturbed: Any) -> Tensor:
    """What a block can hold: the perturbations of one input.

    Raises:
        UnsupportedInputError: the model takes several floating-point inputs.
    """
    if isinstance(perturbed, Tensor):
        return perturbed
    entries = pytree.tree_flatten_with_path(perturbed)[0]
    moved = ", ".join(pytree.keystr(path) for path, leaf in entries if leaf is not None)
    raise UnsupportedInputError(
        f"mode perturbation: expected one floating-point input to move, got {moved}; a calculator's result "
        "is one array, so ask the model itself, whose `influences` answers for each of them, or use mode up"
    )


def _factors_of(field: str, item: Any) -> tuple[Tensor]:
    """The factors of one item, as such or wrapped.

    Raises:
        ValueError: something else.
    """
    factors = item[0] if isinstance(item, list | tuple) and item else item
    if not isinstance(factors, Tensor):
        raise ValueError(
            f"{field}: expected tensors [t, P], got {type(factors).__name__}; pass what influence_factors of "
            "this model returned"
        )
    return (factors,)


def _as_given(z_test_factors: Tensor) -> Tensor:
    return z_test_factors


@dataclass
class _Group:
    """Test items that share one pass over the training data.

    The pass advances as far as the row that is ahead has got; the rows behind find its blocks here.
    """

    model: InfluenceFunctionModel[Any, Any]
    items: list[Arguments]
    solve: Callable[..., Tensor]
    """As of `_TestSide`."""
    train: Readable[Any]
    mode: InfluenceMode
    _sizes: list[int] = field(init=False, default_factory=list)
    _blocks: list[Tensor] = field(init=False, default_factory=list)
    _pass: Iterator[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._pass = self._scored()

    def row(self, index: int) -> Iterator[Tensor]:
        """The blocks of one test item."""
        if len(self.items) == 1:  # nobody is behind: nothing is kept
            yield from self._pass
            return
        for column in count():
            if column == len(self._blocks):
                block = next(self._pass, None)
                if block is None:
                    return
                self._blocks.append(block)
            stop = list(accumulate(self._sizes))[index]
            yield self._blocks[column][stop - self._sizes[index] : stop]

    def _scored(self) -> Iterator[Tensor]:
        """The group against one training batch after the other."""
        rows = [self.solve(*item) for item in self.items]
        self._sizes = [len(chunk) for chunk in rows]
        together = rows[0] if len(rows) == 1 else torch.cat(rows)
        del rows
        for item in self.train:
            x, y = pair_of(self.train.field, item)
            if self.mode is InfluenceMode.Up:
                yield self.model.influences_from_left(together, x, y)
            else:
                yield _one_array(self.model.influences_from_factors(together, x, y, self.mode))
