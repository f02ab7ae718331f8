"""Whether gradients of this model may be taken batched and by hooks: a few examples are tried first.

Hooks miss in silence what does not pass through a module's call: `nn.MultiheadAttention` never calls
its `out_proj`, weights are used as functions or shared, batch statistics mix examples, dropout
answers differently each time. So every fit begins with this probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError

from influence_calculator.maths.by_hand import in_all_states, seen_at_work
from influence_calculator.maths.errors import CaptureMismatchError, TrainingModeError, UnsupportedModelError
from influence_calculator.maths.objective import Batch, Objective, batch_size, slice_batch
from influence_calculator.maths.one_by_one import (
    PROBED,
    Sketched,
    gradients_one_by_one,
    mismatched,
    tolerance,
    tracked_alone,
    used_otherwise,
)
from influence_calculator.maths.shapes import ModelShapes


def probe_footprint(shapes: ModelShapes) -> int:
    """Bytes above the model that `probe` takes: the gradients of one example alone, or one parameter's of all
    that are tried.
    """
    largest = max(map(math.prod, shapes.parameters.values()), default=0)
    gradients = max(shapes.width, PROBED * largest)
    return shapes.itemsize * gradients + PROBED * shapes.activation_bytes


def probe(objective: Objective, batch: Batch) -> Objective:
    """Refuses a model whose batched per-sample gradients differ from those of batches of one; its checkpoints
    likewise, which are copies of it as it was when they were loaded.

    Returns:
        the objective as it is at work (`by_hand`), which is what was tried.

    Raises:
        TrainingModeError: dropout or batch statistics are on, or two forwards of the same examples disagree.
        CaptureMismatchError: gradients differ; names the parameters and the usual cause.
        UnsupportedModelError: no parameter is tracked, a tensor of the model has no numbers yet, a module has
            sparse gradients, or outputs are no entries of examples.
    """
    _refuse_lazy(objective.model)
    refuse_meta(objective.model)
    _refuse_what_is_not_differentiated(objective)
    if not objective.names:
        raise UnsupportedModelError(
            "model: expected at least one tracked parameter, got none; unfreeze parameters "
            "(requires_grad_(True)) or widen the selection"
        )
    refuse_training_mode(objective.model)
    _refuse_sparse_gradients(objective)
    few = slice_batch(batch, 0, min(PROBED, batch_size(batch)))
    _refuse_random_outputs(objective, few)
    with _checkpointing_named():
        expected = gradients_one_by_one(objective, few)
        seen = seen_at_work(objective, few, expected)
        _refuse_other_gradients(seen, few, expected)
    others = []
    for i, model in enumerate(objective.checkpoints.models if objective.checkpoints else ()):
        try:
            _refuse_loss_of_the_model(objective, model, few)
            others.append(probe(objective.in_state_of(model), few))
        except ValueError as error:
            raise type(error)(f"checkpoints[{i}], a copy of the model as it was then: {error}") from error
    return in_all_states(seen, others)


def _refuse_loss_of_the_model(objective: Objective, state: nn.Module, few: Batch) -> None:
    """A copy of the model has parameters of its own, which a loss that reads the model's does not see."""
    one, of_state = slice_batch(few, 0, 1), objective.in_state_of(state)
    with torch.no_grad():
        outputs = of_state.outputs(one)
    with tracked_alone(objective) as own, torch.enable_grad():
        loss = objective.losses(outputs, one).sum()
        if not loss.requires_grad:
            return
        found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    read = [name for name, gradient in zip(own, found, strict=True) if gradient is not None]
    if read:
        raise UnsupportedModelError(
            f"{', '.join(read[:3])}: expected a loss of outputs and labels, got one that reads the model's "
            "own parameters, as a penalty on its weights does, and not those of its state then; leave that "
            "out of the loss"
        )


def _refuse_lazy(model: nn.Module) -> None:
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise UnsupportedModelError(
            f"{', '.join(lazy[:3])}: expected numbers, got tensors of lazy modules that have no shape yet; "
            "call the model once on an example first"
        )


def refuse_meta(model: nn.Module) -> None:
    """Refuses a model that is a form without numbers, as large ones are built before they are loaded.

    Raises:
        UnsupportedModelError: names the tensors on the meta device.
    """
    meta = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if meta:
        others = f" and {len(meta) - 3} more" if len(meta) > 3 else ""
        raise UnsupportedModelError(
            f"{', '.join(meta[:3])}{others}: expected numbers, got tensors on the meta device, which holds "
            "none; load the weights first: model.to_empty(device=...), then model.load_state_dict(...)"
        )


def _refuse_what_is_not_differentiated(objective: Objective) -> None:
    """Scripts take no other parameters in place of their own; of complex ones no inner product is defined."""
    inference = [name for name, value in objective.model.named_parameters() if value.is_inference()]
    if inference:
        raise UnsupportedModelError(
            f"{', '.join(inference[:3])}: expected parameters that can be differentiated, got some that were "
            "made under torch.inference_mode; make or load the model outside of it"
        )
    scripted = [name or "model" for name, m in objective.model.named_modules() if isinstance(m, ScriptModule)]
    if scripted:
        raise UnsupportedModelError(
            f"{', '.join(scripted[:3])}: expected modules of Python, got scripted or traced ones; give the "
            "model that torch.jit.script or torch.jit.trace was called with"
        )
    complex_ones = [name for name, value in objective.parameters().items() if value.is_complex()]
    if complex_ones:
        raise UnsupportedModelError(
            f"{', '.join(complex_ones[:3])}: expected real parameters, got complex ones; keep real and "
            "imaginary parts (torch.view_as_real) and join them in forward, or do not track them "
            "(requires_grad_(False))"
        )


@contextmanager
def _checkpointing_named() -> Iterator[None]:
    """Says what torch's errors on activation checkpointing mean here."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, CheckpointError) and "checkpoint" not in str(error).lower():
            raise
        raise UnsupportedModelError(
            "forward: expected activations that are kept for backward, got activation checkpointing, "
            "which computes them again when the parameters are others; turn it off "
            "(model.gradient_checkpointing_disable()), no number changes by it"
        ) from error


def refuse_training_mode(model: nn.Module) -> None:
    """Refuses a model that would answer otherwise the next time, or for other examples beside.

    Raises:
        TrainingModeError: names the modules whose dropout or batch statistics are on.
    """
    named = [(name or type(model).__name__, module) for name, module in model.named_modules()]
    random = [name for name, module in named if module.training and _dropout(module) > 0]
    mixing = [name for name, module in named if isinstance(module, _NormBase) and _uses_batch(module)]
    if random:
        raise TrainingModeError(
            f"dropout is on in {', '.join(random)}: expected a model that answers the same each time, got "
            "one in training mode; call model.eval()"
        )
    if mixing:
        raise TrainingModeError(
            f"{', '.join(mixing)}: expected fixed statistics, got statistics of the batch, which mix "
            "examples; call model.eval() (and build the layer with track_running_stats=True)"
        )


def _dropout(module: nn.Module) -> float:
    """The probability of dropout that the module applies in training mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return float(module.dropout)
    return 0.0


def _uses_batch(module: _NormBase) -> bool:
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        # Normalizes each example by itself; only running statistics are changed by training mode.
        return module.training and module.track_running_stats
    return module.training or module.running_mean is None


def _refuse_sparse_gradients(objective: Objective) -> None:
    tracked = {id(p) for name, p in objective.model.named_parameters() if name in objective.names}
    sparse = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in objective.model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.sparse
        and id(module.weight) in tracked
    ]
    if sparse:
        raise UnsupportedModelError(
            f"{', '.join(sparse)}: expected dense gradients, which is what examples are compared by, got "
            "sparse=True; build it with sparse=False (or set its attribute sparse to False: what it computes "
            "is the same), or do not track its weight (requires_grad_(False))"
        )


def _refuse_random_outputs(objective: Objective, few: Batch) -> None:
    n = batch_size(few)
    with torch.no_grad():
        first, second = (pytree.tree_leaves(objective.outputs(few)) for _ in range(2))
    if not any(isinstance(leaf, Tensor) for leaf in first):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in first})) or "nothing"
        raise UnsupportedModelError(
            f"forward: expected outputs that are tensors, or a dict, list or tuple of them, got {kinds}; "
            "return such a thing, or register the class with torch's pytrees "
            "(torch.export.register_dataclass or torch.utils._pytree.register_pytree_node)"
        )
    for a, b in zip(first, second, strict=True):
        if isinstance(a, Tensor) and a.shape[:1] != (n,):
            raise UnsupportedModelError(
                f"forward: expected outputs with an entry for each of {n} examples, got a tensor of shape "
                f"{list(a.shape)}; return what the loss needs of each example, such as logits without a loss "
                "that was averaged over the batch (pass no labels to the model)"
            )
        if isinstance(a, Tensor) and a.is_floating_point():
            allowed = tolerance(a.dtype)
            largest = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
            if not torch.allclose(a, b, rtol=allowed, atol=allowed * largest, equal_nan=True):
                raise TrainingModeError(
                    "forward: expected two passes of the same examples to agree, got different outputs; "
                    "call model.eval(), and take random numbers out of forward (functional dropout takes "
                    "training=)"
                )


def _refuse_other_gradients(objective: Objective, few: Batch, expected: Sketched) -> None:
    wrong = mismatched(objective, few, expected)
    if not wrong:
        return
    otherwise = used_otherwise(objective, few, expected)
    if otherwise:
        raise CaptureMismatchError(
            f"{', '.join(otherwise)}: expected parameters that the model and the loss reach as attributes "
            "of the modules that hold them, got some that are used otherwise, by the loss or through a "
            "reference kept in a list or a function, so that no other values can take their place; read them "
            "there whenever they are used (self.layer.weight, or model.parameters() inside the loss), or "
            "leave them out (requires_grad_(False))"
        )
    raise CaptureMismatchError(
        f"{', '.join(wrong)}: expected the gradients that autograd gives for one example at a time, got "
        "others from a batch. Usual causes: a weight shared with another module, examples that influence "
        "each other (batch statistics, padding to the longest), or a first dimension that does not count "
        "examples. Leave these parameters out (requires_grad_(False)), or mend the model"
    )
