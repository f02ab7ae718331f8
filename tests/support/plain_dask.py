"""The digits job without an operator of ours: the program that a DaskJob runs in `dask_jobs`.

What somebody would write who has dask-kubernetes and the library: connect, fit, compute the matrix chunk by
chunk into the bucket. No progress, nothing to resume from, nothing encrypted.
"""

from __future__ import annotations

import json
import os

from distributed import Client
from torch.utils.data import DataLoader, TensorDataset

from influence_calculator import (
    DaskInfluenceCalculator,
    TorchNumpyConverter,
    torch_dataset_to_dask_array,
    write_zarr,
)
from influence_calculator.torch import EkfacInfluence
from influence_job.examples import digits

CHUNK = 100


def main() -> None:
    """Writes the influences to OUTPUT_URL."""
    task = digits.task(hidden=16)
    train, test = (TensorDataset(*source.read(0, len(source))) for source in (task.train, task.test))
    model = EkfacInfluence(task.model, update_diagonal=True, regularization=0.01)
    model = model.fit(DataLoader(train, batch_size=CHUNK))
    with Client() as client:  # DASK_SCHEDULER_ADDRESS
        client.wait_for_workers(int(os.environ["WORKERS"]))
        calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
        arrays = [
            array
            for dataset in (test, train)
            for array in torch_dataset_to_dask_array(dataset, chunk_size=CHUNK)
        ]
        write_zarr(
            calculator.influences(*arrays),
            os.environ["OUTPUT_URL"],
            storage_options=json.loads(os.environ["STORAGE_OPTIONS"]),
        )


if __name__ == "__main__":
    main()
