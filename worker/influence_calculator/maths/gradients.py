"""Gradients of one example each, `∇θ ℓ_i`, of a whole batch at once.

Every method that works in the space of gradients takes its representations from here.

Shapes: n examples of a batch, P_b parameters of block b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from influence_calculator.maths.capture import captured_gradients, uncaptured_parameters
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import Part
from influence_calculator.maths.objective import Batch, Objective, batch_size
from influence_calculator.maths.traced_gradients import traced_gradients


def per_sample_gradients(objective: Objective, batch: Batch, layout: Layout) -> Iterator[Part]:
    """Gradients `[n, numel]` of each example by each parameter that has a slot, part by part.

    Exact whatever the batching: an example's gradient is that of a batch of one. Layers that hooks
    capture come one after another; parameters of other layers come from `torch.func`, all at once.
    """
    slots = {slot.name: slot for slot in layout.slots}
    treated = replace(objective, names=tuple(name for name in objective.names if name in slots))
    for name, values in captured_gradients(treated, batch):
        yield Part(slots[name].block, slots[name].start, values)
    for name, values in vmapped_gradients(treated, batch, uncaptured_parameters(treated)):
        yield Part(slots[name].block, slots[name].start, values)


def vmapped_gradients(
    objective: Objective, batch: Batch, names: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Gradients by `torch.func`, for parameters of any layer; all of them live at once."""
    rows = traced_gradients(objective, batch, names).rows
    for name in names:
        yield name, rows.pop(name)


def collected(objective: Objective, batch: Batch, layout: Layout) -> Left:
    """The gradients as one `[n, P_b]` per block, in the dtype they are summed in."""
    n = batch_size(batch)
    dtype = accumulation_dtype(objective.dtype)
    left = {
        block: torch.zeros(n, width, dtype=dtype, device=objective.device)
        for block, width in layout.widths.items()
    }
    for part in per_sample_gradients(objective, batch, layout):
        left[part.block][:, part.start : part.start + part.values.shape[1]] = part.values
    return left


def projected(objective: Objective, batch: Batch, layout: Layout, rows: Left) -> Left:
    """`V g` of each example, `[n, q]` by block, for rows V `[q, P_b]`: no gradient is held as a whole."""
    n = batch_size(batch)
    coordinates = {block: vectors.new_zeros(n, len(vectors)) for block, vectors in rows.items()}
    for part in per_sample_gradients(objective, batch, layout):
        columns = rows[part.block][:, part.start : part.start + part.values.shape[1]]
        coordinates[part.block].addmm_(part.values.to(columns.dtype), columns.T)
    return coordinates


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and factors of values of `dtype` are kept in: float32 for half precision, else itself."""
    return torch.promote_types(dtype, torch.float32)
