"""What dask-kubernetes leaves undone, or somebody deletes, of a running cluster is made again.

Its controller never looks again at what it has made: see `influence_operator.decisions.healing`. The job goes
on in the same attempt, and nothing that it had recorded is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cluster import Cluster
from cluster_jobs import ClusterJob
from cluster_storage import Bucket
from kills import WORKERS, Half, address
from surroundings import quota

pytestmark = pytest.mark.usefixtures("operator")

SECONDS = 60
"""Until what is missing is there again."""
WORKER_GROUPS = "count/daskworkergroups.kubernetes.dask.org"


def test_a_worker_group_that_a_quota_refused_is_made_when_the_quota_is_raised(
    cluster: Cluster, namespace: str, bucket: Bucket
) -> None:
    """dask-kubernetes #976: scheduler and Service stand, and workers would never come."""
    job = ClusterJob(cluster, namespace, bucket)
    quota(job, **{WORKER_GROUPS: 0})
    job.apply(workers={"replicas": 1})
    job.wait_until(lambda: job.children("services"), "the scheduler's Service", SECONDS)
    job.wait_until(lambda: job.status.get("clusterIncompleteSince"), "the lack noticed", SECONDS)
    assert not job.children("daskworkergroups")
    quota(job, **{WORKER_GROUPS: 10})
    job.complete()
    assert (job.attempt, job.counted_failures) == (1, 0)
    assert "clusterIncompleteSince" not in job.status


def test_a_deleted_service_and_a_deleted_worker_deployment_are_made_again(start: Callable[..., Half]) -> None:
    """One after the other, while the job stands at its gate."""
    half = start().reached()
    job, old = half.job, half.workers()
    [service] = job.children("services")
    job.kubectl("delete", "service", service["metadata"]["name"])
    job.wait_until(lambda: uids(job, "services") - {uid(service)}, "another Service", SECONDS)

    [deleted, *_] = sorted(worker_deployments(job), key=lambda made: made["metadata"]["name"])
    half.killed = {address(pod) for pod in job.pods("worker") if belongs(pod, deleted)}
    job.kubectl("delete", "deployment", deleted["metadata"]["name"])
    half.mark = len(job.bucket.log())
    job.wait_until(
        lambda: len({uid(made) for made in worker_deployments(job)} - {uid(deleted)}) == WORKERS,
        "a Deployment in the place of the deleted one",
        SECONDS,
    )
    half.replaced("worker", WORKERS)
    half.replaced_at_the_gate(old)
    for kind in ("daskclusters", "daskworkergroups"):
        [made] = job.children(kind)
        assert made["spec"]["worker"]["replicas"] == WORKERS
    job.wait_until(lambda: job.status["workers"]["ready"] == WORKERS, "both in the status", 30)
    half.finishes()


def worker_deployments(job: ClusterJob) -> list[dict[str, Any]]:
    """Those that are to stay."""
    role = "influence-operator.dev/role"
    return [
        made
        for made in job.children("deployments")
        if made["metadata"]["labels"].get(role) == "worker" and "deletionTimestamp" not in made["metadata"]
    ]


def belongs(pod: dict[str, Any], deployment: dict[str, Any]) -> bool:
    return str(pod["metadata"]["name"]).startswith(f"{deployment['metadata']['name']}-")


def uid(thing: dict[str, Any]) -> str:
    return str(thing["metadata"]["uid"])


def uids(job: ClusterJob, kind: str) -> set[str]:
    return {uid(child) for child in job.children(kind)}
