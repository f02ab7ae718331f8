"""The digits job with gates: the task that cluster tests bring in a ConfigMap.

A gate is a storage object that does not exist yet. A process that is about to write an object whose path
matches GATE_PATH waits until the object at GATE_URL is there, so that a test can kill something while the job
stands at a known place. PACE_SECONDS is waited before each region's write. Without these variables it is the
digits job.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any

from influence_calculator import Checkpoint
from influence_job.data import ArraySource
from influence_job.examples import digits
from influence_job.storage.store import Store
from influence_job.task import InfluenceTask

LONGEST_WAIT_SECONDS = 600.0
POLL_SECONDS = 0.2


def task(**arguments: Any) -> InfluenceTask:
    """`influence_job.examples.digits:task`."""
    return digits.task(**arguments)


def few(train: int, test: int, **arguments: Any) -> InfluenceTask:
    """The same model with the first of its training and of its test images."""
    whole = digits.task(**arguments)
    return dataclasses.replace(
        whole,
        train=ArraySource(*whole.train.read(0, train)),
        test=ArraySource(*whole.test.read(0, test)),
        data_version=f"{whole.data_version}, the first {train} and {test}",
    )


def in_training(train: int, test: int, **arguments: Any) -> InfluenceTask:
    """The same, with two states that its model had before, at learning rates of their own."""
    before = {epochs: digits.task(**arguments, epochs=epochs).model.state_dict() for epochs in (2, 10)}
    states = tuple(Checkpoint(state, 0.1 / epochs) for epochs, state in before.items())
    return dataclasses.replace(few(train, test, **arguments), checkpoints=states)


def broken(message: str = "the labels are in another room") -> InfluenceTask:
    """Always raises."""
    raise FileNotFoundError(message)


def _is_open(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _wait(url: str) -> None:
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while not _is_open(url):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened {url}")
        time.sleep(POLL_SECONDS)


def _install(url: str, pattern: str) -> None:
    original = Store.put
    pace = float(os.environ.get("PACE_SECONDS", "0"))

    def put(self: Store, path: str, *arguments: Any, **options: Any) -> Any:
        if path.startswith("influences/c/"):
            time.sleep(pace)
        if re.search(pattern, path):
            _wait(url)
        return original(self, path, *arguments, **options)

    Store.put = put  # type: ignore[method-assign]


if "GATE_URL" in os.environ:
    _install(os.environ["GATE_URL"], os.environ["GATE_PATH"])
