"""Workers are retired by a scheduler whose image is the tenant's: what it does not answer changes nothing."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from kubernetes.aio.client import Configuration

from hostile_http import Answer, HostileServer, hostile_server, sending
from influence_operator.cluster.api import Api
from influence_operator.cluster.apply import Applier
from influence_operator.cluster.cache import Cache, JobKey
from influence_operator.cluster.kinds import KINDS
from influence_operator.cluster.memory import Memory, Outcome
from influence_operator.cluster.scheduler import SchedulerClient
from influence_operator.decisions.actions import RetireWorkers
from influence_operator.metrics import Metrics
from operator_objects import NOW, UID, World, base, computing, pod, worker_name
from scripted_api import scripted_api

KEY = JobKey("team", "digits", UID)


def scaled_down(scheduler: HostileServer, attempt: int = 1, **status: Any) -> tuple[Outcome, list[str]]:
    """How retiring one of two workers went, and what was written to the API server."""
    world = computing(workers=2)
    world.add(pod(attempt, "scheduler", f"{base(1)}-scheduler", podIP="127.0.0.1", **status))
    world.change(workers={"replicas": 1})
    (action,) = world.step(1).actions
    assert isinstance(action, RetireWorkers)
    return asyncio.run(_apply(world, action, scheduler.port))


async def _apply(world: World, action: RetireWorkers, port: int) -> tuple[Outcome, list[str]]:
    cache = Cache()
    for thing in world.objects:
        cache.put(next(kind for kind in KINDS if kind.kind == thing["kind"]), thing)
    async with scripted_api() as server:
        api, schedulers = Api(Configuration(host=server.url), Metrics()), SchedulerClient(port)
        try:
            outcome = await Applier(api, cache, schedulers, lambda: NOW).apply(KEY, (action,))
        finally:
            await schedulers.close()
            await api.close()
        return outcome, server.writes


def workers_named(*indices: int) -> bytes:
    """The answer of `get_workers`."""
    named = [{"name": worker_name(1, index), "address": f"tls://{index}"} for index in indices]
    return json.dumps({"workers": named}).encode()


def in_turn(*answers: Answer) -> Answer:
    """One for each connection."""
    left = list(answers)
    return lambda connection: left.pop(0)(connection)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (sending(b"", "404 Not Found"), "get_workers: expected status 200, got 404"),
        (
            in_turn(sending(workers_named(0, 1)), sending(b"", "404 Not Found")),
            "retire_workers: expected status 200, got 404",
        ),
        (in_turn(sending(workers_named(0, 1)), sending(b"{}")), "chose 0 of 1 workers"),
    ],
    ids=["no API", "no retirement", "nobody"],
)
def test_a_scheduler_that_chooses_nobody_loses_no_worker_and_fails_no_pass(answer: Answer, words: str):
    with hostile_server(answer) as server:
        outcome, written = scaled_down(server)

    assert words in outcome.unretired
    assert replace(outcome, unretired="") == Outcome(), "neither done, nor an error of the whole pass"
    assert written == []


@pytest.mark.parametrize(
    "changes", [{"conditions": []}, {"attempt": 2}], ids=["not ready", "of another attempt"]
)
def test_while_the_attempt_has_no_scheduler_any_worker_goes_and_nobody_is_asked(changes: dict[str, Any]):
    with hostile_server(sending(b"", "404 Not Found")) as server:
        outcome, written = scaled_down(server, **changes)

    assert server.requests == []
    assert outcome.unretired == ""
    assert written == [
        f"DELETE /apis/apps/v1/namespaces/team/deployments/{worker_name(1, 0)}",
        f"PATCH /apis/kubernetes.dask.org/v1/namespaces/team/daskclusters/{base(1)}",
    ]


def test_why_nobody_was_chosen_is_remembered_until_something_was_done():
    memory = Memory()
    memory.learn((), Outcome(unretired="404"))
    memory.learn((), Outcome())
    assert memory.unretired == "404"

    memory.learn((), Outcome(done=1))

    assert memory.unretired == ""


def test_whom_the_scheduler_chooses_is_deleted_and_then_the_number_is_written():
    chosen = json.dumps({"tls://1": {"name": worker_name(1, 1)}}).encode()
    with hostile_server(in_turn(sending(workers_named(0, 1)), sending(chosen))) as server:
        outcome, written = scaled_down(server)

    assert outcome.unretired == ""
    assert written == [
        f"DELETE /apis/apps/v1/namespaces/team/deployments/{worker_name(1, 1)}",
        f"PATCH /apis/kubernetes.dask.org/v1/namespaces/team/daskclusters/{base(1)}",
    ]
