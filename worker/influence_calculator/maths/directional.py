"""Many directional derivatives of one batch at once, within a bounded amount of memory.

Curvature products and perturbations pull vectors of parameter space back through a graph that is
built once per batch. How many go through at a time follows from the size of that graph.

Shapes: q directions, n examples, P_b parameters of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_calculator.maths.objective import Batch, Objective, slice_batch

WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 192 << 20}
"""Per device type, what the intermediate values of the directions that go through at once may take.

On a CPU about what its caches hold: one product of 256 directions (MLP, 17 000 parameters, 1536 examples)
takes half the time of an unbounded one. Constants, so that results do not depend on the machine, and
close to each other, so that a plan counts the larger without knowing the device."""

GRAPH_COPIES = 4
"""Values per saved activation while a direction is pulled back: its own and those of the first backward."""


def pull_back(function: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], Any]]:
    """`function(at)` and `cotangent → Jᵀ cotangent` there; the function may itself differentiate.

    Attention is computed by operations that have second derivatives.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            value, pull = vjp(function, at)[:2]
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return value, lambda cotangent: pull(cotangent)[0]


def directions_at_once(objective: Objective, n: int, elements: int, width: int) -> int:
    """How many directions of `width` columns go through a graph over n examples at a time; at least one.

    `elements`: what one example takes for each, the activations and what lies outside of the model.
    """
    per_direction = objective.dtype.itemsize * (GRAPH_COPIES * n * elements + 4 * width)
    return max(1, workspace_bytes(objective) // per_direction)


def workspace_bytes(objective: Objective) -> int:
    """The bound for the device that the model is on."""
    return WORKSPACE_BYTES.get(objective.device.type, WORKSPACE_BYTES["cuda"])


def activation_elements(objective: Objective, batch: Batch) -> int:
    """Elements that a forward pass of ONE example keeps for its backward pass, parameters not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in objective.model.parameters()}
    counted = 0

    def count(saved: Tensor) -> Tensor:
        nonlocal counted
        if saved.untyped_storage().data_ptr() not in own:
            counted += saved.numel()
        # An operation that keeps its own output through a hook would keep itself alive by it.
        return saved.detach()

    # `requires_grad_` on a detached tensor leaves the user's parameters, frozen ones too, as they are.
    parameters = {name: value.requires_grad_() for name, value in objective.parameters().items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        objective.outputs(slice_batch(batch, 0, 1), parameters)
    return counted


def in_pieces(function: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """`function` of all rows, `size` rows at a time."""
    if rows.shape[0] <= size:
        return function(rows)
    return torch.cat([function(rows[start : start + size]) for start in range(0, rows.shape[0], size)])
