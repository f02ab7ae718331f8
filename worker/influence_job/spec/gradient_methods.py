"""The methods of a job that compare gradients without a curvature of the model: products and projections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from influence_job.spec.fields import Integer, Number, SpecModel


class GradDotSpec(SpecModel):
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
