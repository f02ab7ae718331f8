"""Models of Hugging Face: dicts in, objects out, masks, tied weights, adapters; against the oracles."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import dense_ekfac
import language_models as lm
import oracle
from influence_calculator import (
    DirectInfluence,
    GradDotInfluence,
    NestedTorchCatAggregator,
    SequentialInfluenceCalculator,
)
from influence_calculator.maths import region
from influence_calculator.maths.capture import supported_layers
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.ekfac_passes import uncaptured_blocks
from influence_calculator.maths.errors import UnsupportedModelError
from influence_calculator.maths.grad_dot import GradDot
from influence_calculator.maths.layers import supported_embeddings
from influence_calculator.maths.method import FitState, Method, fit
from influence_calculator.maths.objective import Objective
from influence_calculator.maths.probe import probe
from references import REGULARIZATIONS
from training_sets import TrainingSet

N, T = 11, 3


@dataclass(frozen=True)
class Family:
    """A model, its data, its loss as a user writes it and as a function of the logits."""

    build: Callable[[], nn.Module]
    data: Callable[[int, int], dict[str, Tensor]]
    loss: Callable[[Any, Any], Tensor]
    loss_of_logits: Callable[[Tensor, Tensor], Tensor]

    def objective(self) -> Objective:
        model = self.build()
        names = tuple(name for name, p in model.named_parameters() if p.requires_grad)
        return Objective(model, self.loss, lm.forward, names)


FAMILIES = {
    "bert": Family(lm.bert, lm.sentences, lm.classification_loss, F.cross_entropy),
    "lora": Family(lm.bert_with_adapters, lm.sentences, lm.classification_loss, F.cross_entropy),
    "gpt2": Family(lm.gpt2, lm.texts, lm.language_loss, lm.next_token_loss),
    "gpt2, untied": Family(lambda: lm.gpt2(tied=False), lm.texts, lm.language_loss, lm.next_token_loss),
}
LEFT_TO_A_DIAGONAL = {"gpt2": ["model.transformer.wte.weight"]}
"""Of parameters that are no norm's."""
NORM = re.compile(r"\.(LayerNorm|ln_\w)\.")
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)


@cache
def _gradients(name: str, count: int, seed: int) -> Tensor:
    family = FAMILIES[name]
    return oracle.example_gradients(
        lm.Packed(family.build()), family.loss_of_logits, *lm.packed(family.data(count, seed))
    )


@cache
def _gauss_newton(name: str) -> Tensor:
    family = FAMILIES[name]
    data = lm.packed(family.data(N, 1))
    return oracle.generalized_gauss_newton(lm.Packed(family.build()), family.loss_of_logits, *data)


def _influences(name: str, method: Method, state: FitState) -> Tensor:
    family = FAMILIES[name]
    objective = family.objective()
    fitted = method.fitted(objective, state, TrainingSet(family.data(N, 1), 4))
    solved = fitted.solve(fitted.gradients(objective, family.data(T, 2)))
    return region.influences(fitted, solved.left, family.data(N, 1), 4)


def _fit(name: str, method: Method) -> FitState:
    family = FAMILIES[name]
    return fit(method, family.objective(), TrainingSet(family.data(N, 1), 4))


@EVERY_FAMILY
def test_they_pass_the_probe_that_every_fit_begins_with(name: str) -> None:
    probe(FAMILIES[name].objective(), FAMILIES[name].data(N, 1))


OTHER_FAMILIES = {
    "dora": (Family(lm.bert_with_normed_adapters, lm.sentences, lm.classification_loss, F.cross_entropy), ""),
    "deberta": (Family(lm.deberta, lm.sentences, lm.classification_loss, F.cross_entropy), "pos_key_proj"),
    "xlnet": (Family(lm.xlnet, lm.sentences, lm.classification_loss, F.cross_entropy), "ff.layer_1"),
    "mamba": (Family(lm.mamba, lm.texts, lm.language_loss, lm.next_token_loss), "dt_proj"),
}
"""With a layer that they use by hand, or call on other things than sentences."""


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_families_that_do_more_than_call_their_layers_have_autograds_gradients(name: str) -> None:
    family, by_hand = OTHER_FAMILIES[name]
    data = family.data(N, 1)
    objective = probe(family.objective(), data)
    assert any(by_hand in parameter for parameter in objective.by_hand) == bool(by_hand)
    fitted = GradDot().fitted(objective, {}, None)
    found = fitted.layout.flatten(fitted.gradients(objective, data))
    expected = oracle.example_gradients(lm.Packed(family.build()), family.loss_of_logits, *lm.packed(data))
    oracle.assert_close(found, expected, 1e-9)
    if by_hand:
        with pytest.raises(UnsupportedModelError, match=rf"{by_hand}\.\w+ \(.*, used by hand too\)"):
            Ekfac().layout(objective)


def test_what_a_tokenizer_returns_is_refused_with_the_cure() -> None:
    """No tree of tensors for torch: it is a `UserDict`."""
    batch = lm.sentences(4, 1)
    labels = batch.pop("labels")
    model = GradDotInfluence(_Wrapped(lm.bert()), F.cross_entropy)
    with pytest.raises(ValueError, match=r"got BatchEncoding; give dict\(...\) of it"):
        model.fit([(transformers.BatchEncoding(batch), labels)])
    with pytest.raises(ValueError, match=r"\['mask'\]: expected tensors .* got NoneType; leave it out"):
        model.fit([({**batch, "mask": None}, labels)])
    with pytest.raises(ValueError, match=r"got NoneType; leave it out"):
        model.fit([(batch, None)])
    with pytest.raises(ValueError, match=r"got NoneType; leave it out"):
        model.fit([(batch, labels)]).influence_factors(batch, None)


def test_a_loss_that_the_model_has_averaged_is_refused() -> None:
    """`model(**batch).loss` is one number for all examples."""
    model = lm.gpt2()
    names = tuple(name for name, _ in model.named_parameters())
    own = Objective(model, lambda outputs, _: outputs.loss, lambda model, batch: model(**batch), names)
    with pytest.raises(UnsupportedModelError, match=r"4 examples, got a tensor of shape \[\].*no labels"):
        probe(own, lm.texts(N, 1))


class _Wrapped(nn.Module):
    """A model of Hugging Face for calculators that call `model(x)`: x is a dict."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.net(**x).logits
        return logits


def test_the_librarys_models_take_dicts_for_x() -> None:
    def pairs(count: int, seed: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        batch = lm.sentences(count, seed)
        labels = batch.pop("labels")
        places = [slice(0, 4), slice(4, count)]
        return [({key: value[place] for key, value in batch.items()}, labels[place]) for place in places]

    model = DirectInfluence(
        _Wrapped(lm.bert_with_adapters()),
        F.cross_entropy,
        regularization=0.1,
        second_order_mode=SecondOrderMode.GENERALIZED_GAUSS_NEWTON,
    ).fit(pairs(N, 1))
    calculator = SequentialInfluenceCalculator(model)
    found = calculator.influences(pairs(6, 2), pairs(N, 1)).compute(NestedTorchCatAggregator())
    expected = oracle.influences(
        _gauss_newton("lora"), 0.1, _gradients("lora", 6, 2), _gradients("lora", N, 1)
    )
    oracle.assert_close(found, expected, oracle.bound(_gauss_newton("lora"), 0.1))


@EVERY_FAMILY
@pytest.mark.parametrize("method", [Direct, Cg])
def test_influences_are_those_of_the_gauss_newton_matrix(name: str, method: Any) -> None:
    mode = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
    options = {"rtol": 1e-10} if method is Cg else {}
    state = _fit(name, method(REGULARIZATIONS[0], second_order=mode, **options))
    for λ in REGULARIZATIONS:
        found = _influences(name, method(λ, second_order=mode, **options), state)
        expected = oracle.influences(_gauss_newton(name), λ, _gradients(name, T, 2), _gradients(name, N, 1))
        oracle.assert_close(found, expected, oracle.bound(_gauss_newton(name), λ))


def _bases(objective: Objective, state: FitState) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> Q_A, Q_G; the inputs of an embedding are not turned."""
    units = state["covariance"]
    bases = {
        layer.name: (units[layer.name]["input_vectors"], units[layer.name]["output_vectors"])
        for layer in supported_layers(objective)
    }
    for embedding in supported_embeddings(objective):
        identity = torch.eye(embedding.rows, dtype=torch.float64)
        bases[embedding.name] = identity, units[embedding.name]["output_vectors"]
    return bases


@cache
def _curvature(name: str) -> tuple[Tensor, Tensor]:
    """By the definition, and of the rest the diagonal; and the columns of the rest."""
    family = FAMILIES[name]
    objective, packed = family.objective(), lm.Packed(family.build())
    layers = {}
    for layer, (Q_A, Q_G) in _bases(objective, _ekfac_state(name, "diagonal")).items():
        data = lm.packed(family.data(N, 1))
        inside = f"model.{layer}"
        dense = dense_ekfac.dense_layer(packed, inside, *data, dense_ekfac.exact(family.loss_of_logits))
        layers[inside, 0] = (dense, Q_A, Q_G, dense.eigenvalues(Q_A, Q_G))
    curvature = dense_ekfac.curvature(packed, layers)
    rest = tuple(f"model.{key}" for own in uncaptured_blocks(objective).values() for key in own)
    assert [key for key in rest if not NORM.search(key)] == LEFT_TO_A_DIAGONAL.get(name, [])
    places = oracle.columns_of(packed, rest) if rest else torch.empty(0, dtype=torch.int64)
    curvature[places, places] = _gauss_newton(name).diagonal()[places]
    return curvature, places


@cache
def _ekfac_state(name: str, unsupported: str) -> FitState:
    return _fit(name, Ekfac(expectation="exact", unsupported=unsupported))


def _compare_with_the_definition(name: str, unsupported: str, test: Tensor) -> None:
    for λ in REGULARIZATIONS:
        method = Ekfac(regularization=λ, expectation="exact", unsupported=unsupported)
        found = _influences(name, method, _ekfac_state(name, unsupported))
        expected = oracle.influences(_curvature(name)[0], λ, test, _gradients(name, N, 1))
        oracle.assert_close(found, expected, 1e-6)


@EVERY_FAMILY
def test_ekfac_is_its_definition_with_a_diagonal_for_the_rest(name: str) -> None:
    """Of the adapters nothing is left to a diagonal; of GPT-2 the head is, if it is the embedding too."""
    _compare_with_the_definition(name, "diagonal", _gradients(name, T, 2))


def test_a_tied_head_that_is_left_out_has_no_part_in_the_influences() -> None:
    test = _gradients("gpt2", T, 2).clone()
    test[:, _curvature("gpt2")[1]] = 0
    _compare_with_the_definition("gpt2", "exclude", test)


def test_adapters_are_treated_alone() -> None:
    """Nothing is refused: what is frozen needs no formula."""
    layout = Ekfac().layout(FAMILIES["lora"].objective())
    assert [block.rpartition("attention.self.")[2] for block in layout.blocks] == [
        "query.lora_A.default",
        "query.lora_B.default",
        "value.lora_A.default",
        "value.lora_B.default",
    ]


def test_the_linear_layers_of_gpt2_have_kronecker_products() -> None:
    """`Conv1D`, whose weight is transposed: nothing of them is left to a diagonal."""
    objective = FAMILIES["gpt2"].objective()
    inside = [name for name in objective.names if ".attn.c_" in name or ".mlp.c_" in name]
    captured = [name for layer in supported_layers(objective) for name in layer.parameters]
    assert captured == inside
    assert len(inside) == 8


def test_a_tied_head_is_refused_naming_the_embedding() -> None:
    with pytest.raises(UnsupportedModelError, match=r"wte\.weight \(Embedding, shared with 'lm_head'\)"):
        Ekfac().layout(FAMILIES["gpt2"].objective())
