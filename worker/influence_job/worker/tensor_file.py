"""Several named tensors as one object: an uncompressed .npz, whose entries carry checksums.

For what only jobs read: the stored model and partial sums of a fit. The same tensors give the same bytes.
"""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import torch
from torch import Tensor

from influence_job.errors import PermanentError, Reason

_DTYPES = "__dtypes__"


def pack(tensors: dict[str, Tensor]) -> bytes:
    """The tensors as bytes, in order."""
    arrays: dict[str, np.ndarray] = {}
    dtypes = []
    for index, (name, tensor) in enumerate(tensors.items()):
        own = tensor.detach().cpu().contiguous()
        dtypes.append([name, str(own.dtype).removeprefix("torch.")])
        # numpy has no bfloat16: what it cannot name travels as integers of the same width.
        arrays[str(index)] = (own.view(torch.int16) if own.dtype is torch.bfloat16 else own).numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **{_DTYPES: np.frombuffer(json.dumps(dtypes).encode(), np.uint8)}, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(data: bytes, what: str) -> dict[str, Tensor]:
    """The tensors, in memory that torch owns.

    Raises:
        PermanentError: STORE_CORRUPT if a checksum does not match.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            dtypes = json.loads(archive[_DTYPES].tobytes())
            tensors = {}
            for index, (name, dtype) in enumerate(dtypes):
                value = torch.from_numpy(archive[str(index)]).clone()
                tensors[name] = value.view(torch.bfloat16) if dtype == "bfloat16" else value
            return tensors
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise PermanentError(
            Reason.STORE_CORRUPT,
            f"{what}: expected an intact tensor file, got {error}; restore it, or delete the store",
        ) from error
