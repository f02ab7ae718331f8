"""Wrong manifests by the hundred: the API server refuses them, or the operator says what is wrong."""

from __future__ import annotations

import copy

import pytest

from chart import operator_processes
from cluster import Cluster
from cluster_jobs import ClusterJob
from cluster_storage import Bucket
from job_samples import Broken, Json, broken_rules
from refusals import chance, create, names, own_refusal, refusal, wrong_manifests

pytestmark = pytest.mark.usefixtures("operator")

MANIFESTS = 300
SECONDS = 60


def test_wrong_manifests_are_refused_by_the_api_server_or_by_the_operator_naming_the_field(
    cluster: Cluster, namespace: str, bucket: Bucket
) -> None:
    """What the API server lets through is created: a condition names the field, and nothing is started."""
    rules = list(broken_rules())
    cases = [*rules, *chance().sample(wrong_manifests(), MANIFESTS - len(rules))]
    processes = operator_processes(cluster)
    left: list[tuple[ClusterJob, Broken]] = []
    for case in cases:
        said = refusal(cluster, namespace, case.document)
        if said is None:
            assert own_refusal(case.document), f"accepted by both: {case.what}"
            job = ClusterJob(cluster, namespace, bucket, f"wrong-{len(left)}")
            create(cluster, namespace, managed(case.document, job.name))
            left.append((job, case))
        else:
            assert names(said, case), f"{case.what}: {said}"
    print(f"left to the operator: {[case.what for _, case in left]}")
    assert 0 < len(left) < MANIFESTS / 10
    for job, case in left:
        job.wait_until(lambda job=job: job.is_true("Stalled"), f"Stalled: {case.what}", SECONDS)
        stalled = job.condition("Stalled")
        assert stalled["reason"] == "InvalidSpec", f"{case.what}: {stalled}"
        assert names(stalled["message"], case), f"{case.what}: {stalled}"
        assert job.condition("Ready")["status"] == "False", case.what
        assert not job.children("jobs,configmaps,networkpolicies,daskclusters"), case.what
    assert operator_processes(cluster) == processes, "the operator has not crashed"


def managed(document: dict[str, Json], name: str) -> dict[str, Json]:
    """The job under a name, and nobody else's."""
    made = copy.deepcopy(document)
    made["metadata"]["name"] = name
    if isinstance(made["spec"].get("managedBy"), str):
        del made["spec"]["managedBy"]
    return made
