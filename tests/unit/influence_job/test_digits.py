"""The example's entry point: the same bits always, a few mistakes to explain, and nothing left behind."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch

from influence_job.examples import digits
from influence_job.task import DataSource, InfluenceTask

PRINT_DIGEST = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from influence_job.examples.digits import task
values = [p.detach().numpy().tobytes() for p in task().model.state_dict().values()]
print(hashlib.sha256(b"".join(values)).hexdigest())
"""


@pytest.fixture(scope="module")
def task() -> InfluenceTask:
    return digits.task()


def digest(task: InfluenceTask) -> str:
    """Digest of a model's parameters and buffers."""
    values = [value.numpy().tobytes() for value in task.model.state_dict().values()]
    return hashlib.sha256(b"".join(values)).hexdigest()


def mistakes(task: InfluenceTask, source: DataSource) -> int:
    """How many examples the model misreads, by the task's own annotations."""
    batch = source.read(0, len(source))
    told = task.annotate(batch, task.model(batch[0]))
    assert set(told) == {"label", "predicted"}
    return int((told["label"] != told["predicted"]).sum())


def test_1400_images_are_traced_to_300_others(task: InfluenceTask) -> None:
    assert (len(task.train), len(task.test)) == (1400, 300)
    images, labels = task.train.read(0, 1400)
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
        (1400, 64),
        torch.float32,
        (1400,),
        torch.int64,
    )
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert labels.unique().tolist() == list(range(10))


def test_training_and_test_images_do_not_overlap(task: InfluenceTask) -> None:
    train, test = ({row.numpy().tobytes() for row in s.read(0, len(s))[0]} for s in (task.train, task.test))
    assert not train & test


def test_a_handful_of_test_digits_are_misread(task: InfluenceTask) -> None:
    assert 3 <= mistakes(task, task.test) <= 15
    assert mistakes(task, task.train) <= 20


def test_the_model_is_in_evaluation_mode(task: InfluenceTask) -> None:
    assert not any(module.training for module in task.model.modules())


def test_every_call_returns_the_same_bits_whatever_came_before(task: InfluenceTask) -> None:
    torch.manual_seed(123)
    assert digest(digits.task()) == digest(task)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_every_process_returns_the_same_bits_with_any_number_of_threads(
    task: InfluenceTask, threads: str
) -> None:
    command = [sys.executable, "-c", PRINT_DIGEST, threads]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(task)


def test_threads_and_random_state_are_left_as_they_were() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = torch.get_rng_state()
        digits.task(epochs=1)
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_num_threads(threads)


def test_arguments_change_the_model() -> None:
    narrow = digits.task(hidden=8, epochs=1)
    assert narrow.model[0].weight.shape == (8, 64)
    assert digest(digits.task(hidden=8, epochs=1, seed=1)) != digest(narrow)
