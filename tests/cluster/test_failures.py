"""What a job says when something that it needs is not there, and that it goes on when it comes.

Each cause is named by a condition within a minute of the job's creation, in the words of whoever found it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator
from typing import Any

import pytest

import chart
from cluster import Cluster, CommandError
from cluster_jobs import STORE, ClusterJob
from cluster_storage import Bucket
from surroundings import quota, tag_image

pytestmark = pytest.mark.usefixtures("operator")

SECONDS = 60
"""From creation until a condition names the cause."""
DASK_OPERATOR = ("deployment/influence-operator-dask-kubernetes-operator", "--namespace", "influence-system")
DASK_CRDS = ("daskclusters", "daskworkergroups", "daskjobs", "daskautoscalers")
SMALL = {"workers": {"replicas": 1}}


@pytest.fixture
def job(cluster: Cluster, namespace: str, bucket: Bucket) -> ClusterJob:
    return ClusterJob(cluster, namespace, bucket)


def named(job: ClusterJob, reason: str, *words: str, kind: str = "ClusterReady") -> None:
    """Waits until the condition gives this reason, which must be soon; its message holds the words."""

    def there() -> bool:
        return job.condition(kind).get("reason") == reason

    job.wait_until(there, f"{kind} with reason {reason}", 2 * SECONDS)
    condition = job.condition(kind)
    seconds = job.wait_until(lambda: seconds_until_told(job, reason), f"an Event {reason}", 10)
    print(f"{reason} after {seconds:.0f} s: {condition['message']}")
    assert seconds <= SECONDS
    for word in words:
        assert word in condition["message"]
    assert condition["status"] == ("False" if kind == "ClusterReady" else "True")


def seconds_until_told(job: ClusterJob, reason: str) -> float | None:
    """From the job's creation until a Warning gave this reason, on the cluster's clock; at least 1."""
    created = datetime.datetime.fromisoformat(job.get()["metadata"]["creationTimestamp"])
    for event in job.cluster.get("events", namespace=job.namespace):
        about = event["involvedObject"]
        mine = (about["kind"], about["name"]) == ("InfluenceJob", job.name)
        if mine and (event["type"], event["reason"]) == ("Warning", reason):
            told = datetime.datetime.fromisoformat(event["firstTimestamp"])
            return max(1.0, (told - created).total_seconds())
    return None


def waits(job: ClusterJob) -> None:
    """Nothing has been given up."""
    assert not job.is_true("Failed")
    assert not job.condition("Stalled")
    assert job.counted_failures == 0


def goes_on(job: ClusterJob, seconds: float = 90) -> None:
    """The same attempt passes its preflight."""
    job.wait_until(lambda: job.condition("Ready").get("reason") == "Running", "preflight passed", seconds)
    assert job.attempt == 1
    waits(job)


def failed(job: ClusterJob, reason: str, *words: str) -> None:
    """`Failed` and `Stalled`, saying the same, soon."""
    named(job, reason, *words, kind="Failed")
    failed, stalled = job.condition("Failed"), job.condition("Stalled")
    assert (stalled["status"], stalled["reason"], stalled["message"]) == ("True", reason, failed["message"])
    assert job.condition("Ready")["status"] == "False"
    assert not job.condition("Reconciling")
    assert job.status["phase"] == "Failed"


# -- the task and what the spec names ------------------------------------------------------------


def test_a_task_that_always_raises_fails_the_job_with_its_last_line(job: ClusterJob) -> None:
    job.apply(task={"entrypoint": "gated_digits:broken", "arguments": None}, **SMALL)
    failed(job, "InvalidTask", "gated_digits:broken", "FileNotFoundError: the labels are in another room")
    assert job.attempt == 1, "no retry can cure it"


@pytest.mark.host
def test_an_image_that_cannot_be_pulled_yet(job: ClusterJob) -> None:
    image = job.cluster.images.worker
    absent = f"{image.repository}:{job.namespace}"
    job.apply(image=absent, **SMALL)
    named(job, "ImagePullFailed", "driver pod digits-", absent)
    waits(job)
    tag_image(image.name, job.namespace)
    goes_on(job, 120)


def test_a_gpu_that_nobody_has_yet(job: ClusterJob) -> None:
    resource = f"nvidia.com/mig-{job.namespace}"
    job.apply(workers={"replicas": 1, "resources": {"limits": {resource: "1"}}})
    named(job, "Unschedulable", "worker pod digits-", f"Insufficient {resource}")
    waits(job)
    advertise(job.cluster, resource, "1")
    try:
        job.wait_until(lambda: job.running("worker"), "a worker", 60)
        waits(job)
    finally:
        advertise(job.cluster, resource, None)


def advertise(cluster: Cluster, resource: str, count: str | None) -> None:
    """Every node says that it has so many of the extended resource, or none at all."""
    patch = json.dumps({"status": {"capacity": {resource: count}, "allocatable": {resource: count}}})
    for node in cluster.core.list_node().items:
        arguments = ("--subresource=status", "--type=merge", "--patch", patch)
        cluster.kubectl("patch", "node", node.metadata.name, *arguments)


def test_a_secret_that_is_not_there_yet(job: ClusterJob) -> None:
    job.apply(output={"credentialsSecretRef": {"name": "bucket-key"}}, **SMALL)
    named(job, "MissingReference", "driver pod digits-", 'secret "bucket-key" not found')
    waits(job)
    job.kubectl("create", "secret", "generic", "bucket-key", "--from-literal=UNUSED=yes")
    goes_on(job)


def test_a_config_map_with_the_task_that_is_not_there_yet(job: ClusterJob) -> None:
    job.cluster.apply(job.manifest(**SMALL), namespace=job.namespace)
    named(job, "MissingReference", "ConfigMap gated-digits")
    waits(job)
    assert not job.children("jobs,pods,daskclusters")
    job.apply_source()
    goes_on(job)


def test_a_bucket_that_is_not_there(job: ClusterJob) -> None:
    """Waiting for a bucket would cure a misspelt name never; a change of the spec starts the job again."""
    missing = f"{job.bucket.name}-missing"
    job.apply(output={"url": f"gs://{missing}/{STORE}"}, **SMALL)
    failed(job, "StoreUnreachable", missing)
    job.files.mkdir(missing)
    job.patch(backoffLimit=1)
    job.wait_until(lambda: job.condition("Ready").get("reason") == "Running", "preflight passed", 60)
    assert not job.condition("Failed")
    assert not job.condition("Stalled")


# -- what the API server refuses -----------------------------------------------------------------


def test_a_quota_that_refuses_the_driver_until_it_is_raised(job: ClusterJob) -> None:
    quota(job, pods=0)
    job.apply(**SMALL)
    named(job, "QuotaExceeded", "driver: ", "exceeded quota: small", "limited: pods=0")
    waits(job)
    quota(job, pods=10)
    goes_on(job)


def test_a_quota_that_refuses_workers_until_it_is_raised(job: ClusterJob) -> None:
    quota(job, pods=2)
    job.apply(**SMALL)
    named(job, "QuotaExceeded", "Deployment digits-", "exceeded quota: small", "limited: pods=2")
    waits(job)
    quota(job, pods=10)
    job.wait_until(lambda: job.running("worker"), "a worker", 90)
    waits(job)


def test_a_quota_that_refuses_what_the_operator_makes_itself(job: ClusterJob) -> None:
    quota(job, **{"count/jobs.batch": 0})
    job.apply(**SMALL)
    named(job, "QuotaExceeded", "Job digits-", "exceeded quota: small")
    waits(job)
    quota(job, **{"count/jobs.batch": 10})
    goes_on(job)


def test_a_namespace_whose_pod_security_refuses_the_driver(job: ClusterJob) -> None:
    host = {"name": "host", "hostPath": {"path": "/srv"}}
    job.apply(driver={"volumes": [host], "volumeMounts": [{"name": "host", "mountPath": "/srv"}]}, **SMALL)
    named(job, "PodSecurityRefused", "driver: ", 'violates PodSecurity "restricted', "hostPath")
    waits(job)
    level = "pod-security.kubernetes.io/enforce=privileged"
    job.cluster.kubectl("label", "--overwrite", "namespace", job.namespace, level)
    goes_on(job)


def test_a_service_account_that_is_not_there_yet(job: ClusterJob) -> None:
    job.apply(podDefaults={"serviceAccountName": "trainer"}, **SMALL)
    named(job, "MissingReference", "driver: ", 'serviceaccount "trainer" not found')
    waits(job)
    job.kubectl("create", "serviceaccount", "trainer")
    goes_on(job)


@pytest.mark.parametrize("kind", ["ConfigMap", "DaskCluster"])
def test_an_object_of_a_childs_name_is_left_alone_until_somebody_removes_it(
    job: ClusterJob, kind: str
) -> None:
    job.apply(suspend=True, **SMALL)
    child = f"digits-{job.uid[:5]}-1"
    job.cluster.apply(stranger(kind, child), namespace=job.namespace)
    before = job.cluster.get(kind, child, job.namespace)
    job.patch(suspend=False)
    named(job, "NameConflict", f"{kind} {child}", "not this job's", kind="Stalled")
    assert not job.is_true("Ready")
    after = job.cluster.get(kind, child, job.namespace)
    assert what_we_would_write(after) == what_we_would_write(before)
    job.kubectl("delete", kind, child, "--wait=false")
    goes_on(job)


def what_we_would_write(found: dict[str, Any]) -> list[Any]:
    """Parts of an object that say whose it is and what it is to be."""
    metadata = found["metadata"]
    owners = (metadata.get("labels"), metadata.get("ownerReferences"))
    return [metadata["uid"], *owners, found.get("data"), found.get("spec")]


def stranger(kind: str, name: str) -> dict[str, Any]:
    """An object that is nobody's and does nothing."""
    container = {"name": "a", "image": "nothing", "args": ["x"]}
    cluster = {
        "worker": {"replicas": 1, "spec": {"containers": [container]}},
        "scheduler": {"spec": {"containers": [container]}, "service": {"ports": [{"port": 1, "name": "a"}]}},
    }
    spec = {
        "ConfigMap": ("v1", {"data": {"a": "b"}}),
        "DaskCluster": ("kubernetes.dask.org/v1", {"spec": cluster}),
    }
    version, content = spec[kind]
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **content}


# -- no dask operator ----------------------------------------------------------------------------


@pytest.mark.alone
def test_a_dask_operator_that_does_not_run(job: ClusterJob) -> None:
    job.cluster.kubectl("scale", *DASK_OPERATOR, "--replicas=0")
    try:
        job.apply(**SMALL)
        named(job, "DaskOperatorMissing", "nobody takes up DaskCluster digits-")
        waits(job)
    finally:
        job.cluster.kubectl("scale", *DASK_OPERATOR, "--replicas=1")
    job.complete()
    assert (job.attempt, job.counted_failures) == (1, 0)


@pytest.mark.alone
def test_a_cluster_that_knows_no_dask_clusters_yet(job: ClusterJob) -> None:
    """Their CRDs go and come back while the operators run."""
    definitions = [job.cluster.get("crd", f"{plural}.kubernetes.dask.org") for plural in DASK_CRDS]
    with without_definitions(job.cluster, definitions):
        job.apply(**SMALL)
        named(job, "DaskOperatorMissing", "knows no DaskCluster", "install the dask-kubernetes operator")
        waits(job)
    job.complete()
    assert (job.attempt, job.counted_failures) == (1, 0)


@contextlib.contextmanager
def without_definitions(cluster: Cluster, definitions: list[dict[str, Any]]) -> Iterator[None]:
    """The CRDs are away inside the block, and the objects of these kinds for ever."""
    names = [definition["metadata"]["name"] for definition in definitions]
    cluster.kubectl("delete", "crd", *names, "--wait=false")
    try:
        cluster.wait_until(lambda: gone(cluster, names), "the CRDs to go", 60)
        yield
    finally:
        cluster.apply(*map(as_written, definitions))
        chart.wait_for_owners(cluster)


def gone(cluster: Cluster, definitions: list[str]) -> bool:
    """Whether these CRDs are. What is left of their kinds is let go: it would hold them for ever.

    dask-kubernetes no longer watches a kind whose CRD is about to go, and leaves its finalizers; and on an
    object of another test that is not being deleted yet it puts them back. So it takes more than one look.
    """
    left = cluster.kubectl("get", "crd", *definitions, "--ignore-not-found", "--output", "name").split()
    for definition in left:
        kind = definition.rpartition("/")[2]
        listed = json.loads(cluster.kubectl("get", kind, "--all-namespaces", "--output", "json"))
        for found in listed["items"]:
            release(cluster, kind, found["metadata"])
    return not left


def release(cluster: Cluster, kind: str, metadata: dict[str, Any]) -> None:
    """Takes an object's finalizers away.

    A namespace can go without it while the API server does not serve its kind; such an object takes no patch
    before its namespace is there again.
    """
    name, namespace = metadata["name"], metadata["namespace"]
    patch = ("--type=merge", "--patch", '{"metadata": {"finalizers": null}}')
    try:
        cluster.kubectl("patch", kind, name, "--namespace", namespace, *patch)
    except CommandError as error:
        if f'namespaces "{namespace}" not found' in error.output:
            cluster.make_namespace(namespace)
        elif "NotFound" not in error.output:  # gone by itself meanwhile
            raise


def as_written(definition: dict[str, Any]) -> dict[str, Any]:
    """A CRD as it can be made again."""
    kept = ("name", "labels", "annotations")
    metadata = {name: value for name, value in definition["metadata"].items() if name in kept}
    return {key: value for key, value in definition.items() if key != "status"} | {"metadata": metadata}
