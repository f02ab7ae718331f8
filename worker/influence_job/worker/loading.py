"""The Loading stage on a worker: call the entry point, probe the model, and say what the job is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from influence_calculator.maths import perturbation
from influence_calculator.maths.by_token import token_count
from influence_calculator.maths.capture import measure
from influence_calculator.maths.errors import CalculatorError, UnsupportedInputError
from influence_calculator.maths.objective import slice_batch
from influence_calculator.maths.probe import probe
from influence_job.data import ReadError, data_identity
from influence_job.errors import PermanentError, Reason
from influence_job.plan import Sizes
from influence_job.spec import Device, InfluenceJobSpec, Mode, Operation
from influence_job.storage import arrays
from influence_job.worker import model_state
from influence_job.worker.annotations import annotate
from influence_job.worker.blame import blaming
from influence_job.worker.factors import factor_path
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import Session, WorkerContext, build, session

KIND = "load"
PROBED = 4
"""Examples of each side that the probe differentiates."""


@dataclass(frozen=True)
class Loaded:
    """What the worker that loads first tells the driver."""

    sizes: Sizes
    model_digest: str
    train_identity: dict[str, Any]
    test_identity: dict[str, Any] | None
    """None where there is none: factors of another store take its place, or training examples do."""
    environment: str
    units: dict[str, int]
    """Pass -> number of units."""
    follows: dict[str, str]
    """Pass -> the pass before it in its series, if it is one of a series."""
    annotations: dict[str, str]
    """Coordinate (`test_label`) -> numpy dtype."""


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
    annotations = _probed(own)
    test_identity = None
    if test_side(own.spec):
        test_identity = data_identity(task.test, "test", task.data_version)
    return Loaded(
        sizes=measure_sizes(own),
        model_digest=own.model_digest,
        train_identity=data_identity(task.train, "train", task.data_version),
        test_identity=test_identity,
        environment=own.environment,
        units={step.name: len(step.units(own.objective)) for step in passes},
        follows={step.name: step.follows for step in passes if step.follows is not None},
        annotations=annotations,
    )


def _probed(own: Session) -> dict[str, str]:
    """Tries a few examples of each side; the dtypes of what they are annotated with, by coordinate."""
    task = own.task
    few, _ = own.read("train", 0, min(PROBED, len(task.train)))
    with blaming(own, own.tracked, "train", 0, min(PROBED, len(task.train))):
        probe(own.tracked, few)
    annotations = {f"train_{name}": str(c.dtype) for name, c in annotate(task, own.objective, few).items()}
    if test_side(own.spec):
        tests, _ = own.read("test", 0, min(PROBED, len(task.test)))
        annotations |= {f"test_{n}": str(c.dtype) for n, c in annotate(task, own.objective, tests).items()}
    return annotations


@contextmanager
def _refusals_named() -> Iterator[None]:
    """What the maths refuses, as an error of the field that is to change."""
    try:
        yield
    except UnsupportedInputError as error:
        raise PermanentError(Reason.INVALID_TASK, f"spec.mode: {error}") from error
    except CalculatorError as error:
        message = f"InfluenceTask.model: {str(error).removeprefix('model: ')}"
        raise PermanentError(Reason.UNSUPPORTED_MODEL, message) from error


def measure_sizes(own: Session) -> Sizes:
    """Sizes of model and data, from one example of each."""
    one, _ = own.read("train", 0, 1)
    feature_shape: tuple[int, ...] = ()
    if own.spec.mode is Mode.PERTURBATION:
        feature_shape = tuple(perturbation.perturbed_input(one).shape[1:])
    elif own.spec.operation is Operation.INFLUENCES_BY_TOKEN:
        feature_shape = (token_count(own.objective, own.layout, one),)
    return Sizes(
        test=_test_length(own),
        train=len(own.task.train),
        shapes=measure(own.objective, slice_batch(one, 0, 1)),
        feature_shape=feature_shape,
        dtype=_dtype(own),
        blocks=own.layout.factor_widths,
        test_example_bytes=_test_example_bytes(own, one),
    )


def measure_job(spec: InfluenceJobSpec) -> Sizes:
    """The sizes of a job, measured in this process; writes nothing and reads no store but `factors.url`.

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


def test_side(spec: InfluenceJobSpec) -> bool:
    """Whether the operation differentiates test examples."""
    return spec.operation not in (Operation.INFLUENCES_FROM_FACTORS, Operation.SELF_INFLUENCE)


def _test_example_bytes(own: Session, train_example: Any) -> int:
    if own.spec.operation is Operation.SELF_INFLUENCE:
        return _bytes(train_example)
    return _bytes(own.read("test", 0, 1)[0]) if test_side(own.spec) else 0


def _test_length(own: Session) -> int:
    if own.spec.operation is Operation.SELF_INFLUENCE:
        return len(own.task.train)
    if test_side(own.spec):
        return len(own.task.test)
    return int(arrays.array_info(own.factor_store, factor_path(0)).shape[0])


def _dtype(own: Session) -> str:
    dtype = next(iter(own.objective.parameters().values())).dtype
    return "float64" if str(dtype) == "torch.float64" else "float32"


def _bytes(batch: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(batch))
