"""EK-FAC whose layers' gradients are scored by parameter, not turned: when, and with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import dask.array as da
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import oracle
import positions_task
from ekfac_cases import EKFAC_CASES, GROUPS_CASE, EkfacCase
from influence_calculator import (
    DaskInfluenceCalculator,
    DisableClientSingleThreadCheck,
    EkfacInfluence,
    SequentialInfluenceCalculator,
)
from influence_calculator.maths import ekfac_passes, region
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.ekfac_fitted import EkfacFitted
from influence_calculator.maths.kronecker import scores_by_parameter
from influence_calculator.maths.method import Fitted, fit
from influence_calculator.maths.objective import xy_objective
from influence_calculator.torch.util import NestedTorchCatAggregator, TorchNumpyConverter
from training_sets import TrainingSet

N, T = 11, 3
LAMBDA = 0.05


@pytest.mark.parametrize(
    ("examples", "tokens", "outputs", "inputs", "by_parameter"),
    [
        (1024, 256, 64, 289, True),
        (1024, 64, 128, 577, True),
        (1024, 16, 128, 1153, False),
        (10_000, 16, 128, 1153, True),
        (1024, 1024, 32, 28, False),
        (512, 64, 1024, 257, False),
        (50_000, 64, 1024, 257, True),
        (10**7, 1, 128, 65, False),
    ],
    ids=[
        "many positions",
        "some positions",
        "few positions",
        "few positions, but of many examples",
        "a layer that is turned for next to nothing",
        "tokens of few examples",
        "tokens of many examples",
        "one token",
    ],
)
def test_training_gradients_stay_unturned_where_that_costs_less(
    examples: int, tokens: float, outputs: int, inputs: int, by_parameter: bool
) -> None:
    """Layers of a conv net, a transformer and an MLP."""
    assert scores_by_parameter(examples, tokens, outputs, inputs, 1) == by_parameter
    assert not scores_by_parameter(examples, tokens, outputs, inputs, 2), "groups stay turned"


def _wherever_it_can(answer: bool, *sizes: float) -> bool:
    return answer and sizes[-1] == 1


def _both(case: EkfacCase, monkeypatch: pytest.MonkeyPatch) -> tuple[Fitted, Fitted]:
    """The same fit, which scores turned, and by parameter wherever it can."""
    objective, method = xy_objective(case.model(), case.loss), Ekfac(regularization=LAMBDA, seed=3)
    state = fit(method, objective, TrainingSet(case.data(N, 1), 4))
    fits = []
    for answer in (False, True):
        rule = partial(_wherever_it_can, answer)
        monkeypatch.setattr(ekfac_passes, "scores_by_parameter", rule)
        fits.append(method.fitted(objective, state))
    return fits[0], fits[1]


@pytest.mark.parametrize("case", EKFAC_CASES, ids=repr)
def test_scores_of_every_layer_are_those_of_turned_gradients(
    case: EkfacCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also block by block, and whether the left representation was solved or came from factors."""
    turned, own = _both(case, monkeypatch)
    objective, train, test = turned.objective, case.data(N, 1), case.data(T, 2)
    left = own.solve(own.gradients(objective, test)).left
    expected = region.influences_by_block(turned, left, train, 4)
    found = region.influences_by_block(own, own.scored(left), train, 4)
    oracle.assert_close(found, expected, 1e-11)
    oracle.assert_close(region.influences(own, own.scored(left), train, 3), expected.sum(0), 1e-11)
    again = own.scored(own.left(own.factors(left)))
    oracle.assert_close(region.influences(own, again, train, N), expected.sum(0), 1e-11)
    compact = own.compact(objective, test)
    if compact is not None:
        rows = compact.rows
        rows = own.expanded(rows) if own.is_compact(rows.shape[1]) else rows
        oracle.assert_close(rows, own.layout.flatten(own.scored(left)), 1e-11)


@pytest.mark.parametrize("case", EKFAC_CASES, ids=repr)
def test_by_parameter_the_right_representation_is_the_gradient(
    case: EkfacCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers without groups, whatever is tracked of them; parts are pieces of it in its own columns."""
    _, own = _both(case, monkeypatch)
    assert isinstance(own, EkfacFitted)
    x, y = case.data(N, 1)
    gradients = own.layout.split(oracle.example_gradients(own.objective.model, case.loss, x, y))
    found = {block: torch.zeros_like(rows) for block, rows in gradients.items()}
    for part in own.right((x, y)):
        if part.places is None:
            rows = slice(part.row, part.row + len(part.values))
            found[part.block][rows, part.start : part.start + part.values.shape[1]] = part.values
    for block, rows in own._layers.items():
        if rows.by_parameter:
            oracle.assert_close(found[block], gradients[block], 1e-11)


def test_groups_stay_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    _, own = _both(GROUPS_CASE, monkeypatch)
    grouped = [rows for rows in own._layers.values() if rows.basis.groups > 1]
    assert grouped
    assert not any(rows.by_parameter for rows in grouped)


def _fitted(monkeypatch: pytest.MonkeyPatch | None) -> EkfacInfluence:
    """Of the task's own model and data; with `monkeypatch` turned against the rule."""
    task = positions_task.task()
    if monkeypatch is not None:
        monkeypatch.setattr(ekfac_passes, "scores_by_parameter", lambda *_: False)
    model = EkfacInfluence(task.model, True, LAMBDA, seed=2)
    model.fit([task.train.read(0, positions_task.TRAIN)])
    if monkeypatch is not None:
        monkeypatch.undo()
    return model


def _sequential(model: EkfacInfluence, test: Any, train: Any) -> Tensor:
    batches = ([*zip(*(t.split(size) for t in own), strict=True)] for own, size in ((test, 4), (train, 90)))
    return SequentialInfluenceCalculator(model).influences(*batches).compute(NestedTorchCatAggregator())


def _dask(model: EkfacInfluence, test: Any, train: Any) -> Tensor:
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), DisableClientSingleThreadCheck)
    arrays = [
        da.from_array(t.numpy(), chunks=(size, *t.shape[1:]))
        for own, size in ((test, 4), (train, 90))
        for t in own
    ]
    return torch.from_numpy(calculator.influences(*arrays).compute(scheduler="synchronous"))


CALLS: dict[str, Callable[[EkfacInfluence, Any, Any], Tensor]] = {
    "influences": lambda m, test, train: m.influences(*test, *train),
    "by block": lambda m, test, train: torch.stack([*m.influences_by_block(*test, *train).values()]).sum(0),
    "from factors": lambda m, test, train: m.influences_from_factors(m.influence_factors(*test), *train),
    "from factors by block": lambda m, test, train: torch.stack(
        [*m.influences_from_factors_by_block(m.influence_factors_by_block(*test), *train).values()]
    ).sum(0),
    "on each other": lambda m, test, _: m.influences(*test),
    "self-influences": lambda m, test, _: m.self_influences(*test),
    "factors": lambda m, test, _: m.influence_factors(*test),
    "sequential": _sequential,
    "Dask": _dask,
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_the_library_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule itself chooses the first layer here, and leaves the second turned."""
    task = positions_task.task()
    test, train = task.test.read(0, positions_task.TEST), task.train.read(0, positions_task.TRAIN)
    own = _fitted(None)
    by_parameter = {name: rows.by_parameter for name, rows in own._require_fitted()._layers.items()}
    assert by_parameter == {positions_task.BY_PARAMETER: True, positions_task.TURNED: False}
    expected = CALLS[name](_fitted(monkeypatch), test, train)
    oracle.assert_close(CALLS[name](own, test, train), expected, 1e-11)


def test_the_sum_over_positions_is_the_example_gradient_of_the_layer() -> None:
    """The library's factors against a gradient of one example at a time: not by what the layers captured."""
    task, own = positions_task.task(), _fitted(None)
    test, train = task.test.read(0, 2), task.train.read(0, 5)
    gradients = oracle.example_gradients(task.model, F.cross_entropy, *train)
    oracle.assert_close(own.influences(*test, *train), own.influence_factors(*test) @ gradients.T, 1e-11)
