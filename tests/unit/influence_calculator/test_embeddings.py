"""Embeddings under EK-FAC: what is refused, what is never formed, and what must not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ekfac_cases import WORDS_CASE
from influence_calculator import EkfacInfluence
from influence_calculator.maths import embeddings, method, region
from influence_calculator.maths.capture import measure
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.errors import UnsupportedModelError
from influence_calculator.maths.layers import supported_embeddings
from influence_calculator.maths.method import Fitted, fit
from influence_calculator.maths.objective import Objective, xy_objective
from influence_calculator.maths.shapes import EmbeddingShape
from training_sets import TrainingSet

N, T = 11, 3


def _objective(model: nn.Module) -> Objective:
    return xy_objective(model, F.cross_entropy)


def _fitted(model: nn.Module, size: int = 4) -> Fitted:
    objective, chosen = _objective(model), Ekfac(regularization=0.1, seed=5)
    return chosen.fitted(objective, fit(chosen, objective, TrainingSet(WORDS_CASE.data(N, 1), size)), None)


def _influences(model: nn.Module, size: int = 4) -> Tensor:
    fitted = _fitted(model, size)
    left = fitted.solve(fitted.gradients(_objective(model), WORDS_CASE.data(T, 2))).left
    return region.influences(fitted, left, WORDS_CASE.data(N, 1), size)


class _Reads(nn.Module):
    """A model whose forward asks for a number, which cannot be vmapped."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        assert x.max().item() < 100
        answer: Tensor = self.net(x)
        return answer


def test_a_model_that_asks_for_numbers_scores_as_one_that_does_not() -> None:
    expected = _influences(WORDS_CASE.model())
    torch.testing.assert_close(_influences(_Reads(WORDS_CASE.model())), expected, rtol=1e-9, atol=1e-12)


class _Cut(nn.Module):
    """The mean over the words of a sentence, cut to the longest of its batch or as it comes."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.cut = cut
        generator = torch.Generator().manual_seed(3)
        # Without cutting, what stands for no word is left out by `padding_idx`.
        self.words = nn.Embedding(6, 3, padding_idx=None if cut else 0).double()
        self.head = nn.Linear(3, 3).double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : int((x != 0).sum(1).max())] if self.cut else x
        read = (x != 0).unsqueeze(2)
        answer: Tensor = self.head((self.words(x) * read).sum(1) / read.sum(1))
        return answer


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_sentences_cut_to_the_longest_of_their_batch_score_as_whole_ones(size: int, corrected: bool) -> None:
    x = torch.tensor(
        [[1, 2, 0, 0], [3, 3, 3, 4], [5, 0, 0, 0], [2, 4, 0, 0], [1, 1, 5, 0], [4, 0, 0, 0], [2, 5, 3, 1]]
    )
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def influences(model: nn.Module) -> Tensor:
        batches = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
        fitted = EkfacInfluence(model, corrected, 0.1).fit(batches)
        factors = fitted.influence_factors(x[:3], y[:3])
        return torch.cat([fitted.influences_from_factors(factors, *batch) for batch in batches], dim=1)

    torch.testing.assert_close(influences(_Cut(cut=True)), influences(_Cut(cut=False)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5, N])
def test_the_size_of_a_batch_does_not_matter(size: int) -> None:
    """Of 4 examples with 4 places each, the looked-up places are as many as the examples."""
    expected = _influences(WORDS_CASE.model())
    torch.testing.assert_close(_influences(WORDS_CASE.model(), size), expected, rtol=1e-9, atol=1e-12)


def test_tokens_that_are_scored_piece_by_piece_score_as_together(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _influences(WORDS_CASE.model())
    monkeypatch.setattr(embeddings, "PRODUCT_ELEMENTS", 4 * 3 * 4)
    monkeypatch.setattr(method, "GATHERED_ELEMENTS", 2 * 3 * T)
    torch.testing.assert_close(_influences(WORDS_CASE.model()), expected, rtol=1e-9, atol=1e-12)


def test_influences_by_layer_add_up_to_the_influences() -> None:
    model = EkfacInfluence(WORDS_CASE.model(), True, 0.1).fit([WORDS_CASE.data(N, 1)])
    test, train = WORDS_CASE.data(T, 2), WORDS_CASE.data(N, 1)
    by_layer = model.influences_by_layer(*test, *train)
    assert {"words", "places"} < set(by_layer)
    total = torch.stack(list(by_layer.values())).sum(0)
    torch.testing.assert_close(total, model.influences(*test, *train))


def test_rows_of_padding_have_no_factors() -> None:
    fitted = _fitted(WORDS_CASE.model())
    test = WORDS_CASE.data(T, 2)
    assert (test[0] == 0).any()
    left = fitted.solve(fitted.gradients(_objective(WORDS_CASE.model()), test)).left
    words = fitted.factors(left)["words"].unflatten(1, (5, 3))
    assert not words[:, 0].any()
    assert words[:, 1:].any()


def test_nothing_as_large_as_the_vocabulary_squared_or_per_token_is_formed() -> None:
    """50 000 words: a matrix of them squared would take 20 GB, one-hot inputs of this batch 10 MB a token."""
    V, o = 50_000, 2
    model = nn.Sequential(nn.Embedding(V, o), nn.Flatten(), nn.Linear(3 * o, 3)).double()
    objective, chosen = _objective(model), Ekfac(regularization=0.1)
    x, y = torch.randint(V, (26, 3)), torch.randint(3, (26,))
    with _Largest() as largest:
        state = fit(chosen, objective, TrainingSet((x, y), 13))
        fitted = chosen.fitted(objective, state, None)
        one = fitted.solve(fitted.gradients(objective, (x[:1], y[:1]))).left
        fitted.score(one, (x, y))
    assert largest.elements == V * o


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def _shared() -> nn.Module:
    first, second = nn.Embedding(5, 3), nn.Embedding(5, 3)
    second.weight = first.weight
    return nn.ModuleList([first, second])


class _Scaled(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


UNTREATED: dict[str, Callable[[], nn.Module]] = {
    "changed by lookups": lambda: nn.ModuleList([nn.Embedding(5, 3, max_norm=1.0)]),
    "divided by counts": lambda: nn.ModuleList([nn.Embedding(5, 3, scale_grad_by_freq=True)]),
    "shared": _shared,
    "a forward of its own": lambda: nn.ModuleList([_Scaled(5, 3)]),
}


@pytest.mark.parametrize("name", UNTREATED)
def test_what_is_no_plain_lookup_has_no_kronecker_product(name: str) -> None:
    objective = _objective(UNTREATED[name]())
    assert supported_embeddings(objective) == ()
    with pytest.raises(UnsupportedModelError, match=r"0\.weight \("):
        Ekfac().layout(objective)


def test_a_frozen_embedding_costs_nothing() -> None:
    model = WORDS_CASE.model()
    model.words.requires_grad_(False)
    objective = _objective(model)
    assert [spec.name for spec in supported_embeddings(objective)] == ["places"]
    assert "words" not in Ekfac().layout(objective).blocks


def test_measured_sizes_of_embeddings_are_the_models() -> None:
    shapes = measure(_objective(WORDS_CASE.model()), WORDS_CASE.data(N, 1))
    assert shapes.embeddings == (
        EmbeddingShape("words", rows=5, columns=3, tokens=4),
        EmbeddingShape("places", rows=4, columns=3, tokens=4),
    )


def test_a_footprint_counts_a_row_of_the_vocabulary_and_no_square_of_it() -> None:
    V, o, S = 50_000, 64, 16
    model = nn.Sequential(nn.Embedding(V, o), nn.Flatten(), nn.Linear(S * o, 3))
    shapes = measure(_objective(model), (torch.randint(V, (1, S)), torch.zeros(1).long()))
    footprint = Ekfac().footprint(shapes, 8, 10)
    width = V * o + S * o * 3 + 3
    assert footprint.factor_row == 4 * width
    assert 10 * 4 * width < footprint.factors
    assert footprint.fit < 8 * 4 * width
    assert footprint.capture < 2**28


def test_the_commonest_token_is_counted_beyond_what_float32_can() -> None:
    """float32 stands still at 2^24."""
    model = WORDS_CASE.model().float()
    objective = _objective(model)
    ((unit, *_), step) = ([spec.name for spec in supported_embeddings(objective)], Ekfac(0.1).passes()[0])
    sums = step.accumulate(objective, TrainingSet(WORDS_CASE.data(N, 1), 4).batches(), {})
    frequencies = sums[unit]["frequencies"]
    more = frequencies + 2**24
    assert torch.equal(more - 2**24, frequencies)
    assert (more + 1 > more).all()
