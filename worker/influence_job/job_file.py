"""A job's YAML file to an `InfluenceJob`, with every mistake named at once.

Each problem says line, field as the file spells it, what was expected, what came, and the cure; a name
that is nearly right gets "did you mean". Called by the command line and by the driver.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from influence_job.errors import PermanentError, Reason
from influence_job.spec import InfluenceJob
from influence_job.yaml_lines import Document, Path, YamlError, read_documents


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
        message = f"expected a mapping with apiVersion, kind, metadata and spec, got {_show(document.value)}"
        raise _invalid(source, [Problem(document.line(()), "", message)])
    try:
        # By alias alone: the API server knows no snake_case.
        return InfluenceJob.model_validate(document.value, by_alias=True, by_name=False)
    except ValidationError as error:
        problems = {_problem(details, document) for details in error.errors(include_url=False)}
        raise _invalid(source, sorted(problems, key=lambda p: (p.line, p.field))) from error


def _invalid(source: str, problems: list[Problem]) -> PermanentError:
    if len(problems) == 1:
        return PermanentError(Reason.INVALID_SPEC, f"{source}, {problems[0]}")
    listed = "".join(f"\n  {problem}" for problem in problems)
    return PermanentError(Reason.INVALID_SPEC, f"{source}: {len(problems)} problems{listed}")


def _problem(details: Mapping[str, Any], document: Document) -> Problem:
    kind, context = details["type"], details.get("ctx", {})
    path = _path(details["loc"], document.value, keep_last=kind == "missing")
    if kind == "rule" and context["field"]:
        path += tuple(context["field"].split("."))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path += ("name",)
    model = _model_at(path[:-1], document.value)
    match kind:
        case "missing" | "union_tag_not_found":
            message = f"required, but absent{_about(model, path)}"
            message += _near_unknown(path, model, document.value)
        case "extra_forbidden":
            message = f"unknown field; {_unknown_field(str(path[-1]), model)}"
        case "rule":
            message = context["message"]
        case "enum" | "literal_error" | "union_tag_invalid":
            message = _choice(context, _value(path, document.value))
        case _:
            message = f"{_expected(details)}, got {_show(details['input'])}{_about(model, path)}"
    return Problem(document.line(path) if document.lines else 0, _dotted(path), message)


_EXPECTED = {
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "finite_number": "expected a finite number",
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping",
    "model_attributes_type": "expected a mapping",
    "list_type": "expected a list",
    "string_pattern_mismatch": "wrong form",
}


def _expected(details: Mapping[str, Any]) -> str:
    if details["type"] in _EXPECTED:
        return _EXPECTED[details["type"]]
    message: str = details["msg"]
    return message.replace("Input should be", "expected a value").replace("String should have", "expected")


def _choice(context: Mapping[str, Any], given: Any) -> str:
    expected = str(context.get("expected") or context.get("expected_tags"))
    names = [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]
    message = f"expected {' | '.join(names)}, got {_show(given)}"
    near = _nearest(str(given), names)
    return f"{message}; did you mean {near}?" if near else message


def _unknown_field(name: str, model: type[BaseModel] | None) -> str:
    own = sorted(_aliases(model)) if model else []
    near = _nearest(name, own)
    if near:
        return f"did you mean {near}?"
    homes = [_dotted(path) for path, alias in _all_fields(InfluenceJob, ()) if alias == name]
    if homes:
        return f"it belongs under {homes[0]}"
    return f"expected one of {', '.join(own)}" if own else "remove it"


def _near_unknown(path: Path, model: type[BaseModel] | None, document: Any) -> str:
    """What stands in the file instead of a required field, if it looks like it."""
    beside = _value(path[:-1], document)
    if not isinstance(beside, dict) or model is None:
        return ""
    unknown = [str(name) for name in beside if name not in _aliases(model)]
    near = _nearest(str(path[-1]), unknown)
    return f"; the file says {near}" if near else ""


def _nearest(name: str, names: list[str]) -> str | None:
    """The one of `names` that `name` was probably meant to be."""
    by_lower = {candidate.lower().replace("_", ""): candidate for candidate in names}
    found = difflib.get_close_matches(name.lower().replace("_", ""), by_lower, n=1, cutoff=0.7)
    return by_lower[found[0]] if found else None


def _about(model: type[BaseModel] | None, path: Path) -> str:
    """The field's own description, which says what may stand there."""
    aliases = _aliases(model) if model and path else {}
    field = aliases.get(str(path[-1])) if path else None
    if model is None or field is None:
        return ""
    description = model.model_fields[field].description
    return f" ({description.rstrip('.')})" if description else ""


def _path(location: tuple[str | int, ...], document: Any, *, keep_last: bool) -> Path:
    """The place in the file, from pydantic's, which also names union members and kinds of errors."""
    path: list[str | int] = []
    value = document
    for index, step in enumerate(location):
        if _holds(value, step):
            value = value[step]
        elif not (keep_last and index == len(location) - 1):
            continue
        path.append(step)
    return tuple(path)


def _value(path: Path, document: Any) -> Any:
    value = document
    for step in path:
        if not _holds(value, step):
            return None
        value = value[step]
    return value


def _holds(value: Any, step: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value


def _dotted(path: Path) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _aliases(model: type[BaseModel]) -> dict[str, str]:
    return {field.alias or name: name for name, field in model.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation names outside of lists and maps."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from _models(part)


def _model_at(path: Path, document: Any) -> type[BaseModel] | None:
    """The model of the mapping at `path`; of a union the one that its `name` chooses."""
    model: type[BaseModel] = InfluenceJob
    value = document
    for step in path:
        field = _aliases(model).get(str(step))
        if field is None:
            return None
        value = value.get(step) if isinstance(value, dict) else None
        members = list(_models(model.model_fields[field].annotation))
        if not members:
            return None
        named = value.get("name") if isinstance(value, dict) else None
        model = next((m for m in members if named in _names(m)), members[0])
    return model


def _names(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("name")
    return typing.get_args(field.annotation) if field else ()


def _all_fields(model: type[BaseModel], path: Path) -> Iterator[tuple[Path, str]]:
    """Every field of the document: the path of its parent, and its name there."""
    for alias in _aliases(model):
        yield path, alias
    for alias, name in _aliases(model).items():
        for member in _models(model.model_fields[name].annotation):
            yield from _all_fields(member, (*path, alias))


def _show(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case _:
            text = json.dumps(value, default=str, ensure_ascii=False)
            return text if len(text) <= 80 else f"{text[:77]}…"
