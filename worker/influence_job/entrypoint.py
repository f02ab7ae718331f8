"""From `module:function` to a checked `InfluenceTask`.

The driver only imports (`find`); a worker calls (`build`). What the user's code raises is told with the
entry point's name and the exception's last line; the traceback is kept as the cause.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from influence_calculator.maths.checkpoints import load_checkpoints
from influence_calculator.maths.errors import UnsupportedModelError
from influence_calculator.maths.objective import Objective
from influence_calculator.maths.probe import refuse_meta
from influence_job.data import check_source
from influence_job.document import SOURCE_DIRECTORY
from influence_job.errors import OF_THE_TASK, PermanentError, Reason
from influence_job.task import DataSource, InfluenceTask

FIELD = "spec.task.entrypoint"


def find(entrypoint: str) -> Callable[..., Any]:
    """Imports the module and returns the function.

    Raises:
        PermanentError: no such module, no such function, or the module raises when imported.
    """
    module_name, _, function_name = entrypoint.partition(":")
    _look_into_the_config_map()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise PermanentError(
                Reason.INVALID_TASK,
                f"{FIELD}: no module named {error.name!r}; it is searched for in task.source.configMap, in "
                f"PYTHONPATH, in the installed packages and, by `influence run`, in the working directory: "
                f"put it there, or correct {entrypoint!r}",
            ) from error
        raise _import_failed(module_name, error) from error
    except OF_THE_TASK as error:
        raise _import_failed(module_name, error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [
            n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__
        ]
        raise PermanentError(
            Reason.INVALID_TASK,
            f"{FIELD}: module {module_name!r} has no function {function_name!r}; it has {sorted(names)}",
        )
    return function


def _look_into_the_config_map() -> None:
    """Where `task.source.configMap` is mounted comes first: that code is to replace the image's."""
    if SOURCE_DIRECTORY not in sys.path and Path(SOURCE_DIRECTORY).is_dir():
        sys.path.insert(0, SOURCE_DIRECTORY)


def _import_failed(module_name: str, error: BaseException) -> PermanentError:
    return PermanentError(
        Reason.INVALID_TASK, f"{FIELD}: importing {module_name!r} raised {type(error).__name__}: {error}"
    )


def source_digest(entrypoint: str) -> str:
    """Digest of the file that the entry point's module was loaded from."""
    named = entrypoint.partition(":")[0]
    module = sys.modules[getattr(find(entrypoint), "__module__", None) or named]
    path = getattr(module, "__file__", None)
    content = Path(path).read_bytes() if path else entrypoint.encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def build(entrypoint: str, arguments: Mapping[str, Any]) -> InfluenceTask:
    """Calls the entry point and checks what it returned.

    Raises:
        PermanentError: the call raised, or returned something that is no InfluenceTask.
    """
    function = find(entrypoint)
    signature = _signature(function)
    try:
        if signature is not None:
            signature.bind(**arguments)
    except TypeError as error:
        raise PermanentError(
            Reason.INVALID_TASK,
            f"spec.task.arguments: {entrypoint}{signature} cannot be called with "
            f"{sorted(arguments)}: {error}",
        ) from error
    try:
        task = function(**arguments)
    except PermanentError:
        raise
    except OF_THE_TASK as error:
        raise PermanentError(
            Reason.INVALID_TASK, f"{FIELD}: {entrypoint} raised {type(error).__name__}: {error}"
        ) from error
    return check_task(task, entrypoint)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """None for functions written in C that tell none."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def check_task(task: Any, entrypoint: str) -> InfluenceTask:
    """`task` if all its parts are what they must be."""
    if not isinstance(task, InfluenceTask):
        raise PermanentError(
            Reason.INVALID_TASK,
            f"{FIELD}: {entrypoint} must return an influence_job.task.InfluenceTask, got "
            f"{type(task).__name__}",
        )
    if not isinstance(task.model, nn.Module):
        raise _wrong("model", "a torch.nn.Module", task.model)
    try:
        refuse_meta(task.model)
    except UnsupportedModelError as error:
        raise PermanentError(Reason.INVALID_TASK, f"InfluenceTask.model: {error}") from error
    for name in ("loss", "measurement", "forward", "annotate"):
        value = getattr(task, name)
        if not callable(value) and (value is not None or name == "loss"):
            raise _wrong(name, "a function", value)
    if not isinstance(task.checkpoints, tuple | list):
        raise _wrong("checkpoints", "a tuple of Checkpoint(state, learning_rate)", task.checkpoints)
    if not isinstance(task.parameters, str | re.Pattern | None):
        raise _wrong("parameters", "a regular expression", task.parameters)
    if not isinstance(task.data_version, str | None):
        raise _wrong("data_version", "a str that names the data's version", task.data_version)
    train, test = _side(task.train, "train"), _side(task.test, "test")
    if train is task.train and test is task.test:
        return task
    return replace(task, train=train, test=test)


def _side(source: Any, name: str) -> DataSource:
    """`source` if it is one. One without examples is refused when somebody asks for them: not every
    operation reads both sides.

    Raises:
        PermanentError: it is no DataSource.
    """
    try:
        return check_source(source, name)
    except PermanentError as error:
        if error.reason is not Reason.INVALID_DATA:
            raise
        return _Empty(error)


class _Empty:
    """In place of a data set without examples."""

    def __init__(self, refusal: PermanentError) -> None:
        self._refusal = refusal

    def __len__(self) -> int:
        raise self._refusal

    def read(self, start: int, stop: int) -> Any:  # noqa: ARG002 - as a DataSource is asked
        raise self._refusal


def _wrong(field: str, expected: str, got: Any) -> PermanentError:
    return PermanentError(
        Reason.INVALID_TASK, f"InfluenceTask.{field}: expected {expected}, got {type(got).__name__}"
    )


def objective_of(task: InfluenceTask) -> Objective:
    """The training objective of a task, with the parameters that its `parameters` selects."""
    names = tuple(name for name, value in task.model.named_parameters() if value.requires_grad)
    if task.parameters is not None:
        try:
            pattern = re.compile(task.parameters)
        except re.error as error:
            raise PermanentError(
                Reason.INVALID_TASK,
                f"InfluenceTask.parameters: {task.parameters!r} is no regular expression: {error}",
            ) from error
        chosen = tuple(name for name in names if pattern.search(name))
        if not chosen:
            raise PermanentError(
                Reason.INVALID_TASK,
                f"InfluenceTask.parameters: {task.parameters!r} matches none of {list(names)[:20]}",
            )
        names = chosen
    if not names:
        raise PermanentError(
            Reason.INVALID_TASK,
            "InfluenceTask.model: no parameter requires grad, so there is nothing to trace",
        )
    return Objective(task.model, task.loss, task.forward or _first_element, names)


def with_checkpoints(objective: Objective, task: InfluenceTask) -> Objective:
    """The objective with the task's checkpoints loaded, where its model is.

    Raises:
        PermanentError: there is none, or one that cannot be read or is not a state of this model.
    """
    try:
        loaded = load_checkpoints(task.model, task.checkpoints)
    except ValueError as error:
        raise PermanentError(Reason.INVALID_TASK, f"InfluenceTask.{error}") from error
    return replace(objective, checkpoints=loaded)


def _first_element(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, tuple | list):
        raise PermanentError(
            Reason.INVALID_TASK,
            f"InfluenceTask.forward: batches are {type(batch).__name__}s, for which `model(batch[0])` has no "
            f"meaning; give forward(model, batch)",
        )
    return model(batch[0])
