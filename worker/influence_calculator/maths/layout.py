"""Where each tracked parameter lies: blocks of parameters, and the flat order the public API shows.

A block structure is a partition of PARAMETERS (never of data). Inside a block, and in the flat view
over all blocks, parameters stand in `named_parameters()` order, each `reshape(-1)`.

Shapes: t examples, P tracked parameters, P_b parameters of block b.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

Left = dict[str, Tensor]
"""A test chunk's representation: block -> `[t, width]`."""


@dataclass(frozen=True)
class Slot:
    """The place of one parameter."""

    name: str
    shape: tuple[int, ...]
    block: str
    start: int
    """First column inside the block."""
    flat_start: int
    """First column of the flat view."""

    @property
    def size(self) -> int:
        size = 1
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class Layout:
    """Slots of all tracked parameters, in `named_parameters()` order."""

    slots: tuple[Slot, ...]
    blocks: tuple[str, ...]
    """Block names in order; the full block structure has the one block `""`."""
    coordinates: Mapping[str, int] | None = None
    """Columns of each block's representations, where these are coordinates in a smaller space than that of
    the parameters."""

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], structure: Mapping[str, tuple[str, ...]]) -> Layout:
        """The layout of parameters (name -> shape, in order) under block -> parameter names.

        A parameter that no block names has no slot: it contributes nothing.
        """
        block_of = {name: block for block, names in structure.items() for name in names}
        next_column = dict.fromkeys(structure, 0)
        slots, flat = [], 0
        for name, shape in shapes.items():
            if name not in block_of:
                continue
            block = block_of[name]
            slot = Slot(name, tuple(shape), block, next_column[block], flat)
            next_column[block] += slot.size
            flat += slot.size
            slots.append(slot)
        return cls(tuple(slots), tuple(structure))

    @cached_property
    def widths(self) -> dict[str, int]:
        """P_b of each block."""
        widths = dict.fromkeys(self.blocks, 0)
        for slot in self.slots:
            widths[slot.block] += slot.size
        return widths

    @property
    def factor_widths(self) -> dict[str, int]:
        """Columns of each block in left and right representations: P_b, or of its coordinates."""
        return dict(self.coordinates or self.widths)

    @property
    def left_width(self) -> int:
        """Columns of a left representation over all blocks."""
        return sum(self.factor_widths.values())

    def of_rank(self, rank: int) -> Layout:
        """The same with representations of at most `rank` columns per block."""
        return replace(self, coordinates={block: min(width, rank) for block, width in self.widths.items()})

    @property
    def width(self) -> int:
        """P."""
        return sum(self.widths.values())

    def slots_of(self, block: str) -> tuple[Slot, ...]:
        """The parameters of one block, in order of their columns."""
        return self._by_block[block]

    @cached_property
    def _by_block(self) -> dict[str, tuple[Slot, ...]]:
        found: dict[str, list[Slot]] = {block: [] for block in self.blocks}
        for slot in self.slots:
            found[slot.block].append(slot)
        return {block: tuple(slots) for block, slots in found.items()}

    def only(self, block: str) -> Layout:
        """The layout of one block alone, its columns where they were."""
        return Layout(tuple(replace(s, flat_start=s.start) for s in self.slots_of(block)), (block,))

    def among(self, blocks: Iterable[str]) -> Layout:
        """The layout of some blocks, as far as columns inside of blocks go."""
        kept = tuple(block for block in self.blocks if block in set(blocks))
        return Layout(tuple(slot for slot in self.slots if slot.block in kept), kept)

    def flatten(self, left: Left) -> Tensor:
        """Per-block `[t, P_b]` as one `[t, P]`."""
        if len(self.blocks) == 1:
            return left[self.blocks[0]]
        columns = [left[s.block][:, s.start : s.start + s.size] for s in self.slots]
        return torch.cat(columns, dim=1)

    def split(self, flat: Tensor) -> Left:
        """One `[t, P]` as per-block `[t, P_b]`; the inverse of `flatten`."""
        return {block: self.columns_of(flat, block) for block in self.blocks}

    def columns_of(self, flat: Tensor, block: str) -> Tensor:
        """One block's columns `[t, P_b]` of `[t, P]`: a view where they stand together, as a layer's do."""
        if len(self.blocks) == 1:
            return flat
        columns = self._range(block)
        if columns is not None:
            return flat[:, columns]
        slots = self.slots_of(block)
        return torch.cat([flat[:, s.flat_start : s.flat_start + s.size] for s in slots], dim=1)

    def flatten_left(self, left: Left) -> Tensor:
        """A left representation as one row per example: `[t, P]`, or the blocks' coordinates side by side."""
        if self.coordinates is None:
            return self.flatten(left)
        return torch.cat([left[block] for block in self.blocks], dim=1)

    def split_left(self, rows: Tensor) -> Left:
        """The inverse of `flatten_left`."""
        if self.coordinates is None:
            return self.split(rows)
        pieces = rows.split([self.coordinates[block] for block in self.blocks], dim=1)
        return dict(zip(self.blocks, pieces, strict=True))

    @cached_property
    def blocks_are_whole(self) -> bool:
        """Whether the columns of each block stand together in `[t, P]`, so that `split` gives views."""
        return all(self._range(block) is not None for block in self.blocks)

    def _range(self, block: str) -> slice | None:
        """One block's columns of `[t, P]`, if they stand together."""
        slots = self.slots_of(block)
        start, stop = slots[0].flat_start, slots[-1].flat_start + slots[-1].size
        return slice(start, stop) if stop - start == self.widths[block] else None


def tensors_of(columns: Tensor, slots: Iterable[Slot], dtype: torch.dtype) -> dict[str, Tensor]:
    """Columns `[q, P_b]` as one `[q, *shape]` per parameter."""
    q = columns.shape[0]
    return {
        slot.name: columns[:, slot.start : slot.start + slot.size].to(dtype).reshape(q, *slot.shape)
        for slot in slots
    }


def columns_of(tensors: Mapping[str, Tensor], slots: Iterable[Slot], dtype: torch.dtype) -> Tensor:
    """One `[q, *shape]` per parameter as columns `[q, P_b]`; the inverse of `tensors_of`."""
    return torch.cat([rows_of(tensors[slot.name]).to(dtype) for slot in slots], dim=1)


def rows_of(values: Tensor) -> Tensor:
    """`[q, *shape]` as `[q, numel]`; of shape `[]` too."""
    return values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)
