"""A spec as the API server stored it, to an `InfluenceJobSpec`. Called by the operator."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from influence_job.spec.job import InfluenceJobSpec
from influence_job.spec.problems import Problem, problems_of

_MOST_TOLD = 8
"""Problems in one message: a condition is read in a terminal."""
_LONGEST = 400
"""Characters of one problem, which repeats names and values of whoever wrote the spec."""


class InvalidSpecError(ValueError):
    """A spec that the model refuses; the message names each field, what was expected and what came."""

    def __init__(self, problems: list[Problem]) -> None:
        told = [_shortened(str(problem)) for problem in problems[:_MOST_TOLD]]
        if len(problems) > _MOST_TOLD:
            told.append(f"and {len(problems) - _MOST_TOLD} problems more")
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


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
