"""What a running job says of itself: one small JSON document, served at `/progress`.

Read by the operator, by `influence watch` and by the progress bar of `influence run`. Imports pydantic
and the standard library only, for the operator's image has no torch.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

CONTRACT_VERSION = 1
"""Raised when a reader of the previous version would misread the document."""


class Stage(StrEnum):
    """The stages of a job, in order."""

    PREFLIGHT = "Preflight"
    LOADING = "Loading"
    FITTING = "Fitting"
    GRADIENTS = "Gradients"
    FACTORS = "Factors"
    SCORES = "Scores"
    VERIFYING = "Verifying"


class _Document(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")


class StageTimes(_Document):
    """When a stage ran."""

    name: Stage
    start: datetime
    end: datetime | None = None


class Regions(_Document):
    """Ledger rows of the present stage (fit ranges, factor chunks and regions alike)."""

    done: int = Field(0, ge=0)
    total: int = Field(0, ge=0)
    failed: int = Field(0, ge=0)
    """Attempts that ended in an exception; each region may fail twice and still be computed."""


class SolverCounts(_Document):
    """Right-hand sides by how their solve ended."""

    converged: int = Field(0, ge=0)
    max_iterations: int = Field(0, ge=0)
    indefinite: int = Field(0, ge=0)
    not_finite: int = Field(0, ge=0)


MESSAGE_CHARACTERS = 2048
WARNING_CHARACTERS = 512


def bounded(text: str, characters: int) -> str:
    """`text` as a document may hold it: valid Unicode, and if it is too long without its middle.

    A message begins with what happened, and ends with the cure or an exception's last line.
    """
    text = text.encode("utf-8", "replace").decode()  # names of files may hold what no JSON can
    if len(text) <= characters:
        return text
    head = (characters - 3) * 2 // 3
    tail = characters - 3 - head
    return f"{text[:head]}...{text[len(text) - tail :]}"


class Problem(_Document):
    """The last error."""

    reason: str = Field(max_length=64)
    message: str = Field(max_length=MESSAGE_CHARACTERS)


class Progress(_Document):
    """The document. Times are UTC, rates per second."""

    contract_version: int = CONTRACT_VERSION
    job_uid: str = Field(max_length=64)
    attempt: int = Field(ge=0)
    stage: Stage = Stage.PREFLIGHT
    stages: list[StageTimes] = Field(default_factory=list, max_length=16)
    regions: Regions = Field(default_factory=Regions)
    recorded: int | None = Field(None, ge=0)
    """Ledger rows that this attempt wrote, of all stages; null from a driver that does not count them."""
    rate: float | None = None
    """Regions per second over the last minute; null before the first."""
    eta_seconds: float | None = None
    """Seconds to the end of the present stage; null while unknown."""
    workers_needed: bool = False
    """Whether work is left that needs workers: false until preflight has said so."""
    workers: int = Field(0, ge=0)
    """Workers connected."""
    solver: SolverCounts | None = None
    """Null for methods without iterations."""
    warnings: list[str] = Field(default_factory=list, max_length=20)
    last_error: Problem | None = None
    finished: bool = False
    result: dict[str, object] | None = None
    """url, shape, dtype, bytes and digest, once Complete."""
