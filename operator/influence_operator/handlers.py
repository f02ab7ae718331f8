"""The kopf decorators: every event of an InfluenceJob or of a child is handed on, and nothing else happens.

kopf is used for watching alone: its handlers of creation and change, timers and daemons would write
annotations and finalizers on the user's object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import kopf

from influence_operator.cluster.kinds import Kind

Tell = Callable[[Kind, str | None, Mapping[str, Any]], None]


def registry(kinds: tuple[Kind, ...], tell: Tell) -> kopf.OperatorRegistry:
    """Handlers that tell of these kinds."""
    handlers = kopf.OperatorRegistry()
    for kind in kinds:
        _observe(kind, tell, handlers)
    return handlers


def _observe(kind: Kind, tell: Tell, handlers: kopf.OperatorRegistry) -> None:
    @kopf.on.event(kind.group, kind.version, kind.plural, id=kind.kind, registry=handlers)
    async def seen(event: Mapping[str, Any], **_: object) -> None:
        tell(kind, event["type"], event["object"])
