"""What a region's test rows are scored against: examples that are read here, or stored gradients of them.

Shapes: t test rows of a group, n training examples of a chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths import by_token, perturbation, region
from influence_calculator.maths.layout import Left
from influence_calculator.maths.objective import Batch
from influence_job.errors import PermanentError, Reason
from influence_job.spec import Mode
from influence_job.worker.annotations import write_annotations
from influence_job.worker.blame import blame, blaming
from influence_job.worker.factors import as_array
from influence_job.worker.session import Session
from influence_job.worker.training_gradients import load_gradients


class TrainingSide(ABC):
    """One training chunk after another; what `read` answers is given to `scores`."""

    def __init__(self, own: Session) -> None:
        self.own = own

    @abstractmethod
    def read(self, chunk: int) -> tuple[Any, str]:
        """What is scored, and its digest; an I/O thread calls this ahead of time."""

    @abstractmethod
    def scores(self, left: Left, chunk: int, content: Any, *, annotate: bool) -> np.ndarray:
        """The region's values, `[t, n]` and what the operation adds; coordinates are stored if `annotate`."""

    @abstractmethod
    def blame(self, chunk: int) -> PermanentError | None:
        """The error for the chunk's first example that explains scores that are not finite, if one does."""


class ReadExamples(TrainingSide):
    """Examples of the task."""

    @override
    def read(self, chunk: int) -> tuple[Batch, str]:
        return self.own.read("train", *self.own.plan.train_range(chunk))

    @override
    def scores(self, left: Left, chunk: int, content: Batch, *, annotate: bool) -> np.ndarray:
        with blaming(self.own, self.own.objective, "train", *self.own.plan.train_range(chunk)):
            if annotate:
                write_annotations(self.own, "train", chunk, content)
            return as_array(self._scores(left, content))

    @override
    def blame(self, chunk: int) -> PermanentError | None:
        return blame(self.own, self.own.objective, "train", *self.own.plan.train_range(chunk))

    def _scores(self, left: Left, batch: Batch) -> Tensor:
        fitted, plan = self.own.fitted, self.own.plan
        if plan.mode is Mode.PERTURBATION:
            move = perturbation.perturbations_by_block if plan.by_block else perturbation.perturbations
            return move(fitted, self.own.objective, left, batch, plan.micro_batch)
        if plan.by_token:
            return self._by_token(left, batch)
        score = region.influences_by_block if plan.by_block else region.influences
        return score(fitted, left, batch, plan.micro_batch)

    def _by_token(self, left: Left, batch: Batch) -> Tensor:
        plan = self.own.plan
        parts = by_token.influences_by_token(
            self.own.fitted, self.own.objective, left, batch, plan.micro_batch
        )
        if parts.shape[2:] != plan.feature_shape:
            raise PermanentError(
                Reason.INVALID_DATA,
                f"training examples: expected {plan.feature_shape[0]} tokens, as the first one has, got "
                f"{parts.shape[2]}; pad all of them to one length",
            )
        return parts


class StoredGradients(TrainingSide):
    """Gradients of the store that `gradients.url` names, which are finite and came with their coordinates."""

    @override
    def read(self, chunk: int) -> tuple[Left, str]:
        return load_gradients(self.own, *self.own.plan.train_range(chunk))

    @override
    def scores(self, left: Left, chunk: int, content: Left, *, annotate: bool) -> np.ndarray:
        return as_array(region.influences_from_gradients(left, content))

    @override
    def blame(self, chunk: int) -> PermanentError | None:
        return None


def training_side(own: Session) -> TrainingSide:
    """What the operation scores against."""
    return ReadExamples(own) if own.spec.operation.reads_training else StoredGradients(own)
