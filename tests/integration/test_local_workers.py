"""The cluster of `influence run`: workers that die, however soon, are replaced; without any it ends."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.scheduler import KilledWorker

from influence_job import local
from influence_job.errors import InfrastructureError, JobError, Reason

ALLOWED = 3
"""Workers that may die under one task."""


@pytest.fixture(autouse=True)
def _quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """That import no torch, of which few may die."""
    monkeypatch.setitem(local.SETTINGS, "distributed.worker.preload", [])
    monkeypatch.setitem(local.SETTINGS, "distributed.scheduler.allowed-failures", ALLOWED)


def dies(times: int, folder: str) -> str:
    """Ends its process, unless so many have ended there."""
    deaths = len(list(Path(folder).iterdir()))
    if deaths == times:
        return "done"
    (Path(folder) / str(deaths)).touch()
    os._exit(1)


@pytest.mark.parametrize("deaths", [ALLOWED, ALLOWED + 1])
def test_each_worker_that_dies_is_replaced_until_too_many_did(deaths: int, tmp_path: Path) -> None:
    """Also one that dies before its nanny is up, which then starts it no more."""
    lost: list[JobError] = []
    with local.local_cluster(1, [], lost.append) as connect, connect() as client:
        future = client.submit(dies, deaths, str(tmp_path))
        if deaths <= ALLOWED:
            assert future.result(timeout=100) == "done"
        else:
            with pytest.raises(KilledWorker):
                future.result(timeout=100)
    assert len(list(tmp_path.iterdir())) == deaths
    assert lost == []


class Cluster:
    """As much of a local cluster as is watched."""

    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(workers={})
        self.workers: dict[int, Any] = {}
        self.closed: list[Any] = []
        self.scaled: list[int] = []
        self.loop = SimpleNamespace(add_callback=lambda _, nanny: self.closed.append(nanny))

    def scale(self, workers: int) -> None:
        self.scaled.append(workers)


class Nanny:
    def __init__(self, alive: bool) -> None:
        self.is_alive = lambda: alive


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What time it is."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(local.time, "monotonic", lambda: now.seconds)
    return now


def test_a_cluster_without_any_worker_for_long_ends_the_run(clock: SimpleNamespace) -> None:
    lost: list[JobError] = []
    cluster = Cluster()
    watch = local._Watch(cluster, 2, lost.append)
    for step in ("there are some", "there are none", "one came and went", "there are none"):
        cluster.scheduler.workers = {"address": 1} if step == "there are some" else {}
        if step == "one came and went":
            watch.remove_worker()
        watch.look()
        assert not lost, step
        clock.seconds += local.GRACE_SECONDS
    clock.seconds += 1
    watch.look()
    assert [(type(error), error.reason) for error in lost] == [(InfrastructureError, Reason.WORKERS_LOST)]
    assert "no worker for 60 s" in lost[0].message


def test_a_nanny_has_time_to_start_its_worker_again(clock: SimpleNamespace) -> None:
    cluster = Cluster()
    sound, idle = Nanny(alive=True), Nanny(alive=False)
    cluster.workers = {0: sound, 1: idle}
    watch = local._Watch(cluster, 2, lambda _: None)
    watch.look()
    assert cluster.workers == {0: sound, 1: idle}
    assert cluster.scaled == []
    clock.seconds += local.RESTART_SECONDS
    watch.look()
    assert cluster.workers == {0: sound}
    assert (cluster.closed, cluster.scaled) == ([idle], [2])
