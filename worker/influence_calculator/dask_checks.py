"""What a graph is refused for before it is built: chunks, pairs of arrays, workers.

Everything here reads metadata; nothing computes.
"""

from __future__ import annotations

import math
from typing import Any

import dask.array as da
import numpy as np

from influence_calculator.errors import (
    InvalidDimensionChunksError,
    ThreadSafetyViolationError,
    UnalignedChunksError,
    UnknownChunksError,
)
from influence_calculator.types import InfluenceMode


def require_aligned_pair(x: da.Array, y: da.Array, suffix: str = "") -> None:
    """X and y hold the same examples in the same chunks, each example in one chunk.

    Raises:
        UnknownChunksError, UnalignedChunksError, InvalidDimensionChunksError: they do not.
        ValueError: as `require_rows`.
    """
    for field, array in ((f"x{suffix}", x), (f"y{suffix}", y)):
        require_rows(field, array)
    if x.chunks[0] != y.chunks[0]:
        raise UnalignedChunksError(x.chunks[0], y.chunks[0], suffix)


def require_rows(field: str, array: da.Array) -> None:
    """`array` holds numbers that a tensor can hold, chunked along its first dimension only, in known sizes.

    Raises:
        UnknownChunksError, InvalidDimensionChunksError: it is not.
        ValueError: it is no Dask array, has no dimension, or holds something else.
    """
    _require_dask_array(field, array)
    if array.dtype.kind in "OUS" or array.dtype in (np.longdouble, np.clongdouble):
        raise ValueError(
            f"{field}: expected numbers of a dtype that tensors have, got {array.dtype}; convert them, as "
            f"with {field}.astype('float32')"
        )
    if array.ndim == 0:
        raise ValueError(f"{field}: expected one entry per example, got an array without dimensions")
    require_known_chunks(field, array)
    if any(len(sizes) > 1 for sizes in array.chunks[1:]):
        raise InvalidDimensionChunksError(array.chunks, field)


def require_known_chunks(field: str, array: da.Array) -> None:
    """All chunk sizes are known before computing.

    Raises:
        UnknownChunksError: they are not.
        ValueError: it is no Dask array.
    """
    _require_dask_array(field, array)
    for sizes in array.chunks:
        if any(math.isnan(size) for size in sizes):
            raise UnknownChunksError(field, sizes)


def _require_dask_array(field: str, array: object) -> None:
    if isinstance(array, da.Array):
        return
    cure = (
        "give the array"
        if array is None
        else f"make one: da.from_array(np.asarray({field}), chunks=(256, *{field}.shape[1:])), or by "
        "torch_dataset_to_dask_array"
    )
    raise ValueError(f"{field}: expected a dask.array.Array, got {type(array).__name__}; {cure}")


def require_factors(factors: da.Array, n_parameters: int) -> None:
    """Factors are `[t, P]` floats.

    Raises:
        ValueError: another shape or dtype.
    """
    require_rows("z_test_factors", factors)
    if factors.ndim != 2 or factors.shape[1] != n_parameters:
        raise ValueError(
            f"z_test_factors: expected shape [t, {n_parameters}] (one column per parameter), got "
            f"{factors.shape}; pass what influence_factors of the same model returned"
        )
    if factors.dtype.kind != "f":
        raise ValueError(f"z_test_factors: expected floats, got {factors.dtype}; convert with astype(float)")


def require_differentiable(x: da.Array, mode: InfluenceMode) -> None:
    """Perturbation moves x, so x is made of floats.

    Raises:
        ValueError: it is not.
    """
    if mode is InfluenceMode.Perturbation and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"x: expected floats in mode perturbation, got {x.dtype}, which has no derivative; use mode Up"
        )


def require_single_threads(workers: dict[str, Any], is_thread_safe: bool) -> None:
    """Workers run one thread each, unless the model allows more.

    Raises:
        ThreadSafetyViolationError: some worker runs several.
    """
    if not is_thread_safe and any(worker["nthreads"] > 1 for worker in workers.values()):
        raise ThreadSafetyViolationError()
