"""What a plan says that embeddings cost under EK-FAC, beside the operations that are done."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import positions_task
from counted_products import CountedProducts
from influence_calculator.maths import region
from influence_calculator.maths.capture import measure
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.method import fit
from influence_calculator.maths.objective import Objective, xy_objective
from influence_job.plan import Plan, Sizes, cost, make_plan
from influence_job.spec import InfluenceJobSpec
from manifests import spec
from training_sets import TrainingSet

TOKENS, COLUMNS, TRAIN, TEST = 6, 8, 200, 6
METHOD = Ekfac(regularization=0.1)


@dataclass(frozen=True)
class Job:
    """A model of words in some vocabulary, with what a plan is made from."""

    vocabulary: int
    objective: Objective
    sizes: Sizes
    spec: InfluenceJobSpec
    plan: Plan

    def examples(self, count: int) -> tuple[Tensor, Tensor]:
        """Random texts and classes."""
        return torch.randint(self.vocabulary, (count, TOKENS)), torch.randint(3, (count,))

    def gflop(self) -> dict[str, float]:
        """By stage."""
        return cost.gflop(self.spec, self.sizes, self.plan)


def _job(vocabulary: int) -> Job:
    layers = nn.Linear(COLUMNS, COLUMNS), nn.Tanh(), nn.Flatten(), nn.Linear(TOKENS * COLUMNS, 3)
    objective = xy_objective(nn.Sequential(nn.Embedding(vocabulary, COLUMNS), *layers), F.cross_entropy)
    shapes = measure(objective, (torch.zeros(1, TOKENS, dtype=torch.int64), torch.zeros(1).long()))
    blocks = dict(METHOD.layout(objective).widths)
    sizes = Sizes(test=TEST, train=TRAIN, shapes=shapes, blocks=blocks)
    given = spec(method={"name": "Ekfac", "regularization": 0.1}, chunks={"test": TEST, "train": TRAIN})
    return Job(vocabulary, objective, sizes, given, make_plan(given, METHOD, sizes))


def test_the_cost_of_embeddings_is_that_of_the_products_that_are_done() -> None:
    """A table of 40 000 numbers, of which an example meets 48."""
    job = _job(5000)
    train, test = job.examples(TRAIN), job.examples(TEST)
    with CountedProducts() as fitting:
        state = fit(METHOD, job.objective, TrainingSet(train, TRAIN))
    fitted = METHOD.fitted(job.objective, state, None)
    left = fitted.solve(fitted.gradients(job.objective, test)).left
    with CountedProducts() as scoring:
        region.influences(fitted, left, train, job.plan.micro_batch)
    assert job.gflop()["Fitting"] == pytest.approx(fitting.flop / 1e9, rel=0.5)
    assert job.gflop()["Scores"] == pytest.approx(scoring.flop / 1e9, rel=0.5)


def test_words_that_no_text_holds_cost_nothing() -> None:
    assert _job(50_000).gflop() == _job(5000).gflop()


def test_a_layer_that_is_scored_by_parameter_is_not_turned() -> None:
    """Turning would be as much again; that a first layer passes no gradient on is left out of account."""
    task = positions_task.task()
    objective = xy_objective(task.model, F.cross_entropy)
    train, test = task.train.read(0, positions_task.TRAIN), task.test.read(0, positions_task.TEST)
    blocks = dict(METHOD.layout(objective).widths)
    sizes = Sizes(test=len(test[1]), train=len(train[1]), shapes=measure(objective, train), blocks=blocks)
    given = spec(method={"name": "Ekfac", "regularization": 0.1}, chunks={"test": TEST, "train": TRAIN})
    plan = make_plan(given, METHOD, sizes)
    fitted = METHOD.fitted(objective, fit(METHOD, objective, TrainingSet(train, TRAIN)), None)
    left = fitted.scored(fitted.solve(fitted.gradients(objective, test)).left)
    with CountedProducts() as scoring:
        region.influences(fitted, left, train, plan.micro_batch)
    assert cost.gflop(given, sizes, plan)["Scores"] == pytest.approx(scoring.flop / 1e9, rel=0.5)
