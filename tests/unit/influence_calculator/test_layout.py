"""Where parameters lie: blocks and the flat view hold the same columns."""

from __future__ import annotations

import pytest
import torch

from influence_calculator.maths.layout import Layout

SHAPES = {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (4,), "c.weight": (1, 5)}
STRUCTURES = {
    "full": {"": tuple(SHAPES)},
    "by layer": {"a": ("a.weight", "a.bias"), "b": ("b.weight",), "c": ("c.weight",)},
    "apart": {"outer": ("a.weight", "c.weight"), "inner": ("a.bias", "b.weight")},
    "with one left out": {"a": ("a.weight",), "c": ("c.weight",)},
}


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_split_and_flatten_are_inverse(structure: dict[str, tuple[str, ...]]):
    layout = Layout.of(SHAPES, structure)
    flat = torch.arange(3.0 * layout.width).reshape(3, layout.width)
    left = layout.split(flat)
    assert {block: rows.shape[1] for block, rows in left.items()} == layout.widths
    assert torch.equal(layout.flatten(left), flat)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_every_parameter_has_the_same_columns_in_its_block_and_in_the_flat_view(
    structure: dict[str, tuple[str, ...]],
):
    layout = Layout.of(SHAPES, structure)
    flat = torch.arange(3.0 * layout.width).reshape(3, layout.width)
    left = layout.split(flat)
    for slot in layout.slots:
        there = left[slot.block][:, slot.start : slot.start + slot.size]
        assert torch.equal(there, flat[:, slot.flat_start : slot.flat_start + slot.size])


def test_blocks_that_stand_together_are_split_without_a_copy():
    layout = Layout.of(SHAPES, STRUCTURES["by layer"])
    flat = torch.zeros(3, layout.width)
    memory = flat.untyped_storage().data_ptr()
    assert {rows.untyped_storage().data_ptr() for rows in layout.split(flat).values()} == {memory}
