"""Each example's influence on itself: the definition at small λ, once per example, and no pair besides."""

from __future__ import annotations

from collections import Counter

import dask.array as da
import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from counting_model import CountingModel
from influence_calculator import (
    DaskInfluenceCalculator,
    DirectInfluence,
    DisableClientSingleThreadCheck,
    NotFittedException,
    RandomOrderError,
    SecondOrderMode,
    SequentialInfluenceCalculator,
    TorchNumpyConverter,
    torch_dataset_to_dask_array,
)
from influence_calculator.maths import region
from model_cases import CASES, MLP, TRAIN, ModelCase
from references import REGULARIZATIONS, reference

MODE = "generalized_gauss_newton"


def model(case: ModelCase, λ: float = 0.1) -> DirectInfluence:
    return DirectInfluence(case.model(), case.loss, λ, second_order_mode=SecondOrderMode(MODE))


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_it_is_the_product_of_an_examples_gradient_with_its_own_factors(case: ModelCase, λ: float) -> None:
    explicit = reference(case, MODE)
    expected = (oracle.factors(explicit.curvature, λ, explicit.train) * explicit.train).sum(1)
    found = model(case, λ).fit([case.train()]).self_influences(*case.train())
    oracle.assert_close(found, expected, explicit.bound(λ))


def test_each_example_is_differentiated_once_and_meets_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = model(MLP).fit([MLP.train()])
    monkeypatch.setattr(region, "influences", lambda *_: pytest.fail("pairs were scored"))
    seen: Counter[str] = Counter()
    fitted.model.register_forward_hook(lambda _, args, __: seen.update(examples=len(args[0])))
    fitted.self_influences(*MLP.train())
    assert seen["examples"] == TRAIN


def test_halves_are_summed_in_float32() -> None:
    left = {"": torch.ones(2, 4097, dtype=torch.bfloat16)}
    found = region.self_influences(left, left)
    assert found.dtype is torch.float32
    assert found.tolist() == [4097, 4097]  # bfloat16 has no such number


def test_a_model_of_ones_own_answers_by_the_diagonal() -> None:
    x, y = torch.tensor([[1.0, 2, 3], [0, 1, 0]]), torch.tensor([2.0, 3])
    assert CountingModel().self_influences(x, y).tolist() == [4 * 14, 9]


def test_a_sequential_calculator_takes_batches_in_their_order_alone() -> None:
    calculator = SequentialInfluenceCalculator(model(MLP).fit([MLP.train()]))
    data = torch.utils.data.TensorDataset(*MLP.train())
    with pytest.raises(RandomOrderError):
        calculator.self_influences(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))


def test_both_calculators_refuse_a_model_that_is_not_fitted() -> None:
    data = torch.utils.data.TensorDataset(*MLP.train())
    with pytest.raises(NotFittedException):
        SequentialInfluenceCalculator(model(MLP)).self_influences([MLP.train()])
    calculator = DaskInfluenceCalculator(model(MLP), TorchNumpyConverter(), DisableClientSingleThreadCheck)
    with pytest.raises(NotFittedException):
        calculator.self_influences(*torch_dataset_to_dask_array(data, chunk_size=5))


def test_a_chunk_without_examples_has_no_influences() -> None:
    x, y = (part.numpy() for part in MLP.train())
    chunked = [da.from_array(p, chunks=((0, 23), *((n,) for n in p.shape[1:]))) for p in (x, y)]
    fitted = model(MLP).fit([MLP.train()])
    calculator = DaskInfluenceCalculator(fitted, TorchNumpyConverter(), DisableClientSingleThreadCheck)
    found: Tensor = calculator.self_influences(*chunked).compute(scheduler="synchronous")
    assert np.allclose(found, fitted.self_influences(*MLP.train()))
