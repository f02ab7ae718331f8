"""Layers that a model calls on other rows than its examples', in order, for some batches only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

import oracle
from influence_calculator import EkfacInfluence, GradDotInfluence
from influence_calculator.maths.errors import CaptureMismatchError, UnsupportedModelError
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.probe import probe
from influence_calculator.maths.row_owners import may_move_rows

N, WORDS, FIRST = 12, 6, 4
LENGTHS = [WORDS] * FIRST + [1, 3, 2, 6, 3, 5, 2, 2]
"""The first four examples are as long as one another."""


class _Sentences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def length(self, x: Tensor) -> Tensor:
        return (x[..., 0] != 0).sum(1)


class Packed(_Sentences):
    """Removes padding before a layer."""

    def forward(self, x: Tensor) -> Tensor:
        own = x[..., 0] != 0
        hidden = x.new_zeros(*x.shape[:2], 5)
        hidden[own] = self.layer(x[own]).tanh()
        return self.head(hidden.sum(1))


class Sorted(_Sentences):
    """The longest first before a layer."""

    def forward(self, x: Tensor) -> Tensor:
        order = self.length(x).argsort(descending=True, stable=True)
        return self.head(self.layer(x[order]).tanh().sum(1)[order.argsort()])


class SortedOtherwise(_Sentences):
    """The same, back by another operation, of two groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(WORDS, WORDS, 1, groups=2)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = self.length(x).argsort(descending=True, stable=True)
        hidden = torch.zeros_like(x).index_copy(0, order, self.layer(x[order]))
        return self.head(hidden.tanh().sum(1))


class Sequences(_Sentences):
    """By torch's packed sequences, of which a layer sees the data."""

    def forward(self, x: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(x, self.length(x), batch_first=True, enforce_sorted=False)
        hidden = packed._replace(data=self.layer(packed.data).tanh())
        return self.head(rnn.pad_packed_sequence(hidden, batch_first=True)[0].sum(1))


class Between(_Sentences):
    """Sorts where there is no layer."""

    def forward(self, x: Tensor) -> Tensor:
        order = self.length(x).argsort(descending=True, stable=True)
        hidden: Tensor = self.layer(x)
        return self.head(hidden[order].tanh().sum(1)[order.argsort()])


class Chosen(nn.Module):
    """A layer for some examples, none or all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        own = x[:, 0] > 0
        hidden = x.new_zeros(len(x), 5)
        hidden[own] = self.layer(x[own]).tanh()
        return self.head(hidden)


class Vector(nn.Module):
    """A layer called on one vector that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(FIRST))
        self.shared, self.layer, self.head = nn.Linear(FIRST, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.layer(x) + self.shared(self.vector)).tanh())


class Vmapped(nn.Module):
    """A layer called inside of a transform, for some examples or all."""

    def __init__(self, always: bool = True) -> None:
        super().__init__()
        self.always = always
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.always or bool((x[:, 0] < 0).all())
        return self.head((torch.vmap(self.layer)(x) if inside else self.layer(x)).tanh())


def _model(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build().double().eval()


def _sentences(count: int = N, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """From an example on."""
    x = torch.randn(N, WORDS, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for sentence, length in zip(x, LENGTHS, strict=True):
        sentence[length:] = 0
    y = torch.arange(N) % 2
    return x.roll(-first, 0)[:count], y.roll(-first)[:count]


def _vectors() -> tuple[Tensor, Tensor]:
    """With a first entry above 0 of the first four, below of the next four, and then of both signs."""
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[:4, 0], x[4:8, 0] = x[:4, 0].abs(), -x[4:8, 0].abs()
    x[8:, 0] = x[8:, 0].abs() * torch.tensor([1, -1, 1, -1])
    return x, torch.arange(N) % 2


def _batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def _assert_as_autograd(model: nn.Module, x: Tensor, y: Tensor, size: int) -> GradDotInfluence:
    influence = GradDotInfluence(model, F.cross_entropy).fit(_batches(x, y, size))
    gradients = oracle.example_gradients(model, F.cross_entropy, x, y)
    for rows, batch in zip(gradients.split(size), _batches(x, y, size), strict=True):
        oracle.assert_close(
            influence.influences(x[:FIRST], y[:FIRST], *batch), gradients[:FIRST] @ rows.T, 1e-9
        )
    return influence


@pytest.mark.parametrize("size", [4, N])
@pytest.mark.parametrize("build", [Packed, Sorted, SortedOtherwise])
def test_rows_that_only_later_batches_show_elsewhere_are_refused_by_name(
    build: Callable[[], nn.Module], size: int
) -> None:
    """Their shapes show nothing: as many rows as examples, or a multiple."""
    x, y = _sentences()
    influence = GradDotInfluence(_model(build), F.cross_entropy).fit(_batches(x, y, size))
    last = _batches(x, y, size)[-1]
    with pytest.raises(CaptureMismatchError, match=r"^layer 'layer': expected rows .*among the first four"):
        influence.influences(x[:FIRST], y[:FIRST], *last)
    with pytest.raises(CaptureMismatchError, match=r"^layer 'layer': expected rows"):
        EkfacInfluence(_model(build), True, 0.1).fit(_batches(x, y, size))


@pytest.mark.parametrize("size", [4, N])
@pytest.mark.parametrize("build", [Packed, Sorted, SortedOtherwise, Sequences])
def test_with_an_example_first_that_shows_it_the_gradients_are_autograds(
    build: Callable[[], nn.Module], size: int
) -> None:
    influence = _assert_as_autograd(_model(build), *_sentences(first=FIRST), size)
    assert influence.objective.by_hand == ("layer.weight", "layer.bias")


@pytest.mark.parametrize("size", [4, N])
def test_rows_that_are_moved_and_moved_back_between_layers_are_the_examples_own(size: int) -> None:
    for first in (0, FIRST):
        influence = _assert_as_autograd(_model(Between), *_sentences(first=first), size)
        assert influence.objective.by_hand == ()


def test_half_precision_and_examples_with_equal_gradients_are_not_taken_for_others() -> None:
    x, y = _sentences()
    x = torch.cat([x, x]).bfloat16()
    model = _model(Between).bfloat16()
    GradDotInfluence(model, F.cross_entropy).fit([(x, torch.cat([y, y]))]).influences(x, torch.cat([y, y]))


def test_a_batch_of_which_no_example_reaches_a_layer_has_no_gradient_there() -> None:
    x, y = (part[:8] for part in _vectors())
    _assert_as_autograd(_model(Chosen), x, y, 4)
    EkfacInfluence(_model(Chosen), True, 0.1).fit([(x[:4], y[:4])]).influences(x[:4], y[:4], x[4:], y[4:])


def test_a_batch_of_which_some_examples_do_is_refused_by_name() -> None:
    x, y = _vectors()
    influence = GradDotInfluence(_model(Chosen), F.cross_entropy).fit(_batches(x, y, 4))
    with pytest.raises(UnsupportedModelError, match=r"layer 'layer': expected inputs with as many"):
        influence.influences(x[:4], y[:4], x[8:], y[8:])


def test_a_vector_with_as_many_entries_as_examples_are_tried_counts_none() -> None:
    x, y = _vectors()
    influence = _assert_as_autograd(_model(Vector), x, y, 4)
    assert influence.objective.by_hand == ("shared.weight", "shared.bias")


def test_a_convolution_called_on_one_example_at_a_time_counts_none() -> None:
    """With as many channels as examples are tried."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Conv1d(FIRST, 2, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.stack([self.layer(one) for one in x]).tanh().flatten(1))

    x = torch.randn(N, FIRST, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    influence = _assert_as_autograd(_model(Loop), x, torch.arange(N) % 2, 4)
    assert influence.objective.by_hand == ("layer.weight", "layer.bias")


def test_a_layer_called_inside_of_a_transform_has_autograds_gradients() -> None:
    influence = _assert_as_autograd(_model(Vmapped), *_vectors(), 4)
    assert influence.objective.by_hand == ("layer.weight", "layer.bias")
    with pytest.raises(UnsupportedModelError, match=r"layer\.weight \(Linear, used by hand too\)"):
        EkfacInfluence(_model(Vmapped), True, 0.1).fit([_vectors()])


def test_one_that_only_later_examples_call_so_is_refused_by_name() -> None:
    x, y = _vectors()
    influence = GradDotInfluence(_model(lambda: Vmapped(always=False)), F.cross_entropy).fit([(x, y)])
    with pytest.raises(UnsupportedModelError, match=r"layer 'layer': expected a call outside"):
        influence.influences(x[:4], y[:4], x[4:8], y[4:8])


PLACES = torch.tensor([2, 0, 3, 1])
PICKED = {
    "rows": (lambda h: h[PLACES], True),
    "rows chosen by a mask": (lambda h: h[torch.ones(4, 5, dtype=torch.bool)], True),
    "rows put": (lambda h: torch.zeros_like(h).index_put((PLACES,), h), True),
    "rows added": (lambda h: torch.zeros_like(h).index_add(0, PLACES, h), True),
    "rows selected": (lambda h: h.index_select(-3, PLACES), True),
    "rows sorted": (lambda h: h.sort(0).values, True),
    "rows stacked": (lambda h: torch.stack(list(h)), True),
    "rows side by side": (lambda h: torch.cat([h[2:], h[:2]], -3), True),
    "rows written": (lambda h: torch.zeros(4, 5, 3).copy_(h).index_copy_(0, PLACES, h), True),
    "some rows written": (lambda h: _written(h), True),
    "a place of each example": (lambda h: h[torch.arange(4), PLACES], False),
    "some places of each example": (
        lambda h: h[torch.arange(4)[:, None], PLACES.view(2, 2).T[[0, 1, 0, 1]]],
        False,
    ),
    "a place of each example in another order": (lambda h: h[PLACES, PLACES], True),
    "the same places of all": (lambda h: h[:, PLACES], False),
    "places gathered": (lambda h: h.gather(1, PLACES.view(4, 1, 1)), False),
    "places side by side": (lambda h: torch.cat([h, h], -2), False),
    "nothing": (lambda h: h.transpose(1, 2).flatten(1).softmax(1), False),
}
"""What is done with a layer's outputs `[4, 5, 3]`, and whether it may move rows."""


def _written(h: Tensor) -> Tensor:
    found = torch.zeros(4, 5, 3)
    found[:2] = h[2:]
    return found


@pytest.mark.parametrize("name", PICKED)
def test_a_graph_tells_whether_rows_may_be_moved(name: str) -> None:
    pick, moves = PICKED[name]
    hidden = torch.randn(4, 5, 3, requires_grad=True) * 2
    assert may_move_rows([hidden, pick(hidden).tanh()], 4) == moves


def test_a_model_that_moves_none_is_differentiated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Last(_Sentences):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[torch.arange(len(x)), self.length(x) - 1].tanh())

    x, y = _sentences()
    influences = [GradDotInfluence(_model(build), F.cross_entropy).fit([(x, y)]) for build in (Last, Between)]
    passes = []
    grad = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    counts = []
    for influence in influences:
        passes.clear()
        influence.influence_factors(x, y)
        counts.append(len(passes))
    assert counts == [1, 2]


def test_what_one_example_tells_is_told_of_it_twice() -> None:
    """Where batches hold one: a layer called on a vector is no more than one example's."""
    x, y = _vectors()
    seen = probe(xy_objective(_model(Vector), F.cross_entropy), (x[:1], y[:1]))
    assert seen.by_hand == ("shared.weight", "shared.bias")
