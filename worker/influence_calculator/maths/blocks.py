"""Block structures, and the regularization of each block.

A block structure says which parameters are solved together: the curvature between two blocks counts
as zero. A parameter shared by two modules belongs to the first name it has; a frozen parameter
belongs to none.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from influence_calculator.maths.errors import BlocksError
from influence_calculator.maths.finite import is_finite_number
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.objective import Objective


class BlockMode(StrEnum):
    """The named block structures."""

    FULL = "full"
    """One block `""` of all tracked parameters."""
    LAYER_WISE = "layer_wise"
    """One block per direct child of the model; parameters of the model itself in block `""`."""
    PARAMETER_WISE = "parameter_wise"
    """One block per parameter."""


BlockStructure = BlockMode | Mapping[str, Sequence[str]]
"""A named structure, or block -> names of its parameters (one that no block names contributes 0)."""


@dataclass(frozen=True)
class Relative:
    """A regularization in proportion to the curvature: `λ_b = c · tr(H_b) / dim_b`."""

    c: float
    """At least 0."""


Regularization = float | Mapping[str, float] | Relative
"""λ of every block, one λ per block, or relative to each block's own curvature."""


def block_layout(objective: Objective, structure: BlockStructure) -> Layout:
    """Where the tracked parameters lie under a block structure.

    Raises:
        BlocksError: a custom structure that overlaps, is empty, or names what is not tracked.
    """
    return model_layout(objective.model, objective.names, structure)


def model_layout(model: nn.Module, tracked: tuple[str, ...], structure: BlockStructure) -> Layout:
    """`block_layout` of the tracked parameters of a model, whatever is differentiated."""
    own = dict(model.named_parameters())
    shapes = {name: tuple(own[name].shape) for name in tracked}
    if not shapes:
        raise ValueError(
            "model: expected at least one parameter that requires grad, got none; "
            "unfreeze the parameters whose influence you ask for"
        )
    names = names_of_blocks(tracked, structure)
    _refuse_untracked(model, tracked, names)
    return Layout.of(shapes, names)


def names_by_module(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Module -> names of its own parameters, in order."""
    modules: dict[str, tuple[str, ...]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        modules[module] = (*modules.get(module, ()), name)
    return modules


def names_of_blocks(tracked: tuple[str, ...], structure: BlockStructure) -> dict[str, tuple[str, ...]]:
    """Block -> names of its parameters, of those that are tracked."""
    if isinstance(structure, Mapping):
        return _custom(structure)
    try:
        mode = BlockMode(structure)
    except ValueError as error:
        raise BlocksError(
            f"block_structure: expected one of {', '.join(repr(known.value) for known in BlockMode)}, or a "
            f"mapping of blocks to names of parameters, got {structure!r}; BlockMode names them"
        ) from error
    match mode:
        case BlockMode.FULL:
            return {"": tracked}
        case BlockMode.PARAMETER_WISE:
            return {name: (name,) for name in tracked}
        case BlockMode.LAYER_WISE:
            return _by_child(tracked)


def _by_child(tracked: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    blocks: dict[str, tuple[str, ...]] = {}
    for name in tracked:
        child = name.split(".")[0] if "." in name else ""
        blocks[child] = (*blocks.get(child, ()), name)
    return blocks


def _custom(structure: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    if not structure:
        raise BlocksError("block_structure: expected at least one block, got an empty mapping; name one")
    owner: dict[str, str] = {}
    for block, names in structure.items():
        if isinstance(names, str) or not names:
            raise BlocksError(
                f"block_structure[{block!r}]: expected a list of at least one parameter name, got {names!r}; "
                "list the parameters of the block or drop it"
            )
        for name in names:
            if name in owner:
                raise BlocksError(
                    f"block_structure: parameter {name!r} stands in block {owner[name]!r} and in {block!r}; "
                    "blocks are disjoint, name it once"
                )
            owner[name] = block
    return {block: tuple(names) for block, names in structure.items()}


def _refuse_untracked(
    model: nn.Module, tracked: tuple[str, ...], structure: Mapping[str, Sequence[str]]
) -> None:
    for block, names in structure.items():
        for name in names:
            if name not in tracked:
                raise BlocksError(
                    f"block_structure[{block!r}]: expected tracked parameters, got {name!r}: "
                    f"{_why_untracked(model, tracked, name)}"
                )


def _why_untracked(model: nn.Module, tracked: tuple[str, ...], name: str) -> str:
    every = dict(model.named_parameters(remove_duplicate=False))
    if name in every:
        first = next(n for n, p in model.named_parameters() if p is every[name])
        if first != name:
            return f"it is tied to {first!r}; use that name"
        return "it does not require grad or was not selected; track it or drop it from the block"
    close = difflib.get_close_matches(name, tracked, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the tracked ones are {', '.join(tracked)}"


def checked_regularization(regularization: Regularization | None) -> Regularization:
    """The regularization with None as 0.

    Raises:
        ValueError: no number, negative or not finite.
    """
    values: Iterable[float]
    match regularization:
        case None:
            return 0.0
        case Relative(c=c):
            values = (c,)
        case Mapping():
            values = regularization.values()
        case _:
            values = (regularization,)
    for value in values:
        if not (is_finite_number(value) and value >= 0):
            raise ValueError(
                f"regularization: expected finite numbers that are not negative, got {value!r}; "
                "0 means none, 0.01 is a usual start"
            )
    return regularization


def require_positive(regularization: Regularization | None, why: str) -> None:
    """Refuses a regularization that leaves a block without one; `why` says what needs it.

    Raises:
        ValueError: None, or not above 0.
    """
    match checked_regularization(regularization):
        case Relative(c=c):
            smallest = c
        case Mapping() as by_block:
            smallest = min(by_block.values(), default=0.0)
        case number:
            smallest = number
    if smallest <= 0:
        raise ValueError(f"regularization: expected numbers above 0, got {smallest}: {why}; 0.01 is a start")


def needs_trace(regularization: Regularization) -> bool:
    """Whether λ follows from the curvature's trace."""
    return isinstance(regularization, Relative)


def check_coverage(regularization: Regularization, blocks: Sequence[str]) -> None:
    """Refuses a mapping that does not name every block and nothing else.

    Raises:
        BlocksError: naming the missing and the extra names.
    """
    if not isinstance(regularization, Mapping):
        return
    missing = [block for block in blocks if block not in regularization]
    extra = [block for block in regularization if block not in blocks]
    if missing or extra:
        raise BlocksError(
            f"regularization: expected one number for each of the blocks {list(blocks)}; "
            f"missing: {missing or 'none'}, unknown: {extra or 'none'}; name every block or give one number"
        )


def regularized_layout(
    objective: Objective, structure: BlockStructure, regularization: Regularization | None
) -> Layout:
    """`block_layout`, for a regularization that names every block, if it names any.

    Raises:
        BlocksError: as `block_layout` and `check_coverage`.
    """
    layout = block_layout(objective, structure)
    check_coverage(checked_regularization(regularization), layout.blocks)
    return layout


def block_regularization(regularization: Regularization, block: str, trace: float, dim: int) -> float:
    """λ of one block. `trace` counts only for a relative one: `λ_b = c · tr(H_b) / dim_b`, at least 0."""
    match regularization:
        case Relative(c=c):
            return max(0.0, c * trace / dim)
        case Mapping():
            return float(regularization[block])
        case _:
            return float(regularization)
