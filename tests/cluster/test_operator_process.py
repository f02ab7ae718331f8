"""The operator's process: who leads, what a restart costs, and what objects nobody meant to make do to it.

The replicas run on this machine and watch one namespace. Whatever operator is installed in the cluster is
sent away meanwhile, for it would look after the same jobs.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chart import pods
from cluster import Cluster, CommandError
from cluster_jobs import unplaced
from influence_job.crd import custom_resource_definition
from influence_operator.manifests import names
from operator_process import LEASE_SECONDS, OperatorProcess, operator_process

pytestmark = pytest.mark.alone

INSTALLED = ("deployment", "influence-operator", "--namespace", "influence-system")
CRD = "influencejobs.influence-operator.dev"
CHILDREN = {"configmaps": 1, "networkpolicies": 3, "secrets": 1, "jobs": 1}
"""Per job, before its driver has asked for workers."""


@pytest.fixture(autouse=True)
def _no_other_operator(cluster: Cluster) -> Iterator[None]:
    try:
        cluster.kubectl("get", "crd", CRD)
    except CommandError:
        cluster.apply(custom_resource_definition())
    try:
        replicas = cluster.kubectl("get", *INSTALLED, "--output", "jsonpath={.spec.replicas}")
    except CommandError:
        yield
        return
    cluster.kubectl("scale", *INSTALLED, "--replicas=0")
    # A rollout is over while the pods still end, and they go on until then.
    cluster.wait_until(lambda: not pods(cluster), "the installed operator to be gone", 60)
    yield
    cluster.kubectl("scale", *INSTALLED, f"--replicas={replicas}")
    cluster.kubectl("rollout", "status", *INSTALLED)


def status(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = cluster.get("influencejob", name, namespace).get("status", {})
    return found


def has_children(cluster: Cluster, namespace: str, jobs: int) -> bool:
    made = {kind: len(cluster.get(kind, "", namespace, names.JOB_UID)) for kind in CHILDREN}
    return made == {kind: number * jobs for kind, number in CHILDREN.items()}


def leading(cluster: Cluster, replica: OperatorProcess, seconds: float = 30) -> OperatorProcess:
    cluster.wait_until(lambda: replica.running and replica.leads(), f"{replica.name} to lead", seconds)
    cluster.wait_until(lambda: replica.probe("/readyz") == 200, f"{replica.name} to be ready", 30)
    return replica


def test_a_standby_is_ready_and_follows_a_leader_that_is_told_to_stop(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    with (
        operator_process(cluster, namespace, "first", tmp_path, lease_seconds="30") as first,
        operator_process(cluster, namespace, "second", tmp_path, lease_seconds="30") as second,
    ):
        cluster.wait_until(lambda: first.leads() or second.leads(), "a leader", 30)
        leader, standby = (first, second) if first.leads() else (second, first)
        leading(cluster, leader)
        cluster.wait_until(lambda: standby.probe("/readyz") == 200, "the standby to be ready", 30)
        assert not standby.leads()

        asked = time.monotonic()
        leader.send(signal.SIGTERM)
        assert leader.wait() == 0
        ended = time.monotonic() - asked
        leading(cluster, standby)

        assert ended < 5, "the process takes its time to stop"
        assert time.monotonic() - asked < 15, "the lease of 30 s was not released"
        cluster.apply(unplaced("digits"), namespace=namespace)
        cluster.wait_until(lambda: has_children(cluster, namespace, 1), "children", 30, namespace)


def test_a_killed_leader_is_followed_when_its_lease_runs_out(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    with operator_process(cluster, namespace, "first", tmp_path) as first:
        leading(cluster, first)
        with operator_process(cluster, namespace, "second", tmp_path) as second:
            cluster.wait_until(lambda: second.probe("/readyz") == 200, "the standby", 30)
            first.send(signal.SIGKILL)
            leading(cluster, second, LEASE_SECONDS + 15)


def test_a_leader_that_was_frozen_ends_when_it_wakes_and_writes_nothing(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    with (
        operator_process(cluster, namespace, "first", tmp_path) as first,
        operator_process(cluster, namespace, "second", tmp_path) as second,
    ):
        cluster.wait_until(lambda: first.leads() or second.leads(), "a leader", 30)
        frozen, follower = (first, second) if first.leads() else (second, first)
        leading(cluster, frozen)
        frozen.send(signal.SIGSTOP)
        # Its watch tells it of these when it wakes.
        cluster.apply(*(unplaced(f"digits-{n}") for n in range(5)), namespace=namespace)
        leading(cluster, follower, LEASE_SECONDS + 15)
        cluster.wait_until(lambda: has_children(cluster, namespace, 5), "children", 30, namespace)
        follower.settle()
        before = cluster.get("influencejob", "", namespace)

        frozen.send(signal.SIGCONT)

        assert frozen.wait() == 1
        assert cluster.get("influencejob", "", namespace) == before
        assert follower.leads()
        assert not [line for line in frozen.records("INFO") if "created" in line]


def test_many_jobs_cost_few_requests_and_a_restart_writes_nothing(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    waiting = [unplaced(f"waiting-{n}") for n in range(15)]
    resting = [unplaced(f"resting-{n}", suspend=True) for n in range(15)]
    with operator_process(cluster, namespace, "first", tmp_path) as first:
        leading(cluster, first)
        cluster.apply(*waiting, *resting, namespace=namespace)
        cluster.wait_until(lambda: has_children(cluster, namespace, 15), "children", 60, namespace)
        cluster.wait_until(lambda: unschedulable(cluster, namespace) == 15, "what is awaited", 60)
        first.settle()
        requests = first.requests()

        assert first.metric("influence_operator_jobs", phase="Suspended") == 15
        assert first.metric("influence_operator_jobs", phase="Starting") == 15
        assert first.metric("influence_operator_queue_depth") == 0
        assert first.metric("influence_operator_queue_oldest_seconds") == 0
        for kind, number in CHILDREN.items():
            assert requests["create", kind] == number * 15
        assert requests["patch", "influencejobs/status"] <= 5 * 30
        assert sum(number for (verb, _), number in requests.items() if verb == "get") <= 10
        first.send(signal.SIGTERM)
        assert first.wait() == 0

    with operator_process(cluster, namespace, "second", tmp_path) as second:
        leading(cluster, second)
        passes = "influence_operator_reconciles_total"
        cluster.wait_until(lambda: second.metric(passes) >= 30, "a pass over each job", 30)
        time.sleep(5)

        assert second.writes() == 0, second.requests()


def unschedulable(cluster: Cluster, namespace: str) -> int:
    """Jobs that say so of their driver's pod."""
    conditions = [
        c for job in cluster.get("influencejob", "", namespace) for c in job["status"]["conditions"]
    ]
    return sum((c["type"], c["reason"]) == ("ClusterReady", "Unschedulable") for c in conditions)


def test_a_job_is_looked_at_again_though_nothing_happens(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    with operator_process(cluster, namespace, "only", tmp_path, resync_seconds="4") as only:
        leading(cluster, only)
        cluster.apply(unplaced("digits", suspend=True), namespace=namespace)
        cluster.wait_until(lambda: status(cluster, namespace, "digits").get("phase"), "a phase", 30)
        only.settle()
        passes = only.metric("influence_operator_reconciles_total")
        time.sleep(10)

        assert 2 <= only.metric("influence_operator_reconciles_total") - passes <= 8


def test_objects_nobody_meant_to_make_neither_end_nor_heat_it(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    with operator_process(cluster, namespace, "only", tmp_path) as only:
        leading(cluster, only)
        cluster.apply(unplaced("digits"), unplaced("taken", suspend=True), namespace=namespace)
        cluster.wait_until(lambda: has_children(cluster, namespace, 1), "children", 30, namespace)
        uids = {
            job["metadata"]["name"]: job["metadata"]["uid"]
            for job in cluster.get("influencejob", "", namespace)
        }
        cluster.apply(*strangers(uids["digits"]), namespace=namespace)
        foreign = named("ConfigMap", names.base_name("taken", uids["taken"], 1), {})
        cluster.apply(foreign, namespace=namespace)
        cluster.kubectl(
            *("patch", "influencejob", "taken", "--namespace", namespace, "--type=merge"),
            *("--patch", json.dumps({"spec": {"suspend": False}})),
        )
        spoil_status(cluster, namespace, "digits")

        cluster.wait_until(
            lambda: condition(cluster, namespace, "taken", "Stalled").get("reason") == "NameConflict",
            "the conflict to be told",
            30,
            namespace,
        )
        only.settle()
        passes = only.metric("influence_operator_reconciles_total")
        time.sleep(10)

        assert only.metric("influence_operator_reconciles_total") - passes < 40
        assert only.running
        assert only.records("ERROR") == []
        assert cluster.get("configmap", foreign["metadata"]["name"], namespace)["data"] == {"theirs": "yes"}


def condition(cluster: Cluster, namespace: str, name: str, kind: str) -> dict[str, Any]:
    conditions = status(cluster, namespace, name).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {})


def named(kind: str, name: str, labels: dict[str, str]) -> dict[str, Any]:
    metadata = {"name": name, "labels": labels}
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, "data": {"theirs": "yes"}}


def strangers(uid: str) -> list[dict[str, Any]]:
    """Objects that carry our labels and are none of ours."""
    own = {names.JOB_UID: uid, names.JOB: "digits"}
    attempts = ["", "0", "-1", "x", "007", "1000000", "9" * 60, "1.5"]
    labels = [own | {names.ATTEMPT: attempt} for attempt in attempts]
    labels += [own | {names.ROLE: "driver"}, {names.JOB_UID: ""}, {names.JOB_UID: "nobody"}]
    labels += [{names.JOB_UID: uid, names.JOB: "another"}, {names.JOB_UID: "x" * 63, names.ATTEMPT: "1"}]
    labels = [label for label in labels if not label.get(names.ATTEMPT, "").startswith("-")]
    made = [named("ConfigMap", f"stranger-{number}", label) for number, label in enumerate(labels)]
    service: dict[str, Any] = named("Service", "stranger", own | {names.ATTEMPT: "1"})
    del service["data"]
    service["spec"] = {"ports": [{"port": 1}], "selector": {"nobody": "has"}}
    return [*made, service]


def spoil_status(cluster: Cluster, namespace: str, name: str) -> None:
    """Writes what the schema lets through and the operator never would."""
    spoiled = {
        "phase": "Complete",
        "observedGeneration": 2**40,
        "activeSeconds": 2**50,
        "attempts": {"current": 1, "countedFailures": 2**40, "started": "9999-12-31T23:59:59Z"},
        "conditions": [
            {
                "type": "Anything",
                "status": "Unknown",
                "lastTransitionTime": "0001-01-01T00:00:00Z",
                "reason": "x",
                "message": "\u0000 \u202e",
            }
        ],
    }
    cluster.kubectl(
        *("patch", "influencejob", name, "--namespace", namespace, "--subresource=status", "--type=merge"),
        *("--patch", json.dumps({"status": spoiled})),
    )
