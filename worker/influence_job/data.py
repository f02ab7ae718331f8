"""Data sources: adapters from what people have to `DataSource`, and reading with proof of what was read.

An adapter answers `len` and `read(start, stop)`. Data that can only be iterated over is refused: a job
reads ranges in any order, on many workers, and again after a crash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from influence_calculator.maths.objective import Batch, batch_size
from influence_job.errors import OF_THE_TASK, PermanentError, Reason
from influence_job.task import DataSource

IDENTITY_EXAMPLES = 64
"""Examples that stand for a data set whose version nobody named."""


class ReadError(Exception):
    """A data source raised. It may be the network: the region is tried again before the job gives up."""


class ArraySource:
    """Tensors or numpy arrays of equal length; a batch is the tuple of their slices."""

    def __init__(self, *arrays: Tensor | np.ndarray) -> None:
        if not arrays:
            raise ValueError("ArraySource: expected at least one array, got none")
        self._arrays = tuple(torch.as_tensor(array) for array in arrays)
        lengths = [int(array.shape[0]) for array in self._arrays]
        if len(set(lengths)) != 1:
            raise ValueError(
                f"ArraySource: expected arrays of one length, got {lengths}; give one label for every example"
            )

    def __len__(self) -> int:
        return int(self._arrays[0].shape[0])

    def read(self, start: int, stop: int) -> Batch:
        return tuple(array[start:stop] for array in self._arrays)


class ZarrSource:
    """Zarr arrays by URL; a batch is the tuple of their slices. Each worker opens them for itself."""

    def __init__(self, *urls: str, storage_options: Mapping[str, Any] | None = None) -> None:
        if not urls:
            raise ValueError("ZarrSource: expected at least one URL, got none")
        self._urls = urls
        self._options = dict(storage_options or {})
        self._arrays: tuple[Any, ...] | None = None
        lengths = [int(array.shape[0]) for array in self._opened()]
        if len(set(lengths)) != 1:
            raise ValueError(f"ZarrSource: expected arrays of one length, got {lengths} for {list(urls)}")

    def __getstate__(self) -> dict[str, Any]:
        return {"_urls": self._urls, "_options": self._options, "_arrays": None}

    def __len__(self) -> int:
        return int(self._opened()[0].shape[0])

    def read(self, start: int, stop: int) -> Batch:
        return tuple(torch.from_numpy(np.ascontiguousarray(array[start:stop])) for array in self._opened())

    def _opened(self) -> tuple[Any, ...]:
        if self._arrays is None:
            import zarr

            options = self._options or None
            self._arrays = tuple(
                zarr.open_array(url, mode="r", storage_options=options) for url in self._urls
            )
        return self._arrays


class TorchDatasetSource:
    """A map-style torch dataset; examples are collated as a DataLoader would."""

    def __init__(self, dataset: Any) -> None:
        _require_random_access(dataset, "TorchDatasetSource")
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, start: int, stop: int) -> Batch:
        return default_collate([self._dataset[index] for index in range(start, stop)])


class HuggingFaceSource:
    """A Hugging Face dataset with a torch format; a batch is a dict of the chosen columns."""

    def __init__(self, dataset: Any, columns: Sequence[str] | None = None) -> None:
        _require_random_access(dataset, "HuggingFaceSource")
        self._dataset = dataset.with_format("torch", columns=list(columns) if columns else None)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, start: int, stop: int) -> Batch:
        rows: Mapping[str, Any] = self._dataset[start:stop]
        return {name: torch.as_tensor(column) for name, column in rows.items()}


def _require_random_access(dataset: Any, adapter: str) -> None:
    if not (callable(getattr(dataset, "__getitem__", None)) and callable(getattr(dataset, "__len__", None))):
        raise ValueError(
            f"{adapter}: expected a data set with len() and [index], got {type(dataset).__name__}, which can "
            f"only be iterated over; write a class with `__len__` and `read(start, stop)`, or store the "
            f"examples as arrays once and use ZarrSource"
        )


def check_source(source: Any, field: str) -> DataSource:
    """`source` if it is a DataSource with examples in it; else an error that names the adapter to use."""
    if callable(getattr(source, "read", None)) and callable(getattr(type(source), "__len__", None)):
        if _length(source, field) == 0:
            raise PermanentError(Reason.INVALID_DATA, f"{field}: expected examples, got an empty data set")
        return source
    kind = type(source).__name__
    if callable(getattr(type(source), "__getitem__", None)) and callable(getattr(source, "__len__", None)):
        cure = "wrap it in influence_job.data.TorchDatasetSource (or HuggingFaceSource, ArraySource)"
    else:
        cure = (
            "data that can only be iterated over cannot be read in ranges: write a class with `__len__` and "
            "`read(start, stop)`, or store it as arrays and use influence_job.data.ZarrSource"
        )
    raise PermanentError(
        Reason.INVALID_TASK,
        f"{field}: expected a DataSource with len() and read(start, stop), got {kind}; {cure}",
    )


def _length(source: Any, field: str) -> int:
    try:
        return len(source)
    except OF_THE_TASK as error:
        raise PermanentError(
            Reason.INVALID_TASK,
            f"InfluenceTask.{field}: expected a number of examples from len(), but it raised "
            f"{type(error).__name__}: {error}; correct __len__ of {type(source).__name__}",
        ) from error


def read_batch(
    source: DataSource, field: str, start: int, stop: int, device: torch.device
) -> tuple[Batch, str]:
    """Examples `start` to `stop` on `device`, and the digest of what was read.

    Tensors are copied into memory that torch allocated: the alignment of foreign memory changes bits.

    Raises:
        PermanentError: a number of examples other than asked for, or leaves that disagree.
    """
    try:
        batch = source.read(start, stop)
    except OF_THE_TASK as error:
        raise ReadError(_locate(source, field, start, stop, error)) from error
    try:
        count = batch_size(batch)
    except ValueError as error:
        raise PermanentError(Reason.INVALID_DATA, f"{field}.read({start}, {stop}): {error}") from error
    if count != stop - start:
        raise PermanentError(
            Reason.INVALID_DATA,
            f"{field}.read({start}, {stop}): expected {stop - start} examples, got {count}; "
            f"len({field}) and read() must agree",
        )
    owned = pytree.tree_map(lambda leaf: leaf.detach().clone(memory_format=torch.contiguous_format), batch)
    digest = batch_digest(owned)
    return pytree.tree_map(lambda leaf: leaf.to(device), owned), digest


def _locate(source: DataSource, field: str, start: int, stop: int, error: BaseException) -> str:
    """The sentence for a read that raised, with the one example that raises if there is one."""
    where = f"{field} examples {start} to {stop - 1}"
    for index in range(start, stop):
        try:
            source.read(index, index + 1)
        except OF_THE_TASK as single:
            where, error = f"{field} example {index}", single
            break
    return f"{where}: reading raised {type(error).__name__}: {error}"


def batch_digest(batch: Batch) -> str:
    """Digest of a CPU batch: structure, dtypes, shapes and every byte."""
    leaves, structure = pytree.tree_flatten(batch)
    state = hashlib.blake2b(str(structure).encode(), digest_size=16)
    for leaf in leaves:
        state.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
        state.update(tensor_bytes(leaf))
    return state.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in C order, without a copy; bfloat16 included, which numpy lacks."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def data_identity(source: DataSource, field: str, version: str | None) -> dict[str, Any]:
    """What a job compares to know the same data again: its version, else a sample of it, never all."""
    length = len(source)
    if version is not None:
        return {"length": length, "version": version}
    digests = hashlib.blake2b(digest_size=16)
    first, _ = read_batch(source, field, 0, 1, torch.device("cpu"))
    for index in identity_indices(length):
        _, digest = read_batch(source, field, index, index + 1, torch.device("cpu"))
        digests.update(digest.encode())
    leaves = pytree.tree_leaves(first)
    return {
        "length": length,
        "shapes": [list(leaf.shape[1:]) for leaf in leaves],
        "dtypes": [str(leaf.dtype) for leaf in leaves],
        "examples": digests.hexdigest(),
    }


def identity_indices(length: int) -> list[int]:
    """The fixed examples that stand for `length` of them: evenly spaced, first and last among them."""
    count = min(IDENTITY_EXAMPLES, length)
    if count == 1:
        return [0]
    return sorted({round(i * (length - 1) / (count - 1)) for i in range(count)})
