"""In memory, batch after batch or on a cluster: one answer, and the same word on how solves ended."""

from __future__ import annotations

import time
import warnings

import dask
import numpy as np
import pytest
import torch
from distributed import Client
from torch import Tensor

from influence_calculator import (
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    DisableClientSingleThreadCheck,
    InfluenceMode,
    LissaInfluence,
    NestedTorchCatAggregator,
    SequentialInfluenceCalculator,
    SolverStatus,
    SolverWarning,
    TorchCatAggregator,
    TorchNumpyConverter,
)
from influence_models import CASES, FISHER, MODELS, WORDS, arrays, batches
from model_cases import MLP, ModelCase


@pytest.mark.parametrize(
    ("method", "case", "mode"),
    [*((*pair, mode) for pair in CASES for mode in InfluenceMode), ("ekfac", WORDS, InfluenceMode.Up)],
)
def test_distributed_sequential_and_in_memory_agree(
    client: Client, method: str, case: ModelCase, mode: InfluenceMode
):
    model = MODELS[method](case).fit(batches(*case.train(), 6))
    test, train = case.test(), case.train()
    in_memory = model.influences(*test, *train, mode)
    scale = float(in_memory.abs().max())

    sequential = SequentialInfluenceCalculator(model)
    sequential.group_bytes = 5 * 8 * (model.n_parameters + len(train[0]))
    lazy = sequential.influences(batches(*test, 2), batches(*train, 5), mode)
    assert float((lazy.compute(NestedTorchCatAggregator()) - in_memory).abs().max()) < 1e-10 * scale

    distributed = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    distributed.group_bytes = 5 * 8 * (model.n_parameters + 5)
    values = distributed.influences(*arrays(*test, 2), *arrays(*train, 5), mode=mode).compute()
    assert np.abs(values - in_memory.numpy()).max() < 1e-10 * scale


@pytest.mark.parametrize("method", MODELS)
def test_self_influences_are_the_diagonal_everywhere(client: Client, method: str):
    model = MODELS[method](MLP).fit(batches(*MLP.train(), 6))
    x, y = MLP.train()
    expected = model.influences(x, y, x, y).diagonal()
    scale = 1e-10 * float(expected.abs().max())
    assert float((model.self_influences(x, y) - expected).abs().max()) < scale

    lazy = SequentialInfluenceCalculator(model).self_influences(batches(x, y, 5))
    assert float((lazy.compute(TorchCatAggregator()) - expected).abs().max()) < scale

    distributed = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    values = distributed.self_influences(*arrays(x, y, 5))
    assert values.chunks == ((5, 5, 5, 5, 3),)
    assert np.abs(values.compute() - expected.numpy()).max() < scale


def test_a_test_chunk_longer_than_the_last_training_chunk_is_no_matter():
    """Mistake 3."""
    model = MODELS["direct"](MLP).fit(batches(*MLP.train(), 6))
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), DisableClientSingleThreadCheck)
    moved = calculator.influences(
        *arrays(*MLP.test(), 7), *arrays(*MLP.train(), 11), mode=InfluenceMode.Perturbation
    )
    assert moved.chunks[:2] == ((7,), (11, 11, 1))
    expected = model.influences(*MLP.test(), *MLP.train(), InfluenceMode.Perturbation)
    assert np.allclose(moved.compute(scheduler="synchronous"), expected)


def test_another_regularization_reaches_the_workers(client: Client):
    model = MODELS["direct"](MLP).fit(batches(*MLP.train(), 6))
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    test, train = arrays(*MLP.test(), 4), arrays(*MLP.train(), 8)
    calculator.influences(*test, *train).compute()
    model.with_regularization(1.0)
    values = calculator.influences(*test, *train).compute()
    assert np.allclose(values, model.influences(*MLP.test(), *MLP.train()))


def test_how_each_solve_ended_comes_back_from_the_cluster_with_the_factors(client: Client):
    model = CgInfluence(MLP.model(), MLP.loss, **FISHER, maxiter=3, warn_on_max_iteration=False)
    model.fit(batches(*MLP.train(), 6))
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    factors, report = dask.compute(*calculator.influence_factors_and_report(*arrays(*MLP.test(), 3)))
    solved = model.solve(*MLP.test())
    assert np.allclose(factors, model.layout.flatten(solved.left))
    assert report["status"].tolist() == solved.report.status.tolist()
    assert SolverStatus.MAX_ITERATIONS in report["status"]
    assert report["iterations"].tolist() == solved.report.iterations.tolist()
    assert np.allclose(report["residual"], solved.report.residual)


def test_a_solver_that_did_not_converge_on_a_worker_warns_the_client(client: Client):
    model = CgInfluence(MLP.model(), MLP.loss, **FISHER, maxiter=1).fit(batches(*MLP.train(), 6))
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calculator.influence_factors(*arrays(*MLP.test(), 7)).compute()
        deadline = time.monotonic() + 20  # the event takes its own way to the client
        while time.monotonic() < deadline and not any(w.category is SolverWarning for w in caught):
            time.sleep(0.02)
    (warning,) = [w for w in caught if w.category is SolverWarning]
    assert "right-hand sides did not converge" in str(warning.message)


def test_a_curvature_that_lissa_cannot_take_is_told_to_the_client_with_the_cure(client: Client):
    model = LissaInfluence(MLP.model(), MLP.loss, **FISHER, scale=0.1).fit(batches(*MLP.train(), 6))
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        factors, report = dask.compute(*calculator.influence_factors_and_report(*arrays(*MLP.test(), 7)))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and sum(w.category is SolverWarning for w in caught) < 2:
            time.sleep(0.02)
    assert np.isnan(factors).all()
    assert set(report["status"]) == {SolverStatus.NOT_FINITE}
    told = " ".join(str(w.message) for w in caught if w.category is SolverWarning)
    assert "7 of 7 right-hand sides did not converge (7 not_finite)" in told
    assert "a scale of 1.07" in told


def test_a_model_whose_class_lives_in_the_calling_program_reaches_the_workers(client: Client):
    class Doubling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MLP.model()

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    scale = 0.5
    model = DirectInfluence(
        Doubling().eval(), lambda outputs, y: scale * MLP.loss(outputs, y), regularization=1.0
    )
    model.fit(batches(*MLP.train(), 6))
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    values = calculator.influences(*arrays(*MLP.test(), 4)).compute()
    assert np.allclose(values, model.influences(*MLP.test()))
