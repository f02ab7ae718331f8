"""How a replica starts when kinds that it needs are not there yet: the API server learns of them later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from kubernetes.aio.client import Configuration

from influence_operator import process
from influence_operator.cluster.kinds import DASK_KINDS, INFLUENCE_JOB, WATCHED_KINDS
from influence_operator.process import Replica
from influence_operator.settings import Defaults, Settings
from scripted_api import ScriptedApi, scripted_api


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOOK_SECONDS", 0.1)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def replica_of(api: ScriptedApi) -> AsyncIterator[Replica]:
    replica = Replica(Settings(Defaults("worker:1")), Configuration(host=api.url))
    running = asyncio.create_task(replica.run())
    try:
        yield replica
        assert not running.done(), running.exception()
    finally:
        replica.stop_watching()
        for stream in api.streams.values():
            stream.put_nowait(None)
        running.cancel()
        await asyncio.wait((running,))
        await replica.close()


def watched(api: ScriptedApi) -> set[str]:
    return {plural for plural, query in api.queries if "watch" in query}


def test_without_the_kinds_of_dask_kubernetes_it_works_and_watches_them_when_they_come():
    async def scenario() -> None:
        async with scripted_api() as api:
            api.kinds -= set(DASK_KINDS)
            async with replica_of(api) as replica:
                await until(lambda: watched(api) == {k.plural for k in WATCHED_KINDS if k in api.kinds})
                await until(lambda: replica.unready() is None)
                assert not replica.sees_dask()

                api.kinds |= set(DASK_KINDS)

                await until(lambda: watched(api) == {kind.plural for kind in WATCHED_KINDS})
                await until(replica.sees_dask)
                await until(lambda: replica.unready() is None)

    asyncio.run(scenario())


def test_it_waits_for_its_own_kind_and_is_not_ready_meanwhile():
    async def scenario() -> None:
        async with scripted_api() as api:
            api.kinds -= {INFLUENCE_JOB}
            async with replica_of(api) as replica:
                await until(lambda: api.lease)
                await asyncio.sleep(0.5)
                assert replica.unready() is not None
                assert replica.sick() is None

                api.kinds |= {INFLUENCE_JOB}

                await until(lambda: replica.unready() is None)

    asyncio.run(scenario())


def test_a_leader_whose_watches_fall_silent_is_to_be_started_anew(monkeypatch: pytest.MonkeyPatch):
    """What `/healthz` says, and with it the liveness probe. Any sign of life from each watch will do."""
    monkeypatch.setattr(process, "SILENCE", 1.0)

    async def scenario() -> None:
        async with scripted_api() as api, replica_of(api) as replica:
            assert replica.sick() is None
            await until(lambda: replica.unready() is None)
            assert replica.sick() is None, "every watch has begun a moment ago"

            await until(replica.sick)
            assert replica.sick() == "no watch event for 1 s"
            bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "101"}}}
            for kind in WATCHED_KINDS:
                named = {"kind": kind.kind, "apiVersion": kind.api_version}
                api.streams[kind.plural].put_nowait({**bookmark, "object": bookmark["object"] | named})
            await until(lambda: replica.sick() is None)

    asyncio.run(scenario())


def job_in(phase: str, number: int) -> dict[str, Any]:
    """A suspended job that another manager carries out, so that no pass changes it."""
    metadata = {"name": f"job-{number}", "namespace": "team", "uid": f"u-{number}", "resourceVersion": "7"}
    return {
        "apiVersion": INFLUENCE_JOB.api_version,
        "kind": INFLUENCE_JOB.kind,
        "metadata": metadata,
        "spec": {"managedBy": "another"},
        **({"status": {"phase": phase}} if phase else {}),
    }


def test_its_metrics_count_jobs_by_phase_and_say_that_nothing_waits():
    async def scenario() -> None:
        async with scripted_api() as api:
            phases = ["Suspended", "Running", "Suspended", ""]
            api.lists[INFLUENCE_JOB.plural] = [job_in(phase, number) for number, phase in enumerate(phases)]
            async with replica_of(api) as replica:
                await until(lambda: 'reconciles_total{result="done"} 4.0' in replica.scrape().decode())
                told = replica.scrape().decode()

        assert 'influence_operator_jobs{phase="Suspended"} 2.0' in told
        assert 'influence_operator_jobs{phase="Running"} 1.0' in told
        assert 'influence_operator_jobs{phase="Pending"} 1.0' in told
        assert "influence_operator_queue_depth 0.0" in told
        assert "influence_operator_queue_oldest_seconds 0.0" in told
        assert "influence_operator_leader 1.0" in told

    asyncio.run(scenario())


def test_a_standby_does_not_watch():
    async def scenario() -> None:
        async with scripted_api() as api:
            spec = {"holderIdentity": "another", "leaseDurationSeconds": 3600}
            api.lease = {"metadata": {"name": "influence-operator", "resourceVersion": "1"}, "spec": spec}
            async with replica_of(api) as replica:
                await asyncio.sleep(0.5)

                assert replica.unready() is None
                assert api.queries == []
                assert api.lease["spec"]["holderIdentity"] == "another"

    asyncio.run(scenario())
