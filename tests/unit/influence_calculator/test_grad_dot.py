"""Products of gradients, over one state of a model and over several, against one example at a time."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from influence_calculator import BlockMode, Checkpoint, GradDotInfluence, InfluenceMode, TracInInfluence
from influence_calculator.maths import region
from influence_calculator.maths.capture import measure
from influence_calculator.maths.checkpoints import load_checkpoints
from influence_calculator.maths.grad_dot import GradDot
from influence_calculator.maths.method import Fitted, SolverStatus
from influence_calculator.maths.objective import Objective, xy_objective
from influence_calculator.maths.perturbation import perturbations, perturbations_by_block
from influence_calculator.maths.tracin import TracIn
from model_cases import CASES, MLP, SHARED, TRANSFORMER, ModelCase

RATES = (0.5, 0.125, 2.0)


@cache
def states(case: ModelCase) -> tuple[dict[str, Tensor], ...]:
    """Three states on the way to the trained model, no two alike."""
    generator = torch.Generator().manual_seed(3)
    trained = case.model().state_dict()
    return tuple(
        {k: v + s * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in trained.items()}
        for s in (0.6, 0.3, 0.1)
    )


def checkpoints(case: ModelCase) -> list[Checkpoint]:
    return [Checkpoint(state, rate) for state, rate in zip(states(case), RATES, strict=True)]


def in_state(case: ModelCase, state: dict[str, Tensor]) -> nn.Module:
    model = case.model()
    model.load_state_dict(state)
    return model


def gradients(case: ModelCase, state: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Of the test and the training examples, one at a time."""
    model = case.model() if state is None else in_state(case, state)
    test, train = (oracle.example_gradients(model, case.loss, *d) for d in (case.test(), case.train()))
    return test, train


def summed(case: ModelCase) -> Tensor:
    """The definition: `Σ_c η_c g_c(test) · g_c(train)`."""
    total = torch.zeros(())
    for state, rate in zip(states(case), RATES, strict=True):
        test, train = gradients(case, state)
        total = total + rate * test @ train.T
    return total


def over_checkpoints(case: ModelCase) -> Objective:
    model = TracInInfluence(case.model(), case.loss, checkpoints(case))
    return model.objective


def scored(fitted: Fitted, objective: Objective, case: ModelCase, micro_batch: int) -> Tensor:
    left = fitted.solve(fitted.gradients(objective, case.test())).left
    return region.influences(fitted, left, case.train(), micro_batch)


@pytest.mark.parametrize("case", [*CASES, TRANSFORMER], ids=repr)
def test_grad_dot_is_the_product_of_both_sides_gradients(case: ModelCase) -> None:
    model = GradDotInfluence(case.model(), case.loss).fit([case.train()])
    test, train = gradients(case)
    oracle.assert_close(model.influence_factors(*case.test()), test, 1e-10)
    oracle.assert_close(model.influences(*case.test(), *case.train()), test @ train.T, 1e-10)
    oracle.assert_close(model.influences(*case.test()), test @ test.T, 1e-10)
    assert model.solver_report is not None
    assert (model.solver_report.status == SolverStatus.CONVERGED).all()


@pytest.mark.parametrize("case", [*CASES, TRANSFORMER], ids=repr)
def test_tracin_is_the_weighted_sum_over_the_checkpoints(case: ModelCase) -> None:
    model = TracInInfluence(case.model(), case.loss, checkpoints(case)).fit([case.train()])
    oracle.assert_close(model.influences(*case.test(), *case.train()), summed(case), 1e-10)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_perturbations_are_the_inputs_gradients_of_the_influences(case: ModelCase) -> None:
    x, y = (part[:5] for part in case.train())
    one = GradDotInfluence(case.model(), case.loss).fit([case.train()])
    expected = oracle.perturbations(case.model(), case.loss, gradients(case)[0], x, y)
    moved = one.influences(*case.test(), x, y, InfluenceMode.Perturbation)
    oracle.assert_close(moved, expected, 1e-9)

    several = TracInInfluence(case.model(), case.loss, checkpoints(case)).fit([case.train()])
    total = torch.zeros_like(expected)
    for state, rate in zip(states(case), RATES, strict=True):
        z = rate * gradients(case, state)[0]
        total += oracle.perturbations(in_state(case, state), case.loss, z, x, y)
    moved = several.influences(*case.test(), x, y, InfluenceMode.Perturbation)
    oracle.assert_close(moved, total, 1e-9)


def test_the_part_of_each_checkpoint_in_perturbations_is_its_own() -> None:
    x, y = (part[:5] for part in MLP.train())
    objective = over_checkpoints(MLP)
    fitted = TracIn().fitted(objective, {})
    left = fitted.solve(fitted.gradients(objective, MLP.test())).left
    parts = perturbations_by_block(fitted, objective, left, (x, y), micro_batch=2)
    for part, state, rate in zip(parts, states(MLP), RATES, strict=True):
        z = rate * gradients(MLP, state)[0]
        oracle.assert_close(part, oracle.perturbations(in_state(MLP, state), MLP.loss, z, x, y), 1e-9)


@pytest.mark.parametrize("micro_batch", [1, 4, 23])
def test_batches_do_not_matter(micro_batch: int) -> None:
    objective = over_checkpoints(MLP)
    fitted = TracIn().fitted(objective, {})
    oracle.assert_close(scored(fitted, objective, MLP, micro_batch), summed(MLP), 1e-10)
    left = fitted.solve(fitted.gradients(objective, MLP.test())).left
    parts = [perturbations(fitted, objective, left, MLP.train(), size) for size in (micro_batch, 9)]
    oracle.assert_close(parts[0], parts[1], 1e-10)


def test_the_order_of_the_checkpoints_does_not_matter() -> None:
    backwards = TracInInfluence(MLP.model(), MLP.loss, checkpoints(MLP)[::-1]).fit([MLP.train()])
    oracle.assert_close(backwards.influences(*MLP.test(), *MLP.train()), summed(MLP), 1e-10)


def test_the_model_counts_if_its_own_state_is_a_checkpoint_and_only_then() -> None:
    own = Checkpoint(MLP.model().state_dict())
    alone = TracInInfluence(in_state(MLP, states(MLP)[0]), MLP.loss, [own]).fit([MLP.train()])
    test, train = gradients(MLP)
    oracle.assert_close(alone.influences(*MLP.test(), *MLP.train()), test @ train.T, 1e-10)
    twice = TracInInfluence(MLP.model(), MLP.loss, [own, own]).fit([MLP.train()])
    oracle.assert_close(twice.influences(*MLP.test(), *MLP.train()), 2 * test @ train.T, 1e-10)


def test_factors_have_a_block_of_columns_per_checkpoint_and_score_as_the_examples_do() -> None:
    model = TracInInfluence(SHARED.model(), SHARED.loss, checkpoints(SHARED)).fit([SHARED.train()])
    assert model.layout.blocks == ("checkpoint_0", "checkpoint_1", "checkpoint_2")
    factors = model.influence_factors(*SHARED.test())
    expected = [r * gradients(SHARED, s)[0] for s, r in zip(states(SHARED), RATES, strict=True)]
    oracle.assert_close(factors, torch.cat(expected, 1), 1e-10)
    assert model.n_parameters == 3 * expected[0].shape[1]
    oracle.assert_close(model.influences_from_factors(factors, *SHARED.train()), summed(SHARED), 1e-10)


def test_the_training_side_is_differentiated_once_per_checkpoint_for_all_test_rows() -> None:
    objective = over_checkpoints(MLP)
    fitted = TracIn().fitted(objective, {})
    left = fitted.solve(fitted.gradients(objective, MLP.test())).left
    seen: Counter[int] = Counter()
    assert objective.checkpoints is not None
    for c, model in enumerate(objective.checkpoints.models):
        model.register_forward_hook(lambda _, args, __, c=c: seen.update({c: len(args[0])}))
    objective.model.register_forward_hook(lambda *_: pytest.fail("the model itself is no checkpoint"))
    region.influences(fitted, left, MLP.train(), 6)
    assert seen == {c: len(MLP.train()[0]) for c in range(3)}


def test_a_state_may_be_a_dict_a_file_or_a_function(tmp_path: Path) -> None:
    first, second, third = states(MLP)
    path = tmp_path / "second.pt"
    torch.save(second, path)
    given = [first, path, lambda: third]
    made = [Checkpoint(state, rate) for state, rate in zip(given, RATES, strict=True)]
    model = TracInInfluence(MLP.model(), MLP.loss, made).fit([MLP.train()])
    oracle.assert_close(model.influences(*MLP.test(), *MLP.train()), summed(MLP), 1e-10)


def test_checkpoints_are_probed_as_the_model_is() -> None:
    """They are copied where the model of influence is made, in training mode here."""
    x, y = MLP.train()
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    influence = TracInInfluence(model, F.cross_entropy, [Checkpoint(model.state_dict())])
    model.eval()
    with pytest.raises(ValueError, match=r"checkpoints\[0\].*dropout is on in 1:.*call model.eval\(\)"):
        influence.fit([(x, y)])


def test_the_given_model_and_states_are_left_as_they_are() -> None:
    model, before = MLP.model(), copy.deepcopy(MLP.model().state_dict())
    TracInInfluence(model, MLP.loss, checkpoints(MLP)).fit([MLP.train()]).influences(*MLP.test())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_it_travels_by_pickle_with_its_checkpoints_and_moves_with_them() -> None:
    model = TracInInfluence(MLP.model(), MLP.loss, checkpoints(MLP)).fit([MLP.train()])
    again = pickle.loads(pickle.dumps(model)).to("cpu")
    oracle.assert_close(again.influences(*MLP.test(), *MLP.train()), summed(MLP), 1e-10)
    unfitted = TracInInfluence(MLP.model(), MLP.loss, checkpoints(MLP)).to("meta")
    assert unfitted.checkpoints is not None
    assert {p.device.type for p in unfitted.checkpoints.parameters()} == {"meta"}


def test_float32_stays_near_float64() -> None:
    model = TracInInfluence(MLP.model(torch.float32), MLP.loss, checkpoints(MLP))
    (x, y), (a, b) = MLP.train(), MLP.test()
    scores = model.fit([(x.float(), y)]).influences(a.float(), b, x.float(), y)
    assert scores.dtype is torch.float32
    oracle.assert_close(scores, summed(MLP), 1e-4)


@pytest.mark.parametrize("method", [GradDot(), TracIn()], ids=repr)
def test_a_gradient_that_is_not_finite_concerns_its_row_only(method: Any) -> None:
    objective = over_checkpoints(MLP) if method.sums_checkpoints else xy_objective(MLP.model(), MLP.loss)
    fitted = method.fitted(objective, {})
    rows = fitted.gradients(objective, MLP.test())
    expected = fitted.solve(rows).left
    block = next(iter(rows))
    spoiled = {name: value.clone() for name, value in rows.items()}
    spoiled[block][1, 3] = torch.inf
    solved = fitted.solve(spoiled)
    others = [0, 2, 3, 4, 5, 6]
    for name, value in solved.left.items():
        assert torch.equal(value[others], expected[name][others])
    assert solved.left[block][1].isnan().all()
    assert solved.report.status.tolist() == [0, SolverStatus.NOT_FINITE, 0, 0, 0, 0, 0]


def test_the_plan_counts_every_checkpoint() -> None:
    objective = over_checkpoints(MLP)
    shapes, one = (measure(o, MLP.train()) for o in (objective, xy_objective(MLP.model(), MLP.loss)))
    assert shapes.checkpoints == 3
    rates = 3 * 8
    assert shapes.model_bytes == 4 * one.model_bytes + rates
    several, single = TracIn().footprint(shapes, 8, 5), GradDot().footprint(one, 8, 5)
    assert several.factor_row == 3 * single.factor_row == 3 * 60 * 8
    assert several.capture == single.capture, "checkpoints are differentiated one after another"


WRONG: dict[str, tuple[Any, str]] = {
    "none": ([], r"checkpoints: expected at least one, got none"),
    "no list": (Checkpoint({}), r"checkpoints: expected a list of Checkpoint.*got Checkpoint; give a list"),
    "nothing": (None, r"checkpoints: expected a list of Checkpoint.*got NoneType"),
    "a bare state": ([{}], r"checkpoints\[0\]: expected a Checkpoint\(state, learning_rate\), got dict"),
    "a missing name": (
        [Checkpoint(lambda: MLP.model().state_dict()), Checkpoint({"0.weight": torch.ones(5, 4)})],
        r'checkpoints\[1\]: expected every parameter and buffer .*"0\.bias"',
    ),
    "another shape": (
        [Checkpoint({**MLP.model().state_dict(), "0.bias": torch.ones(7)})],
        r"checkpoints\[0\]: expected every parameter.*0\.bias",
    ),
    "no state": ([Checkpoint(lambda: torch.ones(3))], r"checkpoints\[0\]: expected a state dict.*got Tensor"),  # type: ignore[arg-type,return-value]
    "no file": ([Checkpoint("nowhere.pt")], r"checkpoints\[0\]: reading its state raised FileNotFoundError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_checkpoint_of_the_model_is_refused_by_its_place(name: str) -> None:
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_checkpoints(MLP.model(), given)


def test_checkpoints_of_an_iterator_are_all_taken() -> None:
    states = [MLP.build().double().state_dict() for _ in range(2)]
    taken = load_checkpoints(MLP.model(), (Checkpoint(state, 0.5) for state in states))
    assert taken.learning_rates.tolist() == [0.5, 0.5]
    for own, state in zip(taken.models, states, strict=True):
        assert torch.equal(own.get_parameter("0.weight"), state["0.weight"])


def test_a_model_that_cannot_be_copied_is_refused_with_the_cure() -> None:
    model = MLP.model()
    model.cached = 2 * model.get_parameter("0.weight")  # type: ignore[assignment]
    told = "model: TracIn copies it .* cannot be copied: RuntimeError.*; remove tensors that were computed"
    with pytest.raises(ValueError, match=f"(?s){told}"):
        load_checkpoints(model, [Checkpoint(MLP.model().state_dict())])


@pytest.mark.parametrize(
    "rate", [0.0, -1.0, float("nan"), float("inf"), "0.1", None, 1j, torch.ones(2)], ids=str
)
def test_a_learning_rate_is_a_finite_number_above_zero(rate: Any) -> None:
    with pytest.raises(ValueError, match="learning_rate: expected a finite number above 0"):
        Checkpoint({}, rate)


def test_tracin_without_checkpoints_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="TracIn sums over states of the model"):
        TracIn().layout(xy_objective(MLP.model(), MLP.loss))


@pytest.mark.parametrize("mode", list(InfluenceMode))
def test_grad_dot_has_the_parts_of_blocks(mode: InfluenceMode) -> None:
    case, (x, y) = MLP, MLP.train()
    model = GradDotInfluence(case.model(), case.loss, BlockMode.LAYER_WISE).fit([(x, y)])
    test, train = gradients(case)
    parts = model.influences_by_block(*case.test(), x, y, mode)
    assert list(parts) == model.block_names == ["0", "2", "4"]
    factors = model.influence_factors_by_block(*case.test())
    for block, part in parts.items():
        own = oracle.columns_of(case.model(), tuple(slot.name for slot in model.layout.slots_of(block)))
        oracle.assert_close(factors[block], test[:, own], 1e-10)
        alone = torch.zeros_like(test)
        alone[:, own] = test[:, own]
        perturbed = mode is InfluenceMode.Perturbation
        expected = (
            oracle.perturbations(case.model(), case.loss, alone, x, y) if perturbed else alone @ train.T
        )
        oracle.assert_close(part, expected, 1e-9)
    from_factors = model.influences_from_factors_by_block(factors, x, y, mode)
    assert all(torch.equal(from_factors[block], part) for block, part in parts.items())
    oracle.assert_close(
        torch.stack(list(parts.values())).sum(0), model.influences(*case.test(), x, y, mode), 1e-9
    )


def test_blocks_of_grad_dot_that_leave_parameters_out_score_the_others() -> None:
    blocks = {"ends": ("0.bias", "4.weight")}
    model = GradDotInfluence(MLP.model(), MLP.loss, blocks).fit([MLP.train()])
    own = oracle.columns_of(MLP.model(), blocks["ends"])
    test, train = (rows[:, own] for rows in gradients(MLP))
    oracle.assert_close(model.influences(*MLP.test(), *MLP.train()), test @ train.T, 1e-10)
    assert model.n_parameters == len(own)


def test_tracin_has_the_parts_of_checkpoints() -> None:
    case = MLP
    model = TracInInfluence(case.model(), case.loss, checkpoints(case)).fit([case.train()])
    parts = model.influences_by_block(*case.test(), *case.train())
    assert list(parts) == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]
    for part, state, rate in zip(parts.values(), states(case), RATES, strict=True):
        test, train = gradients(case, state)
        oracle.assert_close(part, rate * test @ train.T, 1e-10)
    factors = model.influence_factors_by_block(*case.test())
    again = model.influences_from_factors_by_block(factors, *case.train())
    assert all(torch.equal(again[block], part) for block, part in parts.items())
    x, y = (part[:5] for part in case.train())
    moved = model.influences_by_block(*case.test(), x, y, InfluenceMode.Perturbation)
    for part, state, rate in zip(moved.values(), states(case), RATES, strict=True):
        z = rate * gradients(case, state)[0]
        oracle.assert_close(part, oracle.perturbations(in_state(case, state), case.loss, z, x, y), 1e-9)
