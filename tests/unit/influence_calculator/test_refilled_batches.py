"""Data whose batches share memory: each is seen as it was when it was read, whatever is read after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import oracle
from influence_calculator.maths.training_batches import KeptBatches
from influence_calculator.torch import functional
from influence_calculator.torch.batch_operation import GaussNewtonBatchOperation
from influence_calculator.torch.operator import GaussNewtonOperator, HessianOperator, LissaOperator
from influence_calculator.torch.training_data import IterableTrainingData
from influence_models import MODELS
from model_cases import MLP
from references import reference

X, Y = MLP.train()
IN_NUMPY = X.numpy()
CPU = torch.device("cpu")


class Refilled:
    """Batches of at most 5 examples in one buffer, as data loaders of other libraries yield them."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = torch.empty(5, *X.shape[1:], dtype=X.dtype), torch.empty(5, dtype=Y.dtype)
        for start in range(0, len(X), 5):
            n = min(5, len(X) - start)
            x[:n], y[:n] = X[start : start + n], Y[start : start + n]
            yield x[:n], y[:n]


class InNumpy:
    """The same in a buffer that torch does not see filled."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x = np.empty_like(IN_NUMPY[:5])
        for start in range(0, len(IN_NUMPY), 5):
            part = IN_NUMPY[start : start + 5]
            x[: len(part)] = part
            yield torch.from_numpy(x)[: len(part)], Y[start : start + 5]


class _Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(Refilled())


def collating() -> DataLoader[Any]:
    """A loader that collates into one buffer."""
    x, y = torch.empty(5, *X.shape[1:], dtype=X.dtype), torch.empty(5, dtype=Y.dtype)

    def collate(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        for place, (features, label) in enumerate(examples):
            x[place], y[place] = features, label
        return x[: len(examples)], y[: len(examples)]

    return DataLoader(TensorDataset(X, Y), batch_size=5, collate_fn=collate)


SOURCES = {
    "an iterable": Refilled,
    "a loader that does not collate": lambda: DataLoader(_Streamed(), batch_size=None),
    "a loader that collates by hand": collating,
}


@pytest.fixture(params=SOURCES)
def data(request: pytest.FixtureRequest) -> Iterable[Any]:
    source: Iterable[Any] = SOURCES[request.param]()
    return source


def listed() -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(5), Y.split(5), strict=True))


@pytest.mark.parametrize("method", ["direct", "cg", "ekfac", "lissa in parts", "inverse harmonic mean"])
def test_a_fit_sees_every_batch_as_it_was(method: str, data: Iterable[Any]) -> None:
    model = MODELS[method](MLP).fit(listed())
    expected = model.influences(*MLP.test(), X, Y)
    found = MODELS[method](MLP).fit(data).influences(*MLP.test(), X, Y)
    oracle.assert_close(found, expected, 1e-10)


def test_matrices_and_operators_do_too(data: Iterable[Any]) -> None:
    model, identity = MLP.model(), torch.eye(60, dtype=torch.float64)
    curvature, fisher = (reference(MLP, mode).curvature for mode in ("hessian", "empirical_fisher"))
    oracle.assert_close(functional.hessian(model, MLP.loss, data), curvature, 1e-10)
    oracle.assert_close(functional.gauss_newton(model, MLP.loss, data), fisher, 1e-10)
    oracle.assert_close(HessianOperator(model, MLP.loss, data).apply(identity), curvature, 1e-10)
    oracle.assert_close(GaussNewtonOperator(model, MLP.loss, data).apply(identity), fisher, 1e-10)
    operation = GaussNewtonBatchOperation(model, MLP.loss)
    found, expected = (
        LissaOperator(operation, batches, 2.0, maxiter=4, warn_on_max_iteration=False).apply(identity[:2])
        for batches in (data, listed())
    )
    oracle.assert_close(found, expected, 1e-10)


def test_a_loss_over_all_batches_does_too() -> None:
    model = MLP.model()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = functional.create_empirical_loss_function(model, MLP.loss, InNumpy())
    gradient = torch.func.grad(loss)(parameters)
    found = torch.cat([value.flatten() for value in gradient.values()])
    oracle.assert_close(found, reference(MLP, "empirical_fisher").train.mean(0), 1e-10)


@pytest.mark.parametrize(
    ("source", "copies"),
    [(listed(), False), (tuple(listed()), False), ((pair for pair in listed()), True)],
    ids=["list", "tuple", "iterator"],
)
def test_what_stays_as_it_is_is_not_copied(source: Iterable[Any], copies: bool) -> None:
    kept = list(KeptBatches(IterableTrainingData(source, CPU, passes=1)).batches())
    shared = {x.untyped_storage().data_ptr() == X.untyped_storage().data_ptr() for _, (x, _) in kept}
    assert shared == {not copies}


def test_of_a_loader_that_collates_as_torch_does_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    data = IterableTrainingData(DataLoader(TensorDataset(X, Y), batch_size=5), CPU, passes=1)
    monkeypatch.setattr(Tensor, "clone", None)
    assert len(list(data.batches())) == 5
