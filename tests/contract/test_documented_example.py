"""What pyDVL's users write for the Dask calculator runs here after replacing the prefix of the imports.

The steps, names and arguments are those that pyDVL 0.10 documents, with the argument's name of 0.9; the
data is small and the result is compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from influence_calculator import DaskInfluenceCalculator, SequentialInfluenceCalculator
from influence_calculator.torch import CgInfluence
from influence_calculator.torch.util import (
    NestedTorchCatAggregator,
    TorchNumpyConverter,
    torch_dataset_to_dask_array,
)


def _sets() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    torch.manual_seed(0)
    x, x_test = torch.randn(30, 4), torch.randn(12, 4)
    weight = torch.randn(4, 2)
    return nn.Linear(4, 2).eval(), TensorDataset(x, x @ weight), TensorDataset(x_test, x_test @ weight)


def test_the_documented_example_of_the_dask_calculator_runs(tmp_path: Path):
    model, train_data_set, test_data_set = _sets()
    loss = nn.functional.mse_loss
    train_dataloader = DataLoader(train_data_set, batch_size=10)
    with pytest.warns(DeprecationWarning, match="regularization"):
        infl_model = CgInfluence(model, loss, hessian_regularization=0.01)
    infl_model = infl_model.fit(train_dataloader)

    chunk_size = 10
    da_x, da_y = torch_dataset_to_dask_array(train_data_set, chunk_size=chunk_size)
    da_x_test, da_y_test = torch_dataset_to_dask_array(test_data_set, chunk_size=chunk_size)

    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        infl_calc = DaskInfluenceCalculator(
            infl_model, TorchNumpyConverter(device=torch.device("cpu")), client
        )
        da_influences = infl_calc.influences(da_x_test, da_y_test, da_x, da_y)
        assert da_influences.chunks == ((12,), (10, 10, 10))
        da_influences.to_zarr(str(tmp_path / "influences.zarr"))

    stored = zarr.open_array(str(tmp_path / "influences.zarr"), mode="r")[:]
    in_memory = infl_model.influences(*test_data_set.tensors, *train_data_set.tensors)
    assert np.allclose(stored, in_memory, rtol=1e-4, atol=1e-6)


def test_the_documented_example_of_the_sequential_calculator_runs(tmp_path: Path):
    model, train_data_set, test_data_set = _sets()
    train_dataloader = DataLoader(train_data_set, batch_size=10)
    test_dataloader = DataLoader(test_data_set, batch_size=10)
    infl_model = CgInfluence(model, nn.functional.mse_loss, regularization=0.01).fit(train_dataloader)

    infl_calc = SequentialInfluenceCalculator(infl_model)
    lazy_influences = infl_calc.influences(test_dataloader, train_dataloader)
    influences = lazy_influences.compute(aggregator=NestedTorchCatAggregator())
    lazy_influences.to_zarr(str(tmp_path / "influences.zarr"), TorchNumpyConverter())

    in_memory = infl_model.influences(*test_data_set.tensors, *train_data_set.tensors)
    assert torch.allclose(influences, in_memory, rtol=1e-4, atol=1e-6)
    assert np.array_equal(zarr.open_array(str(tmp_path / "influences.zarr"), mode="r")[:], influences.numpy())
