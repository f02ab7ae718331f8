"""Kubernetes Events: ours about jobs, and the warnings of others about their children."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from operator import itemgetter
from typing import Any
from weakref import WeakValueDictionary

from influence_operator.cluster.api import FIELD_MANAGER, Api
from influence_operator.cluster.cache import JobKey
from influence_operator.cluster.errors import ClusterError
from influence_operator.cluster.kinds import EVENT, INFLUENCE_JOB
from influence_operator.decisions.actions import Event
from influence_operator.manifests.names import children_prefix, may_be_a_childs

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
        self._listed: dict[str, list[Object]] = {}
        """Warnings by namespace, newest first, while they are fresh."""
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

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
        prefix = children_prefix(key.name, key.uid)
        about = (event for event in listed if event["involvedObject"]["name"].startswith(prefix))
        return tuple(islice(about, KEPT))

    async def _namespace_warnings(self, namespace: str) -> list[Object]:
        lock = self._locks.setdefault(namespace, asyncio.Lock())
        async with lock:
            if namespace not in self._listed:
                self._listed[namespace] = await self._list(namespace)
                asyncio.get_running_loop().call_later(FRESH_SECONDS, self._listed.pop, namespace)
            return self._listed[namespace]

    async def _list(self, namespace: str) -> list[Object]:
        """The warnings that may be about children, newest first."""
        looked_at, found = 0, []
        async for event in self._api.list(EVENT, namespace, fieldSelector="type=Warning"):
            if may_be_a_childs(_name(event)):
                found.append(_trimmed(event))
            looked_at += 1
            if looked_at >= MOST_LISTED:
                break
        return sorted(found, key=itemgetter("lastTimestamp"), reverse=True)

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


def _name(event: Object) -> str:
    """Of what the event is about."""
    about = event.get("involvedObject")
    return str(about.get("name", "")) if isinstance(about, dict) else ""


def _trimmed(event: Object) -> Object:
    """What decisions read of it, and its time."""
    return {
        "involvedObject": {"kind": event["involvedObject"].get("kind"), "name": _name(event)},
        "reason": event.get("reason"),
        "message": event.get("message"),
        "lastTimestamp": _time(event),
    }


def _time(event: Object) -> str:
    """RFC 3339 in UTC, which sorts as text."""
    series = event.get("series") or {}
    created = event["metadata"].get("creationTimestamp")
    stamps = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"), created)
    return next((str(stamp) for stamp in stamps if stamp), "")
