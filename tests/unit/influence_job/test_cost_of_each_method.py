"""What a plan says that each method costs, beside the operations that are done and by the method's formula.

Symbols: i inputs, o outputs, S tokens of a layer; P parameters; T, N test and training examples; k columns of
a projection; of one example C its capture, G its gradient, Q the product of a row with its curvature.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counted_products import CountedProducts
from influence_calculator import Checkpoint, SolverWarning
from influence_calculator.maths import region
from influence_calculator.maths.capture import measure
from influence_calculator.maths.checkpoints import load_checkpoints
from influence_calculator.maths.method import fit
from influence_calculator.maths.objective import Objective, xy_objective
from influence_calculator.maths.perturbation import perturbations
from influence_calculator.maths.shapes import LayerShape, ModelShapes
from influence_job.methods import method_of
from influence_job.plan import Plan, Sizes, cost, make_plan
from influence_job.spec import InfluenceJobSpec
from manifests import METHOD_NAMES, spec
from training_sets import TrainingSet

λ = 0.1
GAUSS_NEWTON = {"regularization": λ, "secondOrder": "GeneralizedGaussNewton"}
FISHER = {"regularization": λ, "secondOrder": "EmpiricalFisher"}

METHODS: dict[str, dict[str, Any]] = {
    "Direct, Hessian": {"name": "Direct", "regularization": λ},
    "Direct, Gauss-Newton": {"name": "Direct", **GAUSS_NEWTON},
    "Direct, empirical Fisher": {"name": "Direct", **FISHER},
    "Cg": {"name": "Cg", **GAUSS_NEWTON, "maxiter": 8, "rtol": 1e-6},
    "Cg, relative": {"name": "Cg", **GAUSS_NEWTON, "relative": True, "maxiter": 8, "rtol": 1e-6},
    "Cg, empirical Fisher": {"name": "Cg", **FISHER, "maxiter": 8, "rtol": 1e-6},
    "Cg, Jacobi": {
        "name": "Cg",
        **GAUSS_NEWTON,
        "maxiter": 8,
        "rtol": 1e-6,
        "preconditioner": {"name": "Jacobi", "samples": 5},
    },
    "Cg, Nystroem": {
        "name": "Cg",
        **GAUSS_NEWTON,
        "maxiter": 8,
        "rtol": 1e-6,
        "preconditioner": {"name": "Nystroem", "rank": 10},
    },
    "Lissa, relative": {"name": "Lissa", **GAUSS_NEWTON, "relative": True, "maxiter": 10, "rtol": 1e-9},
    "Lissa, empirical Fisher": {"name": "Lissa", **FISHER, "maxiter": 10, "rtol": 1e-9},
    "InverseHarmonicMean, relative": {"name": "InverseHarmonicMean", "regularization": λ, "relative": True},
    "Arnoldi, relative": {"name": "Arnoldi", **GAUSS_NEWTON, "relative": True, "rank": 4, "maxIter": 1},
    "Arnoldi without the complement": {
        "name": "Arnoldi",
        **GAUSS_NEWTON,
        "rank": 50,
        "maxIter": 1,
        "complement": False,
    },
    "NystroemSketch, relative": {"name": "NystroemSketch", **GAUSS_NEWTON, "relative": True, "rank": 5},
    "NystroemSketch, empirical Fisher": {"name": "NystroemSketch", **FISHER, "rank": 30},
    "Ekfac, exact": {"name": "Ekfac", "regularization": λ, "expectation": "Exact"},
    "Ekfac, 10 draws": {"name": "Ekfac", "regularization": λ, "samples": 10},
    "Lissa": {"name": "Lissa", **GAUSS_NEWTON, "maxiter": 10, "rtol": 1e-9},
    "Lissa in parts": {"name": "Lissa", **GAUSS_NEWTON, "maxiter": 16, "rtol": 1e-9, "batchSize": 8},
    "InverseHarmonicMean": {"name": "InverseHarmonicMean", "regularization": λ},
    "Arnoldi": {"name": "Arnoldi", **GAUSS_NEWTON, "rank": 4, "maxIter": 1},
    "NystroemSketch": {"name": "NystroemSketch", **GAUSS_NEWTON, "rank": 30},
    "NystroemSketch, Hessian": {"name": "NystroemSketch", "regularization": λ, "rank": 30},
    "Ekfac": {"name": "Ekfac", "regularization": λ},
    "Ekfac, uncorrected": {"name": "Ekfac", "regularization": λ, "updateDiagonal": False},
    "GradDot": {"name": "GradDot"},
    "TracIn": {"name": "TracIn"},
    "Trak": {"name": "Trak", "regularization": λ, "rank": 50},
    "Logra": {"name": "Logra", "regularization": λ, "rank": 4},
}


def test_every_method_of_a_job_has_a_case() -> None:
    assert (
        {case["name"] for case in METHODS.values()}
        == METHOD_NAMES
        == {law.method["name"] for law in LAWS.values()}
    )


# What is done, counted


TRAIN, TEST, TOKENS, FEATURES, CLASSES = 64, 8, 24, 12, 8


class CountedWork(CountedProducts):
    """Counts matrices `[n, n]` that are factorized too: `n³/3`, `10 n³` for eigenpairs, `2 n² q` to solve."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        match getattr(func, "overloadpacket", None):
            case torch.ops.aten.linalg_cholesky_ex:
                self.flop += args[0].shape[-1] ** 3 // 3
            case torch.ops.aten._linalg_eigh:
                self.flop += 10 * args[0].shape[-1] * args[0].numel()
            case torch.ops.aten.cholesky_solve:
                self.flop += 2 * args[1].numel() * args[0].shape[-1]
            case _:
                pass
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Pooled(nn.Module):
    """Two layers over tokens, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.second(self.first(x).tanh()).mean(1)
        return answer


@dataclass(frozen=True)
class Job:
    """A method on the model, as a job plans and does it."""

    spec: InfluenceJobSpec
    objective: Objective
    sizes: Sizes
    plan: Plan

    @property
    def told(self) -> dict[str, float]:
        """Stage -> operations."""
        return {name: 1e9 * gflop for name, gflop in cost.gflop(self.spec, self.sizes, self.plan).items()}

    def done(self) -> dict[str, int]:
        """Stage -> operations, counted while it is run in this process."""
        method, train, test = method_of(self.spec), _examples(TRAIN), _examples(TEST)
        data = TrainingSet(train, self.plan.micro_batch)
        with CountedWork() as fitting:
            fitted = method.fitted(self.objective, fit(method, self.objective, data), data)
        with CountedWork() as solving:
            gradients = fitted.gradients(self.objective, test)
            left = fitted.solve(gradients).left
        with CountedWork() as scoring:
            region.influences(fitted, left, train, self.plan.micro_batch)
        counted = {"Factors": solving.flop, "Scores": scoring.flop}
        return {"Fitting": fitting.flop, **counted} if self.plan.fit_passes else counted


def _examples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, TOKENS, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def _job(method: dict[str, Any], **changes: Any) -> Job:
    given = spec(method=method, device="cpu", chunks={"test": TEST, "train": TRAIN}, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Pooled().eval()
    objective = xy_objective(model, F.cross_entropy)
    if method["name"] == "TracIn":
        states = [Checkpoint(model.state_dict(), rate) for rate in (0.5, 2.0, 1.0)]
        objective = replace(objective, checkpoints=load_checkpoints(model, states))
    own = method_of(given)
    objective = own.looked_at(objective, lambda: _examples(1))
    features = (TOKENS, FEATURES) if changes.get("mode") == "Perturbation" else ()
    sizes = Sizes(
        test=TEST,
        train=TRAIN,
        shapes=measure(objective, _examples(1)),
        blocks=own.layout(objective).factor_widths,
        feature_shape=features,
    )
    return Job(given, objective, sizes, make_plan(given, own, sizes))


@pytest.mark.parametrize("name", METHODS)
def test_each_stage_costs_what_is_counted_while_it_is_done(name: str) -> None:
    """Within a factor of two; a product, a factorization or a pass that is left out is seen."""
    job = _job(METHODS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        done = job.done()
    ratios = {stage: told / done[stage] for stage, told in job.told.items()}
    assert list(ratios) == list(done)
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios


def test_perturbations_cost_what_is_counted_while_they_are_computed() -> None:
    """Within a factor of two."""
    job = _job({"name": "GradDot"}, mode="Perturbation")
    fitted, train = method_of(job.spec).fitted(job.objective, {}, None), _examples(TRAIN)
    rows = fitted.gradients(job.objective, _examples(TEST))
    with CountedWork() as counted:
        perturbations(fitted, job.objective, rows, train, job.plan.micro_batch)
    assert 0.5 < job.told["Scores"] / counted.flop < 2


# The laws of each formula


N, T = 40, 6
LAYERS = (
    LayerShape("0", inputs=6, outputs=5, tokens=3, bias=True),
    LayerShape("2", inputs=5, outputs=4, tokens=1, bias=False),
)
PARAMETERS: dict[str, tuple[int, ...]] = {"0.weight": (5, 6), "0.bias": (5,), "2.weight": (4, 5)}
P = 5 * 6 + 5 + 4 * 5
C = 4 * (3 * 5 * 6 + 4 * 5 + 5)
"""A forward pass and activation gradients; the bias counts as a weight of one."""
G = C // 2
Q = 2 * C
ROTATION = 2 * 3 * (6**2 + 5**2) + 2 * (5**2 + 4**2)
"""`2 S (i² + o²)` of both layers."""


@dataclass(frozen=True)
class Law:
    """How a method's operations grow."""

    method: dict[str, Any]
    per_fitted: float = 0
    """Of the fit, per training example."""
    once: tuple[float, float] = (0, 0)
    """Of the fit, whatever N: at least and at most."""
    per_test: float = 0
    """Of the factors, per test example, beside its gradient, without what N examples take."""
    per_pair: float = 0
    """Of the factors, per test and training example."""
    per_train: float = 0
    """Of the factors, per training example."""
    turned: tuple[float, float] = (0, 0)
    """Of the scores, per training example beside its gradient: at least and at most."""
    columns: int = P
    gradient: int = G
    """What forming a gradient takes."""


SIDES = {"0": 2 * 7 + 2 * 5, "2": 2 * 5 + 2 * 4}
"""Multiplications that project a token to two columns on each side, the bias an input more, `k (j + o)`."""
PROJECTED_TOKENS = 2 * 3 * (SIDES["0"] + 4) + 2 * (SIDES["2"] + 4)
"""And the product of the two, `k²`."""
FACTORIZED = (P**3 / 3, P**3 / 3)
"""By Cholesky."""
EIGENPROBLEMS = 10 * (6**3 + 5**3 + 5**3 + 4**3)
TURNED_BACK = 4 * 6 * 5 * (6 + 5) + 4 * 5 * 4 * (5 + 4)
"""A gradient into the eigenbasis and back: `4 i o (i + o)` of both layers."""
LAWS = {
    "Direct, Hessian": Law(
        {"name": "Direct", "regularization": λ}, per_fitted=Q * P, once=FACTORIZED, per_test=2 * P**2
    ),
    "Direct, empirical Fisher": Law(
        {"name": "Direct", **FISHER}, per_fitted=C + G + 2 * P**2, once=FACTORIZED, per_test=2 * P**2
    ),
    "Cg": Law({"name": "Cg", "regularization": λ, "maxiter": 7}, per_pair=7 * Q),
    "Cg, shared": Law(
        {"name": "Cg", "regularization": λ, "maxiter": 7, "products": "Distributed"}, per_pair=7 * Q
    ),
    "Lissa": Law({"name": "Lissa", "regularization": λ, "maxiter": 9}, per_pair=9 * Q),
    "InverseHarmonicMean": Law(
        {"name": "InverseHarmonicMean", "regularization": λ}, per_pair=4 * P, per_train=C + G
    ),
    "Arnoldi": Law(
        {"name": "Arnoldi", "regularization": λ, "rank": 3, "krylovDimension": 11},
        per_fitted=cost.KRYLOV_ROUNDS * 11 * Q,
        per_test=4 * 3 * P,
    ),
    "NystroemSketch": Law(
        {"name": "NystroemSketch", **GAUSS_NEWTON, "rank": 3}, per_fitted=3 * Q, per_test=4 * 3 * P
    ),
    "Ekfac": Law(
        {"name": "Ekfac", "regularization": λ},
        per_fitted=2 * C + 2 * ROTATION + G,
        once=(EIGENPROBLEMS, EIGENPROBLEMS),
        per_test=TURNED_BACK,
        turned=(0, ROTATION),
    ),
    "Ekfac, uncorrected": Law(
        {"name": "Ekfac", "regularization": λ, "updateDiagonal": False},
        per_fitted=C + ROTATION,
        once=(EIGENPROBLEMS, EIGENPROBLEMS),
        per_test=TURNED_BACK,
        turned=(0, ROTATION),
    ),
    "GradDot": Law({"name": "GradDot"}),
    "TracIn": Law({"name": "TracIn"}),
    "Trak": Law(
        {"name": "Trak", "regularization": λ, "rank": 12},
        per_fitted=C + G + 2 * P * 12 + 2 * 12**2,
        once=(12**3 / 3, 12**3 / 3),
        per_test=2 * P * 12 + 2 * 12**2,
        turned=(2 * P * 12, 2 * P * 12),
        columns=12,
    ),
    "Logra": Law(
        {"name": "Logra", "regularization": λ, "rank": 2},
        per_fitted=C + PROJECTED_TOKENS + 2 * 2 * 4**2,
        once=(2 * 4**3 / 3, 2 * 4**3 / 3),
        per_test=PROJECTED_TOKENS + 2 * 2 * 4**2,
        turned=(PROJECTED_TOKENS, PROJECTED_TOKENS),
        columns=8,
        gradient=0,
    ),
}


COORDINATES = {law.method["name"]: law.columns for law in LAWS.values() if law.columns != P}
"""Columns of representations, of methods whose are not parameters."""


@cache
def _shapes() -> ModelShapes:
    return ModelShapes(
        parameters=PARAMETERS,
        layers=LAYERS,
        itemsize=4,
        model_bytes=4 * P,
        activation_bytes=64,
        example_bytes=64,
        outputs=4,
    )


def _flop(
    method: dict[str, Any],
    *,
    train: int = N,
    test: int = T,
    groups: int = 1,
    shapes: ModelShapes | None = None,
    blocks: dict[str, int] | None = None,
    **changes: Any,
) -> dict[str, float]:
    """Stage -> operations of a method on the model of `LAWS`."""
    given = spec(**{"method": method, "device": "cpu", "chunks": {"test": 1, "train": 8}, **changes})
    shapes = _shapes() if shapes is None else shapes
    blocks = blocks or {"": COORDINATES.get(method["name"], shapes.width)}
    sizes = Sizes(test=test, train=train, shapes=shapes, blocks=blocks)
    plan = make_plan(given, method_of(given), sizes)
    plan = plan.model_copy(update={"group_chunks": test // max(1, groups)})
    assert plan.groups == groups
    return {stage: 1e9 * gflop for stage, gflop in cost.gflop(given, sizes, plan).items()}


@pytest.mark.parametrize("name", LAWS)
def test_a_fit_costs_so_much_per_training_example_and_so_much_once(name: str) -> None:
    law, method = LAWS[name], LAWS[name].method
    few, many = (_flop(method, train=train).get("Fitting", 0) for train in (N, 3 * N))
    per_example = (many - few) / (2 * N)
    assert per_example == pytest.approx(law.per_fitted)
    least, most = law.once
    assert least - 1e-3 <= few - N * per_example <= most + 1e-3
    assert ("Fitting" in _flop(method)) == (law.per_fitted > 0)


@pytest.mark.parametrize("name", LAWS)
def test_factors_cost_so_much_per_test_example_training_example_and_pair(name: str) -> None:
    law, method = LAWS[name], LAWS[name].method

    def expected(test: int, train: int) -> float:
        own = test * (C + law.gradient + law.per_test)
        return own + test * train * law.per_pair + train * law.per_train

    for test, train in ((T, N), (2 * T, N), (T, 2 * N), (5 * T, 3 * N)):
        told = _flop(method, test=test, train=train)["Factors"]
        assert told == pytest.approx(expected(test, train)), (test, train)


@pytest.mark.parametrize("name", LAWS)
def test_scores_cost_a_pass_over_the_training_set_per_group_and_a_product_per_pair(name: str) -> None:
    law, method = LAWS[name], LAWS[name].method
    for groups, test, train in ((1, T, N), (2, T, N), (3, T, N), (1, 2 * T, N), (1, T, 2 * N)):
        told = _flop(method, groups=groups, test=test, train=train)["Scores"]
        passes = told - 2 * law.columns * test * train
        per_example = passes / (groups * train) - C - law.gradient
        assert law.turned[0] - 1e-3 <= per_example <= law.turned[1] + 1e-3, (groups, test, train)


@pytest.mark.parametrize("name", LAWS)
def test_a_state_of_the_model_costs_as_much_as_another(name: str) -> None:
    """Of methods that sum over states: each is differentiated."""
    method = LAWS[name].method
    one, three = (_flop(method, shapes=replace(_shapes(), checkpoints=count)) for count in (1, 3))
    assert three["Factors"] - one["Factors"] == pytest.approx(2 * T * (C + LAWS[name].gradient))


@pytest.mark.parametrize(
    ("method", "field", "stage"),
    [
        ("Cg", "maxiter", "Factors"),
        ("Lissa", "maxiter", "Factors"),
        ("Lissa", "batchSize", "Factors"),
        ("Arnoldi", "krylovDimension", "Fitting"),
        ("NystroemSketch", "rank", "Fitting"),
    ],
)
def test_products_with_the_curvature_are_as_many_as_a_method_is_told_to_make(
    method: str, field: str, stage: str
) -> None:
    """Twice as many steps, rows or examples of a step cost twice as much."""
    given = LAWS[method].method
    one, two, three = (_flop({**given, field: 4 * times})[stage] for times in (1, 2, 3))
    assert three - two == pytest.approx(two - one)
    gradients = T * (C + G) if stage == "Factors" else 0
    assert two - gradients == pytest.approx(2 * (one - gradients))


def test_no_method_is_told_to_cost_more_than_its_matrix_has_rows() -> None:
    """A rank or a Krylov dimension above P is P; steps of more examples than there are take all of them."""
    for method, field, beyond in (
        (LAWS["Arnoldi"].method, "krylovDimension", P),
        (LAWS["NystroemSketch"].method, "rank", P),
        (LAWS["Lissa"].method, "batchSize", N),
        (LAWS["Trak"].method, "rank", P),
    ):
        at, above = (_flop({**method, field: count}) for count in (beyond, 10 * beyond))
        assert above == at, method["name"]


def test_direct_grows_with_the_parameters_as_matrices_of_them_do() -> None:
    """One layer of P inputs and one output: with twice P four times the passes, eight times the rest."""

    def fit_of(parameters: int, method: str, train: int) -> float:
        layer = LayerShape("", inputs=parameters, outputs=1, tokens=1, bias=False)
        shapes = replace(_shapes(), parameters={"weight": (1, parameters)}, layers=(layer,))
        return _flop(LAWS[method].method, shapes=shapes, train=train)["Fitting"]

    def per_example(parameters: int, method: str) -> float:
        return (fit_of(parameters, method, 2 * N) - fit_of(parameters, method, N)) / N

    for method, of_matrix in (("Direct, Hessian", 8), ("Direct, empirical Fisher", 2)):
        gradients = 0 if of_matrix == 8 else 6
        for parameters in (50, 100):
            expected = of_matrix * parameters**2 + gradients * parameters
            assert per_example(parameters, method) == pytest.approx(expected)
        once = [fit_of(size, method, N) - N * per_example(size, method) for size in (50, 100)]
        assert once[1] == pytest.approx(8 * once[0])


@pytest.mark.parametrize(("name", "squares"), [("Direct, Hessian", 0), ("Direct, empirical Fisher", 2)])
def test_direct_factorizes_and_solves_block_by_block(name: str, squares: int) -> None:
    """Of Fisher's matrix blocks are formed alone; a Hessian is multiplied with every unit vector anyway."""
    method = {**LAWS[name].method, "blocks": "LayerWise"}
    widths = {"0": 35, "2": P - 35}
    whole, apart = _flop(LAWS[name].method), _flop(method, blocks=widths)

    def power(of: int) -> int:
        return P**of - sum(width**of for width in widths.values())

    saved = N * squares * power(2) + power(3) / 3
    assert whole["Fitting"] - apart["Fitting"] == pytest.approx(saved)
    assert whole["Factors"] - apart["Factors"] == pytest.approx(2 * T * power(2))
    assert whole["Scores"] == apart["Scores"]


def test_perturbations_cost_three_captures_more_per_pair() -> None:
    for method in ("Direct, Hessian", "GradDot", "Ekfac"):
        up, moved = (_flop(LAWS[method].method, mode=mode) for mode in ("Up", "Perturbation"))
        assert moved["Scores"] - up["Scores"] == pytest.approx(3 * C * N * T)
        assert {**moved, "Scores": 0} == pytest.approx({**up, "Scores": 0})


@pytest.mark.parametrize("name", LAWS)
def test_self_influences_differentiate_each_example_once_and_solve_it(name: str) -> None:
    """No pair but of an example with itself: a product of its columns."""
    law = LAWS[name]
    told = _flop(law.method, operation="SelfInfluence", chunks={"train": 8}, test=N, groups=0)
    expected = N * (C + law.gradient + law.per_test + N * law.per_pair + law.per_train)
    assert told["Scores"] == pytest.approx(expected + 2 * N * law.columns)
