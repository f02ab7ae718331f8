"""Data sources: what adapters return, what is refused, and how the same data is known again."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from influence_job.data import (
    ArraySource,
    HuggingFaceSource,
    ReadError,
    TorchDatasetSource,
    ZarrSource,
    batch_digest,
    check_source,
    data_identity,
    identity_indices,
    read_batch,
)
from influence_job.errors import PermanentError, Reason
from influence_job.storage.fingerprint import differences
from influence_job.task import DataSource

CPU = torch.device("cpu")
X = torch.arange(300, dtype=torch.float32).reshape(100, 3)
Y = torch.arange(100) % 7


class Rows:
    """What `HuggingFaceSource` uses of a Hugging Face dataset: length, slices, `with_format`."""

    def __init__(self, columns: dict[str, Tensor], format: str | None = None) -> None:
        self._columns, self._format = columns, format

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def with_format(self, format: str, columns: list[str] | None = None) -> Rows:
        return Rows({name: self._columns[name] for name in columns or self._columns}, format)

    def __getitem__(self, rows: slice) -> dict[str, Any]:
        found = {name: column[rows] for name, column in self._columns.items()}
        return found if self._format == "torch" else {name: c.tolist() for name, c in found.items()}


def _zarr(folder: Path) -> ZarrSource:
    for name, values in (("x", X), ("y", Y)):
        stored = zarr.create_array(
            str(folder / name), shape=values.shape, dtype=values.numpy().dtype, chunks=(7, *values.shape[1:])
        )
        stored[...] = values.numpy()
    return ZarrSource(str(folder / "x"), str(folder / "y"))


SOURCES: dict[str, Callable[[Path], DataSource]] = {
    "tensors": lambda _: ArraySource(X, Y),
    "numpy arrays": lambda _: ArraySource(X.numpy(), Y.numpy()),
    "zarr": _zarr,
    "torch dataset": lambda _: TorchDatasetSource(TensorDataset(X, Y)),
    "hugging face": lambda _: HuggingFaceSource(Rows({"x": X, "y": Y, "text": Y}), columns=["x", "y"]),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> DataSource:
    """One adapter after the other, all with the same examples."""
    return SOURCES[request.param](tmp_path)


def test_an_adapter_reads_any_range_in_any_order(source: DataSource) -> None:
    assert len(source) == 100
    for start, stop in ((40, 60), (0, 1), (99, 100), (0, 100)):
        batch = source.read(start, stop)
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        assert torch.equal(x, X[start:stop])
        assert torch.equal(y, Y[start:stop])
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_a_dict_of_columns_keeps_their_names() -> None:
    source = HuggingFaceSource(Rows({"x": X, "y": Y}))
    assert list(source.read(0, 2)) == ["x", "y"]


def test_a_zarr_source_travels_without_its_open_arrays(tmp_path: Path) -> None:
    source = _zarr(tmp_path)
    assert len(pickle.dumps(source)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(source)).read(3, 5)[0], X[3:5])


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda _: ArraySource(X, Y[:-1]), r"one length, got \[100, 99\]; give one label for every example"),
        (lambda _: ArraySource(), "at least one array"),
        (lambda _: ZarrSource(), "at least one URL"),
        (lambda _: TorchDatasetSource(Stream()), r"got Stream, .*`__len__` and `read\(start, stop\)`"),
        (lambda _: HuggingFaceSource(iter([])), r"can only be iterated over; .*ZarrSource"),
    ],
)
def test_what_cannot_be_read_in_ranges_is_refused_by_its_adapter(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(None)


def test_zarr_arrays_of_two_lengths_are_refused_by_name(tmp_path: Path) -> None:
    for name, length in (("x", 5), ("y", 4)):
        zarr.create_array(str(tmp_path / name), shape=(length,), dtype="int64")
    with pytest.raises(ValueError, match=r"got \[5, 4\] for .*/x.*/y"):
        ZarrSource(str(tmp_path / "x"), str(tmp_path / "y"))


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (TensorDataset(X, Y), "wrap it in influence_job.data.TorchDatasetSource"),
        (DataLoader(TensorDataset(X, Y)), "data that can only be iterated over"),
        (iter([1]), "write a class with"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_source_is_refused_with_the_adapter_to_use(given: Any, cure: str) -> None:
    with pytest.raises(PermanentError, match=f"train: expected a DataSource.*{cure}") as caught:
        check_source(given, "train")
    assert caught.value.reason is Reason.INVALID_TASK


class Answers:
    """A source that answers `answer` whatever it is asked."""

    def __init__(self, answer: Callable[[int, int], Any]) -> None:
        self._answer = answer

    def __len__(self) -> int:
        return 100

    def read(self, start: int, stop: int) -> Any:
        return self._answer(start, stop)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, b: (X[a : b - 1], Y[a : b - 1]), r"train\.read\(10, 20\): expected 10 examples, got 9"),
        (lambda a, b: (X[a:b], Y[a : b - 1]), r"train\.read\(10, 20\): .*first dimension"),
    ],
)
def test_a_batch_of_another_length_is_refused(answer: Any, message: str) -> None:
    with pytest.raises(PermanentError, match=message) as caught:
        read_batch(Answers(answer), "train", 10, 20, CPU)
    assert caught.value.reason is Reason.INVALID_DATA


def test_a_read_that_raises_names_the_example() -> None:
    def answer(start: int, stop: int) -> Any:
        if start <= 13 < stop:
            raise OSError("truncated")
        return X[start:stop], Y[start:stop]

    with pytest.raises(ReadError, match="test example 13: reading raised OSError: truncated"):
        read_batch(Answers(answer), "test", 10, 20, CPU)


def test_a_read_that_raises_for_the_range_alone_names_the_range() -> None:
    def answer(start: int, stop: int) -> Any:
        if stop - start > 1:
            raise MemoryError("too many at once")
        return X[start:stop], Y[start:stop]

    with pytest.raises(ReadError, match="test examples 10 to 19: reading raised MemoryError"):
        read_batch(Answers(answer), "test", 10, 20, CPU)


def test_what_is_read_is_copied_so_that_the_owner_may_reuse_its_memory() -> None:
    own = X.clone()
    batch, digest = read_batch(Answers(lambda a, b: (own[a:b],)), "train", 0, 5, CPU)
    own += 1
    assert torch.equal(batch[0], X[:5])
    assert digest == batch_digest((X[:5],))


def test_a_digest_covers_values_dtypes_shapes_and_names() -> None:
    batches = [
        (X[:4],),
        (X[:4] + 1,),
        (X[:4].double(),),
        (X[:4].reshape(4, 1, 3),),
        {"x": X[:4]},
        {"z": X[:4]},
        (X[:4].bfloat16(),),
        (X[:4].half(),),
    ]
    assert len({batch_digest(batch) for batch in batches}) == len(batches)
    assert batch_digest((X[:4],)) == batch_digest((X[:4].T.contiguous().T,)), "memory order is no content"


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000, 10**8])
def test_the_examples_that_stand_for_all_include_the_ends_and_are_at_most_64(length: int) -> None:
    indices = identity_indices(length)
    assert indices == sorted(set(indices))
    assert (indices[0], indices[-1]) == (0, length - 1)
    assert len(indices) == min(64, length)
    gaps = np.diff(indices)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def _identity(x: Tensor, y: Tensor = Y, version: str | None = None) -> dict[str, Any]:
    return data_identity(ArraySource(x, y[: len(x)]), "train", version)


def test_the_same_data_has_the_same_identity_and_other_data_another() -> None:
    same = _identity(X)
    assert same == _identity(X.clone())
    changed = X.clone()
    changed[identity_indices(100)[5]] += 1
    assert differences(same, _identity(changed)) == [
        f"examples: the store was made with {same['examples']}, this job says "
        f"{_identity(changed)['examples']}"
    ]
    for other in (X[:-1], X.double(), X[:, :2]):
        assert differences(same, _identity(other))


def test_a_version_stands_for_the_data_and_nothing_is_read() -> None:
    def refuse(start: int, stop: int) -> Any:
        raise AssertionError("read although the version is known")

    known = data_identity(Answers(refuse), "train", "v1")
    assert known == {"length": 100, "version": "v1"}
    other = data_identity(Answers(refuse), "train", "v2")
    assert differences(known, other) == ["version: the store was made with v1, this job says v2"]
