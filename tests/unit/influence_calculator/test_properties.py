"""What holds of influences for any weights, data and division of the data, method by method.

Networks are small and not trained: weights, data and their sizes are drawn. Curvatures are positive ones, so
that every method has an answer.

Shapes: T test examples, N training examples, P parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import dask.array as da
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from influence_calculator import (
    ArnoldiInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    DisableClientSingleThreadCheck,
    EkfacInfluence,
    NestedTorchCatAggregator,
    NystroemSketchInfluence,
    SecondOrderMode,
    SequentialInfluenceCalculator,
    TorchNumpyConverter,
)
from influence_calculator.maths import training_batches
from influence_calculator.torch.blockwise import TorchBlockwiseInfluence
from model_cases import Data, ModelCase
from references import REGULARIZATIONS

NETWORKS = (
    ModelCase(
        "mlp", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), F.cross_entropy, (3,), 3
    ),
    ModelCase(
        "conv1d",
        lambda: nn.Sequential(nn.Conv1d(2, 2, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)),
        F.cross_entropy,
        (2, 4),
        3,
    ),
)
POSITIVE = (SecondOrderMode.GENERALIZED_GAUSS_NEWTON, SecondOrderMode.EMPIRICAL_FISHER)

# The same examples at every run: eigenvalues of drawn curvatures may lie so near to each other that rounding
# decides between their eigenvectors, and then no bound holds.
FEW = settings(max_examples=10, deadline=None, derandomize=True, database=None)

WEIGHTS = st.floats(0.1, 10) | st.floats(-10, -0.1)


@dataclass(frozen=True)
class Problem:
    """A network with drawn weights, a drawn number of test and training examples, and the curvature's λ."""

    case: ModelCase
    seed: int
    tests: int
    trains: int
    second_order: SecondOrderMode
    λ: float

    def network(self) -> nn.Module:
        """With the same weights at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.case.build().double().eval()

    def test(self) -> Data:
        return self.case.data(self.tests, self.seed + 1)

    def train(self) -> Data:
        return self.case.data(self.trains, self.seed + 2)


class Build(Protocol):
    def __call__(
        self, problem: Problem, network: nn.Module | None = None, /, **changes: Any
    ) -> TorchBlockwiseInfluence: ...


def direct(problem: Problem, network: nn.Module | None = None, **changes: Any) -> DirectInfluence:
    return DirectInfluence(network or problem.network(), **_given(problem, changes))


def arnoldi(problem: Problem, network: nn.Module | None = None, **changes: Any) -> ArnoldiInfluence:
    searched = {"rank": 5, "krylov_dimension": 24, "tol": 1e-11, "max_iter": 200, "use_woodbury": True}
    return ArnoldiInfluence(network or problem.network(), **searched, **_given(problem, changes))


def nystroem(problem: Problem, network: nn.Module | None = None, **changes: Any) -> NystroemSketchInfluence:
    given = {"rank": 5, **_given(problem, changes)}
    return NystroemSketchInfluence(network or problem.network(), **given)


def ekfac(problem: Problem, network: nn.Module | None = None, **changes: Any) -> EkfacInfluence:
    given = {"expectation": "exact", **_given(problem, changes)}
    del given["second_order_mode"]
    return EkfacInfluence(network or problem.network(), update_diagonal=True, **given)


def _given(problem: Problem, changes: dict[str, Any]) -> dict[str, Any]:
    return {
        "loss": problem.case.loss,
        "regularization": problem.λ,
        "second_order_mode": problem.second_order,
        **changes,
    }


METHODS: dict[str, Build] = {"direct": direct, "ekfac": ekfac, "arnoldi": arnoldi, "nystroem": nystroem}


@pytest.fixture(scope="module", params=METHODS)
def build(request: pytest.FixtureRequest) -> Build:
    """One constructor after the other: what follows holds for all methods."""
    return METHODS[request.param]


def problems(modes: Sequence[SecondOrderMode] = POSITIVE) -> st.SearchStrategy[Problem]:
    sizes = st.integers(1, 12)
    return st.builds(
        Problem,
        st.sampled_from(NETWORKS),
        st.integers(0, 2**32 - 3),
        sizes,
        sizes,
        st.sampled_from(modes),
        st.sampled_from(REGULARIZATIONS),
    )


def compositions(draw: Callable[[Any], Any], n: int) -> tuple[int, ...]:
    """Lengths of consecutive pieces of n examples, any of them."""
    inner = draw(st.sets(st.integers(1, n - 1))) if n > 1 else set()
    return tuple(b - a for a, b in pairwise([0, *sorted(inner), n]))


def divided(data: Data, lengths: tuple[int, ...]) -> list[Data]:
    return list(zip(*(part.split(lengths) for part in data), strict=True))


def chunked(data: Data, lengths: tuple[int, ...]) -> tuple[da.Array, ...]:
    return tuple(da.from_array(part.numpy(), chunks=(lengths, *part.shape[1:])) for part in data)


def chosen(data: Data, order: list[int]) -> Data:
    x, y = data
    return x[order], y[order]


def assert_equal(
    found: Tensor, expected: Tensor, allowed: float = 1e-9, largest: Tensor | None = None
) -> None:
    """Up to rounding, relative to `largest`, or else to the largest entry."""
    assert found.shape == expected.shape
    largest = expected.abs().max() if largest is None else largest
    error = float((found.double() - expected).abs().max() / largest)
    assert error <= allowed, f"{error:.3g} of the largest, allowed {allowed:.3g}"


@FEW
@given(problem=problems(), data=st.data())
def test_influences_by_chunks_are_those_of_one_call(build: Build, problem: Problem, data: st.DataObject):
    """However test and training examples are divided, and however many chunks share a pass."""
    test, train = problem.test(), problem.train()
    model = build(problem).fit([train])
    expected = model.influences(*test, *train)
    rows, columns = (compositions(data.draw, n) for n in (problem.tests, problem.trains))

    sequential = SequentialInfluenceCalculator(model)
    by_dask = DaskInfluenceCalculator(model, TorchNumpyConverter(), DisableClientSingleThreadCheck)
    sequential.group_bytes = by_dask.group_bytes = data.draw(st.sampled_from([1, 2000, 2**30]))
    lazy = sequential.influences(divided(test, rows), divided(train, columns))
    assert_equal(lazy.compute(NestedTorchCatAggregator()), expected)
    graph = by_dask.influences(*chunked(test, rows), *chunked(train, columns))
    assert_equal(torch.from_numpy(graph.compute(scheduler="synchronous")), expected)


@FEW
@given(problem=problems(), data=st.data())
def test_batches_of_a_fit_may_have_any_size_and_order(build: Build, problem: Problem, data: st.DataObject):
    train = problem.train()
    expected = build(problem).fit([train]).influences(*problem.test(), *train)
    batches = data.draw(st.permutations(divided(train, compositions(data.draw, problem.trains))))
    found = fitted_batch_by_batch(build(problem), batches).influences(*problem.test(), *train)
    assert_equal(found, expected)


@FEW
@given(problem=problems(), data=st.data())
def test_draws_of_ekfac_belong_to_an_example_and_not_to_its_batch(problem: Problem, data: st.DataObject):
    train = problem.train()
    drawn = {"expectation": "sampled", "samples": 2, "seed": problem.seed}
    expected = ekfac(problem, **drawn).fit([train]).influences(*problem.test(), *train)
    batches = divided(train, compositions(data.draw, problem.trains))
    found = fitted_batch_by_batch(ekfac(problem, **drawn), batches).influences(*problem.test(), *train)
    assert_equal(found, expected)


@FEW
@given(problem=problems(), data=st.data())
def test_examples_in_another_order_are_rows_and_columns_in_that_order(
    build: Build, problem: Problem, data: st.DataObject
):
    test, train = problem.test(), problem.train()
    model = build(problem).fit([train])
    rows, columns = (data.draw(st.permutations(range(n))) for n in (problem.tests, problem.trains))
    found = model.influences(*chosen(test, rows), *chosen(train, columns))
    assert_equal(found, model.influences(*test, *train)[rows][:, columns])


@FEW
@given(problem=problems(), data=st.data())
def test_the_order_of_the_examples_of_a_fit_does_not_matter(
    build: Build, problem: Problem, data: st.DataObject
):
    test, train = problem.test(), problem.train()
    order = data.draw(st.permutations(range(problem.trains)))
    expected = build(problem).fit([train]).influences(*test, *train)
    assert_equal(build(problem).fit([chosen(train, order)]).influences(*test, *train), expected)


@pytest.mark.parametrize("build", (METHODS | {"nystroem": partial(nystroem, rank=40)}).values(), ids=METHODS)
@FEW
@given(problem=problems([SecondOrderMode.GENERALIZED_GAUSS_NEWTON]))
def test_float32_gives_the_influences_of_float64(build: Build, problem: Problem):
    """With the same weights and data, up to 100 κ(H + λI) ε; influences relative to the largest `‖z‖ ‖g‖`, as
    the score of a single pair may cancel.

    Nyström's sketch is as wide as the curvature: at a lower rank its pseudo-inverse may keep a direction in
    float64 that is rounding in float32.
    """
    narrow = problem.network().float()
    wide = copy.deepcopy(narrow).double()
    (x_test, y_test), (x, y) = problem.test(), problem.train()
    x_test, x = x_test.float(), x.float()
    model = build(problem, narrow).fit([(x, y)])
    found = model.influence_factors(x_test, y_test), model.influences(x_test, y_test, x, y)
    assert {part.dtype for part in found} == {torch.float32}

    x_test, x = x_test.double(), x.double()
    model = build(problem, wide).fit([(x, y)])
    factors = model.influence_factors(x_test, y_test)
    gradients = oracle.example_gradients(wide, problem.case.loss, x, y)
    curvature = oracle.generalized_gauss_newton(wide, problem.case.loss, x, y)
    allowed = oracle.bound(curvature, problem.λ, torch.float32)
    assert_equal(found[0], factors, allowed)
    largest = factors.norm(dim=1).max() * gradients.norm(dim=1).max()
    assert_equal(found[1], model.influences(x_test, y_test, x, y), allowed, largest)


@FEW
@given(problem=problems(), a=WEIGHTS, b=WEIGHTS)
def test_factors_are_linear_in_the_gradient(build: Build, problem: Problem, a: float, b: float):
    """Cross-entropy, and so its gradient, is linear in the weights that a label gives to the classes."""
    model = build(problem).fit([problem.train()])
    x, y = problem.test()
    one, other = (F.one_hot((y + k) % 3, 3).double() for k in (0, 1))
    expected = a * model.influence_factors(x, one) + b * model.influence_factors(x, other)
    assert_equal(model.influence_factors(x, a * one + b * other), expected)


@FEW
@given(problem=problems(), a=WEIGHTS, b=WEIGHTS)
def test_influences_are_linear_in_the_factors(build: Build, problem: Problem, a: float, b: float):
    train = problem.train()
    model = build(problem).fit([train])
    generator = torch.Generator().manual_seed(problem.seed)
    shape = (2, problem.tests, model.n_parameters)
    one, other = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = a * model.influences_from_factors(one, *train) + b * model.influences_from_factors(
        other, *train
    )
    assert_equal(model.influences_from_factors(a * one + b * other, *train), expected)


@FEW
@given(problem=problems([SecondOrderMode.GENERALIZED_GAUSS_NEWTON]), c=st.floats(0.1, 10))
def test_a_loss_and_its_regularization_may_be_scaled_together(build: Build, problem: Problem, c: float):
    """Factors stay as they were, and influences grow as the training gradients do."""
    test, train = problem.test(), problem.train()
    expected = build(problem).fit([train])
    scaled = build(
        replace(problem, λ=c * problem.λ), loss=lambda outputs, y: c * problem.case.loss(outputs, y)
    )
    scaled.fit([train])
    assert_equal(scaled.influence_factors(*test), expected.influence_factors(*test))
    assert_equal(scaled.influences(*test, *train), c * expected.influences(*test, *train))


@FEW
@given(problem=problems())
def test_influences_are_symmetric(build: Build, problem: Problem):
    test, train = problem.test(), problem.train()
    model = build(problem).fit([train])
    assert_equal(model.influences(*train, *test), model.influences(*test, *train).T)


def fitted_batch_by_batch(model: TorchBlockwiseInfluence, batches: list[Data]) -> TorchBlockwiseInfluence:
    """A fit that sees the batches as they are: memory for one example keeps it from joining short ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_batches, "workspace_bytes", lambda objective: 0)
        return model.fit(batches)
