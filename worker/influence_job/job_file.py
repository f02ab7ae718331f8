"""A job's YAML file to an `InfluenceJob`, with every mistake named at once.

Each problem says its line and, in the words of `influence_job.spec.problems`, the field, what was expected,
what came, and the cure. Called by the command line and by the driver.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from influence_job.errors import PermanentError, Reason
from influence_job.spec import InfluenceJob
from influence_job.spec.problems import problems_of, show
from influence_job.yaml_lines import Document, YamlError, read_documents


@dataclass(frozen=True)
class Problem:
    """One mistake in a job file."""

    line: int
    """From 1; 0 when the document has no lines."""
    field: str
    """Dotted, as the file spells it."""
    message: str

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.field}: {self.message}" if self.field else f"{where}{self.message}"


def load_job(text: str, source: str) -> InfluenceJob:
    """The job in `text`; `source` is the file's name for messages.

    Raises:
        PermanentError: InvalidSpec, with every problem.
    """
    try:
        documents = read_documents(text)
    except YamlError as error:
        raise _invalid(source, [Problem(error.line, "", error.message)]) from error
    if len(documents) != 1:
        got = "none" if not documents else f"{len(documents)}"
        message = f"expected one document, an InfluenceJob manifest, got {got}; keep one job per file"
        raise _invalid(source, [Problem(0, "", message)])
    document = documents[0]
    if isinstance(document.value, dict):
        document.value.pop("status", None)  # of a manifest that came from a cluster
    return parse_job(document, source)


def parse_job(document: Document, source: str) -> InfluenceJob:
    """The job in a document that was read already.

    Raises:
        PermanentError: InvalidSpec, with every problem.
    """
    if not isinstance(document.value, dict):
        message = f"expected a mapping with apiVersion, kind, metadata and spec, got {show(document.value)}"
        raise _invalid(source, [Problem(document.line(()), "", message)])
    try:
        # By alias alone: the API server knows no snake_case.
        return InfluenceJob.model_validate(document.value, by_alias=True, by_name=False)
    except ValidationError as error:
        problems = [
            Problem(document.line(found.path) if document.lines else 0, found.field, found.message)
            for found in problems_of(error, document.value, InfluenceJob)
        ]
        raise _invalid(source, sorted(problems, key=lambda p: (p.line, p.field))) from error


def _invalid(source: str, problems: list[Problem]) -> PermanentError:
    if len(problems) == 1:
        return PermanentError(Reason.INVALID_SPEC, f"{source}, {problems[0]}")
    listed = "".join(f"\n  {problem}" for problem in problems)
    return PermanentError(Reason.INVALID_SPEC, f"{source}: {len(problems)} problems{listed}")
