"""How a method divides the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from influence_job.spec.fields import ShortString, SpecModel, refuse
from influence_job.spec.rules import Refusal, rule, rules


class BlockStructure(StrEnum):
    """How the tracked parameters are divided; the curvature between two blocks counts as zero."""

    FULL = "Full"
    """One block of all parameters."""
    LAYER_WISE = "LayerWise"
    """One block per direct child of the model."""
    PARAMETER_WISE = "ParameterWise"
    """One block per parameter."""
    CUSTOM = "Custom"
    """The blocks of `customBlocks`."""


CustomBlocks = Annotated[
    dict[
        Annotated[str, Field(max_length=253)],
        Annotated[list[ShortString], Field(min_length=1, max_length=4096)],
    ],
    Field(min_length=1, max_length=1024),
]
BLOCK_RULES = (
    rule(
        "!(has(self.blocks) && self.blocks == 'Custom') || has(self.customBlocks)",
        "expected block names with parameter names, for blocks is Custom",
        "customBlocks",
        Refusal.REQUIRED,
    ),
    rule(
        "!has(self.customBlocks) || (has(self.blocks) && self.blocks == 'Custom')",
        "only for blocks: Custom; set it or remove this",
        "customBlocks",
        Refusal.FORBIDDEN,
    ),
)


class BlocksSpec(SpecModel):
    """A method that has blocks of parameters."""

    model_config = ConfigDict(json_schema_extra=rules(*BLOCK_RULES))

    blocks: BlockStructure = Field(
        BlockStructure.FULL,
        description="Full | LayerWise | ParameterWise | Custom: partition of the parameters. Default Full.",
    )
    custom_blocks: CustomBlocks | None = Field(
        None,
        description="Block name -> parameter names, for blocks: Custom. Parameters left out contribute 0.",
    )

    @model_validator(mode="after")
    def _blocks_fit_together(self) -> BlocksSpec:
        custom = self.blocks is BlockStructure.CUSTOM
        if custom and self.custom_blocks is None:
            raise refuse("customBlocks", "expected block names with parameter names, for blocks is Custom")
        if not custom and self.custom_blocks is not None:
            raise refuse(
                "customBlocks", f"only for blocks: Custom, but blocks is {self.blocks}; set it or remove this"
            )
        _refuse_overlap(self.custom_blocks or {})
        return self


def _refuse_overlap(blocks: Mapping[str, Sequence[str]]) -> None:
    owner: dict[str, str] = {}
    for block, names in blocks.items():
        for name in names:
            if name in owner:
                where = (
                    f"twice in {block!r}" if owner[name] == block else f"in {owner[name]!r} and in {block!r}"
                )
                raise refuse(
                    "customBlocks", f"parameter {name!r} stands {where}; blocks are disjoint, name it once"
                )
            owner[name] = block
