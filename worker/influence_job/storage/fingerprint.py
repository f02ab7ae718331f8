"""What determines the numbers of a job, and how two of them differ, in words.

A fingerprint is a nested JSON dict made by the driver: parameter digest, method, stored plan, device,
precision, source digest, data identity. A part that is None, or a whole part that is missing, is not
known (yet) and is not compared; a key that is missing inside a part differs from one that is there, and
a value from one of another type: JSON's 1, true and "1" are three. 1.0 is 1, as which the API server of a
cluster gives it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Fingerprint = Mapping[str, Any]

_ABSENT = object()
"""In place of a key that only the other side has: equal to no value that a document can hold."""
_SHOWN = 80
"""Characters of a value in a sentence."""


def differences(stored: Fingerprint, given: Fingerprint) -> list[str]:
    """One sentence for each part in which a job differs from the store it would resume."""
    return [f"{path}: {_sentence(before, now)}" for path, before, now in _differing((), stored, given)]


def _differing(path: tuple[str, ...], stored: Any, given: Any) -> Iterator[tuple[str, Any, Any]]:
    if stored is None or given is None:
        return
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        missing = _ABSENT if path else None
        for name in [*stored, *(name for name in given if name not in stored)]:
            yield from _differing((*path, str(name)), stored.get(name, missing), given.get(name, missing))
    elif stored is _ABSENT or given is _ABSENT or _written(stored) != _written(given):
        yield ".".join(path), stored, given


def _written(value: Any) -> str:
    """The value as JSON, which tells types apart, takes tuples for lists, and writes every NaN alike."""
    return "nothing" if value is _ABSENT else json.dumps(_whole(value), sort_keys=True)


def _whole(value: Any) -> Any:
    """With whole numbers without a point."""
    if isinstance(value, Mapping):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sentence(before: Any, now: Any) -> str:
    words = (_words(before), _words(now))
    if words[0] == words[1]:
        words = (_shortened(_written(before)), _shortened(_written(now)))
    return f"the store was made with {words[0]}, this job says {words[1]}"


def _words(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    return _shortened(str(list(value) if isinstance(value, tuple) else value))


def _shortened(words: str) -> str:
    return words if len(words) <= _SHOWN else f"{words[: _SHOWN - 1]}…"
