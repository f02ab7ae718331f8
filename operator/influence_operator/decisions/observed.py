"""Reading functions over Kubernetes objects, for everything in `decisions`.

Objects come from the API server, but what stands in many of their fields was written by users, by their
containers or by other controllers. A field that is absent or of another type reads as nothing; no function
here raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from influence_operator.decisions.snapshot import Object
from influence_operator.manifests import names

HIGHEST_ATTEMPT = 999_999
"""Labels that name a higher attempt are none of ours: children's names would be too long."""
_INTEGERS = 2**53
"""Beyond it JSON readers disagree."""


def look(source: object, *path: str) -> Any:
    """What stands at `path`; None where there is nothing, or no mapping on the way."""
    for key in path:
        if not isinstance(source, dict | Mapping):
            return None
        source = source.get(key)
    return source


def text(source: object, *path: str) -> str:
    """The string at `path`, else the empty one."""
    value = look(source, *path)
    return value if isinstance(value, str) else ""


def whole(source: object, *path: str) -> int | None:
    """The whole number at `path`."""
    value = look(source, *path)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _INTEGERS:
        return None
    return value


def moment(source: object, *path: str) -> datetime | None:
    """The time at `path`, in UTC."""
    value = look(source, *path)
    if not isinstance(value, str):
        return None
    try:
        return in_utc(datetime.fromisoformat(value))
    except ValueError:
        return None


def in_utc(time: datetime) -> datetime | None:
    """The same moment in UTC; a time without zone is taken to be UTC. None beyond the calendar's ends."""
    if time.tzinfo is None:
        return time.replace(tzinfo=UTC)
    try:
        return time.astimezone(UTC)
    except (OverflowError, ValueError):
        return None


def entries(source: object, *path: str) -> Iterator[Mapping[str, Any]]:
    """The mappings in the list at `path`."""
    value = look(source, *path)
    if isinstance(value, list | tuple):
        for entry in value:
            if isinstance(entry, dict | Mapping):
                yield entry


def name(thing: Object) -> str:
    """The empty string for none, as for `uid` and `label`."""
    return text(thing, "metadata", "name")


def uid(thing: Object) -> str:
    """What tells it from an earlier object of the same name."""
    return text(thing, "metadata", "uid")


def label(thing: Object, key: str) -> str:
    """The value of one label."""
    return text(thing, "metadata", "labels", key)


def created(thing: Object) -> datetime | None:
    """When the API server took it."""
    return moment(thing, "metadata", "creationTimestamp")


def deleted(thing: Object) -> datetime | None:
    """When it was asked to be gone, its grace period included."""
    return moment(thing, "metadata", "deletionTimestamp")


def being_deleted(thing: Object) -> bool:
    """Whether it is on its way out."""
    return look(thing, "metadata", "deletionTimestamp") is not None


def attempt_of(thing: Object) -> int:
    """The number on its label, else 0."""
    digits = label(thing, names.ATTEMPT)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 6):
        return 0
    return int(digits)


def owned_by(thing: Object, owners: Iterable[str]) -> bool:
    """Whether one of these UIDs owns it."""
    known = set(owners) - {""}
    return any(text(owner, "uid") in known for owner in entries(thing, "metadata", "ownerReferences"))


def condition(thing: Object, kind: str) -> Mapping[str, Any] | None:
    """The condition of that type, whatever its status."""
    return next((c for c in entries(thing, "status", "conditions") if text(c, "type") == kind), None)


def holds(thing: Object, kind: str) -> bool:
    """Whether the condition of that type is True."""
    return text(condition(thing, kind), "status") == "True"


def ended(pod: Object) -> bool:
    """Whether every container of the pod has ended for good."""
    return text(pod, "status", "phase") in ("Succeeded", "Failed")


def ready(pod: Object) -> bool:
    """Whether the pod is ready and is to stay."""
    return holds(pod, "Ready") and not being_deleted(pod)


def containers(pod: Object) -> Iterator[Mapping[str, Any]]:
    """The status of each container, those that only initialise first."""
    yield from entries(pod, "status", "initContainerStatuses")
    yield from entries(pod, "status", "containerStatuses")
