"""Data without examples and models without numbers: answers of no rows, or a refusal with the cure."""

from __future__ import annotations

import dask.array as da
import pytest
import torch
from torch import Tensor

from influence_calculator import (
    DaskInfluenceCalculator,
    DisableClientSingleThreadCheck,
    InfluenceMode,
    TorchNumpyConverter,
)
from influence_calculator.torch.base import TorchInfluenceFunctionModel
from influence_models import MODELS
from model_cases import CONV2D, MLP, ModelCase

CASES = {"mlp": MLP, "conv2d": CONV2D}


def batches(case: ModelCase) -> list[tuple[Tensor, Tensor]]:
    x, y = case.train()
    return list(zip(x.split(5), y.split(5), strict=True))


def none_of(case: ModelCase) -> tuple[Tensor, Tensor]:
    x, y = case.train()
    return x[:0], y[:0]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> ModelCase:
    return CASES[request.param]


@pytest.fixture(params=MODELS)
def unfitted(request: pytest.FixtureRequest, case: ModelCase) -> TorchInfluenceFunctionModel:
    model: TorchInfluenceFunctionModel = MODELS[request.param](case)
    return model


def test_no_test_example_has_no_row_and_no_training_example_no_column(
    unfitted: TorchInfluenceFunctionModel, case: ModelCase
) -> None:
    """In both modes, and for every function that takes examples."""
    model, none, test = unfitted.fit(batches(case)), none_of(case), case.test()
    n, features = len(test[0]), case.features
    assert model.influences(*none, *test).shape == (0, n)
    assert model.influences(*test, *none).shape == (n, 0)
    assert model.influences(*none).shape == (0, 0)
    assert model.influences(*none, *test, mode=InfluenceMode.Perturbation).shape == (0, n, *features)
    assert model.influences(*test, *none, mode=InfluenceMode.Perturbation).shape == (n, 0, *features)
    assert model.influence_factors(*none).shape == (0, model.n_parameters)
    assert model.self_influences(*none).shape == (0,)
    assert model.influences_from_left(model.expanded(model.left(*none)), *test).shape == (0, n)
    factors = model.influence_factors(*none)
    assert model.influences_from_factors(factors, *test).shape == (0, n)
    assert model.influences_from_left(model.left_of_factors(factors), *test).shape == (0, n)


def test_chunks_without_examples_change_nothing(
    unfitted: TorchInfluenceFunctionModel, case: ModelCase
) -> None:
    """In the training data of a fit, first and between others, and in what the Dask calculator is given."""
    model, none, (x, y) = unfitted.fit(batches(case)), none_of(case), case.test()
    expected = model.influences(x, y)
    again = model.fit([none, *batches(case)[:2], none, *batches(case)[2:]])
    torch.testing.assert_close(again.influences(x, y), expected, rtol=1e-9, atol=1e-12)
    chunks = (3, 0, len(x) - 3)
    arrays = [
        da.from_array(values.numpy(), (chunks, *((extent,) for extent in values.shape[1:])))
        for values in (x, y)
    ]
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), DisableClientSingleThreadCheck)
    found = calculator.influences(*arrays).compute(scheduler="synchronous")
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-9, atol=1e-12)


def test_training_data_of_empty_batches_is_refused(
    unfitted: TorchInfluenceFunctionModel, case: ModelCase
) -> None:
    with pytest.raises(ValueError, match="data: expected at least one batch with an example, got none"):
        unfitted.fit([none_of(case), none_of(case)])


def test_a_model_on_the_meta_device_is_refused_with_the_cure(
    unfitted: TorchInfluenceFunctionModel, case: ModelCase
) -> None:
    unfitted.model.to("meta")
    with pytest.raises(ValueError, match=r"0\.weight.* on the meta device.*load_state_dict"):
        unfitted.fit(batches(case))
