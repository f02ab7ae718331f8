"""What is differentiated: per-example losses, batches, layouts, the map-reduce of a fit."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_calculator.maths import training_batches
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.method import add_sums
from influence_calculator.maths.objective import (
    IndexedBatch,
    Objective,
    batch_size,
    micro_batches,
    slice_batch,
    xy_objective,
)
from influence_calculator.maths.training_batches import TrainingBatches
from model_cases import CASES, MLP, ModelCase
from training_sets import TrainingSet


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_loss_is_that_of_a_batch_of_one_whatever_the_reduction(case: ModelCase) -> None:
    model = case.model()
    x, y = case.train()
    expected = torch.stack([case.loss(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]).detach()
    objective = xy_objective(model, case.loss)
    assert torch.allclose(objective.losses(objective.outputs((x, y)), (x, y)), expected, rtol=1e-12)


def test_a_mean_and_a_sum_over_the_batch_are_the_same_objective() -> None:
    model = MLP.model()
    batch = MLP.train()
    mean, total = (
        xy_objective(model, lambda out, y, r=r: F.cross_entropy(out, y, reduction=r)) for r in ("mean", "sum")
    )
    parameters = mean.parameters()
    assert torch.equal(mean.losses_at(parameters, batch), total.losses_at(parameters, batch))


def test_a_loss_with_control_flow_on_values_is_computed_one_example_at_a_time() -> None:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.max().item() > 0:
            return F.cross_entropy(outputs, y)
        return 2 * F.cross_entropy(outputs, y)

    model = MLP.model()
    x, y = MLP.train()
    objective = xy_objective(model, loss)
    expected = torch.stack([loss(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]).detach()
    assert torch.allclose(objective.losses_at(objective.parameters(), (x, y)), expected, rtol=1e-12)


def test_labels_keep_their_dimension_in_a_chunk_of_one_example() -> None:
    """Mistake 6: pyDVL squeezes labels of one dimension to none when a chunk holds one example."""
    seen: list[torch.Size] = []

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        seen.append(y.shape)
        return F.cross_entropy(outputs, y)

    x, y = MLP.train()
    objective = xy_objective(MLP.model(), loss)
    one = objective.losses_at(objective.parameters(), (x[:1], y[:1]))
    assert seen[0] == (1,)
    assert one.shape == (1,)


def test_outputs_and_batches_may_be_any_pytree() -> None:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        return OrderedDict(logits=model(batch["features"]))

    def loss(outputs: OrderedDict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs["logits"], batch["label"])

    model = MLP.model()
    x, y = MLP.train()
    names = tuple(name for name, _ in model.named_parameters())
    of_dicts = Objective(model, loss, forward, names)
    of_pairs = xy_objective(model, F.cross_entropy)
    assert torch.equal(
        of_dicts.losses_at(of_dicts.parameters(), {"features": x, "label": y}),
        of_pairs.losses_at(of_pairs.parameters(), (x, y)),
    )


def test_another_loss_leaves_the_model_and_the_parameters_as_they_are() -> None:
    objective = xy_objective(MLP.model(), F.cross_entropy)
    measured = objective.with_loss(lambda outputs, batch: outputs[:, 0].sum())
    x, y = MLP.test()
    assert measured.names == objective.names
    assert torch.equal(measured.losses_at(measured.parameters(), (x, y)), objective.outputs((x, y))[:, 0])


@pytest.mark.parametrize("layer", [nn.LSTM, nn.Linear])
def test_recurrent_layers_are_not_cudnns_which_has_no_backward_pass_in_eval_mode(
    layer: type[nn.Module],
) -> None:
    seen: list[bool] = []
    model = layer(4, 3).double().eval()
    model.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    before = torch.backends.cudnn.enabled
    xy_objective(model, F.cross_entropy).outputs(MLP.test())
    assert seen == [before and layer is nn.Linear]
    assert torch.backends.cudnn.enabled == before


def test_training_data_that_is_too_large_to_be_kept_is_joined_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short batch pays as much for its bookkeeping as a long one, at every iteration of a solver."""
    x, y = MLP.train()
    monkeypatch.setattr(training_batches, "KEPT_BYTES", 1)
    batches = TrainingBatches(xy_objective(MLP.model(), MLP.loss), TrainingSet((x, y), 2))
    assert not batches.are_kept
    ((start, (found, labels)),) = batches.batches()
    assert start == 0
    assert torch.equal(found, x)
    assert torch.equal(labels, y)


def test_a_batch_whose_entries_disagree_in_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"first dimensions \[2, 3\]"):
        batch_size((torch.zeros(3, 2), torch.zeros(2)))


def test_micro_batches_cover_all_examples_in_order_with_their_indices() -> None:
    batch = {"x": torch.arange(7), "y": torch.arange(7) * 2}
    pieces = list(micro_batches(IndexedBatch(10, batch), 3))
    assert [piece.start for piece in pieces] == [10, 13, 16]
    assert torch.equal(torch.cat([piece.batch["y"] for piece in pieces]), batch["y"])
    assert torch.equal(slice_batch(batch, 2, 4)["x"], torch.tensor([2, 3]))


def test_flat_and_blockwise_factors_convert_into_each_other() -> None:
    shapes = {"a": (2, 3), "b": (4,), "c": (1, 2)}
    layout = Layout.of(shapes, {"outer": ("a", "c"), "inner": ("b",)})
    flat = torch.arange(2 * 12.0).reshape(2, 12)
    split = layout.split(flat)
    assert layout.widths == {"outer": 8, "inner": 4}
    assert torch.equal(split["inner"], flat[:, 6:10])
    assert torch.equal(split["outer"], torch.cat([flat[:, :6], flat[:, 10:]], 1))
    assert torch.equal(layout.flatten(split), flat)


def test_sums_of_ranges_add_up_in_place() -> None:
    total = add_sums(None, {"u": {"s": torch.tensor([1.0])}})
    first = total["u"]["s"]
    assert torch.equal(add_sums(total, {"u": {"s": torch.tensor([2.0])}})["u"]["s"], torch.tensor([3.0]))
    assert total["u"]["s"] is first
