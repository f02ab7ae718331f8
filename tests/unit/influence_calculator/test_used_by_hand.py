"""EK-FAC where a model uses an embedding's weight by hand, as a head that multiplies by it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dense_ekfac
import oracle
from influence_calculator import EkfacInfluence
from influence_calculator.maths import region
from influence_calculator.maths.by_hand import at_work
from influence_calculator.maths.capture import measure
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.errors import CaptureMismatchError, UnsupportedModelError
from influence_calculator.maths.method import FitState, fit
from influence_calculator.maths.objective import Objective, xy_objective
from references import REGULARIZATIONS
from training_sets import TrainingSet

N, T, WORDS, TOKENS = 11, 3, 5, 4


class _Tied(nn.Module):
    """A head that multiplies by the weight of one of two embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 3), nn.Embedding(TOKENS, 3)
        self.middle = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.words(x) + self.places(torch.arange(TOKENS))
        return self.middle(seen).tanh().mean(1) @ self.words.weight.T


class _SometimesTwice(_Tied):
    """Looks words up once more by hand, where a text begins with one of the last; the head is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.words(x) + self.places(torch.arange(TOKENS))
        if bool(x[0, 0] > 2):
            seen = seen + F.embedding(x, self.words.weight)
        answer: Tensor = self.head(self.middle(seen).tanh().mean(1))
        return answer


def _model(kind: Callable[[], nn.Module] = _Tied) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind().double()


def _data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(WORDS, (count, TOKENS), generator=generator)
    return x, torch.randint(WORDS, (count,), generator=generator)


def _method(unsupported: str, λ: float = 0.1) -> Ekfac:
    return Ekfac(regularization=λ, expectation="exact", unsupported=unsupported)


def _seen(unsupported: str) -> Objective:
    objective = xy_objective(_model(), F.cross_entropy)
    return _method(unsupported).looked_at(objective, lambda: _data(N, 1))


@cache
def _state(unsupported: str) -> FitState:
    return fit(_method(unsupported), _seen(unsupported), TrainingSet(_data(N, 1), 4))


def _influences(unsupported: str, λ: float) -> Tensor:
    objective = _seen(unsupported)
    fitted = _method(unsupported, λ).fitted(objective, _state(unsupported), None)
    left = fitted.solve(fitted.gradients(objective, _data(T, 2))).left
    return region.influences(fitted, left, _data(N, 1), 4)


def _curvature() -> Tensor:
    """Of the layer and the other embedding by the definition, of the weight in question its diagonal."""
    model, layers = _model(), {}
    covariance = _state("diagonal")["covariance"]
    for name in ("places", "middle"):
        dense = dense_ekfac.dense_layer(model, name, *_data(N, 1), dense_ekfac.exact(F.cross_entropy))
        Q_G = covariance[name]["output_vectors"]
        Q_A = covariance[name].get("input_vectors", torch.eye(TOKENS, dtype=torch.float64))
        layers[name, 0] = (dense, Q_A, Q_G, dense.eigenvalues(Q_A, Q_G))
    curvature = dense_ekfac.curvature(model, layers)
    places = oracle.columns_of(model, ("words.weight",))
    whole = oracle.generalized_gauss_newton(model, F.cross_entropy, *_data(N, 1))
    curvature[places, places] = whole.diagonal()[places]
    return curvature


@pytest.mark.parametrize("λ", REGULARIZATIONS)
@pytest.mark.parametrize("unsupported", ["diagonal", "exclude"])
def test_the_weight_has_a_diagonal_or_no_part_as_the_user_says(unsupported: str, λ: float) -> None:
    test, train = (
        oracle.example_gradients(_model(), F.cross_entropy, *_data(count, seed))
        for count, seed in ((T, 2), (N, 1))
    )
    if unsupported == "exclude":
        test[:, oracle.columns_of(_model(), ("words.weight",))] = 0
    expected = oracle.influences(_curvature(), λ, test, train)
    oracle.assert_close(_influences(unsupported, λ), expected, 1e-6)


@pytest.mark.parametrize("unsupported", ["diagonal", "exclude"])
def test_an_influence_model_looks_when_it_is_fitted(unsupported: str) -> None:
    model = EkfacInfluence(_model(), True, 0.1, expectation="exact", unsupported=unsupported)
    model.fit([_data(N, 1)])
    kept = {"diagonal": ["words", "places", "middle"], "exclude": ["places", "middle"]}
    assert model.block_names == kept[unsupported]
    assert model.n_parameters == sum(p.numel() for name in kept[unsupported] for p in _parameters(name))
    found = model.influences(*_data(T, 2), *_data(N, 1))
    torch.testing.assert_close(found, _influences(unsupported, 0.1), rtol=1e-9, atol=1e-12)


def _parameters(name: str) -> list[Tensor]:
    return list(_model().get_submodule(name).parameters())


def test_it_is_refused_by_name_and_nothing_else_is() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        EkfacInfluence(_model(), regularization=0.1).fit([_data(N, 1)])
    assert "got words.weight (Embedding, used by hand too); take unsupported=" in str(caught.value)


def test_the_look_depends_on_how_the_weight_is_used_and_not_on_its_values() -> None:
    """With a layer of zeros the head's gradient is zero, and the weight is used all the same."""
    model = _model()
    nn.init.zeros_(model.middle.weight)
    nn.init.zeros_(model.middle.bias)
    seen = _method("exclude").looked_at(xy_objective(model, F.cross_entropy), lambda: _data(N, 1))
    assert seen.by_hand == ("words.weight",)


def test_a_model_that_only_calls_its_embeddings_keeps_its_kronecker_products() -> None:
    """Also when it was looked at before it was changed."""
    objective = replace(_seen("exclude"), model=_model(_SometimesTwice))
    x, y = _data(N, 1)
    x[0, 0] = 0
    assert _method("exclude").looked_at(at_work(objective, (x, y)), lambda: (x, y)).by_hand == ()


def test_a_use_that_the_first_example_does_not_show_is_refused_when_it_is_met() -> None:
    x, y = _data(N, 1)
    x[0, 0], x[1, 0] = 0, 4
    objective = xy_objective(_model(_SometimesTwice), F.cross_entropy)
    objective = _method("diagonal").looked_at(objective, lambda: (x, y))
    with pytest.raises(CaptureMismatchError, match=r"^words\.weight: .*the first training example not"):
        fit(_method("diagonal"), objective, TrainingSet((x[1:], y[1:]), 1))


def test_a_plan_counts_the_weight_as_one_without_lookups() -> None:
    names = [embedding.name for embedding in measure(_seen("diagonal"), _data(1, 1)).embeddings]
    assert names == ["places"]
