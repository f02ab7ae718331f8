"""In which coordinates a job stores factors."""

from __future__ import annotations

from enum import StrEnum

from influence_job.spec import InfluenceJobSpec, Mode, Operation


class Basis(StrEnum):
    """Which coordinates a factor array's columns stand for: its attribute `basis`."""

    PARAMETERS = "parameters"
    """Influence factors by parameter."""
    METHOD = "method"
    """The method's left representation: factors in the basis in which it solves."""


def stored_basis(spec: InfluenceJobSpec) -> Basis:
    """A job that only needs factors to score them stores them as they are solved."""
    scores = spec.operation in (
        Operation.INFLUENCES,
        Operation.INFLUENCES_BY_BLOCK,
        Operation.INFLUENCES_FROM_GRADIENTS,
    )
    only_scored = scores and spec.mode is Mode.UP
    return Basis.METHOD if only_scored else Basis.PARAMETERS
