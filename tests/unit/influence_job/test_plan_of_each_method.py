"""A plan can be made and read for every method that a job takes, of a task that is measured here."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from influence_job.cli.plan import as_document, draw
from influence_job.methods import method_of
from influence_job.plan import Plan, Sizes, make_plan
from influence_job.spec import InfluenceJob, Products
from influence_job.worker.loading import measure_job
from manifests import METHOD_NAMES, manifest

λ = 0.05
METHODS: dict[str, dict[str, Any]] = {
    "Direct": {"name": "Direct", "regularization": λ},
    "Direct by layer": {"name": "Direct", "regularization": λ, "blocks": "LayerWise"},
    "Cg": {"name": "Cg", "regularization": λ},
    "Cg, one right-hand side after another": {"name": "Cg", "regularization": λ, "simultaneous": False},
    "Cg, shared by the workers": {"name": "Cg", "regularization": λ, "products": "Distributed"},
    "Lissa": {"name": "Lissa", "regularization": λ},
    "Lissa in parts": {"name": "Lissa", "regularization": λ, "batchSize": 10},
    "InverseHarmonicMean": {"name": "InverseHarmonicMean", "regularization": λ},
    "Arnoldi": {"name": "Arnoldi", "regularization": λ},
    "Arnoldi on the eigenspace": {"name": "Arnoldi", "regularization": λ, "complement": False},
    "NystroemSketch": {"name": "NystroemSketch", "regularization": λ, "rank": 5},
    "Ekfac": {"name": "Ekfac", "regularization": λ},
    "GradDot": {"name": "GradDot"},
    "TracIn": {"name": "TracIn"},
    "Trak": {"name": "Trak", "regularization": λ, "rank": 8},
    "Logra": {"name": "Logra", "regularization": λ, "rank": 2},
}
PASSES = {
    "Direct": (1, False),
    "Cg": (0, True),
    "Lissa": (0, True),
    "InverseHarmonicMean": (0, True),
    "NystroemSketch": (13, False),
    "Ekfac": (2, False),
    "GradDot": (0, False),
    "TracIn": (0, False),
    "Trak": (1, False),
    "Logra": (1, False),
}
"""Method -> how often a fit reads the training set, at most, and whether solving reads it. Without Arnoldi,
whose search may take any number of restarts.
"""
TRAIN, TEST = 96, 8


def _job(method: dict[str, Any], **changes: Any) -> InfluenceJob:
    # Only this task has what TracIn sums over; other methods do not look at it.
    task = {"entrypoint": "checkpoints_task:task", "arguments": {"train": TRAIN, "test": TEST}}
    chunks = {"test": 4, "train": 32}
    document = manifest(**{"method": method, "task": task, "device": "cpu", "chunks": chunks, **changes})
    return InfluenceJob.model_validate(document, by_alias=True, by_name=False)


def _planned(method: dict[str, Any], **changes: Any) -> tuple[InfluenceJob, Sizes, Plan]:
    job = _job(method, **changes)
    sizes = measure_job(job.spec)
    return job, sizes, make_plan(job.spec, method_of(job.spec), sizes)


def _in_words(job: InfluenceJob, sizes: Sizes, plan: Plan) -> str:
    said = io.StringIO()
    draw(job, sizes, plan, Console(file=said, width=200))
    return " ".join(said.getvalue().split())


def test_every_method_of_a_job_has_a_case() -> None:
    """A method without one is not planned below; nor is a way to make Cg's products."""
    assert {case["name"] for case in METHODS.values()} == METHOD_NAMES
    products = {case.get("products", "Local") for case in METHODS.values() if case["name"] == "Cg"}
    assert products == set(Products)


@pytest.mark.parametrize("name", METHODS)
def test_each_stage_has_memory_and_each_that_computes_has_a_cost(name: str) -> None:
    """As `influence plan --json` prints it: stages in the order they run, numbers that JSON can hold."""
    job, sizes, plan = _planned(METHODS[name])
    document = json.loads(json.dumps(as_document(job, sizes, plan), allow_nan=False))
    computing = (["Fitting"] if plan.fit_passes else []) + ["Factors", "Scores"]
    assert list(document["memory"]) == ["Loading", *computing]
    for stage, amounts in document["memory"].items():
        assert amounts["device"] > 0, stage
        assert amounts["host"] >= amounts["device"], stage
    for numbers in (document["gflop"], document["seconds"]):
        assert list(numbers) == computing
        assert all(0 < number < math.inf for number in numbers.values()), numbers
    assert (document["regions"], document["groups"]) == (3, 1)
    assert document["resultBytes"] == 4 * TEST * TRAIN


@pytest.mark.parametrize("name", METHODS)
def test_the_passes_are_those_that_the_method_makes(name: str) -> None:
    """Those that fit, one that scores, and those that solving takes for each test chunk."""
    method = METHODS[name]["name"]
    _, _, plan = _planned(METHODS[name])
    fits, repeats = PASSES.get(method, (max(2, plan.fit_passes), False))
    assert plan.fit_passes == fits
    assert plan.training_passes == fits + 1
    assert plan.passes_per_iteration == (plan.test_chunks if repeats else 0)
    assert plan.solves_by_passes == (METHODS[name].get("products") == "Distributed")


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_in_words_names_method_examples_and_every_stage(name: str) -> None:
    job, sizes, plan = _planned(METHODS[name])
    text = _in_words(job, sizes, plan)
    repeated = {"Cg": "iteration", "Lissa": "epoch" if "batchSize" in METHODS[name] else "iteration"}
    passes = [
        f"for each {word} of the solver" for key, word in repeated.items() if key == job.spec.method.name
    ]
    for words in (
        f"Influences (Up) with {job.spec.method.name} on cpu",
        f"{TEST} test, {TRAIN} training; 53 parameters",
        "3 regions of 8 × 32 examples",
        *passes,
        *plan.memory,
    ):
        assert words in text, f"expected {words!r} in\n{text}"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("operation", ["SelfInfluence", "InfluenceFactors"])
def test_what_solves_without_pairs_of_examples_is_planned_too(name: str, operation: str) -> None:
    """The last stage is the one that solves; a number per training example, or a row per test example."""
    of_training = operation == "SelfInfluence"
    changes = {"chunks": {"train": 32}} if of_training else {}
    document = as_document(*_planned(METHODS[name], operation=operation, **changes))
    last = "Scores" if of_training else "Factors"
    assert list(document["memory"])[-1] == list(document["gflop"])[-1] == last
    assert all(0 < number < math.inf for number in document["gflop"].values()), document["gflop"]
    numbers = TRAIN if of_training else TEST * sum(document["blocks"].values())
    assert document["resultBytes"] == 4 * numbers


@pytest.mark.parametrize("name", METHODS)
def test_twice_the_workers_take_half_the_time(name: str) -> None:
    one, two = (as_document(*_planned(METHODS[name], workers={"replicas": n})) for n in (1, 2))
    assert one["gflop"] == two["gflop"]
    assert {stage: seconds / 2 for stage, seconds in one["seconds"].items()} == two["seconds"]
