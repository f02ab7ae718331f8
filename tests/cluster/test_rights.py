"""The operator's rights, held against everything that it asked the API server for while the tests ran."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any

import pytest

import machine
import pods
from chart import NAMESPACE
from cluster import Cluster
from cluster_jobs import ClusterJob
from cluster_storage import Bucket, ClusterStorage
from influence_operator.manifests import names
from rights import ACCOUNT, FOR_OTHER_CLUSTERS, granted, uncovered, used

pytestmark = pytest.mark.usefixtures("operator")

Object = dict[str, Any]

LATE_REGIONS = r"^influences/c/0/(9|1\d)$"
"""What the gate holds back: the regions from the tenth on."""


@pytest.fixture
def job(cluster: Cluster, namespace: str, bucket: Bucket) -> ClusterJob:
    return ClusterJob(cluster, namespace, bucket)


@pytest.fixture
def others(cluster: Cluster, namespace: str, storage: ClusterStorage) -> dict[str, ClusterJob]:
    """More jobs of the namespace, by name."""
    wanted = ("config-map", "policy", "driver", "dask", "failing")
    return {name: ClusterJob(cluster, namespace, storage.new_bucket(), name) for name in wanted}


def stand_in_the_way(job: ClusterJob, kind: str) -> None:
    """Makes an object of somebody else that has the name of a child."""
    base = names.base_name(job.name, job.uid, 1)
    pod = pods.pod("nothing", "true")
    bodies: dict[str, Object] = {
        "ConfigMap": {"apiVersion": "v1"},
        "NetworkPolicy": {"apiVersion": "networking.k8s.io/v1", "spec": {"podSelector": {}}},
        "Job": {"apiVersion": "batch/v1", "spec": {"suspend": True, "template": {"spec": pod}}},
        "DaskCluster": {
            "apiVersion": "kubernetes.dask.org/v1",
            "spec": {
                "scheduler": {"spec": pod, "service": {"ports": [], "selector": {}}},
                "worker": {"replicas": 0, "spec": pod},
            },
        },
    }
    name = f"{base}-driver" if kind == "NetworkPolicy" else base
    thing = {"kind": kind, "metadata": {"name": name}} | bodies[kind]
    job.cluster.apply(thing, namespace=job.namespace)


def in_the_way(others: dict[str, ClusterJob]) -> None:
    """The operator looks at what has the name of a child, and leaves it alone."""
    kinds = {"config-map": "ConfigMap", "policy": "NetworkPolicy", "driver": "Job", "dask": "DaskCluster"}
    for name in kinds:
        others[name].apply(suspend=True)
    for name, kind in kinds.items():
        stand_in_the_way(others[name], kind)
        others[name].patch(suspend=False)
    for name in kinds:
        others[name].wait_for("Stalled", reason="NameConflict")
    others["dask"].patch(suspend=True)
    others["dask"].wait_for("Suspended", 90)
    for name in kinds:
        others[name].delete()


@pytest.mark.host
@pytest.mark.alone
@pytest.mark.last
def test_the_operator_has_the_rights_that_it_uses_and_no_others(
    job: ClusterJob, others: dict[str, ClusterJob], operator_since: datetime
) -> None:
    """Since it was installed for this run. It does everything once more here: no other test is needed."""
    # Another replica makes the lease anew, and lists and watches everything.
    job.cluster.kubectl("delete", "lease", "influence-operator", "--namespace", NAMESPACE)
    job.apply(workers={"replicas": 1}, **job.gate(LATE_REGIONS))
    others["failing"].apply(task={"entrypoint": "gated_digits:broken", "arguments": None}, backoffLimit=0)
    in_the_way(others)
    others["failing"].wait_for("Failed")
    job.at_gate()
    job.kubectl("scale", f"influencejob/{job.name}", "--replicas=2")
    job.wait_until(lambda: len(job.running("worker")) == 2, "two workers")
    job.kubectl("scale", f"influencejob/{job.name}", "--replicas=1")
    job.wait_until(lambda: len(job.pods("worker")) == 1, "one worker left")
    job.open_gate()
    job.complete()
    job.patch(ttlSecondsAfterFinished=1)
    job.wait_until(lambda: not job.children("influencejobs") and not exists(job), "the job deleted", 60)

    entries, rights = list(machine.audited(ACCOUNT, operator_since)), granted(job.cluster)
    print(f"since {operator_since}: {Counter(e['responseStatus'].get('code') for e in entries)}")
    assert uncovered(entries, rights) == []
    assert rights - used(entries, rights) == FOR_OTHER_CLUSTERS


def exists(job: ClusterJob) -> bool:
    return any(
        found["metadata"]["name"] == job.name
        for found in job.cluster.get("influencejobs", namespace=job.namespace)
    )
