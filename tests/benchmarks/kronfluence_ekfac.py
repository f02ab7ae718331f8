"""Kronfluence's side: EK-FAC on two threads, run in Kronfluence's own virtual environment.

It gets what makes it fastest: all test examples in one batch, so that it passes over the training set once,
float32 throughout as it is by default, and a folder in memory if the machine has one for what it stores.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import clock
import torch
import workload
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model  # type: ignore[import-not-found]  # not installed here
from numpy import ndarray
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from workload import Data, Loaded, Workload

THREADS = 2
MEMORY = Path("/dev/shm")


class CrossEntropy(Task):  # type: ignore[misc]  # its base is not installed here
    """The workloads' loss; outputs are `[n, C]`, or `[n, C, S]` with tokens."""

    def compute_train_loss(self, batch: Data, model: nn.Module, sample: bool = False) -> Tensor:
        x, y = batch
        logits = model(x)
        if sample:
            p = logits.detach().movedim(1, -1).softmax(-1)
            y = torch.multinomial(p.flatten(0, -2), 1).view(y.shape)
        return workload.loss(logits, y)

    def compute_measurement(self, batch: Data, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def compute(given: Workload, loaded: Loaded) -> ndarray:
    task = CrossEntropy()
    train, test = TensorDataset(*loaded.train), TensorDataset(*loaded.test)
    model = prepare_model(loaded.model, task)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        analyzer = Analyzer("bench", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors(
            "ekfac",
            train,
            per_device_batch_size=given.chunk,
            factor_args=FactorArguments(strategy="ekfac"),
        )
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="ekfac",
            query_dataset=test,
            train_dataset=train,
            per_device_query_batch_size=given.test,
            per_device_train_batch_size=given.chunk,
            score_args=ScoreArguments(damping_factor=given.regularization),
        )
        influences: ndarray = analyzer.load_pairwise_scores("scores")["all_modules"].numpy()
    return influences


if __name__ == "__main__":
    options = clock.options()
    clock.ready("kronfluence", THREADS)
    options.measure(lambda _: options.workload.load(options.folder), partial(compute, options.workload))
