"""Gradients of one example each, against a plain autograd loop in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from influence_calculator.maths.blocks import BlockMode, block_layout
from influence_calculator.maths.capture import uncaptured_parameters
from influence_calculator.maths.gradients import collected, vmapped_gradients
from influence_calculator.maths.objective import IndexedBatch, Objective, micro_batches, xy_objective
from model_cases import CASES, MLP, SHARED, ModelCase


def _flat(objective: Objective, batch: tuple[Tensor, Tensor], blocks: BlockMode = BlockMode.FULL) -> Tensor:
    layout = block_layout(objective, blocks)
    return layout.flatten(collected(objective, batch, layout))


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_each_gradient_is_that_of_a_batch_of_one(case: ModelCase) -> None:
    x, y = case.train()
    model = case.model()
    expected = oracle.example_gradients(model, case.loss, x, y)
    oracle.assert_close(_flat(xy_objective(model, case.loss), (x, y)), expected, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_vmap_alone_gives_the_same_gradients_as_hooks(case: ModelCase) -> None:
    objective = xy_objective(case.model(), case.loss)
    batch = case.train()
    parts = dict(vmapped_gradients(objective, batch, objective.names))
    oracle.assert_close(
        torch.cat([parts[name] for name in objective.names], 1), _flat(objective, batch), 1e-12
    )


@pytest.mark.parametrize("size", [1, 4, 23])
def test_the_size_of_a_batch_does_not_matter(size: int) -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    whole = MLP.train()
    pieces = [_flat(objective, piece.batch) for piece in micro_batches(IndexedBatch(0, whole), size)]
    oracle.assert_close(torch.cat(pieces), _flat(objective, whole), 1e-12)


@pytest.mark.parametrize("blocks", list(BlockMode))
def test_every_block_structure_flattens_to_the_same_order(blocks: BlockMode) -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    assert torch.equal(_flat(objective, MLP.test(), blocks), _flat(objective, MLP.test()))


class _Transformer(nn.Module):
    """Token ids, layer norms, attention whose output projection is never called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


def test_integer_inputs_and_layers_that_hooks_cannot_capture_are_exact_too() -> None:
    torch.manual_seed(0)
    model = _Transformer().double().eval()
    x, y = torch.randint(0, 11, (5, 4)), torch.randint(0, 3, (5,))
    gradients = _flat(xy_objective(model, F.cross_entropy), (x, y))
    oracle.assert_close(gradients, oracle.example_gradients(model, F.cross_entropy, x, y), 1e-12)


def test_a_tied_parameter_has_one_gradient_under_its_first_name() -> None:
    objective = xy_objective(SHARED.model(), SHARED.loss)
    assert objective.names == ("first.weight", "first.bias", "second.bias", "head.weight", "head.bias")
    assert uncaptured_parameters(objective) == ("first.weight", "first.bias", "second.bias")


def test_a_loss_with_control_flow_on_values_falls_back_to_one_example_at_a_time() -> None:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) * (1.0 if outputs.max().item() > 0 else 2.0)

    model = MLP.model()
    objective = xy_objective(model, loss)
    x, y = MLP.train()
    expected = oracle.example_gradients(model, loss, x, y)
    parts = dict(vmapped_gradients(objective, (x, y), objective.names))
    oracle.assert_close(torch.cat([parts[name] for name in objective.names], 1), expected, 1e-12)
    oracle.assert_close(_flat(objective, (x, y)), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_weights_are_kept_as_float32(dtype: torch.dtype) -> None:
    model = MLP.model(dtype)
    x, y = MLP.train()
    gradients = _flat(xy_objective(model, F.cross_entropy), (x.to(dtype), y))
    assert gradients.dtype is torch.float32
    expected = oracle.example_gradients(model, F.cross_entropy, x.to(dtype), y)
    oracle.assert_close(gradients, expected, 20 * torch.finfo(dtype).eps)


def test_differentiating_changes_neither_parameters_nor_their_grad() -> None:
    model = MLP.model()
    before = copy.deepcopy(model.state_dict())
    _flat(xy_objective(model, MLP.loss), MLP.train())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_gradients_of_other_blocks_are_not_formed() -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    layout = block_layout(objective, BlockMode.LAYER_WISE).only("2")
    alone = collected(objective, MLP.train(), layout)
    whole = collected(objective, MLP.train(), block_layout(objective, BlockMode.LAYER_WISE))
    assert set(alone) == {"2"}
    assert torch.equal(alone["2"], whole["2"])
