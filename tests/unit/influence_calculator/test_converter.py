"""Every array of numbers that a tensor can hold becomes that tensor; memory is shared where it can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence_calculator import TorchNumpyConverter

VALUES = np.arange(12, dtype=np.float32).reshape(4, 3)
RECORDS = np.zeros(4, dtype=[("flag", "i1"), ("value", "f4")])
RECORDS["value"] = np.arange(4)


@pytest.mark.parametrize(
    "array",
    [
        VALUES[::-1],
        VALUES[:, ::-1],
        VALUES.T[::-2],
        VALUES.astype(">f4"),
        np.arange(3).astype(">i8"),
        RECORDS["value"],
    ],
    ids=["rows turned", "columns turned", "steps back", "big-endian", "big-endian integers", "field"],
)
def test_values_do_not_depend_on_how_numpy_lays_them_out(array: np.ndarray) -> None:
    tensor = TorchNumpyConverter().from_numpy(array)
    assert np.array_equal(tensor.numpy(), array)
    assert tensor.numpy().dtype == array.dtype.newbyteorder("=")


def test_memory_is_shared_unless_it_must_not_be() -> None:
    own, read_only = VALUES.copy(), VALUES.copy()
    read_only.flags.writeable = False
    TorchNumpyConverter().from_numpy(own[:, ::2])[0, 0] = 7
    TorchNumpyConverter().from_numpy(read_only)[0, 0] = 7
    assert own[0, 0] == 7
    assert read_only[0, 0] == 0


def test_half_precision_that_numpy_lacks_becomes_single() -> None:
    assert TorchNumpyConverter().to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
