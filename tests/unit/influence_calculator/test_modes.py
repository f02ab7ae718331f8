"""What a caller's modes, and what they do to the model after its fit, change: nothing, or it is refused."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_calculator.maths.blocks import BlockMode
from influence_calculator.maths.capture import measure
from influence_calculator.maths.directional import activation_elements
from influence_calculator.maths.errors import TrainingModeError, UnsupportedModelError
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.own_modes import eagerly
from influence_calculator.torch import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    GradDotInfluence,
    InverseHarmonicMeanInfluence,
    LograInfluence,
    TrakInfluence,
)
from influence_calculator.torch.gradient_provider import TorchBatch, TorchGradientProvider
from influence_calculator.torch.operator import HessianOperator

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(20, 3, generator=GENERATOR), torch.randint(0, 3, (20,), generator=GENERATOR)
GAUSS_NEWTON = "generalized_gauss_newton"
WIDE = 100_003

MODELS: dict[str, Callable[[nn.Module], Any]] = {
    "Direct": lambda model: DirectInfluence(model, F.cross_entropy, 0.5),
    "Direct, Gauss-Newton": lambda model: DirectInfluence(
        model, F.cross_entropy, 0.5, second_order_mode=GAUSS_NEWTON
    ),
    "Cg": lambda model: CgInfluence(model, F.cross_entropy, 0.5),
    "Arnoldi": lambda model: ArnoldiInfluence(model, F.cross_entropy, 0.5, rank=4),
    "DataInf": lambda model: InverseHarmonicMeanInfluence(model, F.cross_entropy, 0.5),
    "Ekfac": lambda model: EkfacInfluence(model, hessian_regularization=0.5),
    "Trak": lambda model: TrakInfluence(model, F.cross_entropy, 0.5, rank=8),
    "Logra": lambda model: LograInfluence(model, F.cross_entropy, 0.5, rank=2),
    "GradDot": lambda model: GradDotInfluence(model, F.cross_entropy),
}


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).eval()


def answers(name: str, mode: Callable[[], AbstractContextManager[Any]]) -> list[Tensor]:
    """All that a model answers, fitted and asked in that mode of torch."""
    own = net()
    with mode():
        x, y = X.clone(), Y.clone()
        model = MODELS[name](own).fit([(x, y)])
        return [
            model.influences(x[:5], y[:5], x, y),
            model.influence_factors(x[:5], y[:5]),
            model.self_influences(x, y),
            model.influences(x[:5], y[:5], x, y, mode="perturbation"),
        ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["inference_mode", "no_grad", "autocast"],
)
def test_no_mode_of_the_caller_changes_a_number(
    name: str, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    expected, found = answers(name, torch.enable_grad), answers(name, mode)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_building_blocks_answer_in_every_mode_too(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    own = net()

    def gradients() -> Tensor:
        return TorchGradientProvider(own, F.cross_entropy, None).flat_grads(TorchBatch(X, Y))

    def products() -> Tensor:
        return HessianOperator(own, F.cross_entropy, [(X, Y)]).apply(torch.ones(1, 31))

    expected = gradients(), products()
    with mode():
        found = gradients(), products()
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_a_model_that_was_made_under_inference_mode_is_refused_with_the_cure() -> None:
    with torch.inference_mode():
        own = net()
    with pytest.raises(UnsupportedModelError, match=r"0\.weight, 0\.bias, 2\.weight: .* outside of it"):
        DirectInfluence(own, F.cross_entropy, 0.5).fit([(X, Y)])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Ekfac"])
@pytest.mark.parametrize("frozen", ["a layer", "everything"])
def test_freezing_parameters_after_the_fit_changes_nothing(name: str, frozen: str) -> None:
    own = net()
    model = MODELS[name](own).fit([(X, Y)])
    expected = [model.influences(X[:5], Y[:5], X, Y), model.influence_factors(X[:5], Y[:5])]
    (own[0] if frozen == "a layer" else own).requires_grad_(False)
    found = [model.influences(X[:5], Y[:5], X, Y), model.influence_factors(X[:5], Y[:5])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert model.n_parameters == expected[1].shape[1]
    assert model.fit([(X, Y)]).n_parameters < 31 if frozen == "a layer" else True


def test_a_fit_that_is_refused_leaves_the_parameters_of_the_one_before() -> None:
    own = net()
    model = GradDotInfluence(own, F.cross_entropy).fit([(X, Y)])
    expected = model.influence_factors(X, Y)
    own.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="at least one tracked parameter"):
        model.fit([(X, Y)])
    torch.testing.assert_close(model.influence_factors(X, Y), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_trained_on_after_its_fit_is_refused(name: str) -> None:
    own = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3)).eval()
    model = MODELS[name](own).fit([(X, Y)])
    factors = model.influence_factors(X[:5], Y[:5])
    own.train()
    for ask in (
        lambda: model.influences(X[:5], Y[:5], X, Y),
        lambda: model.influence_factors(X[:5], Y[:5]),
        lambda: model.influences_from_factors(factors, X, Y),
    ):
        with pytest.raises(TrainingModeError, match=r"dropout is on in 1.*model\.eval"):
            ask()
    own.eval()
    torch.testing.assert_close(model.influence_factors(X[:5], Y[:5]), factors)


@pytest.mark.parametrize("look", [measure, activation_elements], ids=["measure", "activation_elements"])
def test_looking_at_a_forward_pass_leaves_nothing_behind(look: Callable[..., Any]) -> None:
    """An operation that keeps its own output through a hook is a cycle that no collector sees."""
    wide = nn.Sequential(nn.Linear(2, WIDE), nn.Tanh(), nn.Linear(WIDE, 1))
    objective = xy_objective(wide, F.mse_loss)
    batch = torch.randn(2, 2), torch.randn(2, 1)
    look(objective, batch)
    before = live_activations()
    for _ in range(5):
        look(objective, batch)
    assert live_activations() == before


def live_activations() -> int:
    """Tensors of the size of the wide layer's outputs, of all that is alive in this process."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if isinstance(thing, Tensor))
    return sum(tensor.layout is torch.strided and tensor.numel() == WIDE for tensor in tensors)


class Frozen(nn.Module):
    """Attention that torch computes by its fast path for inference, below a head that is differentiated."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4).requires_grad_(False)
        self.attention = attention.requires_grad_(False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if isinstance(self.attention, nn.MultiheadAttention):
            return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))
        return self.head(self.attention(h).mean(1))


@pytest.mark.parametrize("kind", ["layer", "attention"])
def test_perturbations_go_through_attention_that_is_not_tracked(kind: str) -> None:
    torch.manual_seed(0)
    attention = (
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        if kind == "layer"
        else nn.MultiheadAttention(4, 2, batch_first=True)
    )
    own = Frozen(attention).double().eval()
    x, y = torch.randn(3, 5, 4).double(), torch.randint(0, 2, (3,))
    model = GradDotInfluence(own, F.cross_entropy).fit([(x, y)])
    fast = torch.backends.mha.get_fastpath_enabled()
    found = model.influences(x[:2], y[:2], x, y, mode="perturbation")
    assert torch.backends.mha.get_fastpath_enabled() is fast
    factors = model.influence_factors(x[:2], y[:2])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for i in range(3):
            leaf = x[i : i + 1].clone().requires_grad_()
            gradients = torch.autograd.grad(
                F.cross_entropy(own(leaf), y[i : i + 1]), list(own.head.parameters()), create_graph=True
            )
            flat = torch.cat([g.flatten() for g in gradients])
            for t in range(2):
                (expected,) = torch.autograd.grad(factors[t] @ flat, leaf, retain_graph=True)
                torch.testing.assert_close(found[t, i], expected[0], rtol=1e-9, atol=1e-12)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def test_blocks_without_the_attention_are_perturbed_too() -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(20, 2))
    x, y = torch.randn(3, 5, 4), torch.randint(0, 2, (3,))
    model = GradDotInfluence(own.eval(), F.cross_entropy, block_structure=BlockMode.LAYER_WISE).fit([(x, y)])
    by_block = model.influences_by_block(x[:2], y[:2], x, y, mode="perturbation")
    whole = model.influences(x[:2], y[:2], x, y, mode="perturbation")
    torch.testing.assert_close(sum(by_block.values()), whole, rtol=1e-4, atol=1e-6)


def test_building_blocks_refuse_a_model_that_is_trained_on() -> None:
    own = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3)).eval()
    provider = TorchGradientProvider(own, F.cross_entropy, None)
    provider.flat_grads(TorchBatch(X, Y))
    own.train()
    with pytest.raises(TrainingModeError, match=r"dropout is on in 1"):
        provider.flat_grads(TorchBatch(X, Y))


class TwoDtypes(nn.Module):
    """A frozen body in float32 below a head in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4).requires_grad_(False)
        self.head = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).double())


def test_factors_have_the_dtype_of_what_is_tracked() -> None:
    """Calculators declare it, and cast to it."""
    model = GradDotInfluence(TwoDtypes().eval(), F.cross_entropy).fit([(X, Y)])
    assert model.factor_dtype == "float64"
    assert model.influence_factors(X[:5], Y[:5]).dtype == torch.float64
    assert model.influence_factors(X[:0], Y[:0]).dtype == torch.float64
    assert model.influences(X[:5], Y[:5], X, Y).dtype == torch.float64


class Keeping(nn.Module):
    """Keeps what it computed: in attributes, old and new ones, in a buffer, a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.last: Tensor | None = None
        self.calls = 0
        self.history: list[Tensor] = []
        self.masks: dict[int, Tensor] = {}
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.tanh(self.body(x))
        self.hidden = self.state = self.last
        self.calls += 1
        self.history.append(self.last)
        self.masks[len(x)] = x > 0
        return self.head(self.norm(self.last))


KEEPING: dict[str, Callable[[nn.Module], Any]] = {
    **{name: MODELS[name] for name in ("GradDot", "Direct", "Direct, Gauss-Newton", "Trak", "Logra")},
    "Ekfac": lambda model: EkfacInfluence(model, hessian_regularization=0.5, unsupported="diagonal"),
}


@pytest.mark.parametrize("name", KEEPING)
def test_what_a_forward_pass_stores_in_its_model_is_gone_after_a_call(name: str) -> None:
    """Tensors of a traced pass can be neither pickled nor used, others hold their graph."""
    own = Keeping().eval()
    state = own.state
    model = KEEPING[name](own).fit([(X, Y)])
    expected = model.influences(X[:5], Y[:5], X, Y)
    assert own.last is None
    assert (own.calls, own.history, own.masks) == (0, [], {})
    assert not hasattr(own, "hidden")
    assert own.state is state
    copied = copy.deepcopy(pickle.loads(pickle.dumps(model)) if name == "Ekfac" else model)
    torch.testing.assert_close(copied.influences(X[:5], Y[:5], X, Y), expected)


def test_a_pass_that_fails_leaves_nothing_in_the_model_either() -> None:
    class Failing(Keeping):
        def forward(self, x: Tensor) -> Tensor:
            outputs = super().forward(x)
            if self.calls > 2:
                raise KeyError("no more")
            return outputs

    own = Failing().eval()
    with pytest.raises(KeyError, match="no more"):
        GradDotInfluence(own, F.cross_entropy).fit([(X, Y)])
    assert own.last is None
    assert not hasattr(own, "hidden")


def compiled_inside(own: nn.Module) -> nn.Module:
    own[0] = torch.compile(own[0])
    return own


def compiled_in_place(own: nn.Module) -> nn.Module:
    own.compile()
    return own


@pytest.mark.parametrize(
    "compiled", [torch.compile, compiled_in_place, compiled_inside], ids=["whole", "in_place", "inside"]
)
@pytest.mark.parametrize("name", ["GradDot", "Direct", "Ekfac"])
def test_a_compiled_model_has_the_influences_of_what_was_compiled(
    name: str, compiled: Callable[[nn.Module], nn.Module]
) -> None:
    expected, found = (
        MODELS[name](own).fit([(X, Y)]).influences(X[:5], Y[:5], X, Y) for own in (net(), compiled(net()))
    )
    torch.testing.assert_close(found, expected)


def test_the_compilers_stance_is_the_callers_again_when_all_threads_are_done() -> None:
    """Torch keeps one for all of them, so that each must not put back what another has set."""
    torch.compile(net())
    before = torch._dynamo.eval_frame._stance
    first, second = eagerly(), eagerly()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance == before
