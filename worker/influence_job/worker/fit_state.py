"""A fit in the store: `fit/<pass>/<unit>` when finished, `fit/<pass>/partial/<range>/<unit>` before.

Both are tensor files. The reader is what every later stage starts from; nothing is recomputed from data.
The passes that solve chunk c are called `solve/<c>/<number>` and lie there too until the chunk is done. They
may be thousands: those of a chunk share their ledger kinds, and their rows follow one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from influence_calculator.maths.method import FitPass, FitState, Method, Sums
from influence_calculator.maths.objective import Objective
from influence_job.storage import arrays
from influence_job.storage.store import Store
from influence_job.worker import tensor_file

SOLVING = "solve/"
_SOLVING_STEP = re.compile(rf"({SOLVING}\d+)/(\d+)")


def solving_series(chunk: int) -> str:
    """What the passes that solve a chunk have in common."""
    return f"{SOLVING}{chunk}"


def solving_step(chunk: int, number: int) -> str:
    """Pass `number` of those that solve a chunk; 0 reads no training data: it is what they start from."""
    return f"{solving_series(chunk)}/{number}"


def solving_step_before(step: str) -> str | None:
    """The pass before one that solves; None for the passes of a fit."""
    found = _SOLVING_STEP.fullmatch(step)
    return None if found is None else f"{found[1]}/{int(found[2]) - 1}"


def _of_series(step: str) -> tuple[str, int]:
    """The name that a pass's ledger kinds have, and which of the passes with that name it is."""
    found = _SOLVING_STEP.fullmatch(step)
    return (step, 0) if found is None else (found[1], int(found[2]))


def range_kind(step: str) -> str:
    """The ledger kind of a pass's ranges."""
    return f"fit/{_of_series(step)[0]}/range"


def unit_kind(step: str) -> str:
    """The ledger kind of a pass's units."""
    return f"fit/{_of_series(step)[0]}/unit"


def settled_kind(step: str) -> str:
    """The ledger kind of those units of a pass that further passes of its series would not change."""
    return f"fit/{_of_series(step)[0]}/settled"


def first_row(step: str, count: int) -> int:
    """The index of a pass's first ledger row of a kind, of which each pass has `count`."""
    return _of_series(step)[1] * count


def pass_prefix(step: str) -> str:
    """Where everything of a pass lies."""
    return f"fit/{step}/"


def partial_prefix(step: str) -> str:
    """Where a pass keeps its partial sums until its units are finished."""
    return f"fit/{step}/partial/"


def partial_path(step: str, index: int, unit: int) -> str:
    """One unit's partial sums over one range."""
    return f"{partial_prefix(step)}{index}/{unit}"


def unit_path(step: str, unit: int) -> str:
    """What a pass leaves of one unit."""
    return f"fit/{step}/{unit}"


def read_tensors(store: Store, path: str, device: torch.device) -> dict[str, Tensor]:
    """One tensor file on `device`.

    Raises:
        PermanentError: STORE_CORRUPT if it is missing or damaged.
    """
    data = store.get(path)
    if data is None:
        raise arrays.corrupt(store, path, "expected a tensor file, as the ledger has it, found no object")
    return {name: tensor.to(device) for name, tensor in tensor_file.unpack(data, store, path)}


@dataclass(frozen=True)
class FitReader:
    """Reads the passes of a method that are finished."""

    store: Store
    method: Method
    objective: Objective

    def state(self, device: torch.device, before: str | None = None) -> FitState:
        """Pass -> unit -> name -> tensor, of all passes, or of those before pass `before`.

        Of a series only the last pass that ran; the others were taken over.
        """
        passes = self._last_passes(before)
        return {step.name: self.left_by(step.name, step.units(self.objective), device) for step in passes}

    def left_by(
        self, step: str, units: tuple[str, ...], device: torch.device
    ) -> dict[str, dict[str, Tensor]]:
        """Unit -> name -> tensor, of one pass."""
        return {
            unit: read_tensors(self.store, unit_path(step, number), device)
            for number, unit in enumerate(units)
        }

    def _last_passes(self, before: str | None) -> list[FitPass]:
        passes = list(takewhile(lambda step: step.name != before, self.method.passes()))
        taken_over = {step.follows for step in passes} - {None}
        if taken_over:
            # A pass that was not due left nothing, and one that was is finished before anybody asks.
            there = set(self.store.list("fit/"))
            in_series = {step.name for step in passes if step.follows is not None} | taken_over
            passes = [s for s in passes if s.name not in in_series or unit_path(s.name, 0) in there]
            taken_over = {step.follows for step in passes}
        return [step for step in passes if step.name not in taken_over]

    def sums(self, step: FitPass, unit: int, ranges: int, device: torch.device) -> dict[str, Tensor]:
        """The partial sums of one unit, added in the order of their ranges."""
        total: dict[str, Tensor] = {}
        for index in range(ranges):
            partial = read_tensors(self.store, partial_path(step.name, index, unit), device)
            for name, value in partial.items():
                total[name] = total[name].add_(value) if name in total else value
        return total


def store_partials(
    store: Store, step: FitPass, index: int, sums: Sums, units: tuple[str, ...]
) -> Iterator[bytes]:
    """Writes the partial sums of one range, one object per unit; what was written, one after the other."""
    for number, unit in enumerate(units):
        data = tensor_file.pack(sums[unit])
        store.put(partial_path(step.name, index, number), data)
        yield data
