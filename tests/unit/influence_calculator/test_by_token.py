"""Each token's part of the influences: what the layers did at that token, and no more."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import language_models as lm
import oracle
from influence_calculator import Checkpoint, DirectInfluence, SecondOrderMode, TracInInfluence
from influence_calculator.maths import region
from influence_calculator.maths.arnoldi import Arnoldi
from influence_calculator.maths.blocks import BlockMode
from influence_calculator.maths.by_token import influences_by_token, token_count
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.errors import UnsupportedModelError
from influence_calculator.maths.grad_dot import GradDot
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import Fitted, Method, fit
from influence_calculator.maths.objective import Batch, Objective, xy_objective
from influence_calculator.maths.trak import Trak
from model_cases import MLP, TRAIN, ModelCase
from references import REGULARIZATIONS, reference
from training_sets import TrainingSet

GGN = "generalized_gauss_newton"
S = 5


class _Reader(nn.Module):
    """Attention and a grouped convolution over frozen embeddings; a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4).requires_grad_(False)
        self.query, self.key = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)
        self.value = nn.Linear(4, 4)
        self.value.weight.requires_grad_(False)
        self.convolution = nn.Conv1d(4, 6, 3, padding=1, groups=2)
        self.again = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        own = self.embedding(tokens)
        seen = F.scaled_dot_product_attention(self.query(own), self.key(own), self.value(own), is_causal=True)
        mixed = self.convolution((own + seen).mT).tanh().mT
        answer: Tensor = self.head(self.again(self.again(mixed).tanh()).tanh()).mean(1)
        return answer


READER = ModelCase("reader", _Reader, F.cross_entropy, (S,), 3, vocabulary=5)
METHODS: dict[str, Method] = {
    "EK-FAC": Ekfac(0.1),
    "EK-FAC, KFAC's eigenvalues": Ekfac(0.1, update_diagonal=False),
    "Direct by layers": Direct(0.1, BlockMode.LAYER_WISE, SecondOrderMode(GGN)),
    "Direct by parameters": Direct(0.1, BlockMode.PARAMETER_WISE, SecondOrderMode(GGN)),
    "Arnoldi by coordinates": Arnoldi(0.1, 6, complement=False).narrow(),
    "Trak by coordinates": Trak(0.1, 9).narrow(),
    "GradDot": GradDot(),
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def solved(objective: Objective, method: Method, train: Batch, test: Batch) -> tuple[Fitted, Left]:
    fitted = method.fitted(objective, fit(method, objective, TrainingSet(train, 5)), None)
    return fitted, fitted.solve(fitted.gradients(objective, test)).left


@pytest.fixture(scope="module")
def token_gradients() -> Tensor:
    """`[n, S, P]`."""
    return oracle.token_gradients(READER.model(), READER.loss, *READER.train(), S)


def test_the_oracles_parts_sum_to_its_gradients(token_gradients: Tensor) -> None:
    oracle.assert_close(token_gradients.sum(1), reference(READER, GGN).train, 1e-12)


@EVERY_METHOD
def test_a_part_is_the_product_with_the_tokens_part_of_the_gradient(
    method: Method, token_gradients: Tensor
) -> None:
    objective = xy_objective(READER.model(), READER.loss)
    fitted, left = solved(objective, method, READER.train(), READER.test())
    factors = fitted.factors(left)
    found = influences_by_token(fitted, objective, factors, READER.train(), 6)
    expected = torch.einsum("tp,nsp->tns", fitted.layout.flatten(factors), token_gradients)
    oracle.assert_close(found, expected, 1e-10)
    oracle.assert_close(found.sum(2), region.influences(fitted, left, READER.train(), 6), 1e-10)


@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_the_models_parts_are_those_of_the_definition(λ: float, token_gradients: Tensor) -> None:
    explicit = reference(READER, GGN)
    model = DirectInfluence(READER.model(), READER.loss, λ, second_order_mode=SecondOrderMode(GGN))
    data = (*READER.test(), *READER.train())
    found = model.fit([READER.train()]).influences_by_token(*data)
    expected = torch.einsum("tp,nsp->tns", explicit.factors(λ), token_gradients)
    oracle.assert_close(found, expected, explicit.bound(λ))
    oracle.assert_close(found.sum(2), model.influences(*data), 1e-10)


def test_checkpoints_are_summed() -> None:
    states = [READER.model().state_dict(), _Reader().double().state_dict()]
    rates = [0.5, 2.0]
    model = TracInInfluence(READER.model(), READER.loss, list(map(Checkpoint, states, rates)))
    data = (*READER.test(), *READER.train())
    found = model.fit([READER.train()]).influences_by_token(*data)
    expected = torch.zeros_like(found)
    for state, rate in zip(states, rates, strict=True):
        own = READER.model()
        own.load_state_dict(state)
        test = oracle.example_gradients(own, READER.loss, *READER.test())
        parts = oracle.token_gradients(own, READER.loss, *READER.train(), S)
        expected += rate * torch.einsum("tp,nsp->tns", test, parts)
    oracle.assert_close(found, expected, 1e-10)


def texts_of_gpt2() -> tuple[Objective, Layout]:
    """The layers of GPT-2 without embeddings, norms and the head that is an embedding."""
    model = lm.gpt2()
    names = tuple(name for name, _ in model.named_parameters() if ".attn." in name or ".mlp." in name)
    objective = Objective(model, lm.language_loss, lm.forward, names)
    return objective, GradDot().layout(objective)


def test_padding_has_the_part_zero_and_words_have_not() -> None:
    """Transposed weights too, in batches that hold sentences of different lengths."""
    objective, _ = texts_of_gpt2()
    train, test = lm.texts(11, 1), lm.texts(3, 2)
    fitted, left = solved(objective, Ekfac(0.1), train, test)
    factors = fitted.factors(left)
    found = influences_by_token(fitted, objective, factors, train, 4)
    words = train["attention_mask"].bool()
    assert not found[:, ~words].any()
    assert found[:, words].any(0).double().mean() > 0.7  # the last word predicts nothing, some are alone
    oracle.assert_close(found.sum(2), region.influences(fitted, left, train, 4), 1e-10)
    packed = lm.Packed(objective.model)
    for name, p in packed.named_parameters():
        p.requires_grad_(name.removeprefix("model.") in objective.names)
    parts = oracle.token_gradients(packed, lm.next_token_loss, *lm.packed(train), lm.TOKENS)
    expected = torch.einsum("tp,nsp->tns", fitted.layout.flatten(factors), parts)
    oracle.assert_close(found, expected, 1e-10)


@pytest.mark.parametrize("micro_batch", [1, 4, TRAIN])
def test_neither_batches_nor_pieces_of_test_rows_matter(
    micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = xy_objective(READER.model(), READER.loss)
    fitted, left = solved(objective, Ekfac(0.1), READER.train(), READER.test())
    factors = fitted.factors(left)
    expected = influences_by_token(fitted, objective, factors, READER.train(), 7)
    seen: Counter[str] = Counter()
    objective.model.register_forward_hook(lambda _, args, __: seen.update(examples=len(args[0])))
    monkeypatch.setattr("influence_calculator.maths.by_token.PRODUCT_ELEMENTS", 2 * TRAIN * S * 6)
    found = influences_by_token(fitted, objective, factors, READER.train(), micro_batch)
    oracle.assert_close(found, expected, 1e-12)
    assert seen["examples"] == TRAIN


def test_factors_in_halves_give_parts_in_float32() -> None:
    objective = xy_objective(READER.model(torch.float32), READER.loss)
    fitted, left = solved(objective, Ekfac(0.1), READER.train(), READER.test())
    halves = {block: rows.bfloat16() for block, rows in fitted.factors(left).items()}
    found = influences_by_token(fitted, objective, halves, READER.train(), 6)
    assert found.dtype is torch.float32
    wide = {block: rows.float() for block, rows in halves.items()}
    oracle.assert_close(found, influences_by_token(fitted, objective, wide, READER.train(), 6), 1e-5)


class _Pooled(nn.Module):
    """Layers over the tokens, and one over their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.words, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        answer: Tensor = self.head(self.words(self.embedding(tokens)).tanh().mean(1))
        return answer


class _TwoLengths(nn.Module):
    """A layer over all tokens and one over all but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4).requires_grad_(False)
        self.words, self.rest = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        answer: Tensor = self.rest(self.words(self.embedding(tokens)).tanh()[:, 1:]).mean(1)
        return answer


POOLED = replace(READER, name="pooled", build=_Pooled)


@pytest.mark.parametrize(
    ("case", "names", "told"),
    [
        (POOLED, ("embedding.weight", "words.weight"), r"'embedding' \(Embedding\)"),
        (POOLED, ("words.weight", "head.bias"), r"'head' \(Linear\), called without a token dimension"),
        (
            replace(READER, name="two lengths", build=_TwoLengths),
            ("words.weight", "rest.weight"),
            r"'words' with 5 tokens, 'rest' with 4 tokens",
        ),
        (MLP, ("0.weight",), r"'0' \(Linear\), called without a token dimension"),
    ],
    ids=str,
)
def test_a_layer_that_has_no_tokens_is_refused_by_name(case: ModelCase, names: Any, told: str) -> None:
    objective = xy_objective(case.model(), case.loss, names)
    fitted, left = solved(objective, GradDot(), case.train(), case.test())
    with pytest.raises(UnsupportedModelError, match=told + r".*requires_grad_\(False\)"):
        influences_by_token(fitted, objective, left, case.train(), 6)
    with pytest.raises(UnsupportedModelError, match=told):
        token_count(objective, fitted.layout, case.train())


@pytest.mark.parametrize("method", [GradDot(), Ekfac(0.1)], ids=["GradDot", "EK-FAC"])
def test_no_training_example_has_no_column_and_as_many_tokens_as_others(method: Method) -> None:
    objective = xy_objective(READER.model(), READER.loss)
    fitted, left = solved(objective, method, READER.train(), READER.test())
    x, y = READER.train()
    found = influences_by_token(fitted, objective, fitted.factors(left), (x[:0], y[:0]), 6)
    assert found.shape == (7, 0, S)
    assert found.dtype is torch.float64
    model = DirectInfluence(READER.model(), READER.loss, 0.1).fit([(x, y)])
    assert model.influences_by_token(*READER.test(), x[:0], y[:0]).shape == (7, 0, S)
    assert model.influences_by_token(x[:0], y[:0], x, y).shape == (0, len(x), S)


def test_where_no_example_tells_the_tokens_it_is_said() -> None:
    class Picky(_Reader):
        def forward(self, tokens: Tensor) -> Tensor:
            if not tokens.any():
                raise RuntimeError("no words at all")
            return super().forward(tokens)

    case = replace(READER, name="picky", build=Picky)
    objective = xy_objective(case.model(), case.loss)
    fitted, left = solved(objective, GradDot(), case.train(), case.test())
    x, y = case.train()
    with pytest.raises(
        ValueError, match=r"x: expected at least one training example.*no words at all; leave"
    ):
        influences_by_token(fitted, objective, left, (x[:0], y[:0]), 6)


def test_what_the_method_leaves_out_need_have_no_tokens() -> None:
    model = POOLED.model()
    model.get_submodule("embedding").scale_grad_by_freq = True  # for which EK-FAC has no formula
    objective = xy_objective(model, POOLED.loss, ("embedding.weight", "words.weight"))
    fitted, left = solved(objective, Ekfac(0.1, unsupported="exclude"), POOLED.train(), POOLED.test())
    found = influences_by_token(fitted, objective, fitted.factors(left), POOLED.train(), 6)
    oracle.assert_close(found.sum(2), region.influences(fitted, left, POOLED.train(), 6), 1e-10)
    assert token_count(objective, fitted.layout, POOLED.train()) == S
