"""Which example it was: looked for one by one, after something went wrong with many.

Costs nothing until then. The user's model and loss are called again, so that the message names the
index of the first example that raises or has no finite gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from influence_calculator.maths.objective import Batch, Objective, only_tensors
from influence_job.data import ReadError, read_batch
from influence_job.errors import OF_THE_TASK, JobError, PermanentError, Reason
from influence_job.worker.session import Session

AT_ONCE = 64
"""Examples that are tried together first, when all of them may be sound."""


@contextmanager
def blaming(own: Session, objective: Objective, side: str, start: int, stop: int) -> Iterator[None]:
    """Replaces an exception by one that names the example of the range that causes it, if one does."""
    try:
        yield
    except (JobError, ReadError, torch.cuda.OutOfMemoryError):
        raise
    except OF_THE_TASK as error:
        found = blame(own, objective, side, start, stop)
        if found is None:
            raise
        raise found from error


@contextmanager
def blaming_loss(own: Session, objective: Objective, side: str, count: int) -> Iterator[None]:
    """As `blaming` the first `count` examples, but a loss that fails alike at all of them itself."""
    with blaming(own, objective, side, 0, count):
        try:
            yield
        except (JobError, torch.OutOfMemoryError):
            raise
        except OF_THE_TASK as error:
            found = _loss_blamed(own, objective, side, count)
            if found is None:
                raise
            raise found from error


def _loss_blamed(own: Session, objective: Objective, side: str, count: int) -> PermanentError | None:
    faults = {_fault_of_loss(own, objective, side, index) for index in range(count)}
    if len(faults) > 1 or (fault := faults.pop()) is None:
        return None
    field = "measurement" if side == "test" and own.task.measurement is not None else "loss"
    return PermanentError(
        Reason.INVALID_TASK,
        f"InfluenceTask.{field}: expected a tensor that is computed from the outputs, but with every one of "
        f"the {count} {side} examples that were tried it {fault}; correct {field}(outputs, batch) or what it "
        "is given",
    )


def _fault_of_loss(own: Session, objective: Objective, side: str, index: int) -> str | None:
    """What a loss does wrong with an example that has outputs; None: nothing, or it is not the loss."""
    parameters = _leaves(objective)
    try:
        batch = _read(own, side, index, index + 1)
        outputs = objective.outputs(batch, parameters)
    except OF_THE_TASK:
        return None
    try:
        loss = objective.loss(outputs, batch)
    except OF_THE_TASK as error:
        return f"raised {type(error).__name__}: {error}"
    if not isinstance(loss, Tensor):
        return f"returned {loss!r:.40}"
    if loss.requires_grad or not any(output.requires_grad for output in only_tensors(outputs)[0]):
        return None
    return "returned one that does not depend on the outputs (detached, or counted)"


def blame(own: Session, objective: Objective, side: str, start: int, stop: int) -> PermanentError | None:
    """The error for the first example of the range that raises or is not finite; None if all are sound."""
    for first in range(start, stop, AT_ONCE):
        last = min(first + AT_ONCE, stop)
        if _is_sound(own, objective, side, first, last):
            continue
        for index in range(first, last):
            error = _error_of(own, objective, side, index)
            if error is not None:
                return error
    return None


def not_finite(side: str, index: int) -> PermanentError:
    """The error for an example whose gradient is NaN or infinite."""
    return PermanentError(
        Reason.NOT_FINITE,
        f"{side} example {index}: its gradient is not finite; look for NaN or infinity in the "
        f"example, a logarithm or division by zero in the loss, or overflow in half precision, and mend or "
        f"drop the example",
    )


def _is_sound(own: Session, objective: Objective, side: str, start: int, stop: int) -> bool:
    try:
        return _has_finite_gradient(objective, _read(own, side, start, stop))
    except OF_THE_TASK:
        return False


def _error_of(own: Session, objective: Objective, side: str, index: int) -> PermanentError | None:
    try:
        finite = _has_finite_gradient(objective, _read(own, side, index, index + 1))
    except OF_THE_TASK as error:
        return PermanentError(
            Reason.INVALID_DATA,
            f"{side} example {index}: the model or the loss raised {type(error).__name__}: {error}; mend or "
            f"drop the example, or correct what the entry point returns",
        )
    return None if finite else not_finite(side, index)


def _read(own: Session, side: str, start: int, stop: int) -> Batch:
    source = own.task.train if side == "train" else own.task.test
    batch, _ = read_batch(source, side, start, stop, own.device)
    return own.at_precision(batch)


def _has_finite_gradient(objective: Objective, batch: Batch) -> bool:
    """Of the sum over the batch; one that is not finite makes the sum so."""
    parameters = _leaves(objective)
    total = objective.losses_at(parameters, batch).sum()
    gradients = _gradients(total, parameters) if total.requires_grad else []
    return all(bool(torch.isfinite(value).all()) for value in [total, *gradients])


def _gradients(total: Tensor, parameters: dict[str, Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def _leaves(objective: Objective) -> dict[str, Tensor]:
    return {name: p.detach().requires_grad_() for name, p in objective.parameters().items()}
