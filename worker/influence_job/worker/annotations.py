"""What a task says of its examples (`annotate`), as coordinates `test_<name>` and `train_<name>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_calculator.maths.objective import Batch, Objective, batch_size
from influence_calculator.torch.converter import TorchNumpyConverter
from influence_job.errors import OF_THE_TASK, PermanentError, Reason
from influence_job.storage import arrays
from influence_job.task import InfluenceTask
from influence_job.worker.session import Session

_CONVERTER = TorchNumpyConverter()


def annotate(task: InfluenceTask, objective: Objective, batch: Batch) -> dict[str, np.ndarray]:
    """The task's annotations of a batch, checked; empty without `annotate`.

    Raises:
        PermanentError: it raises, or gives no mapping or not one number per example.
    """
    if task.annotate is None:
        return {}
    with torch.no_grad():
        outputs = objective.outputs(batch)
        try:
            values = task.annotate(batch, outputs)
        except torch.OutOfMemoryError:
            raise
        except OF_THE_TASK as error:
            raise _wrong(
                f"raised {type(error).__name__}: {error}; correct it, or leave annotate out"
            ) from error
    if not isinstance(values, Mapping):
        raise _wrong(f"expected names with one number per example, got {type(values).__name__}")
    count = batch_size(batch)
    return {str(name): _column(str(name), value, count) for name, value in values.items()}


def _column(name: str, value: Any, count: int) -> np.ndarray:
    try:
        column = _CONVERTER.to_numpy(value) if isinstance(value, Tensor) else np.asarray(value)
    except ValueError as error:  # rows of several lengths
        raise _wrong(f"{name!r}: expected one number per example: {error}") from error
    if column.shape != (count,) or column.dtype.kind not in "biuf" or not name.isidentifier():
        raise _wrong(
            f"{name!r}: expected an identifier with one number per example, shape ({count},), got shape "
            f"{column.shape} of {column.dtype}"
        )
    # Integers of every kind become int64, in which -1 says that nothing is computed yet.
    return column if column.dtype.kind == "f" else column.astype(np.int64)


def _wrong(what: str) -> PermanentError:
    return PermanentError(Reason.INVALID_TASK, f"InfluenceTask.annotate: {what}")


def write_annotations(own: Session, side: str, chunk: int, batch: Batch) -> None:
    """Writes one chunk of every coordinate of a side."""
    for name, column in annotate(own.task, own.objective, batch).items():
        arrays.write_chunk(own.store, f"{side}_{name}", (chunk,), column)
