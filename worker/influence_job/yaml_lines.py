"""YAML text to plain values, remembering the line of every field.

Reads what Kubernetes reads: one document's mappings, lists and scalars, numbers such as `1e-4` among
them (which YAML 1.1 calls text). Duplicate keys are errors, never the last one wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Keys and indices from the root of a document."""

MOST_NODES = 100_000
"""Of one document, aliases expanded: far above any manifest, far below what exhausts memory."""


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


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers of YAML 1.2; dates stay text, as in JSON."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute, of which this is a copy
        first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
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


_PLAIN = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")
)


class _Reader:
    """Turns one document's nodes into values."""

    def __init__(self, loader: _Loader, lines: dict[Path, int]) -> None:
        self._loader = loader
        self._lines = lines
        self._nodes = 0

    def read(self, node: Any, path: Path) -> Any:
        self._nodes += 1
        line = node.start_mark.line + 1
        if self._nodes > MOST_NODES or len(path) > 100:
            raise YamlError(
                line, "expected a manifest, got one whose aliases expand without end; remove them"
            )
        self._lines.setdefault(path, line)
        if node.tag not in _PLAIN:
            raise YamlError(line, f"expected a plain value, got one tagged {node.tag}; remove the tag")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(child, (*path, index)) for index, child in enumerate(node.value)]
        return self._loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = key.value, key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(line, "expected text as a field's name")
            if name in seen:
                raise YamlError(
                    line, f"field {name!r} stands twice, first in line {seen[name]}; keep one of them"
                )
            seen[name] = line
        self._loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key, child in node.value:
            self._lines.setdefault((*path, key.value), key.start_mark.line + 1)
            result[key.value] = self.read(child, (*path, key.value))
        return result
