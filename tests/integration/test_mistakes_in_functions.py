"""Functions of a task, and blocks of its parameters, that are wrong for all examples: told by their own name.

`plan` and `run` end with 64 at once: what would go wrong again is not tried three times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import Jobs

MODULE = """\
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
"""

OF_THE_LOSS = ("InfluenceTask.loss: expected a tensor that is computed from the outputs", "4 train examples")
DIRECT = {"name": "Direct", "regularization": 0.1}
CUSTOM = {**DIRECT, "blocks": "Custom"}


def with_blocks(**blocks: list[str]) -> dict[str, Any]:
    return {"method": {**CUSTOM, "customBlocks": blocks}}


def entry(name: str) -> dict[str, Any]:
    return {"task": {"entrypoint": f"mistaken:{name}"}}


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
