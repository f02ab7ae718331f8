"""Zarr v3 arrays as this library writes them: checksummed chunks, nothing unfinished that reads as zero.

Who writes blocks, and from where, is the caller's matter: the lazy sequences one after the other,
`write_zarr` one Dask task per chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.errors import ContainsArrayError
from zarr.storage import StoreLike


def create_array(
    url: StoreLike,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    overwrite: bool,
    storage_options: Mapping[str, Any] | None = None,
) -> zarr.Array[Any]:
    """A new array at `url`: one storage object per chunk, crc32c behind each, no compression.

    Chunks not yet written read as NaN (0 for integers). Chunks of zeros are written like any other, so
    that a missing object always means missing work.

    Raises:
        ContainsArrayError: there is an array already and `overwrite` is False.
    """
    return zarr.create_array(
        url,
        shape=shape,
        chunks=tuple(max(1, extent) for extent in chunks),
        dtype=dtype,
        compressors=Crc32cCodec(),
        fill_value=np.nan if dtype.kind == "f" else 0,
        zarr_format=3,
        overwrite=overwrite,
        storage_options=dict(storage_options) if storage_options else None,
        config={"write_empty_chunks": True},
    )


def require_absent(url: StoreLike) -> None:
    """Refuses a place that holds an array, before anything is computed for it.

    Raises:
        ContainsArrayError: naming the place and the cure.
    """
    try:
        zarr.open_array(url, mode="r")
    except (FileNotFoundError, KeyError):
        return
    raise ContainsArrayError(f"{url}: expected no array there, found one; pass overwrite=True to replace it")
