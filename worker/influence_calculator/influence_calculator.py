"""The calculators, under the module path that pyDVL has them."""

from influence_calculator.dask_calculator import DaskInfluenceCalculator, DisableClientSingleThreadCheck
from influence_calculator.errors import (
    InvalidDimensionChunksError,
    ThreadSafetyViolationError,
    UnalignedChunksError,
)
from influence_calculator.sequential_calculator import SequentialInfluenceCalculator

__all__ = [
    "DaskInfluenceCalculator",
    "DisableClientSingleThreadCheck",
    "InvalidDimensionChunksError",
    "SequentialInfluenceCalculator",
    "ThreadSafetyViolationError",
    "UnalignedChunksError",
]
