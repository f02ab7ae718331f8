"""What many jobs cost: measurements on the test cluster, of a size that the caller chooses.

`make bench` runs them with `FULL`, the tests with `SMALL`; both get the same figures. Requests are counted
from the audit log, for each namespace by itself, so other jobs in the cluster cost accuracy in times and
memory alone.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import api_requests
import pods
from api_requests import OURS, THEIRS, Leader, Requests, asked, settled
from cluster import Cluster
from cluster_jobs import RESOURCE, ClusterJob, unplaced
from cluster_storage import ClusterStorage
from dask_jobs import FAILED, SUCCESSFUL, DaskJob
from influence_operator.manifests import names
from machine import AuditLog

CHILDREN = {"configmaps": 1, "networkpolicies": 3, "secrets": 1, "jobs": 1}
"""Per job, before its driver has asked for workers."""
SIDE_BY_SIDE = 8
"""Requests of ours at a time."""
WATCHED_SECONDS = 20.0
"""For how long jobs that wait are watched doing so: two of the passes that look for a change."""
DEADLINE_SECONDS = 2
"""After which jobs that are to fail do."""


@dataclass(frozen=True)
class Sizes:
    """How many of each."""

    waiting: int
    """Jobs whose pods no node accepts."""
    suspended: int
    finished: int
    foreign: int
    """Pods that are none of ours."""
    running: int


SMALL = Sizes(waiting=30, suspended=30, finished=30, foreign=300, running=2)
FULL = Sizes(waiting=300, suspended=300, finished=300, foreign=5000, running=6)


@dataclass(frozen=True)
class Waiting:
    """Jobs created at once whose pods no node accepts."""

    jobs: int
    seconds: float
    """From the first job to the last child."""
    delays: tuple[float, ...]
    """Of each job's last child after the job."""
    until_children: Requests
    """What the operator asked until the last job had its children."""
    until_settled: Requests
    """Until every status said that no node accepts the pod."""
    while_waiting: Requests
    """In `WATCHED_SECONDS` afterwards."""
    memory: tuple[float, float]
    """Of the operator in bytes, before and with the jobs."""
    processor: float
    """Of the operator, as a share of one core while the jobs wait."""


@dataclass(frozen=True)
class Resting:
    """Suspended and finished jobs while the operator is started anew."""

    jobs: int
    phases: tuple[str, ...]
    """That the jobs are in, each once."""
    restart: Requests
    """What the operator asked about their namespace after its restart."""
    memory: float
    """Of the new leader."""


@dataclass(frozen=True)
class Foreign:
    """Pods that are none of ours."""

    pods: int
    memory: tuple[float, float]
    """Of the operator in bytes, before and with the pods."""
    requests: Requests
    """About the pods' namespace."""
    told: float
    """Events about pods that its watches got meanwhile, those of others' jobs included."""


@dataclass(frozen=True)
class Side:
    """Jobs that ran side by side, each with one worker, to their end."""

    jobs: int
    seconds: float
    """From the first job to the end of the last."""
    ours: Requests
    """Of our operator; empty for a DaskJob."""
    theirs: Requests
    """Of the dask operator."""

    @property
    def requests(self) -> int:
        """Of both, for all jobs."""
        return self.ours.total() + self.theirs.total()


# -- jobs that wait -------------------------------------------------------------------------------


def waiting(cluster: Cluster, jobs: int) -> Waiting:
    """Creates jobs for a node that is nowhere."""
    leader = Leader(cluster)
    with namespace(cluster) as where:
        before, log = leader.memory, AuditLog()
        create_jobs(cluster, where, (unplaced(f"waiting-{n}") for n in range(jobs)))
        cluster.wait_until(lambda: children(log, where) == jobs, "driver Jobs", 60 + jobs, where)
        until_children = asked(log, OURS, where)
        assert_children(cluster, where, jobs)
        cluster.wait_until(
            lambda: reasons(cluster, where, "ClusterReady") == ["Unschedulable"] * jobs,
            "every status to name the cause",
            60 + jobs,
        )
        until_settled = settled(log, OURS, where)
        later, processor, since = AuditLog(), leader.processor_seconds, time.monotonic()
        time.sleep(WATCHED_SECONDS)
        while_waiting = asked(later, OURS, where)
        share = (leader.processor_seconds - processor) / (time.monotonic() - since)
        made, last = api_requests.created(log, where, "influencejobs"), last_children(log, where)
        return Waiting(
            jobs=jobs,
            seconds=(max(last.values()) - min(made.values())).total_seconds(),
            delays=tuple(sorted((last[name] - made[name]).total_seconds() for name in made)),
            until_children=until_children,
            until_settled=until_settled,
            while_waiting=while_waiting,
            memory=(before, leader.memory),
            processor=share,
        )


def children(log: AuditLog, namespace: str) -> int:
    """Jobs that have their driver Job, which is made last."""
    return len(last_children(log, namespace))


def last_children(log: AuditLog, namespace: str) -> dict[str, datetime.datetime]:
    """When each job got its driver Job, called JOB-UID-ATTEMPT."""
    made = api_requests.created(log, namespace, "jobs")
    return {name.rsplit("-", 2)[0]: stamp for name, stamp in made.items()}


def assert_children(cluster: Cluster, namespace: str, jobs: int) -> None:
    """Every job has each of its children once."""
    found = {kind: len(cluster.get(kind, "", namespace, names.JOB_UID)) for kind in CHILDREN}
    assert found == {kind: number * jobs for kind, number in CHILDREN.items()}, found


# -- jobs that rest -------------------------------------------------------------------------------


def resting(cluster: Cluster, suspended: int, finished: int) -> Resting:
    """Suspends jobs and lets others end, half of them Failed, then restarts the operator.

    Restarting it disturbs whatever else runs in the cluster, and only that: nothing else here does.
    """
    leader = Leader(cluster)
    with namespace(cluster) as where:
        failing, completing, log = finished // 2, finished - finished // 2, AuditLog()
        documents = [unplaced(f"suspended-{n}", suspend=True) for n in range(suspended)]
        documents += [unplaced(f"complete-{n}", suspend=True) for n in range(completing)]
        documents += [
            unplaced(f"failed-{n}", startupDeadlineSeconds=DEADLINE_SECONDS) for n in range(failing)
        ]
        create_jobs(cluster, where, documents)
        with_status = suspended + completing
        in_pieces(
            lambda name: complete(cluster, where, name),
            (document["metadata"]["name"] for document in documents[suspended:with_status]),
        )
        wanted = ["Complete"] * completing + ["Failed"] * failing + ["Suspended"] * suspended
        cluster.wait_until(
            lambda: phases(cluster, where) == wanted, "every job to rest", 90 + len(documents), where
        )
        settled(log, OURS, where, 90 + len(documents))
        before, again = jobs_in(cluster, where), AuditLog()
        leader.restart()
        time.sleep(api_requests.QUIET_SECONDS)
        assert jobs_in(cluster, where) == before, "the restart changed a job"
        return Resting(
            jobs=len(documents),
            phases=tuple(sorted(set(phases(cluster, where)))),
            restart=asked(again, OURS, where),
            memory=leader.memory,
        )


def complete(cluster: Cluster, namespace: str, name: str) -> None:
    """Lets a job have completed, as its status alone tells: hundreds of real runs would take hours."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    ended = {"status": "True", "reason": "Complete", "message": "done", "lastTransitionTime": now}
    status = {
        "observedGeneration": 1,
        "phase": "Complete",
        "startTime": now,
        "completionTime": now,
        "conditions": [{"type": kind, **ended} for kind in ("Ready", "Complete")],
    }
    cluster.objects.patch_namespaced_custom_object_status(
        *RESOURCE, namespace=namespace, plural="influencejobs", name=name, body={"status": status}
    )


# -- pods of others -------------------------------------------------------------------------------


def foreign(cluster: Cluster, number: int) -> Foreign:
    """Creates pods that no scheduler looks at."""
    leader, kind = Leader(cluster), "influence_operator_watch_events_total"
    spec = pods.pod("nowhere.invalid/nothing:1", "true") | {"schedulerName": "nobody"}
    with namespace(cluster) as where:
        before, told, log = leader.memory, leader.metric(kind, kind="Pod"), AuditLog()

        def create(name: str) -> None:
            metadata = {"name": name, "labels": {"app": "foreign"}}
            cluster.core.create_namespaced_pod(where, {"metadata": metadata, "spec": spec})

        in_pieces(create, (f"foreign-{n}" for n in range(number)))
        time.sleep(api_requests.QUIET_SECONDS)
        return Foreign(
            pods=number,
            memory=(before, leader.memory),
            requests=asked(log, OURS, where),
            told=leader.metric(kind, kind="Pod") - told,
        )


# -- jobs that run --------------------------------------------------------------------------------


def running(cluster: Cluster, storage: ClusterStorage, jobs: int) -> Side:
    """Runs jobs of one worker each to their end."""
    have_image(cluster)
    with namespace(cluster) as where:
        log, since = AuditLog(), time.monotonic()
        ours = [ClusterJob(cluster, where, storage.new_bucket(), f"digits-{n}") for n in range(jobs)]
        ours[0].apply_source()
        cluster.apply(*(job.manifest(workers={"replicas": 1}) for job in ours), namespace=where)
        for job in ours:
            job.complete(seconds=120 + 60 * jobs)
        seconds = time.monotonic() - since
        requests = settled(log, OURS, where)
        return Side(jobs, seconds, requests, asked(log, THEIRS, where))


def running_dask_jobs(cluster: Cluster, storage: ClusterStorage, jobs: int) -> Side:
    """The same work as DaskJobs."""
    have_image(cluster)
    with namespace(cluster) as where:
        log, since = AuditLog(), time.monotonic()
        theirs = [DaskJob(cluster, where, storage.new_bucket(), f"plain-{n}") for n in range(jobs)]
        theirs[0].apply_program()
        cluster.apply(*(job.manifest() for job in theirs), namespace=where)

        def ended(job: DaskJob) -> bool:
            assert job.status != FAILED, cluster.describe(where)
            return job.status == SUCCESSFUL

        for job in theirs:
            cluster.wait_until(lambda job=job: ended(job), f"{job.name} to end", 120 + 60 * jobs, where)
        seconds = time.monotonic() - since
        requests = settled(log, THEIRS, where)
        return Side(jobs, seconds, asked(log, OURS, where), requests)


def have_image(cluster: Cluster) -> None:
    """Waits until the node has the worker image: several gigabytes, which the first pod would pay for."""
    with namespace(cluster) as where:
        pods.start(cluster, where, "first", pods.pod(cluster.images.worker.name, "true"))
        cluster.wait_until(
            lambda: pods.phase_of(cluster, where, "first") == "Succeeded", "the image", 600, where
        )


# -- what all of them need ------------------------------------------------------------------------


def create_jobs(cluster: Cluster, namespace: str, documents: Iterable[dict[str, Any]]) -> None:
    in_pieces(
        lambda body: cluster.objects.create_namespaced_custom_object(
            *RESOURCE, namespace=namespace, plural="influencejobs", body=body
        ),
        documents,
    )


def in_pieces(action: Callable[[Any], object], things: Iterable[Any]) -> None:
    """Does it for all of them, some at a time."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        list(pool.map(action, things))


def jobs_in(cluster: Cluster, namespace: str) -> list[dict[str, Any]]:
    answer = cluster.objects.list_namespaced_custom_object(
        *RESOURCE, namespace=namespace, plural="influencejobs"
    )
    return list(answer["items"])


def phases(cluster: Cluster, namespace: str) -> list[str]:
    return sorted(job.get("status", {}).get("phase", "") for job in jobs_in(cluster, namespace))


def reasons(cluster: Cluster, namespace: str, kind: str) -> list[str]:
    """Of each job's condition of that type."""
    found = (job.get("status", {}).get("conditions", []) for job in jobs_in(cluster, namespace))
    return [c["reason"] for conditions in found for c in conditions if c["type"] == kind]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


@contextmanager
def namespace(cluster: Cluster) -> Iterator[str]:
    """A new one; its jobs go first, since an operator cannot clean up in a namespace that is going."""
    name = cluster.make_namespace()
    try:
        yield name
    finally:
        cluster.kubectl(
            *("delete", "influencejobs", "--all", "--namespace", name, "--wait=true"), seconds=300
        )
        cluster.kubectl("delete", "namespace", name, "--wait=false")
