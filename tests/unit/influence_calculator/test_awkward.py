"""Awkward models and data: two outputs, one training example, the same twice, half precision, rare layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import dense_ekfac
import influence_calculator
import oracle
from ekfac_cases import SOFTMAX, EkfacCase
from influence_calculator import (
    ArnoldiInfluence,
    CgInfluence,
    Checkpoint,
    DirectInfluence,
    EkfacInfluence,
    GradDotInfluence,
    InfluenceMode,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    LograInfluence,
    NystroemPreconditioner,
    NystroemSketchInfluence,
    SecondOrderMode,
    SolverWarning,
    TracInInfluence,
    TrakInfluence,
)
from influence_calculator.maths import region
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.method import FitState, fit
from influence_calculator.maths.objective import xy_objective
from influence_calculator.torch.base import TorchInfluenceFunctionModel
from model_cases import MLP
from training_sets import TrainingSet

λ = 0.1
X, Y = (part[:11] for part in MLP.train())
X_TEST, Y_TEST = MLP.test()
GAUSS_NEWTON = {"regularization": λ, "second_order_mode": SecondOrderMode.GENERALIZED_GAUSS_NEWTON}

Build = Callable[[nn.Module, Any], TorchInfluenceFunctionModel]
BUILDS: dict[str, Build] = {
    "direct": partial(DirectInfluence, **GAUSS_NEWTON),
    "cg": partial(CgInfluence, **GAUSS_NEWTON, rtol=1e-10, atol=0.0, solve_simultaneously=True),
    "arnoldi": partial(ArnoldiInfluence, **GAUSS_NEWTON, rank=10, max_iter=6, use_woodbury=True),
    "nystroem": partial(NystroemSketchInfluence, **GAUSS_NEWTON, rank=30),
    "lissa": partial(LissaInfluence, **GAUSS_NEWTON, rtol=1e-7, scale=1.6),
    "inverse harmonic mean": partial(InverseHarmonicMeanInfluence, regularization=λ),
    "ekfac": lambda model, loss: EkfacInfluence(
        model, True, loss=loss, regularization=λ, expectation="exact"
    ),
    "logra": partial(LograInfluence, regularization=λ, rank=2),
    "trak": partial(TrakInfluence, regularization=λ, rank=20),
    "grad-dot": GradDotInfluence,
    "tracin": lambda model, loss: TracInInfluence(model, loss, [Checkpoint(model.state_dict(), 0.5)]),
}
"""Every model of influence: a constructor of a model and its loss."""
EXACT = ("direct", "cg", "lissa", "arnoldi", "nystroem")
"""Those that solve with the curvature itself where its rank is small."""


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> Build:
    """One constructor after the other."""
    return BUILDS[request.param]


def test_every_model_of_influence_is_tried_here() -> None:
    exported = [getattr(influence_calculator, name) for name in influence_calculator.__all__]
    models = {it for it in exported if isinstance(it, type) and issubclass(it, TorchInfluenceFunctionModel)}
    built = {type(build(MLP.model(), MLP.loss)) for build in BUILDS.values()}
    assert built == {it for it in models if not it.__name__.startswith("Torch")}


class TestTwoOutputs:
    """A class and an amount, of which the loss takes both, and their product."""

    class Two(nn.Module):
        """Answers with a dictionary, a tuple, or one tensor of both."""

        def __init__(self, kind: type) -> None:
            super().__init__()
            self.kind = kind
            self.trunk = nn.Linear(4, 4)
            self.label, self.amount = nn.Linear(4, 3), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Any:
            hidden = self.trunk(x).tanh()
            label, amount = self.label(hidden), self.amount(hidden)
            if self.kind is Tensor:
                return torch.cat([label, amount], dim=1)
            return {"label": label, "amount": amount} if self.kind is dict else (label, amount)

    @staticmethod
    def loss(outputs: Any, y: Tensor) -> Tensor:
        """Bends each output, and both together: its second derivative has negative eigenvalues."""
        if isinstance(outputs, Tensor):
            outputs = outputs.split([3, 2], dim=1)
        label, amount = outputs.values() if isinstance(outputs, dict) else outputs
        coupled = (label[:, :2] * amount).sum(1).mean()
        return (
            F.cross_entropy(label, y)
            + F.mse_loss(amount, torch.stack([y, -y], 1).to(amount.dtype) / 3)
            + coupled / 2
        )

    def model(self, kind: type) -> nn.Module:
        """The same weights, whatever the kind."""
        with torch.random.fork_rng():
            torch.manual_seed(4)
            return self.Two(kind).double().eval()

    @pytest.mark.parametrize("kind", [dict, tuple])
    @pytest.mark.parametrize("mode", ["hessian", "empirical_fisher", "generalized_gauss_newton"])
    def test_direct_influences_are_those_of_the_definition_on_both_together(
        self, kind: type, mode: str
    ) -> None:
        joined = self.model(Tensor)
        curvature = oracle.CURVATURES[mode](joined, self.loss, X, Y)
        strength = max(λ, -2.5 * oracle.smallest_eigenvalue(curvature))
        influence = DirectInfluence(
            self.model(kind), self.loss, strength, second_order_mode=SecondOrderMode(mode)
        )
        influence.fit(zip(X.split(4), Y.split(4), strict=True))
        test, train = (oracle.example_gradients(joined, self.loss, *of) for of in ((X_TEST, Y_TEST), (X, Y)))
        expected = oracle.influences(curvature, strength, test, train)
        allowed = oracle.bound(curvature, strength)
        oracle.assert_close(influence.influences(X_TEST, Y_TEST, X, Y), expected, allowed)
        z = oracle.factors(curvature, strength, test[:2])
        moved = influence.influences(X_TEST[:2], Y_TEST[:2], X[:3], Y[:3], InfluenceMode.Perturbation)
        oracle.assert_close(moved, oracle.perturbations(joined, self.loss, z, X[:3], Y[:3]), allowed)

    def test_negative_eigenvalues_of_the_outputs_are_met_and_clipped(self) -> None:
        """Without them the test above would not show that both outputs are clipped as one."""
        outputs = self.model(Tensor)(X[:1]).detach()
        assert oracle.smallest_eigenvalue(oracle.output_hessian(self.loss, outputs, Y[:1])) < -0.01

    @pytest.mark.parametrize("kind", [dict, tuple])
    @pytest.mark.parametrize("expectation", ["exact", "empirical", "sampled"])
    @pytest.mark.parametrize("corrected", [True, False])
    def test_ekfac_is_that_of_the_outputs_joined(self, kind: type, expectation: str, corrected: bool) -> None:
        own, joined = (
            EkfacInfluence(
                self.model(of), corrected, loss=self.loss, regularization=λ, expectation=expectation
            ).fit([(X, Y)])
            for of in (kind, Tensor)
        )
        expected = joined.influences(X_TEST, Y_TEST, X, Y)
        oracle.assert_close(own.influences(X_TEST, Y_TEST, X, Y), expected, 1e-9)

    def test_exact_ekfac_has_the_trace_of_the_gauss_newton_matrix(self) -> None:
        """What it corrects is the curvature over both outputs, with what couples them."""
        influence = EkfacInfluence(self.model(dict), True, loss=self.loss, expectation="exact")
        influence.fit([(X, Y)])
        state = influence._state["correction"]
        trace = sum(float(unit["eigenvalues"].sum()) for unit in state.values())
        expected = oracle.generalized_gauss_newton(self.model(Tensor), self.loss, X, Y).trace()
        assert trace == pytest.approx(float(expected), rel=1e-9)


class _OneNumber(nn.Module):
    """One number per example, in `[n, 1]` or in `[n]`."""

    def __init__(self, squeezed: bool) -> None:
        super().__init__()
        self.squeezed = squeezed
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.hidden(x).tanh())
        return found.squeeze(-1) if self.squeezed else found


@pytest.mark.parametrize("mode", list(InfluenceMode))
def test_outputs_of_one_dimension_have_the_influences_of_two(build: Build, mode: InfluenceMode) -> None:
    y = Y.double()
    found = []
    for squeezed in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(6)
            model = _OneNumber(squeezed).double()
        shape = (-1,) if squeezed else (-1, 1)
        test = Y_TEST.double().reshape(shape)
        influence = build(model, F.mse_loss).fit(
            [(X[:6], y[:6].reshape(shape)), (X[6:], y[6:].reshape(shape))]
        )
        found.append(influence.influences(X_TEST, test, X, y.reshape(shape), mode))
    oracle.assert_close(found[0], found[1], 1e-9)


class _Scaled(nn.Module):
    """Logits times a number that is learned, of shape `[]` or `[1]`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 3), nn.Parameter(torch.full(shape, 1.3))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.linear(x) * self.scale
        return scaled


@pytest.mark.parametrize("mode", list(InfluenceMode))
@pytest.mark.parametrize("name", BUILDS)
def test_a_parameter_of_no_dimension_has_the_influences_of_one_of_one(name: str, mode: InfluenceMode) -> None:
    build = partial(EkfacInfluence, unsupported="diagonal", loss=F.cross_entropy, expectation="exact")
    found = []
    for shape in ((), (1,)):
        with torch.random.fork_rng():
            torch.manual_seed(6)
            model = _Scaled(*shape).double()
        influence = (
            build(model, regularization=λ) if name == "ekfac" else BUILDS[name](model, F.cross_entropy)
        ).fit(PARTS)
        found.append(influence.influences(X_TEST, Y_TEST, X, Y, mode))
    oracle.assert_close(found[0], found[1], 1e-9)


class TestOneTrainingExample:
    def test_every_model_answers_with_finite_numbers(self, build: Build) -> None:
        influence = build(MLP.model(), MLP.loss).fit([(X[:1], Y[:1])])
        for mode in InfluenceMode:
            found = influence.influences(X_TEST, Y_TEST, X[:1], Y[:1], mode)
            assert found.shape[:2] == (len(X_TEST), 1)
            assert torch.isfinite(found).all()
            assert found.any()
        assert (influence.influences(X[:1], Y[:1]) > 0).all()

    @pytest.mark.parametrize("name", EXACT)
    def test_those_that_solve_have_the_numbers_of_the_definition(self, name: str) -> None:
        """The curvature has rank two, which few eigenpairs or a sketch hold."""
        influence = BUILDS[name](MLP.model(), MLP.loss).fit([(X[:1], Y[:1])])
        curvature = oracle.generalized_gauss_newton(MLP.model(), MLP.loss, X[:1], Y[:1])
        expected = _expected(curvature, X[:1], Y[:1])
        oracle.assert_close(influence.influences(X_TEST, Y_TEST, X[:1], Y[:1]), expected, 1e-6)

    def test_direct_has_them_with_every_curvature(self) -> None:
        for mode, of in oracle.CURVATURES.items():
            curvature = of(MLP.model(), MLP.loss, X[:1], Y[:1])
            influence = DirectInfluence(
                MLP.model(), MLP.loss, λ, second_order_mode=SecondOrderMode(mode)
            ).fit([(X[:1], Y[:1])])
            found = influence.influences(X_TEST, Y_TEST, X[:1], Y[:1])
            allowed = oracle.bound(curvature, λ)
            oracle.assert_close(found, _expected(curvature, X[:1], Y[:1]), allowed)

    def test_the_mean_of_one_inverse_is_that_of_its_fisher(self) -> None:
        """DataInf and the empirical Fisher are one, where there is one example."""
        curvature = oracle.empirical_fisher(MLP.model(), MLP.loss, X[:1], Y[:1])
        influence = BUILDS["inverse harmonic mean"](MLP.model(), MLP.loss).fit([(X[:1], Y[:1])])
        found = influence.influences(X_TEST, Y_TEST, X, Y)
        oracle.assert_close(found, _expected(curvature, X, Y), 1e-9)


class TestTheSameExampleTwice:
    ORDER = torch.tensor([0, 1, 1, 2, 0, 3, 4, 5])

    def test_the_same_example_has_the_same_scores(self, build: Build) -> None:
        """To the last digits: a batch's products may round otherwise from row to row."""
        x, y = X[self.ORDER], Y[self.ORDER]
        influence = build(MLP.model(), MLP.loss).fit(list(zip(x.split(3), y.split(3), strict=True)))
        factors = influence.influence_factors(X_TEST, Y_TEST)
        for mode in InfluenceMode:
            found = influence.influences_from_factors(factors, x, y, mode)
            for one, other in ((1, 2), (0, 4)):
                torch.testing.assert_close(found[:, one], found[:, other], rtol=1e-10, atol=1e-13)
            assert not torch.allclose(found[:, 0], found[:, 1], rtol=1e-3, atol=1e-6)

    def test_direct_counts_it_twice(self) -> None:
        """The definition's mean over examples: more weight than that of an example that comes once."""
        x, y = X[self.ORDER], Y[self.ORDER]
        for mode, of in oracle.CURVATURES.items():
            curvature = of(MLP.model(), MLP.loss, x, y)
            influence = DirectInfluence(
                MLP.model(), MLP.loss, λ, second_order_mode=SecondOrderMode(mode)
            ).fit(list(zip(x.split(3), y.split(3), strict=True)))
            found, expected = influence.influences(X_TEST, Y_TEST, x, y), _expected(curvature, x, y)
            oracle.assert_close(found, expected, oracle.bound(curvature, λ))
            once = of(MLP.model(), MLP.loss, X[:6], Y[:6])
            assert oracle.relative_error(found, _expected(once, x, y)) > 1e-3

    def test_all_examples_twice_are_the_same_training_set(self, build: Build) -> None:
        """Every fit is a mean; only what is drawn by an example's index would not be."""
        once, twice = (build(MLP.model(), MLP.loss) for _ in range(2))
        once.fit(list(zip(X.split(5), Y.split(5), strict=True)))
        twice.fit(list(zip(X.repeat(2, 1).split(7), Y.repeat(2).split(7), strict=True)))
        solved, again = (influence.influence_factors(X_TEST, Y_TEST) for influence in (once, twice))
        oracle.assert_close(again, solved, 1e-6)
        for mode in InfluenceMode:
            expected = once.influences_from_factors(solved, X, Y, mode)
            oracle.assert_close(twice.influences_from_factors(again, X, Y, mode), expected, 1e-6)


class MovedTensors(TorchFunctionMode):
    """Remembers, while it is entered, which tensors were moved by `Tensor.to`, by their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to:
            self.places.add(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


def _kept(influence: TorchInfluenceFunctionModel) -> Iterator[Tensor]:
    """The tensors that a fitted model keeps: of the model and its checkpoints, and what the fit left."""
    for module in (influence.model, influence.checkpoints):
        if module is not None:
            yield from (*module.parameters(), *module.buffers())
    yield from (leaf for leaf in pytree.tree_leaves(influence._state) if isinstance(leaf, Tensor))


PARTS = [(X[:7].clone(), Y[:7].clone()), (X[7:].clone(), Y[7:].clone())]
MOVED: dict[str, Build] = {
    **BUILDS,
    "lissa": partial(LissaInfluence, **GAUSS_NEWTON, scale=1.6, maxiter=20, warn_on_max_iteration=False),
    "cg with a preconditioner": partial(
        CgInfluence, **GAUSS_NEWTON, rtol=1e-10, preconditioner=NystroemPreconditioner(5)
    ),
    "inverse harmonic mean with a relative λ": partial(
        InverseHarmonicMeanInfluence, regularization=influence_calculator.Relative(λ)
    ),
}
"""As BUILDS, and fits that keep something else."""


class TestMoving:
    """There is one device here, so these show what is handed to `Tensor.to`, not where it ends."""

    @pytest.fixture(params=MOVED)
    def fitted(self, request: pytest.FixtureRequest) -> TorchInfluenceFunctionModel:
        return MOVED[request.param](MLP.model(), MLP.loss).fit(PARTS)

    def test_all_that_a_fitted_model_keeps_is_moved(self, fitted: TorchInfluenceFunctionModel) -> None:
        """Parameters, states of checkpoints and what the fit left; the answers stay."""
        expected = fitted.influences(X_TEST, Y_TEST, X, Y)
        kept = {tensor.data_ptr() for tensor in _kept(fitted)}
        with MovedTensors() as moved:
            fitted.to("cpu")
        assert kept <= moved.places
        oracle.assert_close(fitted.influences(X_TEST, Y_TEST, X, Y), expected, 1e-12)

    def test_examples_and_factors_are_moved_where_the_model_is(
        self, fitted: TorchInfluenceFunctionModel
    ) -> None:
        """And the training set, where solving reads it again."""
        factors = fitted.influence_factors(X_TEST, Y_TEST)
        fitted.to("cpu")
        with MovedTensors() as moved:
            fitted.influences(X_TEST, Y_TEST, X, Y)
            fitted.influences_from_factors(factors, X, Y)
        given = {tensor.data_ptr() for tensor in (X_TEST, Y_TEST, X, Y, factors)}
        assert given <= moved.places
        training = {tensor.data_ptr() for part in PARTS for tensor in part}
        assert training & moved.places == (training if fitted.method.needs_data else set())


class TestHalfPrecision:
    def model(self, dtype: torch.dtype) -> nn.Module:
        """Weights that bfloat16 holds."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
        return model.bfloat16().to(dtype)

    @pytest.mark.parametrize("name", [name for name in BUILDS if name != "lissa"])
    @pytest.mark.parametrize("mode", list(InfluenceMode))
    def test_bfloat16_weights_have_the_influences_of_the_same_weights_in_float64(
        self, name: str, mode: InfluenceMode
    ) -> None:
        """Within 3 % of the largest: what is summed and solved is in float32, not in bfloat16."""
        answers = []
        for dtype in (torch.bfloat16, torch.float64):
            x, x_test = (part.bfloat16().to(dtype) for part in (X, X_TEST))
            influence = BUILDS[name](self.model(dtype), F.cross_entropy)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SolverWarning)  # rtol is below what float32 reaches
                influence.fit([(x, Y)])
                answers.append(influence.influences(x_test, Y_TEST, x, Y, mode))
        half, wide = answers
        assert half.shape == wide.shape
        assert float((half.double() - wide).abs().max()) < 0.03 * float(wide.abs().max())


def _classes(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, (count,), generator=generator)


CONVOLUTIONS = {
    "Conv1d": ((4, 9), lambda: nn.Conv1d(4, 6, 2, stride=2, dilation=3, groups=2), 18),
    "Conv2d": ((4, 6, 5), lambda: nn.Conv2d(4, 6, 2, stride=(2, 1), dilation=(2, 3), groups=2), 24),
    "Conv3d": (
        (4, 4, 3, 5),
        lambda: nn.Conv3d(4, 2, 2, stride=2, padding=1, dilation=(2, 1, 3), groups=2),
        16,
    ),
}
"""Kind -> shape of an input, the layer, and how many numbers it makes of one."""


class TestLayers:
    @pytest.mark.parametrize("kind", CONVOLUTIONS)
    @pytest.mark.parametrize("corrected", [True, False])
    def test_ekfac_of_convolutions_in_groups_with_stride_and_dilation(
        self, kind: str, corrected: bool
    ) -> None:
        """Against patches cut out one by one, each group a layer of its own."""
        features, layer, numbers = CONVOLUTIONS[kind]
        case = EkfacCase(
            kind,
            lambda: nn.Sequential(layer(), nn.Tanh(), nn.Flatten(), nn.Linear(numbers, 3)),
            F.cross_entropy,
            SOFTMAX,
            features,
            _classes,
        )
        (x, y), (x_test, y_test) = case.data(7, 1), case.data(3, 2)
        influence = EkfacInfluence(
            case.model(), corrected, loss=case.loss, regularization=λ, expectation="exact"
        ).fit([(x[:4], y[:4]), (x[4:], y[4:])])
        curvature = _dense_ekfac(influence, case, x, y, corrected)
        test, train = (
            oracle.example_gradients(case.model(), case.loss, *of) for of in ((x_test, y_test), (x, y))
        )
        expected = oracle.influences(curvature, λ, test, train)
        oracle.assert_close(influence.influences(x_test, y_test, x, y), expected, 1e-6)

    @pytest.mark.parametrize(
        "build",
        [
            lambda *of: EkfacInfluence(of[0], True, loss=of[1], regularization=λ, unsupported="exclude"),
            lambda *of: EkfacInfluence(of[0], False, loss=of[1], regularization=λ, unsupported="diagonal"),
            partial(LograInfluence, regularization=λ, rank=2),
        ],
    )
    def test_a_weight_that_is_computed_leaves_its_layer_the_bias(self, build: Build) -> None:
        """As much of it as is a layer's is treated as such: as in a copy whose weight is fixed."""
        model = MLP.model()
        nn.utils.parametrizations.weight_norm(model[0])
        influence = build(model, MLP.loss).fit([(X, Y)])
        fixed = MLP.model()
        fixed[0].weight.requires_grad_(False)
        expected = build(fixed, MLP.loss).fit([(X, Y)]).influence_factors(X_TEST, Y_TEST)
        found = influence.solve(X_TEST, Y_TEST).left
        columns = [s for s in influence.layout.slots if s.name in dict(fixed.named_parameters())]
        assert columns[0].name == "0.bias"
        named = torch.cat([found[s.block][:, s.start : s.start + s.size] for s in columns], dim=1)
        oracle.assert_close(named, expected, 1e-9)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("name", ["direct", "cg", "arnoldi", "nystroem", "lissa"])
    def test_a_hessian_that_torch_has_wrong_is_refused(self, name: str, dtype: torch.dtype) -> None:
        """The second derivative of the fused `weight_norm` is not symmetric; Gauss-Newton's needs none."""
        model = MLP.model(dtype)
        nn.utils.parametrizations.weight_norm(model[0])
        build = BUILDS[name]
        assert isinstance(build, partial)
        own = partial(build.func, **{**build.keywords, "second_order_mode": SecondOrderMode.HESSIAN})
        with pytest.raises(ValueError, match=r"expected a symmetric Hessian.*weight_norm"):
            own(model, MLP.loss).fit([(X.to(dtype), Y)])
        own(MLP.model(dtype), MLP.loss).fit([(X.to(dtype), Y)])
        if name == "direct":
            # A method that does not differentiate by it is not concerned.
            own(model, MLP.loss, block_structure={"head": ["4.weight"]}).fit([(X.to(dtype), Y)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SolverWarning)
            build(model, MLP.loss).fit([(X.to(dtype), Y)])

    @pytest.mark.parametrize("mode", ["hessian", "generalized_gauss_newton"])
    def test_an_operation_without_a_second_derivative_is_named_when_the_model_is_fitted(
        self, mode: str
    ) -> None:
        model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        influence = CgInfluence(model, F.cross_entropy, λ, second_order_mode=SecondOrderMode(mode))
        ids = torch.arange(44).reshape(11, 4) % 10
        with pytest.raises(ValueError, match=r"_embedding_bag_backward.*Take empirical_fisher"):
            influence.fit([(ids, Y)])

    @pytest.mark.parametrize("mode", ["hessian", "generalized_gauss_newton"])
    def test_a_function_of_the_users_that_torch_does_not_transform_is_named_too(self, mode: str) -> None:
        class Tanh(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x.tanh())
                return x.tanh()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Any:
                return gradient * (1 - ctx.saved_tensors[0].square())

        class Net(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return self[1](Tanh.apply(self[0](x)))

        model = Net(nn.Linear(4, 5), nn.Linear(5, 3)).double()
        influence = CgInfluence(model, F.cross_entropy, λ, second_order_mode=SecondOrderMode(mode))
        with pytest.raises(ValueError, match=r"setup_context.*Take empirical_fisher"):
            influence.fit([(X, Y)])
        CgInfluence(model, F.cross_entropy, λ, second_order_mode=SecondOrderMode.EMPIRICAL_FISHER).fit(
            [(X, Y)]
        )

    @pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
    def test_a_layer_with_parameters_of_others_is_none(self) -> None:
        model = MLP.model()
        nn.utils.weight_norm(model[0])
        found = []
        for unsupported in ("diagonal", "exclude"):
            influence = EkfacInfluence(model, True, loss=MLP.loss, regularization=λ, unsupported=unsupported)
            found.append({slot.name for slot in influence.fit([(X, Y)]).layout.slots})
            assert torch.isfinite(influence.influences(X_TEST, Y_TEST, X, Y)).all()
        assert found[0] - found[1] == {"0.bias", "0.weight_g", "0.weight_v"}
        with pytest.raises(ValueError, match="layer 0: expected Linear"):
            EkfacInfluence(model, True, loss=MLP.loss).fit([(X, Y)])

    @pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "ConvTranspose2d"])
    def test_layers_that_hooks_do_not_capture_have_autograds_gradients(self, kind: str) -> None:
        model, x, y = _uncaptured(kind)
        gradients = oracle.example_gradients(model, F.cross_entropy, x, y)
        influence = GradDotInfluence(model, F.cross_entropy).fit([(x, y)])
        factors = influence.influence_factors(x, y)
        oracle.assert_close(factors, gradients, 1e-10)
        oracle.assert_close(influence.influences(x, y), gradients @ gradients.T, 1e-10)

    @pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "ConvTranspose2d"])
    @pytest.mark.parametrize("mode", ["hessian", "empirical_fisher", "generalized_gauss_newton"])
    def test_and_direct_their_curvature(self, kind: str, mode: str) -> None:
        model, x, y = _uncaptured(kind)
        curvature = oracle.CURVATURES[mode](model, F.cross_entropy, x, y)
        strength = max(λ, -2.5 * oracle.smallest_eigenvalue(curvature))
        influence = DirectInfluence(
            model, F.cross_entropy, strength, second_order_mode=SecondOrderMode(mode)
        ).fit([(x[:3], y[:3]), (x[3:], y[3:])])
        gradients = oracle.example_gradients(model, F.cross_entropy, x, y)
        expected = oracle.influences(curvature, strength, gradients, gradients)
        oracle.assert_close(influence.influences(x, y), expected, oracle.bound(curvature, strength))


class _Skipping(nn.Module):
    """Two layers that batches of small amounts do not reach, or are multiplied by 0 there."""

    def __init__(self, skips: bool = True) -> None:
        super().__init__()
        self.skips = skips
        self.grouped = nn.Conv1d(2, 4, 2, groups=2)
        self.extra, self.layer, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x).tanh()
        reached = bool((x[:, 0] > 0).all())
        if reached or not self.skips:
            pairs = x.unflatten(1, (2, 2))
            more = self.extra(pairs).tanh().sum(1) + self.grouped(pairs).tanh().flatten(1)
            hidden = hidden + reached * more
        answer: Tensor = self.head(hidden)
        return answer


class TestSkippedLayers:
    """Six training examples reach them, five do not; none is in a batch with one of the others."""

    x = torch.cat([torch.cat([X[:6, :1].abs(), -X[6:, :1].abs()]), X[:, 1:]], 1)
    halves = ((x[:6], Y[:6]), (x[6:], Y[6:]))

    def model(self, skips: bool = True) -> nn.Module:
        """The same weights, whether it skips or not."""
        with torch.random.fork_rng():
            torch.manual_seed(6)
            return _Skipping(skips).double()

    def curvature(self, state: FitState, corrected: bool) -> Tensor:
        """By the definition, in the bases that were found."""
        model, layers = self.model(), {}
        for name, group in (("grouped", 0), ("grouped", 1), ("extra", 0), ("layer", 0), ("head", 0)):
            dense = dense_ekfac.dense_layer(model, name, self.x, Y, dense_ekfac.exact(F.cross_entropy), group)
            unit = state["covariance"][name]
            Q_A, Q_G = (
                unit[key][group] if name == "grouped" else unit[key]
                for key in ("input_vectors", "output_vectors")
            )
            plain = [
                (Q.T @ matrix @ Q).diagonal()
                for Q, matrix in ((Q_G, dense.gradients), (Q_A, dense.activations))
            ]
            eigenvalues = dense.eigenvalues(Q_A, Q_G) if corrected else torch.outer(*plain)
            layers[name, group] = (dense, Q_A, Q_G, eigenvalues)
        return dense_ekfac.curvature(model, layers)

    @pytest.mark.parametrize("size", [1, 2, 6])
    @pytest.mark.parametrize("corrected", [True, False])
    def test_ekfac_counts_no_token_of_examples_that_do_not_reach_a_layer(
        self, size: int, corrected: bool
    ) -> None:
        objective = xy_objective(self.model(), F.cross_entropy)
        method = Ekfac(regularization=λ, expectation="exact", update_diagonal=corrected)
        state = fit(method, objective, TrainingSet((self.x, Y), size))
        gradients = oracle.example_gradients(self.model(), F.cross_entropy, self.x, Y)
        expected = oracle.influences(self.curvature(state, corrected), λ, gradients, gradients)
        fitted = method.fitted(objective, state, None)
        found = [
            [
                region.influences(fitted, fitted.solve(fitted.gradients(objective, test)).left, train, size)
                for train in self.halves
            ]
            for test in self.halves
        ]
        oracle.assert_close(torch.cat([torch.cat(row, 1) for row in found]), expected, 1e-6)

    def test_a_layer_that_no_training_example_reaches_takes_no_part(self) -> None:
        state = fit(
            Ekfac(regularization=λ),
            xy_objective(self.model(), F.cross_entropy),
            TrainingSet(self.halves[1], 2),
        )
        for name in ("input_values", "output_values"):
            assert not state["covariance"]["extra"][name].any()

    def test_examples_that_skip_a_layer_are_scored_as_if_it_were_multiplied_by_zero(
        self, build: Build
    ) -> None:
        found = []
        for skips in (True, False):
            influence = build(self.model(skips), F.cross_entropy).fit([self.halves[0]])
            scored = [influence.influences(*test, *train) for test in self.halves for train in self.halves]
            found.append(torch.cat([values.flatten() for values in scored]))
        oracle.assert_close(*found, 1e-9)


class _Last(nn.Module):
    """A recurrent layer over three steps, and a class from its last output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(2, 2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.layer(x)[0][:, -1])
        return answer


def _uncaptured(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with a layer of this kind, and five examples."""
    generator = torch.Generator().manual_seed(3)
    is_recurrent = kind != "ConvTranspose2d"
    x = torch.randn(5, *((3, 2) if is_recurrent else (2, 2, 3)), generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        transposed = nn.ConvTranspose2d(
            2, 2, 2, stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=2
        )
        convolved = nn.Sequential(transposed, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
        model = _Last(kind) if is_recurrent else convolved
    return model.double().eval(), x, _classes(5, generator)


def _dense_ekfac(influence: EkfacInfluence, case: EkfacCase, x: Tensor, y: Tensor, corrected: bool) -> Tensor:
    """The definition's curvature, in the bases that were found."""
    model, layers = case.model(), {}
    for name in ("0", "3"):
        for group in range(dense_ekfac.groups_of(model.get_submodule(name))):
            dense = dense_ekfac.dense_layer(model, name, x, y, dense_ekfac.exact(case.loss), group)
            unit = influence._state["covariance"][name]
            Q_A, Q_G = (
                unit[key] if name == "3" else unit[key][group] for key in ("input_vectors", "output_vectors")
            )
            for Q, matrix in ((Q_A, dense.activations), (Q_G, dense.gradients)):
                turned = Q.T @ matrix @ Q
                torch.testing.assert_close(turned, torch.diag(turned.diagonal()), rtol=0, atol=1e-12)
            eigenvalues = (
                dense.eigenvalues(Q_A, Q_G)
                if corrected
                else torch.outer(
                    (Q_G.T @ dense.gradients @ Q_G).diagonal(), (Q_A.T @ dense.activations @ Q_A).diagonal()
                )
            )
            layers[name, group] = (dense, Q_A, Q_G, eigenvalues)
    return dense_ekfac.curvature(model, layers)


def _expected(curvature: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The definition's influences of (x, y) on the test examples."""
    test, train = (oracle.example_gradients(MLP.model(), MLP.loss, *of) for of in ((X_TEST, Y_TEST), (x, y)))
    return oracle.influences(curvature, λ, test, train)
