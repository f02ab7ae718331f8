"""What determines the numbers of a job, and how two of them differ, in words.

A fingerprint is a nested JSON dict made by the driver: parameter digest, method, stored plan, device,
precision, source digest, data identity. A part that is None, or a whole part that is missing, is not
known (yet) and is not compared; a key that is missing inside a part differs from one that is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Fingerprint = Mapping[str, Any]

_NOTHING = "nothing"
_SHOWN = 80
"""Characters of a value in a sentence."""


def differences(stored: Fingerprint, given: Fingerprint) -> list[str]:
    """One sentence for each part in which a job differs from the store it would resume."""
    return [
        f"{path}: the store was made with {_words(before)}, this job says {_words(now)}"
        for path, before, now in _differing((), stored, given)
    ]


def _differing(path: tuple[str, ...], stored: Any, given: Any) -> Iterator[tuple[str, Any, Any]]:
    if stored is None or given is None:
        return
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        missing = _NOTHING if path else None
        for name in [*stored, *(name for name in given if name not in stored)]:
            yield from _differing((*path, str(name)), stored.get(name, missing), given.get(name, missing))
    elif _plain(stored) != _plain(given):
        yield ".".join(path), stored, given


def _plain(value: Any) -> Any:
    """Sequences as JSON would give them back."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _words(value: Any) -> str:
    words = str(_plain(value))
    return words if len(words) <= _SHOWN else f"{words[: _SHOWN - 1]}…"
