"""A spec as the API server stored it, to an `InfluenceJobSpec`. Called by the operator."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from influence_job.spec.job import InfluenceJobSpec
from influence_job.spec.problems import Problem, problems_of

_MOST_TOLD = 5
"""Problems in one message."""
_LONGEST = 960
"""Characters of all of them: a condition is read in a terminal, and an Event holds 1024 bytes."""


class InvalidSpecError(ValueError):
    """A spec that the model refuses; the message names each field, what was expected and what came."""

    def __init__(self, problems: list[Problem]) -> None:
        told = [str(problem) for problem in problems[:_MOST_TOLD]]
        told = [_shortened(text, _LONGEST // len(told)) for text in told]
        if len(problems) > _MOST_TOLD:
            told.append(f"and {len(problems) - _MOST_TOLD} more")
        super().__init__("; ".join(told))
        self.problems = problems


def parse_spec(raw: Any) -> InfluenceJobSpec:
    """The spec in `raw`, the plain value of a job's `spec`.

    Raises:
        InvalidSpecError: with every problem; fields are named from `spec` on.
    """
    try:
        # By alias alone: the API server knows no snake_case.
        return InfluenceJobSpec.model_validate(raw, by_alias=True, by_name=False)
    except ValidationError as error:
        found = problems_of(error, raw, InfluenceJobSpec)
        raise InvalidSpecError([Problem(("spec", *p.path), p.message) for p in found]) from error


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
