"""Perturbations of every method against definitions in float64 that share nothing with the calculator.

`∇x (z_t · g(x))`: z is solved with an explicit matrix from gradients taken one example at a time, never what
the method itself answers, and its input gradient is taken one pair after another. Each pair is compared for
itself, so that a large one hides no mistake in a small one.

Shapes: t test rows, n training examples, P parameters, F... the input's feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import dense_ekfac
import oracle
from dense_ekfac import DenseLayer, PseudoGradients, dense_layer
from ekfac_cases import EKFAC_CASES, EkfacCase
from explicit_projections import explicit_layer, explicit_projection
from influence_calculator import Checkpoint, InfluenceMode, TracInInfluence
from influence_calculator.maths import region
from influence_calculator.maths.arnoldi import Arnoldi
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.expectation import Expectation
from influence_calculator.maths.grad_dot import GradDot
from influence_calculator.maths.inverse_harmonic_mean import InverseHarmonicMean
from influence_calculator.maths.lissa import Lissa
from influence_calculator.maths.logra import Logra
from influence_calculator.maths.method import FitState, Method, SolverStatus, fit
from influence_calculator.maths.nystroem_sketch import NystroemSketch
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.perturbation import perturbations
from influence_calculator.maths.trak import Trak
from model_cases import (
    CAPTURED_CASES,
    CASES,
    IMAGES,
    LINEAR,
    LOGISTIC,
    MULTIHEAD_SEQUENCE,
    SEQUENCE,
    ModelCase,
)
from references import REGULARIZATIONS, reference
from training_sets import TrainingSet

MODES = list(SecondOrderMode)
GAUSS_NEWTON = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
FULL_RANK = 200
SEED = 17
N, T = 11, 3
"""Examples of an EK-FAC case."""
MOVED, TESTED = 4, 3
"""Training examples that are moved, a number that micro-batches of 3 do not divide, and test rows."""

EKFAC_FLOATING = [case for case in EKFAC_CASES if case.vocabulary is None]
"""Those whose inputs can be perturbed: layers of every kind, over vectors, sequences and images."""

Case = ModelCase | EkfacCase
Data = tuple[Tensor, Tensor]

EVERY_MODE = pytest.mark.parametrize("mode", MODES)
EVERY_REGULARIZATION = pytest.mark.parametrize("λ", REGULARIZATIONS)


def train_of(case: Case) -> Data:
    return case.train() if isinstance(case, ModelCase) else case.data(N, 1)


def queries_of(case: Case) -> Data:
    x, y = case.test() if isinstance(case, ModelCase) else case.data(T, 2)
    return x[:TESTED], y[:TESTED]


def moved_of(case: Case) -> Data:
    x, y = train_of(case)
    return x[:MOVED], y[:MOVED]


def gradients_of(case: Case) -> Tensor:
    """`[t, P]`, of the test rows."""
    return oracle.example_gradients(case.model(), case.loss, *queries_of(case))


def expected_of(case: Case, z: Tensor) -> Tensor:
    """The definition, of factors `[t, P]`."""
    return oracle.perturbations(case.model(), case.loss, z, *moved_of(case))


@cache
def expected_of_solve(case: ModelCase, mode: SecondOrderMode, λ: float) -> Tensor:
    """The definition, of factors from a dense solve with the explicit matrix."""
    return expected_of(case, reference(case, mode).factors(λ)[:TESTED])


def found_by(method: Method, case: Case, state: FitState | None = None) -> Tensor:
    """The calculator's answer; every row's solve must have succeeded."""
    objective = xy_objective(case.model(), case.loss)
    data = TrainingSet(train_of(case), 5)
    fitted = method.fitted(objective, fit(method, objective, data) if state is None else state, data)
    solved = fitted.solve(fitted.gradients(objective, queries_of(case)))
    assert (solved.report.status == SolverStatus.CONVERGED).all()
    return perturbations(fitted, objective, fitted.factors(solved.left), moved_of(case), micro_batch=3)


def assert_each_pair_close(found: Tensor, expected: Tensor, case: Case, relative: float) -> None:
    """Every pair `[F...]` within `relative` of its own norm."""
    assert found.shape == expected.shape == (TESTED, MOVED, *case.features)
    error = (found - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)
    assert (error <= relative).all(), f"relative error {float(error.max()):.3g}, allowed {relative:.3g}"


SOLVERS: dict[str, Callable[[ModelCase, SecondOrderMode, float], Method]] = {
    "direct": lambda _, mode, λ: Direct(λ, second_order=mode),
    "cg": lambda _, mode, λ: Cg(λ, rtol=1e-10, second_order=mode),
    "lissa": lambda case, mode, λ: Lissa(
        λ, second_order=mode, scale=_scale(case, mode, λ), rtol=1e-10, maxiter=10_000
    ),
    "arnoldi": lambda _, mode, λ: Arnoldi(λ, FULL_RANK, second_order=mode),
}
"""Every way to solve with one matrix."""


def _scale(case: ModelCase, mode: SecondOrderMode, λ: float) -> float:
    """Somewhat more than half of the largest eigenvalue: LiSSA's steps over all examples then converge."""
    return 0.55 * (float(torch.linalg.eigvalsh(reference(case, mode).curvature)[-1]) + λ)


@cache
def state_of(solver: str, case: ModelCase, mode: SecondOrderMode) -> FitState:
    """Another λ needs no new pass over the data."""
    objective = xy_objective(case.model(), case.loss)
    return fit(SOLVERS[solver](case, mode, 1.0), objective, TrainingSet(case.train(), 5))


CONVEX = (LINEAR, LOGISTIC)
SOLVES = [
    pytest.param(name, case, λ, id=f"{name}-{case}-{λ}")
    for name in SOLVERS
    for case in CASES
    for λ in REGULARIZATIONS
    if (name != "lissa" or λ > 1e-2 or case in CONVEX) and (name != "arnoldi" or λ != 1e-1)
]
"""LiSSA takes the more steps the larger the condition number is: seconds at λ = 1e-2 for what is not convex.
Arnoldi at 0.1 is among its own tests."""


@EVERY_MODE
@pytest.mark.parametrize(("solver", "case", "λ"), SOLVES)
def test_a_solve_moves_inputs_as_the_dense_one_does(
    solver: str, case: ModelCase, λ: float, mode: SecondOrderMode
) -> None:
    """`reference` asserts of Hessians that λ_min > −λ/2."""
    found = found_by(SOLVERS[solver](case, mode, λ), case, state_of(solver, case, mode))
    assert_each_pair_close(found, expected_of_solve(case, mode, λ), case, reference(case, mode).bound(λ))


@pytest.mark.parametrize("λ", [1e-2, 1e-1])
@pytest.mark.parametrize("case", [*CASES, SEQUENCE, MULTIHEAD_SEQUENCE, IMAGES], ids=repr)
def test_a_solve_that_does_nothing_would_be_seen(case: ModelCase, λ: float) -> None:
    """Else the other tests would pass for `I/λ`."""
    undone = expected_of(case, reference(case, GAUSS_NEWTON).test[:TESTED] / λ)
    assert oracle.relative_error(undone, expected_of_solve(case, GAUSS_NEWTON, λ)) > 0.1


@EVERY_REGULARIZATION
@pytest.mark.parametrize("case", [*CASES, IMAGES], ids=repr)
def test_inverse_harmonic_mean_moves_inputs_as_the_explicit_inverses_do(case: ModelCase, λ: float) -> None:
    assert_each_pair_close(
        found_by(InverseHarmonicMean(λ), case), expected_of(case, mean_inverse_factors(case, λ)), case, 1e-6
    )


def mean_inverse_factors(case: ModelCase, λ: float) -> Tensor:
    """`(1/N) Σ_i (g_i g_iᵀ + λI)^-1 g` of the test rows."""
    return gradients_of(case) @ oracle.mean_inverse(reference(case, "empirical_fisher").train, λ)


def _ekfac(case: Case, λ: float) -> Ekfac:
    """Its own cases say what a draw is; of the others the definition has all outputs."""
    expectation = Expectation.SAMPLED if isinstance(case, EkfacCase) else Expectation.EXACT
    return Ekfac(λ, expectation=expectation, seed=SEED, unsupported="diagonal")


@cache
def _ekfac_state(case: Case) -> FitState:
    objective = xy_objective(case.model(), case.loss)
    return fit(_ekfac(case, 1.0), objective, TrainingSet(train_of(case), 4))


def _pseudo_gradients(case: Case, draw: int) -> PseudoGradients:
    return case.sampled(SEED, draw) if isinstance(case, EkfacCase) else dense_ekfac.exact(case.loss)


@cache
def _ekfac_curvature(case: Case) -> Tensor:
    """`[P, P]`: a block for every layer, and the diagonal of the Gauss-Newton matrix for what is in none."""
    model = case.model()
    layers = {
        (name, group): _with_eigenvalues(case, name, group)
        for name, module in model.named_modules()
        if _is_layer(name, module)
        for group in range(dense_ekfac.groups_of(module))
    }
    curvature = dense_ekfac.curvature(model, layers)
    if isinstance(case, ModelCase):
        own = {name for name, _ in layers}
        others = tuple(k for k, _ in model.named_parameters() if k.rpartition(".")[0] not in own)
        diagonal = reference(case, GAUSS_NEWTON).curvature.diagonal()
        places = oracle.columns_of(model, others) if others else torch.arange(0)
        curvature[places, places] = diagonal[places]
    return curvature


def _is_layer(name: str, module: nn.Module) -> bool:
    """Attention's `out_proj` is never called."""
    kinds = (*dense_ekfac.LINEAR, *dense_ekfac.CONVOLUTIONS)
    tracked = any(p.requires_grad for p in module.parameters(recurse=False))
    return isinstance(module, kinds) and tracked and not name.endswith("out_proj")


def _with_eigenvalues(case: Case, name: str, group: int) -> tuple[DenseLayer, Tensor, Tensor, Tensor]:
    """One layer with Q_A, Q_G and Λ."""
    model = case.model()
    covered, corrected = (_pseudo_gradients(case, draw) for draw in (0, 1))
    dense = dense_layer(model, name, *train_of(case), covered, group, corrected)
    unit = dict(_ekfac_state(case)["covariance"][name])
    if dense_ekfac.groups_of(model.get_submodule(name)) > 1:
        unit = {key: tensor[group] for key, tensor in unit.items() if tensor.dim() > 0}
    Q_A, Q_G = unit["input_vectors"], unit["output_vectors"]
    for Q, covariance in ((Q_A, dense.activations), (Q_G, dense.gradients)):
        rotated = Q.T @ covariance @ Q
        torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q), dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(rotated, rotated.diagonal().diag(), rtol=0, atol=1e-12)
    return dense, Q_A, Q_G, dense.eigenvalues(Q_A, Q_G)


def _groups_of_one_output() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 2, 3, groups=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))


class TestEkfac:
    """The dense construction of its definition, in eigenvectors of the fit that are checked to be some."""

    @EVERY_REGULARIZATION
    @pytest.mark.parametrize("case", EKFAC_FLOATING, ids=repr)
    def test_one_draw_moves_inputs_as_the_dense_definition_does(self, case: EkfacCase, λ: float) -> None:
        self._compare(case, λ)

    @EVERY_REGULARIZATION
    @pytest.mark.parametrize("case", [*CAPTURED_CASES, SEQUENCE, MULTIHEAD_SEQUENCE, IMAGES], ids=repr)
    def test_so_does_the_exact_expectation_on_trained_models(self, case: ModelCase, λ: float) -> None:
        """Near a minimum, where pseudo-gradients and gradients at the labels differ most."""
        self._compare(case, λ)

    def test_groups_of_one_output_have_factors(self) -> None:
        """Which stand in memory as einsum left them."""
        self._compare(ModelCase("one output each", _groups_of_one_output, F.cross_entropy, (4, 5), 3), 0.1)

    @staticmethod
    def _compare(case: Case, λ: float) -> None:
        z = oracle.factors(_ekfac_curvature(case), λ, gradients_of(case))
        found = found_by(_ekfac(case, λ), case, _ekfac_state(case))
        assert_each_pair_close(found, expected_of(case, z), case, 1e-6)


ATTENDED = [
    (case, mode)
    for case in (SEQUENCE, MULTIHEAD_SEQUENCE)
    for mode in MODES
    if (case, mode) != (MULTIHEAD_SEQUENCE, SecondOrderMode.HESSIAN)
]
"""The oracle takes seconds for the one Hessian that is left out; the other's passes the same operations."""


class TestAttention:
    """Second derivatives through attention over vectors; EK-FAC's stand with its other cases."""

    @EVERY_REGULARIZATION
    @pytest.mark.parametrize(("case", "mode"), ATTENDED, ids=str)
    def test_a_direct_solve(self, case: ModelCase, mode: SecondOrderMode, λ: float) -> None:
        found = found_by(Direct(λ, second_order=mode), case)
        assert_each_pair_close(found, expected_of_solve(case, mode, λ), case, reference(case, mode).bound(λ))

    @pytest.mark.parametrize("case", [SEQUENCE, MULTIHEAD_SEQUENCE], ids=repr)
    def test_the_product_of_gradients(self, case: ModelCase) -> None:
        assert_each_pair_close(found_by(GradDot(), case), expected_of(case, gradients_of(case)), case, 1e-6)


class TestImages:
    """`[t, n, c, h, w]` of images of which no two dimensions agree, from every method."""

    @pytest.mark.parametrize("method", SOLVERS)
    @pytest.mark.parametrize("mode", [SecondOrderMode.EMPIRICAL_FISHER, GAUSS_NEWTON])
    def test_solves_with_one_matrix(self, method: str, mode: SecondOrderMode) -> None:
        found = found_by(SOLVERS[method](IMAGES, mode, 0.1), IMAGES)
        bound = reference(IMAGES, mode).bound(0.1)
        assert_each_pair_close(found, expected_of_solve(IMAGES, mode, 0.1), IMAGES, bound)

    @EVERY_REGULARIZATION
    def test_nystroem_at_full_rank(self, λ: float) -> None:
        found = found_by(NystroemSketch(λ, FULL_RANK, second_order=GAUSS_NEWTON), IMAGES)
        bound = reference(IMAGES, GAUSS_NEWTON).bound(λ)
        assert_each_pair_close(found, expected_of_solve(IMAGES, GAUSS_NEWTON, λ), IMAGES, bound)

    def test_the_product_of_gradients(self) -> None:
        expected = expected_of(IMAGES, gradients_of(IMAGES))
        assert_each_pair_close(found_by(GradDot(), IMAGES), expected, IMAGES, 1e-6)

    def test_the_sum_over_checkpoints(self) -> None:
        trained = IMAGES.model().state_dict()
        states = [{name: factor * value for name, value in trained.items()} for factor in (0.5, 1.0)]
        pairs = list(zip(states, (0.25, 2.0), strict=True))
        expected = torch.zeros(())
        for state, rate in pairs:
            model = IMAGES.model()
            model.load_state_dict(state)
            z = rate * oracle.example_gradients(model, IMAGES.loss, *queries_of(IMAGES))
            expected = expected + oracle.perturbations(model, IMAGES.loss, z, *moved_of(IMAGES))
        tracin = TracInInfluence(IMAGES.model(), IMAGES.loss, [Checkpoint(*pair) for pair in pairs])
        mode = InfluenceMode.Perturbation
        found = tracin.fit([IMAGES.train()]).influences(*queries_of(IMAGES), *moved_of(IMAGES), mode)
        assert_each_pair_close(found, expected, IMAGES, 1e-6)

    @EVERY_REGULARIZATION
    def test_trak(self, λ: float) -> None:
        train = reference(IMAGES, "empirical_fisher").train
        z = projected_factors(train, gradients_of(IMAGES), explicit_projection(train.shape[1], 8, 7), λ)
        assert_each_pair_close(found_by(Trak(λ, 8, 7), IMAGES), expected_of(IMAGES, z), IMAGES, 1e-6)

    @EVERY_REGULARIZATION
    def test_logra(self, λ: float) -> None:
        model, train, test = IMAGES.model(), reference(IMAGES, "empirical_fisher").train, gradients_of(IMAGES)
        z = torch.zeros_like(test)
        for name, layer in model.named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                columns = oracle.columns_of(model, (f"{name}.weight", f"{name}.bias"))
                o, i = layer.weight.flatten(1).shape
                groups = getattr(layer, "groups", 1)
                S = explicit_layer(o, i, layer.bias is not None, 2, 7, name, groups=groups)
                z[:, columns] = projected_factors(train[:, columns], test[:, columns], S, λ)
        assert_each_pair_close(found_by(Logra(λ, 2, 7), IMAGES), expected_of(IMAGES, z), IMAGES, 1e-6)


def projected_factors(train: Tensor, test: Tensor, S: Tensor, λ: float) -> Tensor:
    """`S ((1/N) Σ φ φᵀ + λI)^-1 Sᵀ g`, φ = Sᵀ g."""
    φ = train @ S
    return oracle.factors(φ.T @ φ / len(φ), λ, test @ S) @ S.T


LEAST_CORRELATION = {1e-2: 0.7, 1e-1: 0.92, 1.0: 0.99}
"""Seen: 0.85, 0.97, 0.998 and more. The product of gradients alone has 0.59, 0.87 and 0.985 at most."""


@EVERY_REGULARIZATION
@pytest.mark.parametrize("mode", [SecondOrderMode.HESSIAN, GAUSS_NEWTON])
def test_ekfac_correlates_with_the_exact_hessian(
    mode: SecondOrderMode, λ: float, record_property: Callable[[str, object], None]
) -> None:
    """How near an approximation comes is a figure, not an identity: of a small model of digits, all pairs."""
    digits = trained_digits()
    curvature = digits.curvatures[mode]
    assert oracle.smallest_eigenvalue(curvature) > -λ / 2
    exact = oracle.influences(curvature, λ, digits.test_gradients, digits.train_gradients)
    plain = correlation(digits.test_gradients @ digits.train_gradients.T, exact)
    found = correlation(digits.ekfac(λ, Expectation.EXACT), exact)
    record_property("correlation of EK-FAC", round(found, 3))
    record_property(
        "of EK-FAC with one draw", round(correlation(digits.ekfac(λ, Expectation.SAMPLED), exact), 3)
    )
    record_property("of the product of gradients", round(plain, 3))
    assert found > LEAST_CORRELATION[λ] > plain


@pytest.mark.parametrize(("λ", "least"), [(1e-2, 0.9), (1e-1, 0.9), (1.0, 0.98)])
def test_one_draw_of_ekfac_comes_near_the_sum_over_outputs(λ: float, least: float) -> None:
    """Seen for these seeds: 0.952, 0.951 and 0.986 at least; with labels drawn 0.761, 0.857 and 0.948."""
    digits = trained_digits()
    exact = digits.ekfac(λ, Expectation.EXACT)
    for seed in range(5):
        assert correlation(digits.ekfac(λ, Expectation.SAMPLED, seed), exact) > least


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over all pairs."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@dataclass(frozen=True)
class Digits:
    """A trained model of images of 4 × 4, with its data and what the oracle says of them."""

    model: nn.Module
    train: Data
    test: Data

    @cached_property
    def train_gradients(self) -> Tensor:
        return oracle.example_gradients(self.model, F.cross_entropy, *self.train)

    @cached_property
    def test_gradients(self) -> Tensor:
        return oracle.example_gradients(self.model, F.cross_entropy, *self.test)

    @cached_property
    def curvatures(self) -> dict[SecondOrderMode, Tensor]:
        """The Hessian from `torch.func`: one entry at a time takes ten seconds."""
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        sizes = [p.numel() for p in parameters.values()]

        def mean_loss(flat: Tensor) -> Tensor:
            pieces = zip(parameters.items(), flat.split(sizes), strict=True)
            values = {name: piece.view_as(p) for (name, p), piece in pieces}
            outputs = torch.func.functional_call(self.model, values, (self.train[0],))
            return F.cross_entropy(outputs, self.train[1])

        flat = torch.cat([p.flatten() for p in parameters.values()])
        return {
            SecondOrderMode.HESSIAN: torch.func.hessian(mean_loss)(flat),
            GAUSS_NEWTON: oracle.generalized_gauss_newton(self.model, F.cross_entropy, *self.train),
        }

    def ekfac(self, λ: float, expectation: Expectation, seed: int = SEED) -> Tensor:
        objective = xy_objective(self.model, F.cross_entropy)
        method = Ekfac(λ, expectation=expectation, seed=seed)
        fitted = method.fitted(objective, fit(method, objective, TrainingSet(self.train, 50)), None)
        left = fitted.solve(fitted.gradients(objective, self.test)).left
        return region.influences(fitted, left, self.train, micro_batch=50)


@cache
def trained_digits() -> Digits:
    """The first digits that scikit-learn ships."""
    bunch = load_digits()
    x = torch.tensor(bunch.images).unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4)).flatten(1)
    x, y = (x - x.mean()) / x.std(), torch.tensor(bunch.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    train, test = (x[:100], y[:100]), (x[100:120], y[100:120])
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum(((p**2).sum() for p in model.parameters()), torch.zeros(()))
        value = F.cross_entropy(model(train[0]), train[1]) + 3e-3 / 2 * decay
        value.backward()
        return value

    optimizer.step(closure)
    optimizer.zero_grad()
    return Digits(model, train, test)
