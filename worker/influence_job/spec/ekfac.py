"""EK-FAC as a job names it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from influence_job.spec.fields import Flag, Integer, Number, SpecModel
from influence_job.spec.rules import POSITIVE_REGULARIZATION, rule, rules


class Expectation(StrEnum):
    """Whose gradients EK-FAC averages."""

    SAMPLED = "Sampled"
    """Drawn from the model's outputs."""
    EXACT = "Exact"
    """Summed over the outputs: a backward pass per output, so for small heads."""
    EMPIRICAL = "Empirical"
    """At the true labels."""


class Unsupported(StrEnum):
    """What EK-FAC does with a layer it has no formula for."""

    REFUSE = "Refuse"
    DIAGONAL = "Diagonal"
    """Mean of g² on the diagonal."""
    EXCLUDE = "Exclude"
    """The layer contributes 0."""


class EkfacSpec(SpecModel):
    """Eigenvalue-corrected Kronecker factors: two passes over the training set, scales to large models."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"self.name != 'Ekfac' || {POSITIVE_REGULARIZATION}",
                "expected more than 0",
                "regularization",
            )
        )
    )

    name: Literal["Ekfac"]
    regularization: Annotated[Number, Field(gt=0)] = Field(
        description="λ, added to the eigenvalues; above 0. No default: 0.01 is a start."
    )
    update_diagonal: Flag = Field(
        True,
        description="Fit the eigenvalues to per-example gradients (EK-FAC). Default true; false is KFAC.",
    )
    expectation: Expectation = Field(
        Expectation.SAMPLED,
        description="Sampled | Exact | Empirical: whose gradients are averaged. Default Sampled.",
    )
    samples: Annotated[Integer, Field(ge=1, le=1000)] = Field(
        1, description="Draws per example and token, for Sampled. Default 1."
    )
    seed: Annotated[Integer, Field(ge=0, le=2**53)] = Field(0, description="Keys the draws. Default 0.")
    unsupported: Unsupported = Field(
        Unsupported.REFUSE,
        description="Refuse | Diagonal | Exclude: layers without a formula. Default Refuse, naming them.",
    )
