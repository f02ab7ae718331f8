"""What a pass reads of the network."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from influence_operator.cluster.cache import JobKey
from influence_operator.cluster.gather import Gatherer
from influence_operator.cluster.memory import Memory
from influence_operator.decisions.snapshot import Children
from operator_objects import UID, child, influence_job

NAME = "digits-0a1b2-1"


class OneConfigMap:
    """An API server with the task's source, which counts how often it is read."""

    def __init__(self) -> None:
        self.reads: list[str] = []

    async def get(self, kind: Any, namespace: str, name: str) -> dict[str, Any]:
        self.reads.append(name)
        return {"metadata": {"name": name}, "data": {"m.py": "x"}}


class Cached:
    """The watches' cache, with some children."""

    def __init__(self, **kinds: Any) -> None:
        self._children = Children(**kinds)

    def children(self, key: Any) -> Children:
        return self._children


class NoEvents:
    """Nobody warned of anything."""

    async def warnings(self, key: Any) -> tuple[()]:
        return ()


DRIVER = child("Job", NAME, 1, UID)
COPY = child("ConfigMap", NAME, 1, UID)
OTHERS = child("ConfigMap", "digits-0a1b2-2", 2, UID)


@pytest.mark.parametrize(
    ("children", "read"),
    [
        ({}, True),
        ({"driver_jobs": (DRIVER,), "config_maps": (COPY,)}, False),
        ({"driver_jobs": (DRIVER,)}, True),
        ({"driver_jobs": (DRIVER,), "config_maps": (OTHERS,)}, True),
    ],
    ids=["no attempt", "an attempt and its copy", "the copy was deleted", "another attempt's copy"],
)
def test_the_tasks_source_is_read_where_no_attempt_has_its_copy(children: dict[str, Any], read: bool) -> None:
    job, api = influence_job(task={"source": {"configMap": {"name": "code"}}}), OneConfigMap()
    gatherer = Gatherer(
        cast(Any, api),
        cast(Any, Cached(**children)),
        cast(Any, NoEvents()),
        cast(Any, None),
        lambda: True,
        clock=lambda: datetime(2026, 3, 1, tzinfo=UTC),
    )
    snapshot = asyncio.run(gatherer.snapshot(JobKey("team", "digits", UID), job, Memory()))
    assert api.reads == (["code"] if read else [])
    assert (snapshot.source is not None) is read
