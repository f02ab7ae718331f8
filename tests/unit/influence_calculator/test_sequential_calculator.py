"""The sequential calculator: bounded memory, one pass per group, rows in order, all of it on demand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from counting_model import FEATURES, CountingModel, TurnedModel
from influence_calculator import (
    InfluenceMode,
    NestedTorchCatAggregator,
    NotFittedException,
    OneShotIterableError,
    RandomOrderError,
    SequentialInfluenceCalculator,
    TorchCatAggregator,
    UnsupportedInfluenceModeException,
)

generator = torch.Generator().manual_seed(0)
X_TEST, Y_TEST = torch.rand(11, FEATURES, generator=generator), torch.rand(11, generator=generator)
X, Y = torch.rand(14, FEATURES, generator=generator), torch.rand(14, generator=generator)
FACTORS = X_TEST * Y_TEST[:, None]
EXPECTED = FACTORS @ (X * Y[:, None]).T
ROW_BYTES = 4 * (FEATURES + len(X))
"""A row of factors and a row of the result."""

Pairs = list[tuple[Tensor, Tensor]]


def queries(size: int = 3) -> Pairs:
    return list(zip(X_TEST.split(size), Y_TEST.split(size), strict=True))


def training(size: int = 4) -> Pairs:
    return list(zip(X.split(size), Y.split(size), strict=True))


def calculator(model: CountingModel, group_bytes: int | None = None) -> SequentialInfluenceCalculator:
    made = SequentialInfluenceCalculator(model)
    if group_bytes is not None:
        made.group_bytes = group_bytes
    return made


class Reading:
    """A re-iterable training side that counts its passes."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(self.pairs)


def test_asking_computes_nothing():
    model, reading = CountingModel(), Reading(training())
    calculator(model).influences(queries(), reading)
    calculator(model).influence_factors(queries())
    calculator(model).influences_from_factors([FACTORS], reading)
    assert (dict(model.calls), reading.passes) == ({}, 0)


class WideModel(CountingModel):
    """Perturbations with the features of the training input, which may be a dict with ids beside it."""

    def influences_from_factors(
        self, z_test_factors: Tensor, x: Any, y: Tensor, mode: InfluenceMode = InfluenceMode.Up
    ) -> Tensor:
        x = x["moves"] if isinstance(x, dict) else x
        self.calls["scores"] += 1
        shape = (len(z_test_factors), len(x), *(x.shape[1:] if mode is InfluenceMode.Perturbation else ()))
        return torch.zeros(shape)


WIDE = torch.zeros(14, 2, 50)
WIDE_SIDES: dict[str, Any] = {
    "list": list(zip(WIDE.split(4), Y.split(4), strict=True)),
    "list of dicts": [
        ({"ids": torch.zeros(len(x), 9).long(), "moves": x}, y)
        for x, y in zip(WIDE.split(4), Y.split(4), strict=True)
    ],
    "loader": DataLoader(TensorDataset(WIDE, Y), batch_size=4),
    "loader of batches": DataLoader(list(zip(WIDE.split(7), Y.split(7), strict=True)), batch_size=None),
}


@pytest.mark.parametrize("train", WIDE_SIDES.values(), ids=WIDE_SIDES.keys())
@pytest.mark.parametrize("from_factors", [False, True])
@pytest.mark.parametrize(("mode", "features"), [(InfluenceMode.Up, 1), (InfluenceMode.Perturbation, 100)])
def test_the_scores_that_count_for_a_group_are_those_of_the_training_inputs_features(
    train: Any, from_factors: bool, mode: InfluenceMode, features: int
):
    """Of batches of 3, 3, 3 and 2 rows two of three fit, and with a byte less they do not."""
    groups: dict[int, int] = {}
    for spare in (0, -1):
        model = WideModel()
        asked = calculator(model, 6 * 4 * (FEATURES + 14 * features) + spare)
        if from_factors:
            lazy = asked.influences_from_factors(FACTORS.split(3), train, mode)
        else:
            lazy = asked.influences(queries(), train, mode)
        lazy.compute()
        groups[spare] = model.calls["scores"] // len(list(train))
    assert groups == {0: 2, -1: 3}


def test_factors_come_batch_by_batch():
    lazy = calculator(CountingModel()).influence_factors(queries())
    assert lazy.len_generator == 4
    assert torch.allclose(lazy.compute(TorchCatAggregator()), FACTORS)


@pytest.mark.parametrize(("group_bytes", "groups"), [(None, 1), (6 * ROW_BYTES, 2), (1, 4)])
def test_factors_once_per_batch_and_one_pass_over_the_training_data_per_group(
    group_bytes: int | None, groups: int
):
    model = CountingModel()
    lazy = calculator(model, group_bytes).influences(queries(), training())
    assert torch.allclose(lazy.compute(NestedTorchCatAggregator()), EXPECTED)
    assert model.calls == {"factors": 4, "scores": groups * 4}


@pytest.mark.parametrize("group_bytes", [6 * 4 * FEATURES, 10**6])
def test_an_iterable_of_unknown_length_is_passed_once_per_group_of_factors(group_bytes: int):
    model, reading = CountingModel(), Reading(training())
    lazy = calculator(model, group_bytes).influences(queries(), reading)
    assert torch.allclose(lazy.compute(NestedTorchCatAggregator()), EXPECTED)
    assert reading.passes == (2 if group_bytes < 10**6 else 1)


@pytest.mark.parametrize("group_bytes", [1, 6 * ROW_BYTES, 10**6])
def test_rows_may_be_consumed_in_any_order_after_all_were_asked_for(group_bytes: int):
    """Mistake 8: inner generators that close over the loop variable."""
    lazy = calculator(CountingModel(), group_bytes).influences(queries(), training())
    for order in (range(4), reversed(range(4)), (2, 0, 3, 1)):
        rows = list(lazy.generator_factory())
        found: dict[int, Tensor] = {i: torch.cat(list(rows[i]), dim=1) for i in order}
        assert torch.allclose(torch.cat([found[i] for i in range(4)]), EXPECTED)


def test_rows_may_be_consumed_in_lockstep():
    lazy = calculator(CountingModel(), 10**6).influences(queries(), training())
    columns = zip(*lazy.generator_factory(), strict=True)
    assert torch.allclose(torch.cat([torch.cat(column) for column in columns], dim=1), EXPECTED)


def test_blocks_are_one_row_of_chunks_per_test_batch_in_the_order_of_the_data():
    lazy = calculator(CountingModel()).influences(queries(), training())
    shapes = [[tuple(block.shape) for block in row] for row in lazy.compute()]
    assert shapes == [[(t, n) for n in (4, 4, 4, 2)] for t in (3, 3, 3, 2)]
    assert lazy.len_outer_generator == 4


def test_perturbations_have_the_features_of_the_training_input():
    lazy = calculator(CountingModel(), 1).influences(queries(), training(), InfluenceMode.Perturbation)
    expected = torch.einsum("tp,n->tnp", FACTORS, Y)
    assert torch.allclose(lazy.compute(NestedTorchCatAggregator()), expected)


@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: [z], lambda z: (z,)])
def test_factors_come_as_such_or_wrapped_in_a_list_or_tuple(wrap: Any):
    model = CountingModel()
    lazy = calculator(model).influences_from_factors([wrap(z) for z in FACTORS.split(3)], training())
    assert torch.allclose(lazy.compute(NestedTorchCatAggregator()), EXPECTED)
    assert "factors" not in model.calls


def test_lazy_factors_are_computed_as_they_are_needed():
    model = CountingModel()
    asked = calculator(model, 6 * ROW_BYTES)
    lazy = asked.influences_from_factors(asked.influence_factors(queries()), training())
    assert lazy.len_outer_generator == 4
    assert not model.calls
    assert torch.allclose(lazy.compute(NestedTorchCatAggregator()), EXPECTED)
    assert model.calls == {"factors": 4, "scores": 2 * 4}
    again = asked.influences_from_factors(asked.influence_factors(iter(queries())), training())
    assert again.len_outer_generator is None
    again.compute()
    with pytest.raises(OneShotIterableError, match=r"^data_iterable.*read already"):
        again.compute()


def test_a_model_scores_in_its_own_coordinates_and_each_batch_of_factors_is_turned_once():
    model = TurnedModel()
    lazy = calculator(model).influences(queries(), training())
    assert torch.allclose(lazy.compute(NestedTorchCatAggregator()), EXPECTED)
    assert "turned" not in model.calls
    lazy = calculator(model).influences_from_factors(FACTORS.split(3), training())
    assert torch.allclose(lazy.compute(NestedTorchCatAggregator()), EXPECTED)
    assert model.calls["turned"] == len(FACTORS.split(3))


def test_loaders_and_lists_of_lists_are_data():
    test = DataLoader(TensorDataset(X_TEST, Y_TEST), batch_size=3)
    train = [list(pair) for pair in training()]
    lazy = calculator(CountingModel()).influences(test, train)
    assert torch.allclose(lazy.compute(NestedTorchCatAggregator()), EXPECTED)


def test_a_training_iterator_suffices_for_one_group():
    lazy = calculator(CountingModel()).influences(iter(queries()), iter(training()))
    assert torch.allclose(lazy.compute(NestedTorchCatAggregator()), EXPECTED)


def test_a_training_iterator_is_refused_for_several_groups_before_anything_is_computed():
    model = CountingModel()
    lazy = calculator(model, 3 * 4 * FEATURES).influences(queries(), iter(training()))
    with pytest.raises(OneShotIterableError, match=r"train_data_iterable: expected .* several groups"):
        lazy.compute()
    assert not model.calls


def test_what_was_read_once_is_refused_the_second_time_and_not_taken_for_empty():
    lazy = calculator(CountingModel()).influences(queries(), iter(training()))
    lazy.compute()
    with pytest.raises(OneShotIterableError, match=r"train_data_iterable.*read already"):
        lazy.compute()
    factors = calculator(CountingModel()).influence_factors(iter(queries()))
    factors.compute()
    with pytest.raises(OneShotIterableError, match=r"data_iterable.*read already"):
        factors.compute()


@pytest.mark.parametrize("options", [{"shuffle": True}, {"sampler": SubsetRandomSampler(range(5))}])
def test_loaders_in_random_order_are_refused_on_both_sides(options: dict[str, Any]):
    shuffled = DataLoader(TensorDataset(X, Y), batch_size=4, **options)
    ask = calculator(CountingModel())
    with pytest.raises(RandomOrderError, match=r"train_data_iterable.*shuffle=False"):
        ask.influences(queries(), shuffled)
    with pytest.raises(RandomOrderError, match="test_data_iterable"):
        ask.influences(shuffled, training())
    with pytest.raises(RandomOrderError, match="train_data_iterable"):
        ask.influences_from_factors([FACTORS], shuffled)
    factors = DataLoader(TensorDataset(FACTORS), batch_size=4, shuffle=True)
    with pytest.raises(RandomOrderError, match="z_test_factors"):
        ask.influences_from_factors(factors, training())


def test_an_unfitted_model_and_an_unknown_mode_are_refused_at_once():
    with pytest.raises(NotFittedException):
        calculator(CountingModel(is_fitted=False)).influences(queries(), training())
    with pytest.raises(NotFittedException):
        calculator(CountingModel(is_fitted=False)).influence_factors(queries())
    with pytest.raises(UnsupportedInfluenceModeException, match="sideways"):
        calculator(CountingModel()).influences(queries(), training(), mode="sideways")  # type: ignore[arg-type]


def test_items_that_are_no_pairs_are_refused_by_name():
    ask, expected = calculator(CountingModel()), r"expected items \(x, y\), got"
    for lazy, message in (
        (ask.influences(queries(), [X]), f"^train_data_iterable: {expected} Tensor"),  # type: ignore[list-item]
        (ask.influences(queries(), [1, 2]), f"^train_data_iterable: {expected} int"),  # type: ignore[list-item]
        (ask.influences([1, 2], training()), f"^test_data_iterable: {expected} int"),  # type: ignore[list-item]
        (
            ask.influences_from_factors([1, 2], training()),
            r"^z_test_factors: expected tensors \[t, P\], got int",
        ),
        (ask.influences_from_factors([()], training()), "^z_test_factors: expected tensors .* got tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            lazy.compute()


@pytest.mark.parametrize("items", [None, 5])
def test_what_cannot_be_iterated_over_is_refused_at_once(items: Any):
    ask, expected = calculator(CountingModel()), "expected something to iterate over"
    with pytest.raises(ValueError, match=f"^test_data_iterable: {expected}"):
        ask.influences(items, training())
    with pytest.raises(ValueError, match=f"^train_data_iterable: {expected}"):
        ask.influences(queries(), items)
    with pytest.raises(ValueError, match=f"^z_test_factors: {expected}"):
        ask.influences_from_factors(items, training())


@pytest.mark.parametrize("mode", InfluenceMode)
def test_without_training_or_test_batches_the_side_is_named(mode: InfluenceMode):
    ask = calculator(CountingModel())
    for train in ([], DataLoader(TensorDataset(X[:0], Y[:0]))):
        with pytest.raises(ValueError, match="the training data iterable is empty"):
            ask.influences(queries(), train, mode).compute(NestedTorchCatAggregator())
    with pytest.raises(ValueError, match="the test data iterable is empty"):
        ask.influences([], training(), mode).compute(NestedTorchCatAggregator())


def test_the_blocks_of_a_group_are_freed_with_the_last_of_its_rows():
    lazy = calculator(CountingModel(), 6 * ROW_BYTES).influences(queries(), training())
    rows = lazy.generator_factory()
    shared = []
    for _ in range(2):
        shared += [weakref.ref(block._base) for block in next(rows)]
    assert len(shared) == 8
    next(rows)
    gc.collect()
    assert [reference() for reference in shared] == [None] * 8


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * len(X), len(X))},
        {"batch_size": 4, "sampler": DistributedSampler(range(len(X)), num_replicas=1, rank=0)},
        {"batch_sampler": BatchSampler(RandomSampler(range(len(X))), 4, drop_last=False)},
        {"batch_size": None, "sampler": BatchSampler(RandomSampler(range(len(X))), 4, drop_last=False)},
    ],
    ids=["weighted", "distributed", "batch sampler", "batches as a sampler"],
)
def test_samplers_that_draw_anew_at_every_pass_are_refused(options: dict[str, Any]):
    loader = DataLoader(TensorDataset(X, Y), **options)
    with pytest.raises(RandomOrderError, match="train_data_iterable"):
        calculator(CountingModel()).influences(queries(), loader)


def test_a_distributed_sampler_that_does_not_shuffle_is_in_order():
    order = DistributedSampler(range(len(X)), num_replicas=1, rank=0, shuffle=False)
    lazy = calculator(CountingModel()).influences(
        queries(), DataLoader(TensorDataset(X, Y), batch_size=4, sampler=order)
    )
    assert torch.allclose(lazy.compute(NestedTorchCatAggregator()), EXPECTED)
