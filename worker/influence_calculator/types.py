"""The words that all modules of the public library share."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from influence_calculator.errors import UnsupportedInfluenceModeException

TensorType = TypeVar("TensorType")
"""A framework's tensor."""

DataLoaderType = TypeVar("DataLoaderType")
"""What a framework's models are fitted to."""


class InfluenceMode(StrEnum):
    """Which change of the training set the influence answers.

    Up: more weight on a training example, `z_test · g_train`, `[T, N]`. Positive means that the example
    helps: removing it raises the test loss by about score / N. Perturbation: a changed training input,
    `∇x (z_test · g_train(x))`, `[T, N, F...]`; moving x along it lowers the test loss.
    """

    Up = "up"
    Perturbation = "perturbation"


def as_mode(mode: InfluenceMode | str) -> InfluenceMode:
    """The mode of that value.

    Raises:
        UnsupportedInfluenceModeException: no such mode.
    """
    try:
        return InfluenceMode(mode)
    except ValueError as error:
        raise UnsupportedInfluenceModeException(mode) from error


__all__ = ["DataLoaderType", "InfluenceMode", "TensorType", "UnsupportedInfluenceModeException", "as_mode"]
