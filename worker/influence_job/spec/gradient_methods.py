"""The methods of a job that compare gradients without a curvature of the model: products and projections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from influence_job.spec.blocks import BlocksSpec
from influence_job.spec.fields import Flag, Integer, Number, SpecModel


class GradDotSpec(BlocksSpec):
    """g_test · g_train, without a curvature: cheap, and what other methods are compared with."""

    name: Literal["GradDot"]


class TracInSpec(SpecModel):
    """g_test · g_train, summed over InfluenceTask.checkpoints with their learning rates."""

    name: Literal["TracIn"]


class TrakSpec(SpecModel):
    """The empirical Fisher of gradients that a random projection makes `rank` numbers long: one pass."""

    name: Literal["Trak"]
    regularization: Annotated[Number, Field(ge=0)] = Field(
        description="λ, added to the diagonal of the projected matrix. No default: 0.01 is a start."
    )
    rank: Annotated[Integer, Field(ge=1, le=100_000)] = Field(
        description="Columns of the projection; rank² numbers are solved with, 2048 is a start."
    )
    seed: Annotated[Integer, Field(ge=0, le=2**53)] = Field(0, description="Draws it. Default 0.")


class LograSpec(SpecModel):
    """The empirical Fisher of each layer, projected on both sides: one pass, for large models."""

    name: Literal["Logra"]
    regularization: Annotated[Number, Field(ge=0)] = Field(
        description="λ, added to the diagonal of each projected matrix. No default: 0.01 is a start, 0.1 "
        "with `relative`."
    )
    relative: Flag = Field(
        False, description="λ of block b becomes regularization · tr(H_b)/dim_b. Default false."
    )
    rank: Annotated[Integer, Field(ge=1, le=100_000)] = Field(
        description="Columns of the projection of each side; rank⁴ numbers a layer are solved with, 64 is a "
        "start."
    )
    seed: Annotated[Integer, Field(ge=0, le=2**53)] = Field(
        0, description="Draws the projections. Default 0."
    )
