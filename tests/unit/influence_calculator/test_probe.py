"""A few examples show whether hooks and batches can be trusted with a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import oracle
from influence_calculator import (
    Checkpoint,
    DirectInfluence,
    EkfacInfluence,
    GradDotInfluence,
    SecondOrderMode,
    TracInInfluence,
)
from influence_calculator.maths.capture import captured_gradients, captured_layers
from influence_calculator.maths.errors import (
    CalculatorError,
    CaptureMismatchError,
    TrainingModeError,
    UnsupportedModelError,
)
from influence_calculator.maths.objective import Objective, Seen, xy_objective
from influence_calculator.maths.probe import probe
from model_cases import CASES, ModelCase


def _objective(model: nn.Module) -> Objective:
    return xy_objective(model.double(), F.cross_entropy)


def _batch(*features: int, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, *features, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_models_whose_gradients_agree_pass(case: ModelCase, dtype: torch.dtype) -> None:
    x, y = case.train()
    targets = y.to(dtype) if y.is_floating_point() else y
    probe(xy_objective(case.model(dtype), case.loss), (x.to(dtype), targets))


class Attention(nn.Module):
    """`out_proj` is used as a function inside `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


def test_attention_is_differentiated_right_although_its_projection_is_never_called() -> None:
    """Mistake 11: a hook on `out_proj` would see nothing and answer 0."""
    objective = _objective(Attention().eval())
    probe(objective, _batch(5, 4))
    assert not any("out_proj" in name for name, _ in captured_gradients(objective, _batch(5, 4)))


def test_a_transformer_layer_passes() -> None:
    """Its fast path, which calls no module, is not taken while layers are recorded."""
    model = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(20, 3)
    ).eval()
    probe(_objective(model), _batch(5, 4))


class Functional(nn.Module):
    """A layer's weight, used once by calling the layer and once as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.layer(x).tanh(), self.layer.weight))


class NeverCalled(nn.Module):
    """A layer that exists for its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.layer.weight, self.layer.bias).tanh())


class Mixing(nn.Module):
    """Examples see the mean of their batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - 0.5 * x.mean(0))


class TimeFirst(nn.Module):
    """Tokens before examples inside; as many tokens as examples are probed, so that shapes cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.transpose(0, 1)).tanh().transpose(0, 1).mean(1))


class SharedInput(nn.Module):
    """A layer called on what all examples share, as positions are, and another on each example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("places", torch.arange(8.0).view(1, 2, 4) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.unsqueeze(1) * self.layer(self.places).tanh()).sum(1))


class Routed(nn.Module):
    """Experts that see some tokens each, whichever example they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = tokens[:, 0].sign().long() + 1
        found = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            own = (chosen == i).nonzero()[:, 0]
            if len(own):
                found = found.index_put((own,), expert(tokens[own]))
        return self.head(found.view_as(x).mean(1))


class Checkpointed(nn.Module):
    """Computes a layer again in the backward pass, when the hooks are gone."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda h: self.second(h).tanh(), self.first(x), use_reentrant=self.reentrant)
        return self.head(hidden)


BY_HAND = {
    "checkpointed": (
        Checkpointed,
        (4,),
        tuple(f"{layer}.{key}" for layer in ("first", "second") for key in ("weight", "bias")),
    ),
    "functional": (Functional, (4,), ("layer.weight", "layer.bias")),
    "never called": (NeverCalled, (4,), ("layer.weight", "layer.bias")),
    "time first": (TimeFirst, (4, 4), ("layer.weight", "layer.bias")),
    "shared input": (SharedInput, (4,), ("layer.weight", "layer.bias")),
    "routed": (Routed, (5, 4), tuple(f"experts.{i}.{key}" for i in (0, 2) for key in ("weight", "bias"))),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_layers_that_hooks_do_not_see_rightly_are_differentiated_as_other_modules_are(name: str) -> None:
    build, features, parameters = BY_HAND[name]
    x, y = _batch(*features, count=9)
    model = build().double()
    assert probe(_objective(model), (x, y)).by_hand == parameters
    gradients = oracle.example_gradients(model, F.cross_entropy, x, y)
    for influence in (GradDotInfluence(model, F.cross_entropy), _direct(model)):
        influence.fit([(x[:4], y[:4]), (x[4:], y[4:])])
        expected = gradients @ gradients.T
        if isinstance(influence, DirectInfluence):
            fisher = oracle.empirical_fisher(model, F.cross_entropy, x, y)
            expected = oracle.influences(fisher, 0.1, gradients, gradients)
        oracle.assert_close(influence.influences(x, y), expected, 1e-9)
        oracle.assert_close(influence.self_influences(x, y), expected.diagonal(), 1e-9)


def _direct(model: nn.Module) -> DirectInfluence:
    return DirectInfluence(model, F.cross_entropy, 0.1, second_order_mode=SecondOrderMode.EMPIRICAL_FISHER)


@pytest.mark.parametrize("name", BY_HAND)
def test_for_ekfac_they_are_layers_that_it_cannot_treat(name: str) -> None:
    build, features, parameters = BY_HAND[name]
    x, y = _batch(*features, count=9)
    with pytest.raises(UnsupportedModelError, match=re.escape(f"{parameters[0]} (Linear, used by hand too)")):
        EkfacInfluence(build().double(), True, 0.1).fit([(x, y)])
    for unsupported in ("diagonal", "exclude"):
        influence = EkfacInfluence(build().double(), True, 0.1, unsupported=unsupported).fit([(x, y)])
        slots = {slot.name for slot in influence.layout.slots}
        assert slots >= set(parameters) if unsupported == "diagonal" else not slots & set(parameters)


def test_a_layer_that_later_examples_reach_for_the_first_time_is_refused_by_name() -> None:
    """All tokens of the first ones go to one expert, so that nothing is out of the ordinary."""
    x, y = _batch(5, 4, count=9)
    x[:4, :, 0] = x[:4, :, 0].abs()
    x[4:, :, 0] = -x[4:, :, 0].abs()
    influence = GradDotInfluence(Routed().double(), F.cross_entropy).fit([(x, y)])
    influence.influence_factors(x[:4], y[:4])
    with pytest.raises(
        UnsupportedModelError, match=r"layer 'experts\.0': none of the first training examples"
    ):
        influence.influence_factors(x[4:], y[4:])


class TwoHeads(nn.Module):
    """Answers with another head too, token by token if there are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.other = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.layer(x).tanh()
        return self.head(hidden).reshape(len(x), -1, 3).mean(1), self.other(hidden)


def first_loss(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    """Of the first head alone."""
    return F.cross_entropy(outputs[0], y)


@pytest.mark.parametrize("features", [(4,), (5, 4)])
def test_a_head_that_the_loss_leaves_out_contributes_nothing(features: tuple[int, ...]) -> None:
    x, y = _batch(*features)
    model = TwoHeads().double()
    objective = probe(xy_objective(model, first_loss), (x, y))
    assert objective.seen == Seen()
    alone = TwoHeads().double()
    alone.load_state_dict(model.state_dict())
    alone.other.requires_grad_(False)
    for build in (
        lambda net: GradDotInfluence(net, first_loss),
        lambda net: EkfacInfluence(net, True, 0.1, loss=first_loss, expectation="exact"),
    ):
        whole, part = (build(net).fit([(x[:4], y[:4]), (x[4:], y[4:])]) for net in (model, alone))
        oracle.assert_close(whole.influences(x, y), part.influences(x, y), 1e-9)
        if len(features) == 2:
            found = whole.influences_by_token(x[:2], y[:2], x, y)
            oracle.assert_close(found.sum(2), whole.influences(x[:2], y[:2], x, y), 1e-9)


def test_a_loss_of_a_head_that_the_training_loss_leaves_out_is_taken() -> None:
    """As a job's measurement may be."""
    x, y = _batch(4)
    objective = probe(xy_objective(TwoHeads().double(), first_loss), (x, y))
    measured = objective.with_loss(lambda outputs, batch: outputs[1].square().sum())
    assert len(list(captured_layers(measured, (x, y)))) == 3


def test_what_any_checkpoint_does_otherwise_is_by_hand_in_all() -> None:
    """Routes depend on the weights: in the model itself every token goes to one expert."""
    x, y = _batch(5, 4, count=9)
    x[..., 0] = x[..., 0].abs()
    model = Signed().double()
    turned = {**model.state_dict(), "sign": torch.tensor(-1.0, dtype=torch.float64)}
    x[:, 0, 1] = 3 * x[:, 0, 1].sign()
    influence = TracInInfluence(model, F.cross_entropy, [Checkpoint(turned), Checkpoint(model.state_dict())])
    influence.fit([(x, y)])
    assert "experts.0.weight" in influence.objective.by_hand
    expected = torch.zeros(9, 9, dtype=torch.float64)
    for state in influence.checkpoints.models:
        rows = oracle.example_gradients(state, F.cross_entropy, x, y)
        expected += rows @ rows.T
    oracle.assert_close(influence.influences(x, y), expected, 1e-9)


class Signed(Routed):
    """Routes by one feature or another, as a buffer says."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sign", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        routed = x[..., :1] if self.sign > 0 else x[..., 1:2]
        return super().forward(torch.cat([routed, x[..., 1:]], dim=2))


def test_what_the_loss_does_not_depend_on_is_no_call() -> None:
    """As adapters take the norm of a product with the identity, and detach it."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            norm = self.layer(torch.eye(4, dtype=x.dtype)).norm().detach()
            return self.head(self.layer(x) / norm)

    x, y = _batch(4, count=7)
    objective = probe(_objective(Normed()), (x, y))
    assert objective.by_hand == ()
    (layer, _) = captured_layers(objective, (x, y))
    torch.testing.assert_close(layer.activations, x.unsqueeze(1))


def test_examples_that_influence_each_other_are_refused_by_name() -> None:
    with pytest.raises(CaptureMismatchError, match=r"^layer\.weight, layer\.bias: .*Usual causes"):
        probe(_objective(Mixing()), _batch(4))


def decayed(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy with a penalty on the parameters that it finds in the model."""
    return lambda f, y: F.cross_entropy(f, y) + 0.5 * sum(p.square().sum() for p in model.parameters())


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _gradients(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Of one example after the other, by the parameters that the loss reads: the oracle's are of a copy."""
    losses = (loss(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x)))
    rows = [torch.autograd.grad(own, list(model.parameters())) for own in losses]
    return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in rows])


def test_a_loss_that_reads_the_models_parameters_is_differentiated_by_them() -> None:
    model, (x, y) = _net(), _batch(4)
    loss = decayed(model)
    g = _gradients(model, loss, x, y)
    torch.testing.assert_close(GradDotInfluence(model, loss).fit([(x, y)]).influences(x, y), g @ g.T)
    found = DirectInfluence(model, loss, 0.5).fit([(x, y)]).influences(x, y)
    hessian = oracle.hessian(model, F.cross_entropy, x, y) + torch.eye(g.shape[1])
    torch.testing.assert_close(found, oracle.influences(hessian, 0.5, g, g))


def test_methods_that_know_layers_alone_refuse_such_a_loss() -> None:
    model, (x, y) = _net(), _batch(4)
    with pytest.raises(UnsupportedModelError, match=r"0\.weight \(Linear, used by hand too\)"):
        EkfacInfluence(model, loss=decayed(model)).fit([(x, y)])
    states = [Checkpoint(model.state_dict())]
    with pytest.raises(
        UnsupportedModelError,
        match=r"checkpoints\[0\].*0\.weight, 0\.bias, 2\.weight: .* reads the model's own",
    ):
        TracInInfluence(model, decayed(model), states).fit([(x, y)])


class InAList(nn.Module):
    """Multiplies by a weight that a list refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.references = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.layer(x)), self.references[0])))


class InAFunction(nn.Module):
    """Its decoder is a function that holds the weight of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(3, 4))
        self.layer = nn.Linear(4, 3, bias=False)
        self.layer.weight = weight
        self.decoder = lambda h: h @ weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.layer(x))


def _of_held_parameters(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    held = list(model.parameters())
    return lambda f, y: F.cross_entropy(f, y) + 0.5 * sum(p.square().sum() for p in held)


@pytest.mark.parametrize("kind", ["list", "function", "loss"])
@pytest.mark.parametrize("method", ["GradDot", "Ekfac"])
def test_parameters_that_something_else_refers_to_are_refused_by_name(kind: str, method: str) -> None:
    """No other values can take their place there, so that a part of the gradient would be missing."""
    model = {"list": InAList, "function": InAFunction, "loss": _net}[kind]().double()
    loss = _of_held_parameters(model) if kind == "loss" else F.cross_entropy
    own = GradDotInfluence(model, loss) if method == "GradDot" else EkfacInfluence(model, loss=loss)
    with pytest.raises(
        CaptureMismatchError, match=r"^(layer|0)\.weight.*used otherwise.*self\.layer\.weight"
    ):
        own.fit([_batch(4)])


def test_a_loss_may_read_what_the_forward_pass_stored() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.layer(x))
            self.penalty = h.square().mean()
            return self.head(self.norm(h))

    model, (x, y) = Penalised().double(), _batch(4)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y) + model.penalty

    g = _gradients(model, loss, x, y)
    del model.penalty
    torch.testing.assert_close(GradDotInfluence(model, loss).fit([(x, y)]).influences(x, y), g @ g.T)
    assert not hasattr(model, "penalty")


class Complex(nn.Module):
    """Multiplies by complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs()


REFUSED = {
    "scripted": (lambda: torch.jit.script(nn.Linear(4, 3)), "model: expected modules of Python.*jit.script"),
    "scripted inside": (
        lambda: nn.Sequential(nn.Linear(4, 3), torch.jit.script(nn.Tanh())),
        "1: expected modules of Python",
    ),
    "complex": (Complex, "weight: expected real parameters.*view_as_real"),
    "reentrant": (lambda: Checkpointed(True), "activation checkpointing.*gradient_checkpointing_disable"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)),
        r"^0\.weight, 0\.bias: .*lazy modules.*call the model once on an example first",
    ),
    "dataclass": (
        lambda: Wrapping(Outputs),
        "^forward: expected outputs that are tensors.*got Outputs; return such.*register the class",
    ),
    "namespace": (lambda: Wrapping(lambda f: SimpleNamespace(logits=f)), "got SimpleNamespace; return such"),
    "detached": (lambda: nn.Sequential(nn.Linear(4, 3), Detached()), "loss: expected one that depends on"),
}


class Detached(nn.Module):
    """Takes what came before as numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@dataclass
class Outputs:
    """What torch's pytrees do not know."""

    logits: Tensor


class Wrapping(nn.Module):
    """Answers with something made of its logits."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_cannot_be_differentiated_is_refused_with_the_cure(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        probe(_objective(build()), _batch(4))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("one_shot", [True, False])
def test_a_loader_of_short_batches_hides_no_mismatch(size: int, one_shot: bool) -> None:
    """Short batches are joined later; one of one example alone would be compared with itself."""
    x, y = _batch(4)
    batches = list(zip(x.split(size), y.split(size), strict=True))
    model = GradDotInfluence(Mixing().double(), F.cross_entropy)
    with pytest.raises(CaptureMismatchError, match=r"layer\.weight, layer\.bias"):
        model.fit(iter(batches) if one_shot else batches)


TRAINING = {
    "dropout": nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5)), nn.Linear(4, 3)),
    "batch norm": nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4)), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_mode_is_refused_naming_the_module_and_the_cure(name: str) -> None:
    model = TRAINING[name].train()
    with pytest.raises(TrainingModeError, match=r"1\.0.*model\.eval\(\)"):
        probe(_objective(model), _batch(4))
    probe(_objective(model.eval()), _batch(4))


def test_dropout_inside_attention_is_refused() -> None:
    model = Attention()
    model.attention.dropout = 0.1
    with pytest.raises(TrainingModeError, match="attention"):
        probe(_objective(model.train()), _batch(5, 4))


def test_batch_statistics_without_running_ones_are_refused_in_evaluation_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
    with pytest.raises(TrainingModeError, match=r"1: .*track_running_stats"):
        probe(_objective(model.eval()), _batch(4))


class RandomOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5)


def test_outputs_that_differ_from_pass_to_pass_are_refused() -> None:
    torch.manual_seed(0)  # two passes may drop the same outputs by chance
    with pytest.raises(TrainingModeError, match="two passes of the same examples"):
        probe(_objective(RandomOutputs().eval()), _batch(4))


def test_an_example_that_is_not_finite_is_no_mismatch() -> None:
    """What becomes of it is said where its index is known: in the fit, and in its row."""
    x, y = _batch(4)
    x[0] = torch.nan
    probe(_objective(nn.Linear(4, 3)), (x, y))


def test_a_model_without_tracked_parameters_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="requires_grad_"):
        probe(_objective(nn.Linear(4, 3).requires_grad_(False)), _batch(4))


SPARSE: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(12, 3)),
    "EmbeddingBag": lambda: nn.Sequential(nn.EmbeddingBag(5, 3, mode="sum", sparse=True), nn.Linear(3, 3)),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_gradients_are_refused_naming_the_module_and_the_cure(kind: str) -> None:
    """Autograd's own error, of a sparse tensor that cannot be viewed, names neither."""
    ids, y = torch.arange(24).view(6, 4) % 5, torch.arange(6) % 3
    model = SPARSE[kind]()
    with pytest.raises(UnsupportedModelError, match=rf"^0 \({kind}\): .*got sparse=True; .*sparse=False"):
        probe(_objective(model), (ids, y))
    model[0].sparse = False
    probe(_objective(model), (ids, y))


def test_a_frozen_embedding_may_be_sparse() -> None:
    ids, y = torch.arange(24).view(6, 4) % 5, torch.arange(6) % 3
    model = SPARSE["Embedding"]()
    model[0].requires_grad_(False)
    probe(_objective(model), (ids, y))


def test_a_probe_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    hooks, generator = dict(model[0].weight._backward_hooks), torch.get_rng_state()
    probe(_objective(model), _batch(4))
    assert torch.equal(torch.get_rng_state(), generator)
    assert dict(model[0].weight._backward_hooks) == hooks
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_refusals_are_value_errors() -> None:
    assert issubclass(CalculatorError, ValueError)


class Counting(nn.Module):
    """Counts its calls, in training or not, as some routers of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
        return self.linear(x)


def test_a_model_that_counts_is_refused_only_where_torch_does_not_differentiate_it() -> None:
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    model = Counting()
    found, expected = (
        GradDotInfluence(m, F.mse_loss).fit([(x, y)]).influences(x, y) for m in (model, model.linear)
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(UnsupportedModelError, match=r"in place .* buffers \['calls'\].*if self\.training"):
        DirectInfluence(model, F.mse_loss, regularization=0.1).fit([(x, y)])
