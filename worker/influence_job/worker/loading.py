"""The Loading stage on a worker: call the entry point, probe the model, and say what the job is made of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from distributed import Worker
from torch.utils import _pytree as pytree

from influence_calculator.maths import perturbation
from influence_calculator.maths.by_token import token_count
from influence_calculator.maths.capture import measure
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.errors import BlocksError, CalculatorError, UnsupportedInputError
from influence_calculator.maths.objective import Batch, Objective, Seen, batch_size, slice_batch
from influence_calculator.maths.one_by_one import PROBED
from influence_calculator.maths.probe import probe
from influence_job import entrypoint
from influence_job.dask_settings import VISIBLE_GPUS
from influence_job.data import ReadError, data_identity
from influence_job.errors import PermanentError, Reason
from influence_job.plan import Sizes
from influence_job.spec import Device, InfluenceJobSpec, MethodSpec, Mode, Operation, SecondOrder
from influence_job.storage import arrays
from influence_job.worker import model_state
from influence_job.worker.annotations import annotate
from influence_job.worker.blame import blaming_loss
from influence_job.worker.factors import factor_path
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import Session, WorkerContext, build, session
from influence_job.worker.training_gradients import gradient_path

KIND = "load"


def dask_setup(worker: Worker) -> None:
    """Leaves a worker of this machine, which Dask names by its number, one of the machine's GPUs.

    Dask calls it of a module that workers preload, before any task, and so before CUDA looks.
    """
    gpus = os.environ.get(VISIBLE_GPUS, "").split(",")
    if isinstance(worker.name, int) and len(gpus) > 1:
        os.environ[VISIBLE_GPUS] = gpus[worker.name % len(gpus)]


@dataclass(frozen=True)
class Loaded:
    """What the worker that loads first tells the driver."""

    sizes: Sizes
    model_digest: str
    train_identity: dict[str, Any] | None
    """None where gradients of another store take their place."""
    test_identity: dict[str, Any] | None
    """None where there is none: factors of another store take its place, or training examples do."""
    environment: str
    units: dict[str, int]
    """Pass -> number of units."""
    follows: dict[str, str]
    """Pass -> the pass before it in its series, if it is one of a series."""
    annotations: dict[str, str]
    """Coordinate (`test_label`) -> numpy dtype."""
    seen: Seen
    """Of the model at work."""
    left_out: dict[str, list[str]]
    """Why -> the model's parameters that contribute nothing."""


def load(context: WorkerContext) -> Outcome:
    """Builds the session and describes it."""
    outcome = Outcome()

    def work() -> None:
        own = session(context)
        with _refusals_named():
            outcome.value = describe(own)

    outcome.attempt(KIND, 0, "loading", work)
    return outcome


def save_model(context: WorkerContext) -> Outcome:
    """Stores this process's model, with which every process of the job computes; the value is its digest."""
    outcome = Outcome()

    def work() -> None:
        own = session(context)
        outcome.value = model_state.save(own.store, own.states, context.identity)

    outcome.attempt(KIND, 0, "storing the model", work)
    return outcome


def describe(own: Session) -> Loaded:
    """Probes a few examples and measures sizes; reads 64 examples of each side at most."""
    task, passes = own.task, own.method.passes()
    operation, version = own.spec.operation, task.data_version
    annotations = _probed(own)
    return Loaded(
        sizes=measure_sizes(own),
        model_digest=own.model_digest,
        train_identity=data_identity(task.train, "train", version) if operation.reads_training else None,
        test_identity=data_identity(task.test, "test", version) if operation.solves_tests else None,
        environment=own.environment,
        units={step.name: len(step.units(own.objective)) for step in passes},
        follows={step.name: step.follows for step in passes if step.follows is not None},
        annotations=annotations,
        seen=own.objective.seen,
        left_out=_left_out(own),
    )


def _left_out(own: Session) -> dict[str, list[str]]:
    """Parameters that are not tracked, and tracked ones that no block of the method holds."""
    objective = own.objective
    every, tracked = (name for name, _ in objective.model.named_parameters()), set(objective.names)
    held = tracked if own.method.sums_checkpoints else {slot.name for slot in own.layout.slots}
    return {
        "untracked": [name for name in every if name not in tracked],
        "excluded": [name for name in objective.names if name not in held],
    }


def _probed(own: Session) -> dict[str, str]:
    """Tries a few examples of each side; the dtypes of what they are annotated with, by coordinate."""
    _refuse_unrepresentable(own.spec.method, own.tracked)
    sides = _sides(own.spec)
    annotations: dict[str, str] = {}
    for side in sides:
        few = _few(own, side, PROBED)
        # As the task says, before the method has looked at it: what the probe refuses has no better name.
        objective = own.side_of(own.tracked, side)
        with blaming_loss(own, objective, side, batch_size(few)):
            if side == sides[0]:
                probe(objective, few)
                if own.spec.operation.fits:
                    own.method.try_on(own.objective, few)
            else:
                with torch.no_grad():
                    objective.losses_at(objective.parameters(), few)
        columns = annotate(own.task, own.objective, few)
        annotations |= {f"{side}_{name}": str(column.dtype) for name, column in columns.items()}
    return annotations


def _refuse_unrepresentable(method: MethodSpec, objective: Objective) -> None:
    """Refuses a λ that the model's numbers do not hold: there it would be infinite, 0 or another."""
    dtype = _computed_in(objective)
    limits = torch.finfo(dtype)
    smallest, largest = Decimal(limits.tiny), Decimal(limits.max)
    for field, λ in _regularizations(method):
        if λ != 0 and not smallest <= λ <= largest:
            raise PermanentError(
                Reason.INVALID_SPEC,
                f"spec.method.{field}: expected 0 or a number that {str(dtype).removeprefix('torch.')}, in "
                f"which this model's curvature is kept, can hold, {limits.tiny:.3g} to {limits.max:.3g}, got "
                f"{λ:g}",
            )


def _regularizations(method: MethodSpec) -> Iterator[tuple[str, Decimal]]:
    """Each λ that counts, with its field. From text: to a thread that flushes denormals some floats are 0."""
    given = json.loads(method.model_dump_json(by_alias=True), parse_float=Decimal)
    by_block = given.get("regularizationByBlock")
    if by_block is not None:
        yield from ((f"regularizationByBlock.{block}", λ) for block, λ in by_block.items())
    elif "regularization" in given:
        yield "regularization", given["regularization"]


def _sides(spec: InfluenceJobSpec) -> tuple[str, ...]:
    """Whose examples are read; the first is probed and measured."""
    read = {"train": spec.operation.reads_training, "test": spec.operation.solves_tests}
    return tuple(side for side, is_read in read.items() if is_read)


def _few(own: Session, side: str, most: int) -> Batch:
    """The first examples of a side."""
    source = own.task.train if side == "train" else own.task.test
    return own.read(side, 0, min(most, len(source)))[0]


@contextmanager
def _refusals_named() -> Iterator[None]:
    """What the maths refuses, as an error of the field that is to change."""
    try:
        yield
    except UnsupportedInputError as error:
        raise PermanentError(Reason.INVALID_TASK, f"spec.mode: {error}") from error
    except BlocksError as error:
        raise PermanentError(Reason.INVALID_SPEC, _blocks_refused(str(error))) from error
    except CalculatorError as error:
        raise PermanentError(Reason.UNSUPPORTED_MODEL, _of_the_model(str(error))) from error


def _of_the_model(message: str) -> str:
    """The message in the words of a job: the spec's field where it begins with the calculator's argument."""
    if not message.startswith("second_order_mode: "):
        return f"InfluenceTask.model: {message.removeprefix('model: ')}"
    for mode in SecondOrderMode:
        message = message.replace(mode, SecondOrder[mode.name])
    return f"spec.method.secondOrder: {message.removeprefix('second_order_mode: ')}"


def _blocks_refused(message: str) -> str:
    """The message with the spec's field in place of the calculator's argument, with which it begins."""
    fields = {"block_structure": "customBlocks", "regularization": "regularizationByBlock"}
    for argument, field in fields.items():
        if message.startswith(argument):
            return f"spec.method.{field}{message.removeprefix(argument)}"
    return f"spec.method: {message}"


def measure_sizes(own: Session) -> Sizes:
    """Sizes of model and data, from one example of each."""
    side = _sides(own.spec)[0]
    one = _few(own, side, 1)
    stored = own.spec.operation is Operation.INFLUENCES_FROM_GRADIENTS
    gradients = arrays.array_info(own.fit_store, gradient_path(0)) if stored else None
    feature_shape: tuple[int, ...] = ()
    if own.spec.mode is Mode.PERTURBATION:
        feature_shape = tuple(perturbation.perturbed_input(one).shape[1:])
    elif own.spec.operation is Operation.INFLUENCES_BY_TOKEN:
        feature_shape = (token_count(own.objective, own.layout, one),)
    return Sizes(
        test=_test_length(own),
        train=len(own.task.train) if gradients is None else gradients.shape[0],
        shapes=measure(own.side_of(own.objective, side), slice_batch(one, 0, 1)),
        feature_shape=feature_shape,
        dtype=str(_computed_in(own.objective)).removeprefix("torch."),
        blocks=own.layout.factor_widths,
        test_example_bytes=_test_example_bytes(own, one),
        stored_chunk=None if gradients is None else gradients.chunks[0],
    )


def measure_job(spec: InfluenceJobSpec) -> Sizes:
    """The sizes of a job, measured in this process; writes nothing and reads no store but that of
    `factors.url` or `gradients.url`.

    Refuses what Loading would refuse.

    Raises:
        PermanentError: a task, an example or a model that no job can be made of.
    """
    # Sizes are the same everywhere, so that a job for a GPU is planned where there is none.
    own = build(spec.model_copy(update={"device": Device.CPU}))
    try:
        with _refusals_named():
            _probed(own)
            return measure_sizes(own)
    except ReadError as error:
        raise PermanentError(Reason.INVALID_DATA, str(error)) from error
    except SystemExit as error:
        raise PermanentError(
            Reason.INVALID_TASK, f"{entrypoint.FIELD}: the task's code raised SystemExit: {error}"
        ) from error


def _test_example_bytes(own: Session, first_example: Any) -> int:
    operation = own.spec.operation
    if operation.is_of_training:
        return _bytes(first_example)
    return _bytes(own.read("test", 0, 1)[0]) if operation.solves_tests else 0


def _test_length(own: Session) -> int:
    if own.spec.operation.is_of_training:
        return len(own.task.train)
    if own.spec.operation.solves_tests:
        return len(own.task.test)
    return int(arrays.array_info(own.factor_store, factor_path(0)).shape[0])


def _computed_in(objective: Objective) -> torch.dtype:
    dtype = next(iter(objective.parameters().values())).dtype
    return torch.float64 if dtype is torch.float64 else torch.float32


def _bytes(batch: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(batch))
