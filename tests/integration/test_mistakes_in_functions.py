"""Functions of a task, and blocks of its parameters, that are wrong for all examples: told by their own name.

`plan` and `run` end with 64 at once: what would go wrong again is not tried three times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import Jobs

MODULE = """\
import sys
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

import traced_task
from influence_job.data import ArraySource


def task(**changes):
    return replace(traced_task.task(), **changes)


def loses_nothing():
    return task(loss=lambda outputs, batch: None)


def loses_a_number():
    return task(loss=lambda outputs, batch: 1.5)


def counts():
    return task(loss=lambda outputs, batch: (outputs.argmax(1) == batch[1]).sum())


def detaches_outputs():
    return task(loss=lambda outputs, batch: F.cross_entropy(outputs.detach(), batch[1]))


def looks_for_labels():
    return task(loss=lambda outputs, batch: F.cross_entropy(outputs, batch["labels"]))


def measures_nothing():
    return task(measurement=lambda outputs, batch: None)


def detaches_the_model():
    return task(forward=lambda model, batch: model(batch[0]).detach())


def normalizes_weights():
    own = task()
    nn.utils.parametrizations.weight_norm(own.model[0])
    return own


def looks_up_bags():
    ids = torch.arange(64).reshape(16, 4) % 10
    model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Tanh(), nn.Linear(4, 3))
    source = ArraySource(ids, torch.arange(16) % 3)
    return task(model=model.eval(), train=source, test=source, annotate=None)


def has_other_test_inputs():
    return task(test=ArraySource(torch.zeros(24, 9), torch.zeros(24, dtype=torch.int64)))


def has_other_test_inputs_without_annotations():
    return replace(has_other_test_inputs(), annotate=None)


def has_a_bad_label_among_the_first():
    x, y = traced_task.task().train.read(0, traced_task.TRAIN)
    return task(train=ArraySource(x, y.clone().index_fill_(0, torch.tensor([1]), 7)))


def annotates_by_dividing():
    return task(annotate=lambda batch, outputs: {"half": 1 / 0})


def annotates_with_a_list():
    return task(annotate=lambda batch, outputs: ["label"])


def annotates_raggedly():
    return task(annotate=lambda batch, outputs: {"words": [[1], [2, 3], [], [4]]})


def leaves_in_the_loss():
    return task(loss=lambda outputs, batch: sys.exit(0))


def leaves_in_annotate():
    return task(annotate=lambda batch, outputs: sys.exit(0))


def leaves_in_forward():
    return task(forward=lambda model, batch: sys.exit(0))


class Length:
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length()

    def read(self, start, stop):
        raise AssertionError


def has_no_length():
    return task(train=Length(lambda: {}["rows"]))


def has_a_negative_length():
    return task(test=Length(lambda: -1))


def leaves_in_len():
    return task(train=Length(lambda: sys.exit(0)))
"""

OF_THE_LOSS = ("InfluenceTask.loss: expected a tensor that is computed from the outputs", "4 train examples")
DIRECT = {"name": "Direct", "regularization": 0.1}
CUSTOM = {**DIRECT, "blocks": "Custom"}


def with_blocks(**blocks: list[str]) -> dict[str, Any]:
    return {"method": {**CUSTOM, "customBlocks": blocks}}


def entry(name: str, **arguments: Any) -> dict[str, Any]:
    return {"task": {"entrypoint": f"mistaken:{name}", "arguments": arguments}}


MISTAKES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "a loss of None": (entry("loses_nothing"), "InvalidTask", (*OF_THE_LOSS, "it returned None")),
    "a loss that is no tensor": (entry("loses_a_number"), "InvalidTask", (*OF_THE_LOSS, "it returned 1.5")),
    "a loss that counts": (entry("counts"), "InvalidTask", (*OF_THE_LOSS, "does not depend on the outputs")),
    "a loss of detached outputs": (
        entry("detaches_outputs"),
        "InvalidTask",
        (*OF_THE_LOSS, "does not depend on the outputs"),
    ),
    "a loss of other batches": (entry("looks_for_labels"), "InvalidTask", (*OF_THE_LOSS, "raised TypeError")),
    "a measurement of None": (
        entry("measures_nothing"),
        "InvalidTask",
        ("InfluenceTask.measurement", "4 test examples", "it returned None"),
    ),
    "a detached model": (
        entry("detaches_the_model"),
        "UnsupportedModel",
        ("InfluenceTask.model", "depends on the tracked parameters", "detached"),
    ),
    "a Hessian that torch has wrong": (
        {**entry("normalizes_weights"), "method": {**DIRECT, "secondOrder": "Hessian"}},
        "UnsupportedModel",
        ("spec.method.secondOrder: expected a symmetric Hessian", "Take GeneralizedGaussNewton or Empirical"),
    ),
    "an operation without a second derivative": (
        {**entry("looks_up_bags"), "method": {**DIRECT, "secondOrder": "GeneralizedGaussNewton"}},
        "UnsupportedModel",
        ("spec.method.secondOrder: GeneralizedGaussNewton takes derivatives", "Take EmpiricalFisher, or"),
    ),
    "test inputs of another width": (
        entry("has_other_test_inputs"),
        "InvalidData",
        ("test example 0", "1x9 and 6x5", "entry point"),
    ),
    "test inputs of another width, without annotations": (
        entry("has_other_test_inputs_without_annotations"),
        "InvalidData",
        ("test example 0", "1x9 and 6x5", "entry point"),
    ),
    "one bad example of those that are tried": (
        entry("has_a_bad_label_among_the_first"),
        "InvalidData",
        ("train example 1", "Target 7 is out of bounds"),
    ),
    "annotations that raise": (
        entry("annotates_by_dividing"),
        "InvalidTask",
        ("InfluenceTask.annotate: raised ZeroDivisionError", "leave annotate out"),
    ),
    "annotations without names": (
        entry("annotates_with_a_list"),
        "InvalidTask",
        ("InfluenceTask.annotate: expected names with one number per example, got list",),
    ),
    "annotations of several lengths": (
        entry("annotates_raggedly"),
        "InvalidTask",
        ("InfluenceTask.annotate: 'words': expected one number per example",),
    ),
    "a loss that leaves": (entry("leaves_in_the_loss"), "InvalidTask", (*OF_THE_LOSS, "raised SystemExit")),
    "annotations that leave": (
        entry("leaves_in_annotate"),
        "InvalidTask",
        ("InfluenceTask.annotate: raised SystemExit",),
    ),
    "a model that leaves": (
        entry("leaves_in_forward"),
        "InvalidData",
        ("train example 0: the model or the loss raised SystemExit",),
    ),
    "data without a length": (
        entry("has_no_length"),
        "InvalidTask",
        ("InfluenceTask.train: expected a number of examples", "KeyError: 'rows'; correct __len__ of Length"),
    ),
    "data of a negative length": (
        entry("has_a_negative_length"),
        "InvalidTask",
        ("InfluenceTask.test: expected a number of examples", "ValueError"),
    ),
    "data that leaves": (entry("leaves_in_len"), "InvalidTask", ("InfluenceTask.train", "SystemExit")),
    "a selection that is a number": (
        entry("task", parameters=3),
        "InvalidTask",
        ("InfluenceTask.parameters: expected a regular expression, got int",),
    ),
    "a selection that is a list": (
        entry("task", parameters=["0.weight"]),
        "InvalidTask",
        ("InfluenceTask.parameters: expected a regular expression, got list",),
    ),
    "a version that is a number": (
        entry("task", data_version=1),
        "InvalidTask",
        ("InfluenceTask.data_version: expected a str", "got int"),
    ),
    "an entry point without a signature": (
        {"task": {"entrypoint": "builtins:dict"}},
        "InvalidTask",
        ("builtins:dict must return an influence_job.task.InfluenceTask, got dict",),
    ),
    "an entry point that belongs to no module": (
        {"task": {"entrypoint": "random:random"}},
        "InvalidTask",
        ("random:random must return an influence_job.task.InfluenceTask, got float",),
    ),
    "a λ that float32 takes for infinite": (
        {"method": {"regularization": 1e39}},
        "InvalidSpec",
        ("spec.method.regularization: expected", "float32", "3.4e+38, got 1e+39"),
    ),
    "a λ that float32 takes for 0": (
        {"method": {**DIRECT, "regularization": 1e-320}},
        "InvalidSpec",
        ("spec.method.regularization: expected", "float32", "1.18e-38", "got 1e-320"),
    ),
    "a λ of a block that float32 takes for infinite": (
        {"method": {**CUSTOM, "blocks": "LayerWise", "regularizationByBlock": {"0": 0.1, "2": 1e300}}},
        "InvalidSpec",
        ("spec.method.regularizationByBlock.2: expected", "float32", "got 1e+300"),
    ),
    "a λ that float64 takes for 0": (
        {
            "task": {"entrypoint": "traced_task:task", "arguments": {"double": True}},
            "method": {"name": "Trak", "rank": 8, "regularization": 1e-320},
        },
        "InvalidSpec",
        ("spec.method.regularization: expected", "float64", "2.23e-308", "got 1e-320"),
    ),
    "a block of an unknown parameter": (
        with_blocks(body=["0.weigth"]),
        "InvalidSpec",
        ("spec.method.customBlocks['body']", "got '0.weigth'", "did you mean '0.weight'?"),
    ),
    "a parameter in two blocks": (
        with_blocks(a=["0.weight"], b=["0.bias", "0.weight"]),
        "InvalidSpec",
        ("line ", "spec.method.customBlocks: parameter '0.weight' stands in 'a' and in 'b'"),
    ),
    "no λ for a block": (
        {"method": {**CUSTOM, "blocks": "LayerWise", "regularizationByBlock": {"0": 0.1}}},
        "InvalidSpec",
        ("spec.method.regularizationByBlock", "missing: ['2']"),
    ),
}
"""Name -> changes to the spec, reason, and what the message must say."""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_plan_and_a_run_refuse_the_same_mistake_at_once(name: str, jobs: Jobs, tmp_path: Path) -> None:
    """In the same words, but for the progress of the run; nothing is a defect of ours."""
    changes, reason, words = MISTAKES[name]
    (tmp_path / "mistaken.py").write_text(MODULE)
    manifest = jobs.manifest(changes)
    planned = jobs.plan(manifest)
    run = jobs.run(manifest, output=tmp_path / "result.zarr", workers=1)
    for code, said in ((planned.returncode, planned.stderr), (run.code, run.stderr)):
        assert code == 64, said
        assert "Traceback" not in said
        assert "3 times" not in said
        for word in (f"error: {reason}", *words):
            assert word in said, f"expected {word!r} in\n{said}"
