"""What a graph is refused for names the argument, and the cure can be carried out."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch

from counting_model import FEATURES, CountingModel
from influence_calculator import (
    DaskInfluenceCalculator,
    DisableClientSingleThreadCheck,
    InvalidDimensionChunksError,
    TorchNumpyConverter,
    UnalignedChunksError,
)

VALUES = np.random.default_rng(0).random((6, FEATURES), dtype=np.float32)


@pytest.fixture
def calculator() -> DaskInfluenceCalculator:
    return DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), DisableClientSingleThreadCheck)


def pair(chunk: int = 2) -> tuple[da.Array, da.Array]:
    return da.from_array(VALUES, chunks=(chunk, -1)), da.from_array(VALUES[:, 0], chunks=chunk)


@pytest.mark.parametrize(("position", "field"), list(enumerate(["x_test", "y_test", "x", "y"])))
def test_unaligned_chunks_are_told_of_the_side_that_has_them(
    calculator: DaskInfluenceCalculator, position: int, field: str
) -> None:
    sides: list[Any] = [*pair(), *pair()]
    suffix = "_test" if "test" in field else ""
    sides[position] = sides[position].rechunk({0: 3})
    with pytest.raises(UnalignedChunksError, match=rf"^x{suffix} and y{suffix}: .* y{suffix}\.rechunk"):
        calculator.influences(*sides)


def test_rechunking_is_no_cure_where_lengths_differ(calculator: DaskInfluenceCalculator) -> None:
    x, y = pair()
    with pytest.raises(UnalignedChunksError, match="got 6 in x_test and 5 in y_test; give") as caught:
        calculator.influences(x, y[:5], x, y)
    assert "rechunk" not in str(caught.value)


@pytest.mark.parametrize("field", ["x_test", "x", "z_test_factors"])
def test_chunked_features_are_told_of_the_argument_that_has_them(
    calculator: DaskInfluenceCalculator, field: str
) -> None:
    x, y = pair()
    cut = x.rechunk((2, 1))
    ask = {
        "x_test": lambda: calculator.influences(cut, y, x, y),
        "x": lambda: calculator.influences(x, y, cut, y),
        "z_test_factors": lambda: calculator.influences_from_factors(cut, x, y),
    }
    with pytest.raises(InvalidDimensionChunksError, match=rf"^{field}: .*{field}\.rechunk"):
        ask[field]()


@pytest.mark.parametrize("array", [VALUES, torch.from_numpy(VALUES)], ids=["numpy", "torch"])
def test_what_is_no_dask_array_is_refused_with_a_cure_that_works(
    calculator: DaskInfluenceCalculator, array: Any
) -> None:
    made = r"expected a dask\.array\.Array, got .*make one: (da\.from_array\(.*\)), or by"
    for call, field in (
        (lambda: calculator.influences(array, pair()[1]), "x_test"),
        (lambda: calculator.influences(*pair(), pair()[0], array), "y"),
        (lambda: calculator.influences_from_factors(array, *pair()), "z_test_factors"),
        (lambda: calculator.fit(array, pair()[1]), "x"),
    ):
        with pytest.raises(ValueError, match=f"^{field}: {made}"):
            call()
    cured = da.from_array(np.asarray(array), chunks=(256, *array.shape[1:]))
    assert calculator.influence_factors(cured, pair(6)[1]).shape == (6, FEATURES)


def test_an_argument_that_is_missing_is_refused_by_name(calculator: DaskInfluenceCalculator) -> None:
    with pytest.raises(ValueError, match=r"^x_test: expected a dask\.array\.Array, got NoneType; give"):
        calculator.influences(None, pair()[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [object, str, bytes, np.longdouble, np.clongdouble])
def test_numbers_that_no_tensor_has_are_refused_before_anything_is_computed(
    calculator: DaskInfluenceCalculator, dtype: Any
) -> None:
    x, y = pair()
    with pytest.raises(ValueError, match=r"^y: expected numbers .*y\.astype"):
        calculator.influences(x, y, x, y.astype(dtype))
    with pytest.raises(ValueError, match=r"^z_test_factors: expected numbers"):
        calculator.influences_from_factors(x.astype(dtype), x, y)


def test_arrays_that_numpy_lays_out_in_another_way_are_data(calculator: DaskInfluenceCalculator) -> None:
    """Turned around, and of foreign byte order."""
    (x, y), turned = pair(), slice(None, None, -1)
    expected = calculator.influences(x, y).compute(scheduler="synchronous")
    found = calculator.influences(x[turned], y[turned], x.astype(">f4"), y.astype(">f4"))
    assert np.allclose(found.compute(scheduler="synchronous")[turned], expected)
