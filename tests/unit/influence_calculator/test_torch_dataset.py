"""A map-style dataset as Dask arrays: values as they are, and nothing converted in silence."""

from __future__ import annotations

import pickle
from typing import Any

import dask
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from influence_calculator import torch_dataset_to_dask_array

ZERO = torch.zeros(2)


class WithoutLength(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Items(WithoutLength):
    def __len__(self) -> int:
        return len(self.items)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(ZERO, 1)])


@pytest.fixture(autouse=True)
def _in_this_process():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_entries_keep_their_values_shapes_and_dtypes(chunk_size: int) -> None:
    items = [(torch.full((2,), i), np.full((2, 1), i, np.int32), float(i), i) for i in range(3)]
    arrays = torch_dataset_to_dask_array(Items(items), chunk_size)
    for array, entries in zip(arrays, zip(*items, strict=True), strict=True):
        expected = np.stack([np.asarray(entry) for entry in entries])
        computed = array.compute()
        assert computed.dtype == array.dtype
        assert np.array_equal(computed, expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("second", "found"),
    [
        ((ZERO, 0.5), "entry 1: expected int64 of shape [], as dataset[0] has it, got float32"),
        (
            (torch.zeros(3), 1),
            "entry 0: expected float32 of shape [2], as dataset[0] has it, got float32 of shape [3]",
        ),
        ((torch.zeros(1), 1), "entry 0: expected float32 of shape [2]"),
        ((ZERO.double(), 1), "entry 0: expected float32 of shape [2], as dataset[0] has it, got float64"),
    ],
    ids=["dtype", "longer", "broadcasts", "precision"],
)
def test_an_example_that_differs_from_the_first_is_refused_and_never_cut_to_it(
    second: Any, found: str, chunk_size: int
) -> None:
    x, y = torch_dataset_to_dask_array(Items([(ZERO, 1), second, (ZERO, 1)]), chunk_size)
    for array in (x, y):
        with pytest.raises(ValueError, match="expected") as caught:
            array.compute()
        assert str(caught.value).startswith(f"dataset[1], {found}")
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_example_with_other_entries_is_refused() -> None:
    x, _ = torch_dataset_to_dask_array(Items([(ZERO, 1), (ZERO,)]), 2)
    with pytest.raises(ValueError, match=r"dataset\[1\]: expected 2 entries, as dataset\[0\] has, got 1"):
        x.compute()


def test_floats_of_several_precisions_are_converted_to_the_one_that_is_asked_for() -> None:
    items = Items([(ZERO, 1), (ZERO.double(), 2)])
    x, y = torch_dataset_to_dask_array(items, 1, resulting_dtype=np.float64)
    assert x.compute().dtype == x.dtype == np.float64
    assert y.compute().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("item", "place"),
    [
        ({"x": ZERO, "y": 1}, "entry 0: expected a tensor or a number, got dict"),
        (((ZERO, torch.zeros(3)), 1), "entry 0: expected a tensor or a number, got tuple"),
        (("text", 1), "entry 0: expected a tensor or a number, got str"),
        ((ZERO, None), "entry 1: expected a tensor or a number, got NoneType"),
        ((np.array(["a"]), 1), "entry 0: expected a tensor or a number, got an array of <U1"),
    ],
    ids=["dict", "nested", "text", "none", "array of text"],
)
def test_items_of_another_kind_are_refused_when_the_arrays_are_made(item: Any, place: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        torch_dataset_to_dask_array(Items([item] * 3), 2)
    assert str(caught.value).startswith(f"dataset[0], {place}")


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Items([]), {}, "^dataset: expected at least one example"),
        (WithoutLength([]), {}, "^dataset: expected at least one example"),
        (
            WithoutLength([(ZERO, 1)] * 3),
            {"total_size": -5},
            "^total_size: expected at least 1 example, got -5",
        ),
        (
            WithoutLength([(ZERO, 1)] * 3),
            {"total_size": 0},
            "^total_size: expected at least 1 example, got 0",
        ),
        (
            WithoutLength([(ZERO, 1)] * 3),
            {"total_size": 4},
            r"^total_size: .* got 4, but dataset\[3\] is not there",
        ),
        (Items([(ZERO, 1)] * 3), {"total_size": 2}, "^total_size: expected 3"),
        (Stream(), {}, r"^dataset: expected a map-style dataset.*got Stream; give it __getitem__"),
        (
            DataLoader(TensorDataset(ZERO)),
            {},
            r"^dataset: expected a map-style .*got DataLoader; pass its dataset",
        ),
        (Items([(ZERO, 1)]), {"chunk_size": 0}, "^chunk_size: expected at least 1"),
    ],
)
def test_arguments_are_refused_by_name(dataset: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch_dataset_to_dask_array(dataset, **{"chunk_size": 2} | options)


@pytest.mark.parametrize(("options", "length"), [({}, 3), ({"total_size": 3}, 3), ({"total_size": 2}, 2)])
def test_a_dataset_without_length_is_as_long_as_it_is_said_or_counted(
    options: dict[str, int], length: int
) -> None:
    x, _ = torch_dataset_to_dask_array(WithoutLength([(ZERO, 1)] * 3), 2, **options)
    assert x.compute().shape == (length, 2)


def test_a_mapping_without_len_that_ends_before_total_size_is_refused() -> None:
    """Examples of a mapping are missing with a KeyError."""

    class Mapped(Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            return {0: 1.0, 1: 2.0}[index]

    with pytest.raises(ValueError, match=r"total_size: expected at most the number of examples, got 3"):
        torch_dataset_to_dask_array(Mapped(), chunk_size=1, total_size=3)
