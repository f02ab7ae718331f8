"""States that a model had while it was trained, for methods that sum over them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence_calculator.maths.finite import is_finite_number

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One state of a model, with the learning rate that its training had there.

    Raises:
        ValueError: a learning rate that is not a finite number above 0.
    """

    state: StateDict | str | os.PathLike[str] | Callable[[], StateDict]
    """A state dict of the whole model, the path of one from `torch.save`, or a function that returns one."""
    learning_rate: float = 1.0
    """η, the checkpoint's weight."""

    def __post_init__(self) -> None:
        if not (is_finite_number(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(
                f"learning_rate: expected a finite number above 0, got {self.learning_rate!r}; 1 weighs all "
                "checkpoints alike"
            )


class Checkpoints(nn.Module):
    """Copies of one model, each in the state of a checkpoint, and their learning rates.

    A module, so that all of it is moved, digested and stored as a model is.
    """

    learning_rates: Tensor
    """`[C]`, float64."""

    def __init__(self, models: Sequence[nn.Module], learning_rates: Sequence[float]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.register_buffer("learning_rates", torch.tensor(learning_rates, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.models)


def load_checkpoints(model: nn.Module, given: Iterable[Checkpoint]) -> Checkpoints:
    """A copy of `model` per checkpoint, on its device and in its dtypes; `model` itself is left alone.

    Raises:
        ValueError: no checkpoint, one whose state cannot be had or is not that of this model (names which),
            or a model that cannot be copied.
    """
    if not isinstance(given, Iterable):
        raise ValueError(
            f"checkpoints: expected a list of Checkpoint(state, learning_rate), got {type(given).__name__}; "
            "give a list, of one too"
        )
    given = list(given)
    if not given:
        raise ValueError(
            "checkpoints: expected at least one, got none; give a Checkpoint(state, learning_rate) for each "
            "state to sum over, or take GradDot, which differentiates the model as it is"
        )
    models = [_loaded(model, f"checkpoints[{i}]", checkpoint) for i, checkpoint in enumerate(given)]
    return Checkpoints(models, [checkpoint.learning_rate for checkpoint in given])


def _loaded(model: nn.Module, place: str, checkpoint: Checkpoint) -> nn.Module:
    if not isinstance(checkpoint, Checkpoint):
        raise ValueError(
            f"{place}: expected a Checkpoint(state, learning_rate), got {type(checkpoint).__name__}"
        )
    try:
        state = _state_dict(checkpoint)
    except Exception as error:
        raise ValueError(f"{place}: reading its state raised {type(error).__name__}: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{place}: expected a state dict, name -> tensor, got {type(state).__name__}; give "
            "model.state_dict()"
        )
    own = _copied(model)
    try:
        own.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{place}: expected every parameter and buffer of the model, and nothing else: {error}; to "
            "change some of them give {**model.state_dict(), **changes}"
        ) from error
    return own


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            "model: TracIn copies it for each checkpoint, and it cannot be copied: "
            f"{type(error).__name__}: {error}; remove tensors that were computed from parameters"
        ) from error


def _state_dict(checkpoint: Checkpoint) -> StateDict:
    state = checkpoint.state
    if isinstance(state, str | os.PathLike):
        loaded: StateDict = torch.load(state, map_location="cpu", weights_only=True)
        return loaded
    return state() if callable(state) else state
