"""Several named tensors as one object: an uncompressed .npz, whose entries carry checksums.

For what only jobs read: the stored model and partial sums of a fit. The same tensors give the same bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from influence_job.storage import arrays
from influence_job.storage.store import Store

_DTYPES = "__dtypes__"


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as bytes, in order; besides those, one at a time is on the host."""
    buffer = io.BytesIO()
    dtypes = [[name, str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()]
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        _write(archive, _DTYPES, np.frombuffer(json.dumps(dtypes).encode(), np.uint8))
        for index, tensor in enumerate(tensors.values()):
            _write(archive, str(index), _as_array(tensor))
    return buffer.getvalue()


def unpack(data: bytes, store: Store, path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name, each in memory that torch owns, one at a time, of what was read at `path`.

    Raises:
        PermanentError: STORE_CORRUPT if a checksum does not match.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            for index, (name, dtype) in enumerate(json.loads(archive[_DTYPES].tobytes())):
                value = torch.from_numpy(archive[str(index)]).clone()
                yield name, value.view(torch.bfloat16) if dtype == "bfloat16" else value
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise arrays.corrupt(store, path, f"expected an intact tensor file, got {error}") from error


def _as_array(tensor: Tensor) -> np.ndarray:
    # numpy has no bfloat16: what it cannot name travels as integers of the same width.
    own = tensor.detach().cpu().contiguous()
    return (own.view(torch.int16) if own.dtype is torch.bfloat16 else own).numpy()


def _write(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """One entry, as numpy.savez writes it."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
