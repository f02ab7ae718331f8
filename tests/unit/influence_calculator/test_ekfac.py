"""EK-FAC against an independent dense construction of its definition, and what must not matter to it."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dense_ekfac
import oracle
import preloaded
from dense_ekfac import DenseLayer, PseudoGradients, dense_layer
from ekfac_cases import EKFAC_CASES, GROUPS_CASE, MLP_CASE, TOKENS_MEAN, EkfacCase
from influence_calculator import SolverWarning
from influence_calculator.maths import kronecker, region
from influence_calculator.maths.blocks import Relative
from influence_calculator.maths.capture import CapturedLayer, measure
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.ekfac_passes import uncaptured_blocks
from influence_calculator.maths.errors import (
    NotFiniteError,
    SingularCurvatureError,
    UnsupportedLossError,
    UnsupportedModelError,
)
from influence_calculator.maths.expectation import Expectation, OutputExpectation
from influence_calculator.maths.layers import LinearLayer
from influence_calculator.maths.method import FitPass, FitState, Fitted, SolverStatus, fit
from influence_calculator.maths.objective import IndexedBatch, Objective, slice_batch, xy_objective
from influence_calculator.torch import EkfacInfluence
from model_cases import ATTENTION, SHARED, ModelCase
from peak_memory import MIB, assert_planned
from references import reference
from training_sets import TrainingSet

N, T = 11, 3
SEED = 17


def _objective(case: EkfacCase) -> Any:
    return xy_objective(case.model(), case.loss)


@cache
def _fitted_state(case: EkfacCase, expectation: str) -> FitState:
    method = Ekfac(expectation=expectation, seed=SEED)
    return fit(method, _objective(case), TrainingSet(case.data(N, 1), 4))


def _definition(case: EkfacCase, expectation: str, draw: int) -> PseudoGradients:
    match expectation:
        case "sampled":
            return case.sampled(SEED, draw)
        case "exact":
            return dense_ekfac.exact(case.loss)
        case _:
            return dense_ekfac.empirical(case.loss)


@cache
def _dense(case: EkfacCase, expectation: str) -> dict[tuple[str, int], DenseLayer]:
    """(layer, group) -> its curvature; Λ is of the second draw."""
    model = case.model()
    covered, corrected = (_definition(case, expectation, draw) for draw in (0, 1))
    x, y = case.data(N, 1)
    names = [
        name
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    return {
        (name, group): dense_layer(model, name, x, y, covered, group, corrected)
        for name in names
        for group in range(dense_ekfac.groups_of(model.get_submodule(name)))
    }


def _unit(case: EkfacCase, expectation: str, name: str, group: int) -> dict[str, Tensor]:
    """What the covariance pass left of one group of a layer."""
    unit = _fitted_state(case, expectation)["covariance"][name]
    module = case.model().get_submodule(name)
    if isinstance(module, nn.Embedding):
        return {**unit, "input_vectors": torch.eye(module.num_embeddings, dtype=torch.float64)}
    if dense_ekfac.groups_of(case.model().get_submodule(name)) == 1:
        return dict(unit)
    return {key: tensor[group] for key, tensor in unit.items() if tensor.dim() > 0}


def _influences(fitted: Fitted, case: EkfacCase) -> Tensor:
    solved = fitted.solve(fitted.gradients(_objective(case), case.data(T, 2)))
    return region.influences(fitted, solved.left, case.data(N, 1), 4)


def _dense_curvature(case: EkfacCase, expectation: str, corrected: bool) -> Tensor:
    layers = {}
    for (name, group), dense in _dense(case, expectation).items():
        unit = _unit(case, expectation, name, group)
        Q_A, Q_G = unit["input_vectors"], unit["output_vectors"]
        if corrected:
            eigenvalues = dense.eigenvalues(Q_A, Q_G)
        else:
            λ_A = (Q_A.T @ dense.activations @ Q_A).diagonal()
            λ_G = (Q_G.T @ dense.gradients @ Q_G).diagonal()
            eigenvalues = torch.outer(λ_G, λ_A)
        layers[name, group] = (dense, Q_A, Q_G, eigenvalues)
    return dense_ekfac.curvature(case.model(), layers)


EVERY_EXPECTATION = pytest.mark.parametrize("expectation", list(Expectation), ids=str)
EVERY_CASE = pytest.mark.parametrize("case", EKFAC_CASES, ids=repr)


@EVERY_CASE
@EVERY_EXPECTATION
def test_the_bases_are_eigenvectors_of_the_defined_covariances(case: EkfacCase, expectation: str) -> None:
    for (name, group), dense in _dense(case, expectation).items():
        unit = _unit(case, expectation, name, group)
        for matrix, side in ((dense.activations, "input"), (dense.gradients, "output")):
            Q, values = unit[f"{side}_vectors"], unit[f"{side}_values"]
            identity = torch.eye(len(Q), dtype=torch.float64)
            torch.testing.assert_close(Q.T @ Q, identity, rtol=0, atol=1e-12)
            torch.testing.assert_close(Q @ torch.diag(values) @ Q.T, matrix, rtol=0, atol=1e-12)


@EVERY_CASE
@EVERY_EXPECTATION
@pytest.mark.parametrize("λ", [1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("corrected", [True, False])
def test_influences_are_those_of_the_definition(
    case: EkfacCase, expectation: str, λ: float, corrected: bool
) -> None:
    method = Ekfac(regularization=λ, update_diagonal=corrected, expectation=expectation, seed=SEED)
    fitted = method.fitted(_objective(case), _fitted_state(case, expectation), None)
    curvature = _dense_curvature(case, expectation, corrected)
    model = case.model()
    test, train = (
        oracle.example_gradients(model, case.loss, *case.data(count, seed))
        for count, seed in ((T, 2), (N, 1))
    )
    expected = oracle.influences(curvature, λ, test, train)
    oracle.assert_close(_influences(fitted, case), expected, 1e-6)


@EVERY_CASE
@pytest.mark.parametrize("λ", [1e-2, 1e-1, 1.0])
def test_the_part_of_each_layer_is_that_of_its_own_curvature(case: EkfacCase, λ: float) -> None:
    fitted = Ekfac(λ).fitted(_objective(case), _fitted_state(case, "exact"), None)
    left = fitted.solve(fitted.gradients(_objective(case), case.data(T, 2))).left
    curvature, model = _dense_curvature(case, "exact", corrected=True), case.model()
    test, train = (oracle.example_gradients(model, case.loss, *case.data(*of)) for of in ((T, 2), (N, 1)))
    parts = region.influences_by_block(fitted, left, case.data(N, 1), 4)
    for block, part in zip(fitted.layout.blocks, parts, strict=True):
        own = oracle.columns_of(model, tuple(slot.name for slot in fitted.layout.slots_of(block)))
        expected = oracle.influences(curvature[own[:, None], own], λ, test[:, own], train[:, own])
        oracle.assert_close(part, expected, 1e-6)


@EVERY_CASE
def test_exact_corrected_eigenvalues_have_the_trace_of_the_gauss_newton_matrix(case: EkfacCase) -> None:
    """Mistake 4: one summed pseudo-gradient per example, or a correction per token, loses this trace."""
    curvature = oracle.generalized_gauss_newton(case.model(), case.loss, *case.data(N, 1))
    state = _fitted_state(case, "exact")["correction"]
    trace = sum(float(unit["eigenvalues"].sum()) for unit in state.values())
    assert trace == pytest.approx(float(curvature.trace()), rel=1e-9)


@pytest.mark.parametrize("case", [MLP_CASE, TOKENS_MEAN, EKFAC_CASES[2], EKFAC_CASES[5]], ids=repr)
def test_sampled_curvature_has_the_trace_of_the_exact_one_on_average(case: EkfacCase) -> None:
    data = TrainingSet(case.data(N, 1), N)
    exact = fit(Ekfac(expectation="exact"), _objective(case), data)["correction"]
    traces = []
    for seed in range(30):
        sampled = fit(Ekfac(samples=4, seed=seed), _objective(case), data)["correction"]
        traces.append(sum(float(unit["eigenvalues"].sum()) for unit in sampled.values()))
    drawn = torch.tensor(traces)
    error = float(drawn.std()) / math.sqrt(len(traces))
    expected = sum(float(unit["eigenvalues"].sum()) for unit in exact.values())
    assert abs(float(drawn.mean()) - expected) < 5 * error
    assert error < 0.1 * expected


def _tensors(state: FitState) -> dict[str, Tensor]:
    """What does not depend on the choice of eigenvectors."""
    values = {}
    for name, unit in state["covariance"].items():
        for side in ("input", "output"):
            Q, eigenvalues = unit[f"{side}_vectors"], unit[f"{side}_values"]
            values[f"{name} {side}"] = Q @ torch.diag(eigenvalues) @ Q.T
        basis = torch.kron(unit["output_vectors"], unit["input_vectors"])
        corrected = state["correction"][name]["eigenvalues"].reshape(-1)
        values[f"{name} corrected"] = basis @ torch.diag(corrected) @ basis.T
    return values


@pytest.mark.parametrize("size", [1, 2, 5, N])
@EVERY_EXPECTATION
def test_the_size_of_a_batch_does_not_matter(size: int, expectation: str) -> None:
    """Mistake 1: N is no multiple of any of these sizes, so a last batch is short."""
    case = TOKENS_MEAN
    method = Ekfac(expectation=expectation, seed=SEED)
    found = _tensors(fit(method, _objective(case), TrainingSet(case.data(N, 1), size)))
    for name, expected in _tensors(_fitted_state(case, expectation)).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


class _Piece:
    """A contiguous range of a training set, with the indices of the whole."""

    def __init__(self, whole: Any, start: int, stop: int) -> None:
        self.length = stop - start
        self._indexed = IndexedBatch(start, slice_batch(whole, start, stop))

    def batches(self) -> Any:
        yield self._indexed


@EVERY_EXPECTATION
def test_ranges_that_are_summed_do_not_matter(expectation: str) -> None:
    case = TOKENS_MEAN
    whole = case.data(N, 1)
    pieces = [_Piece(whole, 0, 6), _Piece(whole, 6, 7), _Piece(whole, 7, N)]
    method = Ekfac(expectation=expectation, seed=SEED)
    found = _tensors(fit(method, _objective(case), TrainingSet(whole, N), pieces))
    for name, expected in _tensors(_fitted_state(case, expectation)).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("expectation", ["sampled", "exact"])
@pytest.mark.parametrize(
    ("limit", "computed"), [(0, 8), (2_000, 7), (1 << 20, 4)], ids=["none", "some", "all"]
)
def test_what_the_first_pass_can_capture_ahead_is_not_computed_again_while_it_fits(
    limit: int, computed: int, expectation: str
) -> None:
    case, method = MLP_CASE, Ekfac(samples=2, seed=SEED, expectation=expectation)
    forwards: list[Any] = []
    objective = _objective(case)
    objective.model.register_forward_hook(lambda *call: forwards.append(call))
    data = TrainingSet(case.data(N, 1), 3)
    found = _tensors(fit(method, objective, data, kept_bytes=limit))
    assert len(forwards) == computed  # of 4 batches in each of 2 passes
    for name, expected in _tensors(_state_of(objective, data, method.passes())).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


class _IntoOneBuffer(nn.Module):
    """Its second layer's inputs stand in the same memory for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("memory", torch.zeros(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.memory[: len(x)].copy_(h.detach())
        return self.last(self.memory[: len(x)]) + 0 * h.sum(1, keepdim=True)


def test_what_was_overwritten_since_it_was_captured_is_computed_again() -> None:
    case, method = MLP_CASE, Ekfac(seed=SEED)
    objective = xy_objective(_IntoOneBuffer().double().eval(), F.cross_entropy)
    data = TrainingSet(case.data(N, 1), 3)
    found = _tensors(fit(method, objective, data, kept_bytes=1 << 20))
    for name, expected in _tensors(_state_of(objective, data, method.passes())).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


def test_the_eigenvalues_see_other_draws_than_the_bases() -> None:
    """In the basis of a draw its own squares are too large at first eigenvectors, too small at the last."""
    case = MLP_CASE
    data = TrainingSet(case.data(100, 1), 100)
    exact = _of_passes(case, Ekfac(regularization=0.01, expectation="exact"), data)
    errors = {"same": 0.0, "others": 0.0}
    for seed in range(24):
        method = Ekfac(regularization=0.01, seed=seed)
        first, second = method.passes()
        for draws, correction in (
            ("same", replace(second, expectation=first.expectation)),
            ("others", second),
        ):
            found = _of_passes(case, method, data, (first, correction))
            errors[draws] += float((found - exact).norm())
    assert errors["others"] < 0.95 * errors["same"]


def _of_passes(
    case: EkfacCase, method: Ekfac, data: TrainingSet, passes: tuple[FitPass, ...] | None = None
) -> Tensor:
    """Influences of a method that these passes fitted."""
    objective = _objective(case)
    state = _state_of(objective, data, passes or method.passes())
    return _influences(method.fitted(objective, state, None), case)


def _state_of(objective: Objective, data: TrainingSet, passes: tuple[FitPass, ...]) -> FitState:
    """Of passes of which each computes all it needs."""
    state: dict[str, Any] = {}
    for step in passes:
        sums = step.accumulate(objective, data.batches(), state)
        state[step.name] = {
            unit: step.finish(unit, sums[unit], data.length, state) for unit in step.units(objective)
        }
    return state


def test_one_example_at_a_time_scores_as_many_together() -> None:
    """Mistake 6: the label of a single example keeps its dimension."""
    case = MLP_CASE
    fitted = Ekfac(regularization=0.1).fitted(_objective(case), _fitted_state(case, "sampled"), None)
    solved = fitted.solve(fitted.gradients(_objective(case), slice_batch(case.data(T, 2), 0, 1)))
    singly = region.influences(fitted, solved.left, case.data(N, 1), 1)
    torch.testing.assert_close(singly, _influences(fitted, case)[:1])


@pytest.mark.parametrize("turns_tokens", [True, False])
@pytest.mark.parametrize("case", [MLP_CASE, TOKENS_MEAN, GROUPS_CASE], ids=repr)
def test_gradients_that_are_formed_piece_by_piece_are_those_formed_together(
    case: EkfacCase, turns_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces share their memory and cut both examples and outputs; tokens are turned or their sums."""
    fitted = Ekfac(regularization=0.1).fitted(_objective(case), _fitted_state(case, "sampled"), None)
    together = _influences(fitted, case)
    objective, data = _objective(case), TrainingSet(case.data(N, 1), 4)
    state = _fitted_state(case, "sampled")
    correction = Ekfac(seed=SEED).passes()[1]
    summed = correction.accumulate(objective, data.batches(), state)
    monkeypatch.setattr(kronecker, "turns_tokens", lambda *_: turns_tokens)
    monkeypatch.setattr(kronecker, "OUTPUTS", 2)
    monkeypatch.setattr(kronecker, "CACHED_ELEMENTS", 30)
    monkeypatch.setattr(kronecker, "PRODUCT_ELEMENTS", 30)
    torch.testing.assert_close(_influences(fitted, case), together)
    torch.testing.assert_close(correction.accumulate(objective, data.batches(), state), summed)


@pytest.mark.parametrize("w", [3, 8, 12])
def test_a_covariance_that_is_summed_in_blocks_is_the_whole_one(
    w: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upper triangle is made of the lower one in the end, whatever the blocks left in it."""
    monkeypatch.setattr(kronecker, "COVARIANCE_COLUMNS", 3)
    tokens = torch.randn(4, 5, w, dtype=torch.float64)
    total = torch.zeros(w, w, dtype=torch.float64)
    for piece in (tokens[:1], tokens[1:]):
        kronecker.add_products(total, piece)
    kronecker.mirror(total)
    torch.testing.assert_close(total, torch.einsum("nsv,nsw->vw", tokens, tokens))


def test_a_layer_without_bias_keeps_the_order_of_its_weight() -> None:
    """Mistake 4: as λ grows the factor becomes g / λ, entry by entry."""
    model = nn.Linear(4, 3, bias=False).double()
    objective = xy_objective(model, F.cross_entropy)
    batch = MLP_CASE.data(N, 1)
    method = Ekfac(regularization=1e9)
    fitted = method.fitted(objective, fit(method, objective, TrainingSet(batch, N)), None)
    factors = fitted.layout.flatten(fitted.factors(fitted.solve(fitted.gradients(objective, batch)).left))
    gradients = oracle.example_gradients(model, F.cross_entropy, *batch)
    oracle.assert_close(factors * 1e9, gradients, 1e-6)


class _WithOthers(nn.Module):
    """Outputs beside the logits that are no tensors, as a language model's cache."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP_CASE.model()

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"cache": object(), "logits": self.net(x), "hidden": None}


@EVERY_EXPECTATION
def test_outputs_that_are_no_tensors_change_nothing(expectation: str) -> None:
    """The closed form of the loss is found beside them: other draws would give another state."""
    objective = xy_objective(_WithOthers().eval(), lambda outputs, y: F.cross_entropy(outputs["logits"], y))
    method = Ekfac(expectation=expectation, seed=SEED)
    found = fit(method, objective, TrainingSet(MLP_CASE.data(N, 1), 4))
    expected = _fitted_state(MLP_CASE, expectation)
    for step, units in expected.items():
        for name, unit in units.items():
            for key, tensor in unit.items():
                assert torch.equal(found[step][f"net.{name}"][key], tensor)


def test_more_samples_are_averaged() -> None:
    """The mean over draws of `(...)²`, not the square of their mean."""
    expectation = OutputExpectation(samples=3, seed=SEED)
    case = MLP_CASE
    x, y = case.data(N, 1)
    outputs = case.model()(x).detach()
    made = expectation.pseudo_gradients(_objective(case), outputs, IndexedBatch(0, (x, y)))
    vs = [made.at(k)[0] for k in range(made.count)]
    assert len(vs) == 3
    assert not torch.equal(vs[0], vs[1])
    single = OutputExpectation(samples=1, seed=SEED).pseudo_gradients(
        _objective(case), outputs, IndexedBatch(0, (x, y))
    )
    torch.testing.assert_close(vs[0] * 3**0.5, single.at(0)[0])


WRAPPED = {
    "named": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "reshaped": lambda f, y: F.cross_entropy(f.unsqueeze(0).float().double()[0, :, :], y),
    "scaled": lambda f, y: 2 * F.cross_entropy(f, y) - F.cross_entropy(f, y),
    "by hand": lambda f, y: F.nll_loss(f.log_softmax(1), y),
    "tempered": lambda f, y: F.cross_entropy(f.sinh().asinh(), y),
    "smoothed": lambda f, y: F.cross_entropy(f, y, label_smoothing=0.3),
    "masked": lambda f, y: _first_classes(f, y),
}


def _first_classes(f: Tensor, y: Tensor) -> Tensor:
    kept = f.clone()
    kept[:, 2] = 0
    return F.cross_entropy(kept, y)


@pytest.mark.parametrize("name", WRAPPED)
def test_sampled_pseudo_gradients_have_the_covariance_of_the_losss_second_derivative(name: str) -> None:
    """Whether the loss is recognised or not; 4 000 copies of one example."""
    loss, count = WRAPPED[name], 4000
    f = torch.tensor([[0.3, -1.0, 0.8]], dtype=torch.float64)
    objective = xy_objective(nn.Linear(2, 3), loss)
    batch = (torch.zeros(count, 2), torch.zeros(count, dtype=torch.int64))
    made = OutputExpectation(seed=2).pseudo_gradients(
        objective, f.expand(count, 3).clone(), IndexedBatch(0, batch)
    )
    (v,) = made.at(0)
    expected = oracle.output_hessian(loss, f, torch.tensor([0]))
    assert float((v.T @ v / count - expected).abs().max()) < 5 * 0.5 / math.sqrt(count)


def test_a_loss_over_many_outputs_is_drawn_from_without_its_second_derivative() -> None:
    objective = xy_objective(nn.Linear(2, 5000), lambda f, y: F.cross_entropy(f, y))
    outputs, labels = torch.randn(2, 5000), torch.tensor([1, 2])
    indexed = IndexedBatch(0, (torch.zeros(2, 2), labels))
    (v,) = OutputExpectation().pseudo_gradients(objective, outputs, indexed).at(0)
    assert v.shape == (2, 5000)
    unknown = xy_objective(nn.Linear(2, 5000), lambda f, y: F.cross_entropy(f, y) ** 2)
    with pytest.raises(UnsupportedLossError, match=r"5000.*expectation empirical"):
        OutputExpectation().pseudo_gradients(unknown, outputs, indexed)


@EVERY_CASE
@pytest.mark.parametrize("λ", [1e-2, 1e-1, 1.0])
def test_factors_are_those_of_the_definition_by_parameter(case: EkfacCase, λ: float) -> None:
    """What is scored stays in the eigenbasis; factors and left representation follow from each other."""
    method = Ekfac(regularization=λ, expectation="exact")
    fitted = method.fitted(_objective(case), _fitted_state(case, "exact"), None)
    left = fitted.solve(fitted.gradients(_objective(case), case.data(T, 2))).left
    factors = fitted.factors(left)
    test = oracle.example_gradients(case.model(), case.loss, *case.data(T, 2))
    curvature = _dense_curvature(case, "exact", corrected=True)
    expected = oracle.factors(curvature, λ, test)
    oracle.assert_close(fitted.layout.flatten(factors), expected, 1e-6)
    for block, rows in fitted.left(factors).items():
        torch.testing.assert_close(rows, left[block], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("weight", "bias"), [("w", "b"), ("w", None), (None, "b")])
def test_turned_gradients_are_the_gradients_in_the_basis(
    monkeypatch: pytest.MonkeyPatch, weight: str | None, bias: str | None, tokens: int
) -> None:
    """Either way of turning, tokens or their products, gives the same."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = CapturedLayer(LinearLayer("", weight, bias), random(5, tokens, 3), random(5, tokens, 4))
    a = kronecker.extended_activations(layer, torch.float64)
    Q_A, Q_G = (torch.linalg.qr(random(k, k))[0] for k in (a.shape[2], 4))
    expected = torch.einsum("nso,nsj,op,jk->npk", layer.gradients, a, Q_G, Q_A).flatten(1)
    basis = kronecker.Basis(Q_A, Q_G)
    for tokens_are_turned in (True, False):
        monkeypatch.setattr(kronecker, "turns_tokens", lambda *_, way=tokens_are_turned: way)
        torch.testing.assert_close(kronecker.turned_gradients(layer, basis), expected)


@pytest.mark.parametrize("tokens_are_turned", [True, False])
def test_gradients_of_groups_are_turned_either_way(
    monkeypatch: pytest.MonkeyPatch, tokens_are_turned: bool
) -> None:
    monkeypatch.setattr(kronecker, "turns_tokens", lambda *_: tokens_are_turned)
    case = GROUPS_CASE
    fitted = Ekfac(regularization=0.1).fitted(_objective(case), _fitted_state(case, "sampled"), None)
    found = _influences(fitted, case)
    monkeypatch.undo()
    torch.testing.assert_close(found, _influences(fitted, case), rtol=1e-9, atol=1e-12)


def test_a_fit_leaves_the_model_as_it_was() -> None:
    """Mistake 4: `.grad` is neither filled nor added to."""
    objective = _objective(MLP_CASE)
    parameters = dict(objective.model.named_parameters())
    parameters["0.weight"].grad = torch.full_like(parameters["0.weight"], 3.0)
    parameters["2.weight"].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    method = Ekfac(regularization=0.1)
    tracked = xy_objective(objective.model, F.cross_entropy)
    state = fit(method, tracked, TrainingSet(MLP_CASE.data(N, 1), 4))
    fitted = method.fitted(tracked, state, None)
    fitted.solve(fitted.gradients(tracked, MLP_CASE.data(T, 2)))
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    assert float(parameters["0.weight"].grad.mean()) == 3.0
    assert all(p.grad is None for name, p in parameters.items() if name != "0.weight")
    assert [name for name, p in parameters.items() if not p.requires_grad] == ["2.weight"]


@EVERY_CASE
@EVERY_EXPECTATION
def test_what_a_fit_leaves_behind_holds_no_graph(case: EkfacCase, expectation: str) -> None:
    units = [unit for units in _fitted_state(case, expectation).values() for unit in units.values()]
    assert not any(tensor.requires_grad for unit in units for tensor in unit.values())


class _Normalized(nn.Module):
    """A layer norm between two Linear layers, and an embedding before them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


def _normalized() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return xy_objective(_Normalized().double(), F.cross_entropy)


def test_parameters_that_cannot_be_treated_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"norm\.weight \(LayerNorm\), norm\.bias.*'diagonal'"):
        Ekfac().layout(_normalized())


def test_excluded_parameters_have_no_place() -> None:
    layout = Ekfac(unsupported="exclude").layout(_normalized())
    assert layout.blocks == ("first", "last")
    assert [slot.name for slot in layout.slots] == ["first.weight", "first.bias", "last.weight", "last.bias"]


@EVERY_EXPECTATION
@pytest.mark.parametrize("corrected", [True, False])
def test_a_diagonal_takes_the_place_of_what_cannot_be_treated(expectation: str, corrected: bool) -> None:
    """`Λ = (1/N) Σ E[g²]`: the diagonal of the Gauss-Newton matrix when the expectation is exact."""
    objective = _normalized()
    method = Ekfac(
        regularization=0.1,
        expectation=expectation,
        unsupported="diagonal",
        seed=SEED,
        update_diagonal=corrected,
    )
    x, y = MLP_CASE.data(N, 1)
    state = fit(method, objective, TrainingSet((x, y), 4))
    fitted = method.fitted(objective, state, None)
    assert fitted.layout.blocks == ("first", "norm", "last")
    model = objective.model
    match expectation:
        case "exact":
            curvature = oracle.generalized_gauss_newton(model, F.cross_entropy, x, y)
        case "empirical":
            curvature = oracle.empirical_fisher(model, F.cross_entropy, x, y)
        case _:
            curvature = _sampled_fisher(model, x, y)
    places = oracle.columns_of(model, ("norm.weight", "norm.bias"))
    diagonal = curvature.diagonal()[places]
    gradients = oracle.example_gradients(model, F.cross_entropy, *MLP_CASE.data(T, 2))
    left = fitted.factors(fitted.solve(fitted.gradients(objective, MLP_CASE.data(T, 2))).left)
    torch.testing.assert_close(left["norm"], gradients[:, places] / (diagonal + 0.1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [ATTENTION, SHARED], ids=repr)
def test_every_kind_of_module_has_a_diagonal(case: ModelCase) -> None:
    """Norms, attention's own weights, a bias alone, shared weights."""
    objective = xy_objective(case.model(), case.loss)
    method = Ekfac(regularization=0.1, expectation="exact", unsupported="diagonal")
    fitted = method.fitted(objective, fit(method, objective, TrainingSet(case.train(), 5)), None)
    left = fitted.factors(fitted.solve(fitted.gradients(objective, case.test())).left)
    diagonal = reference(case, "generalized_gauss_newton").curvature.diagonal()
    blocks = uncaptured_blocks(objective)
    assert blocks.keys() < set(fitted.layout.blocks)
    for block, names in blocks.items():
        places = oracle.columns_of(objective.model, names)
        expected = reference(case, "generalized_gauss_newton").test[:, places] / (diagonal[places] + 0.1)
        torch.testing.assert_close(left[block], expected, rtol=1e-9, atol=1e-12)


def test_modules_that_share_a_weight_are_refused_naming_each_other() -> None:
    objective = xy_objective(SHARED.model(), SHARED.loss)
    with pytest.raises(UnsupportedModelError) as caught:
        Ekfac().layout(objective)
    assert "first.weight (Linear, shared with 'second'), first.bias" in str(caught.value)
    assert "second.bias (Linear, shared with 'first');" in str(caught.value)
    assert "head" not in str(caught.value)


def _sampled_fisher(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    parameters = list(model.parameters())
    rows = []
    for index in range(N):
        outputs = model(x[index : index + 1])
        (v,) = MLP_CASE.sampled(SEED, 0)(index, outputs.detach(), y[index : index + 1])
        found = torch.autograd.grad(outputs, parameters, v)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return sum((torch.outer(g, g) for g in rows), torch.zeros(())) / N


def test_a_relative_regularization_follows_each_layers_trace() -> None:
    case = MLP_CASE
    state = _fitted_state(case, "exact")
    traces = {name: float(unit["eigenvalues"].mean()) for name, unit in state["correction"].items()}
    relative = Ekfac(regularization=Relative(0.3), expectation="exact").fitted(_objective(case), state, None)
    by_layer = {name: 0.3 * trace for name, trace in traces.items()}
    absolute = Ekfac(regularization=by_layer, expectation="exact").fitted(_objective(case), state, None)
    torch.testing.assert_close(_influences(relative, case), _influences(absolute, case))


def test_a_regularization_that_misses_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'4'"):
        Ekfac(regularization={"0": 0.1, "2": 0.1}).layout(_objective(MLP_CASE))


@pytest.mark.parametrize("expectation", ["sampled", "exact"])
def test_a_loss_without_curvature_is_told(expectation: str) -> None:
    """Else gradients divided by λ would pass for influences."""
    x, y = torch.randn(N, 4).double(), torch.randn(N, 2).double()

    def fitted(loss: Any, own: str) -> None:
        model = nn.Linear(4, 2).double()
        EkfacInfluence(model, hessian_regularization=0.1, loss=loss, expectation=own).fit([(x, y)])

    with pytest.warns(SolverWarning, match=r"curvature is 0 .*mean absolute error.*empirical"):
        fitted(F.l1_loss, expectation)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SolverWarning)
        fitted(F.l1_loss, "empirical")
        fitted(F.mse_loss, expectation)


def test_no_regularization_for_a_singular_curvature_is_refused() -> None:
    """The logits' mean is in the null space of the softmax's curvature."""
    case = MLP_CASE
    state = {name: dict(units) for name, units in _fitted_state(case, "exact").items()}
    state["correction"]["4"] = {"eigenvalues": torch.zeros(3, 5, dtype=torch.float64)}
    with pytest.raises(SingularCurvatureError, match=r"layer '4'.*larger regularization"):
        Ekfac(regularization=0.0).fitted(_objective(case), state, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expectation": "mean"}, "expectation: expected one of sampled, exact, empirical, got 'mean'"),
        ({"unsupported": "ignore"}, "unsupported: expected one of refuse, diagonal, exclude"),
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        ({"regularization": -1.0}, "regularization: .*got -1"),
    ],
)
def test_values_that_mean_nothing_are_refused_by_field(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ekfac(**arguments)


@pytest.mark.parametrize("expectation", list(Expectation), ids=str)
def test_a_training_example_that_is_not_finite_is_named(expectation: str) -> None:
    x, y = MLP_CASE.data(N, 1)
    x[9, 2] = torch.nan
    with pytest.raises(NotFiniteError, match="training example 9:"):
        fit(Ekfac(expectation=expectation), _objective(MLP_CASE), TrainingSet((x, y), 4))


def test_a_test_example_that_is_not_finite_spoils_its_own_row_alone() -> None:
    case = MLP_CASE
    fitted = Ekfac(regularization=0.1).fitted(_objective(case), _fitted_state(case, "sampled"), None)
    x, y = case.data(T, 2)
    x[1] = torch.nan
    solved = fitted.solve(fitted.gradients(_objective(case), (x, y)))
    assert solved.report.status.tolist() == [
        SolverStatus.CONVERGED,
        SolverStatus.NOT_FINITE,
        SolverStatus.CONVERGED,
    ]
    scores = region.influences(fitted, solved.left, case.data(N, 1), 4)
    assert scores.isnan().all(1).tolist() == [False, True, False]
    torch.testing.assert_close(scores[0], _influences(fitted, case)[0])


@pytest.mark.parametrize("case", EKFAC_CASES, ids=repr)
def test_compact_rows_expand_to_the_left_representation(case: EkfacCase) -> None:
    """Only layers whose tokens are fewer numbers than their products have them; those of others are whole."""
    fitted = Ekfac(regularization=0.1).fitted(_objective(case), _fitted_state(case, "sampled"), None)
    compact = fitted.compact(_objective(case), case.data(T, 2))
    assert (compact is None) == (case.vocabulary is not None)
    if compact is None:
        return
    solved = fitted.solve(fitted.gradients(_objective(case), case.data(T, 2)))
    assert compact.report.status.tolist() == solved.report.status.tolist()
    rows, expected = compact.rows, fitted.layout.flatten(solved.left)
    assert fitted.is_compact(rows.shape[1]) == (len(case.features) == 1)
    if len(case.features) == 1:
        rows = fitted.expanded(rows)
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 3, 7, 8])
def test_tokens_of_wide_layers_are_sent_in_place_of_their_products(tokens: int) -> None:
    """58 numbers for each token, and 412 for the products: 8 tokens are more."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Flatten()).double()
    objective = xy_objective(model, F.cross_entropy)
    x, y = torch.randn(N, tokens, 12, dtype=torch.float64), MLP_CASE.data(N, 1)[1]
    method = Ekfac(regularization=0.1)
    fitted = method.fitted(objective, fit(method, objective, TrainingSet((x, y), 4)), None)
    rows = fitted.compact(objective, (x, y)).rows
    assert rows.shape == (N, 58 * tokens if tokens < 8 else 412)
    assert fitted.is_compact(rows.shape[1]) == (tokens < 8)
    expected = fitted.layout.flatten(fitted.solve(fitted.gradients(objective, (x, y))).left)
    found = fitted.expanded(rows) if tokens < 8 else rows
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_layers_of_one_token_and_of_several_share_whole_rows() -> None:
    """One that was captured before it was known that others have several is in its place."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.Flatten())
    objective = xy_objective(model.append(nn.Linear(20, 3)).double(), F.cross_entropy)
    x, y = torch.randn(N, 6, dtype=torch.float64), MLP_CASE.data(N, 1)[1]
    method = Ekfac(regularization=0.1)
    fitted = method.fitted(objective, fit(method, objective, TrainingSet((x, y), 4)), None)
    compact = fitted.compact(objective, (x, y))
    solved = fitted.solve(fitted.gradients(objective, (x, y)))
    torch.testing.assert_close(compact.rows, fitted.layout.flatten(solved.left), rtol=1e-12, atol=1e-12)


def test_groups_of_one_token_have_no_compact_rows() -> None:
    """They stand where examples stand, so that their numbers could be taken for those of others."""
    model = nn.Sequential(nn.Conv1d(6, 6, 2, groups=3), nn.Flatten(), nn.Linear(6, 3)).double()
    objective = xy_objective(model, F.cross_entropy)
    x, y = torch.randn(N, 6, 2, dtype=torch.float64), MLP_CASE.data(N, 1)[1]
    method = Ekfac(regularization=0.1)
    fitted = method.fitted(objective, fit(method, objective, TrainingSet((x, y), 4)), None)
    assert not any(fitted.is_compact(columns) for columns in range(fitted.layout.width + 1))
    solved = fitted.solve(fitted.gradients(objective, (x, y)))
    torch.testing.assert_close(fitted.compact(objective, (x, y)).rows, fitted.layout.flatten(solved.left))


def test_a_compact_row_that_is_not_finite_is_told_and_expands_to_nothing_else() -> None:
    case = MLP_CASE
    fitted = Ekfac(regularization=0.1).fitted(_objective(case), _fitted_state(case, "sampled"), None)
    x, y = case.data(T, 2)
    x[1] = torch.inf
    compact = fitted.compact(_objective(case), (x, y))
    assert compact is not None
    solved = fitted.solve(fitted.gradients(_objective(case), (x, y)))
    assert compact.report.status.tolist() == solved.report.status.tolist()
    assert compact.report.residual.isnan().tolist() == [False, True, False]
    left = fitted.expanded(compact.rows)
    assert left.isnan().all(1).tolist() == [False, True, False]
    torch.testing.assert_close(left[0], fitted.layout.flatten(solved.left)[0], rtol=1e-12, atol=1e-12)


def test_a_method_travels_by_pickle() -> None:
    method = Ekfac(regularization=0.1, expectation="exact")
    assert pickle.loads(pickle.dumps(method)) == method
    assert [step.name for step in pickle.loads(pickle.dumps(method.passes()))] == ["covariance", "correction"]


def test_half_precision_is_summed_in_float32() -> None:
    case = MLP_CASE
    x, y = case.data(N, 1)
    objective = xy_objective(case.model().to(torch.bfloat16), case.loss)
    state = fit(Ekfac(), objective, TrainingSet((x.to(torch.bfloat16), y), 4))
    tensors = [t for units in state.values() for own in units.values() for t in own.values()]
    assert {t.dtype for t in tensors if t.dim() > 0} == {torch.float32}
    assert {t.dtype for t in tensors if t.dim() == 0} == {torch.float64}, "counts"
    fitted = Ekfac(regularization=1.0).fitted(objective, state, None)
    left = fitted.solve(fitted.gradients(objective, (x[:T].to(torch.bfloat16), y[:T]))).left
    assert all(rows.dtype == torch.float32 and rows.isfinite().all() for rows in left.values())


def test_a_footprint_counts_the_sums_the_factors_and_the_micro_batch() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    shapes = measure(xy_objective(model, F.cross_entropy), (torch.randn(1, 64), torch.zeros(1).long()))
    width = 64 * 128 + 128 + 128 * 10 + 10
    bases = 4 * (65**2 + 128**2 + 129**2 + 10**2)
    small, large = (Ekfac().footprint(shapes, micro_batch, 10) for micro_batch in (1, 1001))
    assert small.factor_row == 4 * width
    assert small.fit >= bases + 4 * width
    assert small.factors >= bases + 4 * width + 10 * 2 * 4 * width
    per_example = (large.capture - small.capture) / 1000
    assert 4 * (64 * 128 + 64 + 128 + 10) <= per_example <= 2 * 4 * (64 * 128 + 64 + 128 + 10)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel keeps no resettable peak")
@pytest.mark.parametrize("model", ["1", "4", "words"])
def test_a_footprint_is_what_a_process_takes(model: str) -> None:
    """Within 20 % and 200 MiB of the peak above an idle process: for convolutions in so many groups on large
    images, and for a large vocabulary.
    """
    measured = json.loads(preloaded.output("measured_footprint:main", model))
    for stage, (taken, planned) in measured.items():
        assert_planned(planned, taken, stage)
    assert measured["fit"][0] > 200 * MIB
