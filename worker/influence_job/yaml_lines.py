"""YAML text to plain values, remembering the line of every field.

Reads what Kubernetes reads: one document's mappings, lists and scalars, numbers such as `1e-4` among
them (which YAML 1.1 calls text), times such as `1:30` not (which YAML 1.1 calls the number 90). Duplicate
keys are errors, never the last one wins.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Keys and indices from the root of a document."""

MOST_NODES = 100_000
"""Of one document, aliases expanded: far above any manifest, far below what exhausts memory."""
DEEPEST = 100
"""Lists and mappings inside each other: far below what exhausts the interpreter's stack."""


class YamlError(Exception):
    """Text that is no YAML document; `line` counts from 1, 0 when there is none."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass
class Document:
    """One document: its value and where each part of it stands."""

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int:
        """Line of `path`, or of the nearest part above it that is written down."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


_SHOWN = 40
"""Characters of a value in a sentence."""
_TAG = "tag:yaml.org,2002:"
_OURS = frozenset(f"{_TAG}{kind}" for kind in ("timestamp", "value", "int", "float"))
"""Tags of plain scalars that we take otherwise than YAML 1.1: what is none of our numbers is text."""


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers of Kubernetes; dates and `=` stay text, as in JSON."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute, of which this is a copy
        first: [(tag, form) for tag, form in resolvers if tag not in _OURS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.has_aliases = False

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, which refuses to be too deep while the stack still holds it."""
        if self.depth > DEEPEST:
            line = self.peek_event().start_mark.line + 1
            raise YamlError(line, f"expected a manifest, got values nested more than {DEEPEST} deep")
        self.has_aliases = self.has_aliases or self.check_event(yaml.AliasEvent)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(
    f"{_TAG}int",
    re.compile(r"^[-+]?(0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"^([-+]?([0-9][0-9_]*)\.[0-9_]*([eE][-+]?[0-9]+)?|[-+]?(\.[0-9][0-9_]*|[0-9]+)[eE][-+]?[0-9]+|"
        r"[-+]?\.[0-9][0-9_]*|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_documents(text: str) -> list[Document]:
    """All documents of `text` that are not empty.

    Raises:
        YamlError: not YAML, a duplicate key, or a tag or alias that a manifest cannot hold.
    """
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        raise YamlError(0, f"expected YAML text: {error}") from error
    try:
        documents = []
        while loader.check_node():
            document = Document(None)
            document.value = _Reader(loader, document.lines).read(loader.get_node(), ())
            if document.value is not None:
                documents.append(document)
        return documents
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        raise YamlError(line, _explain(error, text, line)) from error
    finally:
        loader.dispose()


def _explain(error: yaml.MarkedYAMLError, text: str, line: int) -> str:
    problem = error.problem or "cannot be read"
    message = f"expected YAML, but {problem}"
    lines = text.splitlines()
    if 0 < line <= len(lines) and "\t" in lines[line - 1]:
        return f"{message}; the line holds a tab: indent with spaces"
    return f"{message}; check the indentation, and quote text that holds ': ' or ' #'"


_SCALARS = {
    f"{_TAG}str": "text",
    f"{_TAG}int": "a whole number",
    f"{_TAG}float": "a number",
    f"{_TAG}bool": "true or false",
    f"{_TAG}null": "nothing",
}
"""What a manifest's scalars are tagged, and what each tag promises."""


class _Reader:
    """Turns one document's nodes into values."""

    def __init__(self, loader: _Loader, lines: dict[Path, int]) -> None:
        self._loader = loader
        self._lines = lines
        self._nodes = 0

    def read(self, node: Any, path: Path) -> Any:
        self._nodes += 1
        line = _line(node)
        self._refuse_too_many(line, len(path))
        self._lines.setdefault(path, line)
        if isinstance(node, yaml.MappingNode):
            _check_tag(node, (f"{_TAG}map",), "a mapping")
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            _check_tag(node, (f"{_TAG}seq",), "a list")
            return [self.read(child, (*path, index)) for index, child in enumerate(node.value)]
        _check_tag(node, _SCALARS, "a value")
        return self._scalar(node)

    def _refuse_too_many(self, line: int, depth: int) -> None:
        if self._nodes <= MOST_NODES and depth <= DEEPEST:
            return
        if self._loader.has_aliases:
            raise YamlError(
                line, "expected a manifest, got one whose aliases expand without end; remove them"
            )
        raise YamlError(line, f"expected a manifest, got more than {MOST_NODES} values")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        """The value that a tag promises, whoever wrote the tag: the author or the form of the value."""
        form = self._loader.resolve(yaml.ScalarNode, node.value, (True, False))
        fits = node.tag in (form, f"{_TAG}str") or (node.tag, form) == (f"{_TAG}float", f"{_TAG}int")
        try:
            if fits:
                return self._loader.construct_object(node)
            cause = None
        except ValueError as error:  # thousands of digits, or none, as in `0x_`
            cause = error
        given = node.value if len(node.value) <= _SHOWN else f"{node.value[: _SHOWN - 1]}…"
        raise YamlError(
            _line(node), f"expected {_SCALARS[node.tag]}, got {given!r}; quote it if it is text"
        ) from cause

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = key.value, _line(key)
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(line, "expected text as a field's name")
            if name in seen:
                raise YamlError(
                    line, f"field {name!r} stands twice, first in line {seen[name]}; keep one of them"
                )
            seen[name] = line
        try:
            self._loader.flatten_mapping(node)
        except RecursionError as error:
            raise YamlError(
                _line(node), "expected a manifest, got mappings merged (<<) without end"
            ) from error
        result: dict[str, Any] = {}
        for key, child in node.value:
            self._lines.setdefault((*path, key.value), _line(key))
            result[key.value] = self.read(child, (*path, key.value))
        return result


def _check_tag(node: yaml.Node, fitting: Collection[str], what: str) -> None:
    if node.tag not in fitting:
        raise YamlError(_line(node), f"expected a plain value, got {what} tagged {node.tag}; remove the tag")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
