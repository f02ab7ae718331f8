"""What pydantic found wrong with a document, told so that its author can cure it.

Each problem names the field as the document spells it, what was expected, what came, and the cure; a name
that is nearly right gets "did you mean". `influence_job.job_file` adds lines, the operator puts them into a
condition. Pydantic and the standard library only.
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

Path = tuple[str | int, ...]
"""Keys and indices from the root of a document."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a document."""

    path: Path
    message: str

    @property
    def field(self) -> str:
        """Dotted, as the document spells it."""
        return _dotted(self.path)

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.path else self.message


def problems_of(error: ValidationError, document: Any, model: type[BaseModel]) -> list[Problem]:
    """Every problem, in the order of the document's model; `document` is what `model` refused."""
    reader = _Reader(document, model)
    return list(dict.fromkeys(reader.problem(details) for details in error.errors(include_url=False)))


class _Reader:
    """Puts pydantic's errors into words, looking at the document and its model."""

    def __init__(self, document: Any, root: type[BaseModel]) -> None:
        self._document = document
        self._root = root

    def problem(self, details: Mapping[str, Any]) -> Problem:
        kind, context = details["type"], details.get("ctx", {})
        path = self._path(details["loc"], keep_last=kind == "missing")
        if kind == "rule" and context["field"]:
            path += tuple(int(step) if step.isdigit() else step for step in context["field"].split("."))
        if kind in ("union_tag_invalid", "union_tag_not_found"):
            path += ("name",)
        model = self._model_at(path[:-1])
        match kind:
            case "missing" | "union_tag_not_found":
                message = f"required, but absent{_about(model, path)}"
                message += self._near_unknown(path, model)
            case "extra_forbidden":
                message = f"unknown field; {self._unknown_field(path, model)}"
            case "rule":
                message = context["message"]
            case "enum" | "literal_error" | "union_tag_invalid":
                message = _choice(context, self._value(path))
            case _:
                about = _about(model, path)
                if kind == "string_pattern_mismatch" and not about:
                    about = f"; it must match {context['pattern']}"
                message = f"{_expected(details)}, got {show(details['input'])}{about}"
        return Problem(path, message)

    def _path(self, location: tuple[str | int, ...], *, keep_last: bool) -> Path:
        """The place in the document, from pydantic's, which also names union members and kinds of errors."""
        path: list[str | int] = []
        value = self._document
        for index, step in enumerate(location):
            if _holds(value, step):
                value = value[step]
            elif not (keep_last and index == len(location) - 1):
                continue
            path.append(step)
        return tuple(path)

    def _value(self, path: Path) -> Any:
        value = self._document
        for step in path:
            if not _holds(value, step):
                return None
            value = value[step]
        return value

    def _model_at(self, path: Path) -> type[BaseModel] | None:
        """The model of the mapping at `path`; of a union the one that its `name` chooses."""
        model = self._root
        value = self._document
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

    def _unknown_field(self, path: Path, model: type[BaseModel] | None) -> str:
        name = str(path[-1])
        own = sorted(_aliases(model)) if model else []
        near = _nearest(name, own)
        if near:
            return f"did you mean {near}?"
        homes = [home for home, alias in _all_fields(self._root, ()) if alias == name]
        if path[:-1] in homes:
            # Of another member of the union.
            return f"{self._value((*path[:-1], 'name'))} has none; remove it"
        if homes:
            return f"it belongs under {_dotted(homes[0])}"
        return f"expected one of {', '.join(own)}" if own else "remove it"

    def _near_unknown(self, path: Path, model: type[BaseModel] | None) -> str:
        """What stands in the document instead of a required field, if it looks like it."""
        beside = self._value(path[:-1])
        if not isinstance(beside, dict) or model is None:
            return ""
        unknown = [str(name) for name in beside if name not in _aliases(model)]
        near = _nearest(str(path[-1]), unknown)
        return f"; the file says {near}" if near else ""


def show(value: Any) -> str:
    """A value for a message: what it is, or itself when it is short."""
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
    message = f"expected {' | '.join(names)}, got {show(given)}"
    near = _nearest(str(given), names)
    return f"{message}; did you mean {near}?" if near else message


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
