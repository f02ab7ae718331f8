"""A fit on Dask workers, from chunks: the fit of one process, whoever computes and whoever dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client, get_worker
from torch import Tensor, nn
from torch.nn import functional as F

from influence_calculator import (
    DaskInfluenceCalculator,
    DisableClientSingleThreadCheck,
    EkfacInfluence,
    NotFittedException,
    TorchNumpyConverter,
    UnalignedChunksError,
)
from influence_calculator.chunk_tasks import WorkerSide
from influence_calculator.dask_fit import chunk_sums, finished
from influence_calculator.maths.objective import micro_batches
from influence_calculator.torch import base
from influence_models import MODELS, TRANSPOSED, WORDS, arrays, batches
from model_cases import CONV2D, MLP, ModelCase

NEEDING_DATA = ("cg", "lissa in parts", "inverse harmonic mean")
FITTED_IN_PARTS = sorted(set(MODELS) - set(NEEDING_DATA))
CASES = [
    *((method, case) for method in FITTED_IN_PARTS for case in (MLP, CONV2D)),
    *(("ekfac", case) for case in (TRANSPOSED, WORDS)),
]


def uneven(x: Tensor, y: Tensor) -> tuple[da.Array, da.Array]:
    """Chunks of several lengths, one of them empty."""
    lengths = (7, 0, 2, 3, len(x) - 12)
    return tuple(da.from_array(v.numpy(), chunks=(lengths, *v.shape[1:])) for v in (x, y))  # type: ignore[return-value]


def state_of(model: Any) -> dict[tuple[str, str, str], np.ndarray]:
    """What the fit left, by pass, unit and name."""
    return {
        (step, unit, name): value.numpy()
        for step, units in model._state.items()
        for unit, values in units.items()
        for name, value in values.items()
    }


def fitted(client: Client, model: Any, x: da.Array, y: da.Array) -> Any:
    DaskInfluenceCalculator(model, TorchNumpyConverter(), client).fit(x, y)
    return model


@pytest.mark.parametrize(("method", "case"), CASES)
def test_it_is_the_fit_of_one_process(client: Client, method: str, case: ModelCase):
    x, y = case.train()
    torch.manual_seed(0)  # of tracin's checkpoints
    alone = MODELS[method](case).fit(batches(x, y, 6))
    torch.manual_seed(0)
    calculator = DaskInfluenceCalculator(MODELS[method](case), TorchNumpyConverter(), client)
    assert calculator.fit(*uneven(x, y)) is calculator
    assert calculator.influence_function_model.is_fitted
    expected = alone.influences(*case.test(), x, y).numpy()
    found = calculator.influences(*arrays(*case.test(), 2), *arrays(x, y, 5)).compute()
    assert np.abs(found - expected).max() < 1e-9 * np.abs(expected).max()


@pytest.fixture(scope="module")
def lone_worker() -> Iterator[Client]:
    with Client(n_workers=1, threads_per_worker=1, dashboard_address=None, set_as_default=False) as other:
        yield other


@pytest.mark.parametrize("method", ["direct", "ekfac", "arnoldi", "nystroem"])
def test_the_numbers_do_not_depend_on_the_workers(client: Client, lone_worker: Client, method: str):
    two = fitted(client, MODELS[method](MLP), *arrays(*MLP.train(), 4))
    one = fitted(lone_worker, MODELS[method](MLP), *arrays(*MLP.train(), 4))
    first, second = state_of(one), state_of(two)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_a_chunk_may_be_too_large_to_be_differentiated_at_once(monkeypatch: pytest.MonkeyPatch):
    x, y = MLP.train()
    model = MODELS["ekfac"](MLP)
    covariance, _ = model.begin_fit(x, y)
    whole = model.fit_sums(covariance, {}, 3, x, y)
    seen: list[int] = []
    monkeypatch.setattr(base, "GRADIENT_BYTES", 4 * 8 * max(p.numel() for p in model.model.parameters()))
    monkeypatch.setattr(base, "micro_batches", lambda *given: seen.append(given[1]) or micro_batches(*given))
    torch.testing.assert_close(model.fit_sums(covariance, {}, 3, x, y), whole)
    assert seen == [4]


class Counted(TorchNumpyConverter):
    """Counts the arrays that become tensors."""

    count = 0

    def from_numpy(self, x: np.ndarray) -> Tensor:
        self.count += 1
        return super().from_numpy(x)


def test_what_a_pass_left_is_converted_once_per_worker_and_a_unit_alone_with_what_is_its_own():
    x, y = MLP.train()
    model = MODELS["ekfac"](MLP)
    covariance, correction = model.begin_fit(x, y)
    side = WorkerSide(model, Counted(), model.factor_dtype)
    sums = chunk_sums(side, covariance, {}, 0, x.numpy(), y.numpy())
    units = model.fit_units(covariance)
    state = {covariance.name: {u: finished(side, covariance, {}, u, sums[u], len(x)) for u in units}}
    left = sum(len(arrays) for arrays in state[covariance.name].values())
    side.converter.count = 0
    twice = [chunk_sums(side, correction, state, 0, x.numpy(), y.numpy()) for _ in range(2)]
    assert side.converter.count == left + 2 * 2
    side.converter.count = 0
    finished(side, correction, state, units[0], twice[0][units[0]], len(x))
    assert side.converter.count == len(state[covariance.name][units[0]]) + len(twice[0][units[0]])


def test_a_second_fit_replaces_the_first(client: Client):
    x, y = MLP.train()
    calculator = DaskInfluenceCalculator(MODELS["ekfac"](MLP), TorchNumpyConverter(), client)
    half = calculator.fit(*arrays(x[:10], y[:10], 4)).influences(*arrays(x, y, 9)).compute()
    whole = calculator.fit(*arrays(x, y, 4)).influences(*arrays(x, y, 9)).compute()
    expected = MODELS["ekfac"](MLP).fit(batches(x, y, 23)).influences(x, y).numpy()
    assert np.abs(half - expected).max() > 1e-3 * np.abs(expected).max()
    assert np.abs(whole - expected).max() < 1e-9 * np.abs(expected).max()


class DiesOnce:
    """Cross-entropy, in whose third evaluation on any worker the process is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self._on_a_worker():
            number = len(list(self.folder.iterdir()))
            (self.folder / str(number)).touch()
            if number == 2:
                os.kill(os.getpid(), 9)
        return F.cross_entropy(outputs, labels)

    @staticmethod
    def _on_a_worker() -> bool:
        try:
            get_worker()
        except ValueError:
            return False
        return True


def test_a_worker_that_dies_costs_nothing_but_time(tmp_path: Path):
    x, y = MLP.train()
    expected = EkfacInfluence(MLP.model(), True, 0.1, loss=F.cross_entropy, expectation="empirical")
    model = EkfacInfluence(MLP.model(), True, 0.1, loss=DiesOnce(tmp_path), expectation="empirical")
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None, set_as_default=False) as own:
        fitted(own, model, *arrays(x, y, 4))
    assert len(list(tmp_path.iterdir())) > 3, "nobody died"
    first, second = state_of(model), state_of(expected.fit(batches(x, y, 4)))
    assert all(
        np.allclose(first[key], second[key], rtol=1e-9, atol=1e-12)
        for key in second
        if "vectors" not in key[2]
    )


@pytest.mark.parametrize("method", NEEDING_DATA)
def test_a_method_that_reads_its_data_whenever_it_solves_is_refused(client: Client, method: str):
    with pytest.raises(ValueError, match=r"reads its training data whenever it solves.*model\.fit\(loader\)"):
        fitted(client, MODELS[method](MLP), *arrays(*MLP.train(), 4))


def test_what_cannot_be_differentiated_is_refused_before_the_workers_see_it(client: Client):
    network = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    model = EkfacInfluence(network, True, 0.1)
    with pytest.raises(ValueError, match=r"dropout|eval"):
        fitted(
            client,
            model,
            da.zeros((8, 4), chunks=(4, 4), dtype=np.float32),
            da.zeros(8, chunks=4, dtype=np.int64),
        )
    assert not model.is_fitted


def test_no_examples_no_client_and_unaligned_chunks_are_refused(client: Client):
    x, y = arrays(*MLP.train(), 4)
    with pytest.raises(ValueError, match="at least one training example"):
        fitted(client, MODELS["ekfac"](MLP), x[:0], y[:0])
    with pytest.raises(UnalignedChunksError):
        fitted(client, MODELS["ekfac"](MLP), x, y.rechunk(5))
    local = DaskInfluenceCalculator(
        MODELS["ekfac"](MLP), TorchNumpyConverter(), DisableClientSingleThreadCheck
    )
    with pytest.raises(ValueError, match=r"synchronous distributed\.Client"):
        local.fit(x, y)
    with pytest.raises(NotFittedException):
        local.influences(x, y)


def test_an_example_that_is_not_finite_is_named_by_its_place_in_the_whole(client: Client):
    x, y = MLP.train()
    x = x.clone()
    x[17, 0] = torch.nan
    with pytest.raises(ValueError, match="training example 17"):
        fitted(client, MODELS["ekfac"](MLP), *arrays(x, y, 4))
