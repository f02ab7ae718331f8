"""Kubernetes Events: ours about jobs, and the warnings of others about their children."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from influence_operator.cluster.api import FIELD_MANAGER, Api
from influence_operator.cluster.cache import JobKey
from influence_operator.cluster.errors import ClusterError
from influence_operator.cluster.kinds import EVENT, INFLUENCE_JOB
from influence_operator.decisions.actions import Event

Object = Mapping[str, Any]

FRESH_SECONDS = 5.0
"""Warnings of a namespace are listed at most so often, however many jobs wait in it."""
MOST_LISTED = 10_000
"""Events looked at per list; a namespace with more has other worries."""
KEPT = 50
"""Warnings per job that a decision gets to see."""

log = logging.getLogger(__name__)


class Events:
    """Posts our events and finds those about children."""

    def __init__(self, api: Api, pod: str) -> None:
        self._api = api
        self._pod = pod
        self._listed: dict[str, tuple[float, list[Object]]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def post(self, key: JobKey, events: tuple[Event, ...]) -> None:
        """Posts events about a job. One that is lost changes nothing."""
        for event in events:
            try:
                await self._api.create(EVENT, key.namespace, self._body(key, event))
            except ClusterError as error:
                log.warning("%s: event %s was not posted: %s", key, event.reason, error)

    async def warnings(self, key: JobKey) -> tuple[Object, ...]:
        """Warnings about the job's children and what belongs to these, newest first."""
        try:
            listed = await self._namespace_warnings(key.namespace)
        except ClusterError as error:
            log.warning("%s: warnings cannot be listed: %s", key, error)
            return ()
        prefix = f"{key.name}-{key.uid[:5]}-"
        about = [event for event in listed if str(event["involvedObject"].get("name", "")).startswith(prefix)]
        return tuple(sorted(about, key=_time, reverse=True)[:KEPT])

    async def _namespace_warnings(self, namespace: str) -> list[Object]:
        lock = self._locks.setdefault(namespace, asyncio.Lock())
        async with lock:
            at, events = self._listed.get(namespace, (float("-inf"), []))
            if time.monotonic() < at + FRESH_SECONDS:
                return events
            events = []
            async for event in self._api.list(EVENT, namespace, fieldSelector="type=Warning"):
                if isinstance(event.get("involvedObject"), dict):
                    events.append(event)
                if len(events) >= MOST_LISTED:
                    break
            self._listed[namespace] = (time.monotonic(), events)
            return events

    def _body(self, key: JobKey, event: Event) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "metadata": {"name": f"{key.name}.{secrets.token_hex(8)}", "namespace": key.namespace},
            "involvedObject": {
                "apiVersion": INFLUENCE_JOB.api_version,
                "kind": INFLUENCE_JOB.kind,
                "namespace": key.namespace,
                "name": key.name,
                "uid": key.uid,
            },
            "type": event.type,
            "reason": event.reason[:128],
            "message": event.message[:1024],
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "reportingInstance": self._pod,
        }


def _time(event: Object) -> str:
    """RFC 3339 in UTC, which sorts as text."""
    series = event.get("series") or {}
    created = event["metadata"].get("creationTimestamp")
    stamps = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"), created)
    return next((str(stamp) for stamp in stamps if stamp), "")
