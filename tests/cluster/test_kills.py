"""Everything that a job stands on is killed once while the job is half done.

Each test stops the job at a gate with some regions in the ledger and some not, kills, opens the gate, and
looks: the job completes, its result is bit for bit that of an undisturbed run, no row that the ledger held
was written twice, and `backoffLimit` was used up only where it should be.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from kubernetes import client

import machine
import stored
from cluster import Cluster
from cluster_jobs import BASE, ClusterJob, merged
from cluster_storage import Bucket
from pods import pod

pytestmark = pytest.mark.usefixtures("operator")

LATE_REGIONS = r"^influences/c/0/(9|1\d)$"
"""What the gate holds back: the regions from the tenth on."""
GRACE_SECONDS = 30
"""A lost node's pods are given up after so long."""


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of the same job on this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = {"task": {"source": None}, "output": {"url": str(folder / "result.zarr")}}
    manifest = merged(BASE, {"spec": source})
    (folder / "job.yaml").write_text(yaml.safe_dump(manifest))
    subprocess.run(
        [str(Path(sys.executable).with_name("influence")), "run", str(folder / "job.yaml"), "--workers", "2"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "support")},
        check=True,
        capture_output=True,
    )
    with stored.open_store(folder / "result.zarr") as store:
        return stored.result(store)


@dataclass(frozen=True)
class Half:
    """A job that stands at its gate, and what its ledger holds."""

    job: ClusterJob
    held: set[tuple[str, int]]
    undisturbed: dict[str, bytes]

    def finishes(self, counted_failures: int = 0, attempt: int | None = None, seconds: float = 300) -> None:
        """Opens the gate; the job completes with the undisturbed result, and nothing held was redone."""
        self.job.open_gate()
        self.job.complete(seconds)
        assert stored.differing(self.job.result(), self.undisturbed) == []
        again = {path: n for path, n in self.job.writes_of(self.held).items() if n > 1}
        assert not again, f"the ledger held these, and they were written again: {again}"
        assert self.job.counted_failures == counted_failures, self.job.status["attempts"]
        if attempt is not None:
            assert self.job.attempt == attempt, self.job.status["attempts"]


@pytest.fixture
def half(cluster: Cluster, namespace: str, bucket: Bucket, undisturbed: dict[str, bytes]) -> Half:
    """A job with two workers, half done, that goes on when its gate is opened."""
    job = ClusterJob(cluster, namespace, bucket)
    job.apply(**job.gate(LATE_REGIONS))
    return Half(job, job.half_done(), undisturbed)


# -- pods of the job -----------------------------------------------------------------------------


def test_a_worker_pod(half: Half) -> None:
    half.job.kill("worker")
    half.finishes(attempt=1)


def test_all_workers(half: Half) -> None:
    half.job.kill("worker", count=2)
    half.finishes(attempt=1)


def test_the_scheduler(half: Half) -> None:
    """The driver waits for the new one; its futures are gone, its ledger is not."""
    half.job.kill("scheduler")
    half.finishes(attempt=1)


def test_the_driver_pod(half: Half) -> None:
    """An attempt whose driver vanished and had recorded regions counts as 75, which is not counted."""
    half.job.kill("driver")
    half.finishes(attempt=2)


def test_an_eviction(half: Half) -> None:
    """The Job controller replaces the driver's pod: the same attempt."""
    (driver,) = half.job.running("driver")
    eviction = client.V1Eviction(metadata=client.V1ObjectMeta(name=driver, namespace=half.job.namespace))
    half.job.cluster.core.create_namespaced_pod_eviction(driver, half.job.namespace, eviction)
    half.job.wait_until(lambda: half.job.running("driver") not in ([], [driver]), "another driver", 120)
    half.finishes()


@pytest.mark.alone
def test_a_preemption(
    cluster: Cluster, namespace: str, bucket: Bucket, undisturbed: dict[str, bytes]
) -> None:
    """A pod of a higher PriorityClass takes the GPU of a worker, and later gives it back."""
    priority = {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": "urgent"},
        "value": 1000,
    }
    cluster.apply(priority)
    cluster.advertise_gpus(2)
    try:
        job = ClusterJob(cluster, namespace, bucket)
        gpu = {"workers": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}}
        job.apply(**(job.gate(LATE_REGIONS) | gpu))
        half = Half(job, job.half_done(), undisturbed)
        before = set(job.running("worker"))
        cluster.apply(_urgent(cluster), namespace=namespace)
        job.wait_until(lambda: len(before & set(job.running("worker"))) < 2, "a worker preempted", 90)
        job.kubectl("delete", "pod", "urgent", "--grace-period=0", "--force")
        half.finishes()
    finally:
        cluster.advertise_gpus(8)


def _urgent(cluster: Cluster) -> dict[str, object]:
    resources = {"requests": {"cpu": "10m"}, "limits": {"nvidia.com/gpu": "1"}}
    spec = pod(cluster.images.operator.name, "sleep", "600", resources=resources)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "urgent"},
        "spec": spec | {"priorityClassName": "urgent"},
    }


# -- the operators -------------------------------------------------------------------------------


def _without_operator(cluster: Cluster) -> None:
    where = ("--namespace", "influence-system")
    cluster.kubectl(
        *("delete", "pods", "--selector", "app.kubernetes.io/name=influence-operator"),
        *("--grace-period=0", "--force", *where),
    )


@pytest.mark.alone
def test_the_operator(half: Half) -> None:
    """Both replicas at once; the job does not notice."""
    _without_operator(half.job.cluster)
    half.finishes(attempt=1)


@pytest.mark.alone
def test_what_happened_while_no_operator_was_there(
    cluster: Cluster, namespace: str, bucket: Bucket, undisturbed: dict[str, bytes], storage: object
) -> None:
    """One job finishes, one is deleted, one suspended: each is right within ten seconds of the new lease."""
    buckets = [bucket, storage.new_bucket(), storage.new_bucket()]  # type: ignore[attr-defined]
    names = ("finishing", "deleted", "suspended")
    finishing, deleted, suspended = (
        ClusterJob(cluster, namespace, own, name) for own, name in zip(buckets, names, strict=True)
    )
    for job in (finishing, deleted, suspended):
        job.apply(**job.gate(LATE_REGIONS))
    for job in (finishing, deleted, suspended):
        job.half_done()
    cluster.kubectl(
        *("scale", "deployment", "influence-operator", "--replicas=0", "--namespace", "influence-system")
    )
    _without_operator(cluster)
    try:
        finishing.open_gate()
        deleted.delete(wait=False)
        suspended.patch(suspend=True)
        finishing.wait_until(lambda: _driver_succeeded(finishing), "the driver finished", 120)
    finally:
        cluster.kubectl(
            *("scale", "deployment", "influence-operator", "--replicas=2", "--namespace", "influence-system")
        )
    _wait_for_new_leader(cluster)
    finishing.wait_for("Complete", 10)
    suspended.wait_until(
        lambda: all(not job_.get("active") for job_ in _driver_states(suspended)),
        "the driver told to stop",
        10,
    )
    suspended.wait_for("Suspended", 60)
    deleted.wait_until(deleted.gone, "nothing of the deleted job left", 60)
    assert stored.differing(finishing.result(), undisturbed) == []


def _driver_states(job: ClusterJob) -> list[dict[str, object]]:
    return [found.get("status", {}) for found in job.children("jobs")]


def _driver_succeeded(job: ClusterJob) -> bool:
    return any(state.get("succeeded") for state in _driver_states(job))


def _wait_for_new_leader(cluster: Cluster) -> None:
    """Until the lease was renewed by a pod that exists."""

    def led() -> bool:
        pods = cluster.get("pods", namespace="influence-system")
        names = {pod["metadata"]["name"] for pod in pods}
        leases = cluster.get("leases", namespace="influence-system")
        return any(str(lease["spec"].get("holderIdentity", "")).startswith(tuple(names)) for lease in leases)

    cluster.wait_until(led, "a replica of the operator to take the lease", 60, "influence-system")


DASK_OPERATOR = ("deployment/influence-operator-dask-kubernetes-operator", "--namespace", "influence-system")


@pytest.mark.alone
def test_the_dask_operator(half: Half) -> None:
    """It is away while a worker dies, and back later; then while the job is deleted."""
    cluster = half.job.cluster
    cluster.kubectl("scale", *DASK_OPERATOR, "--replicas=0")
    try:
        half.job.kill("worker")
        half.job.wait_until(lambda: len(half.job.running("worker")) == 2, "the worker replaced", 90)
        half.finishes(attempt=1)
    finally:
        cluster.kubectl("scale", *DASK_OPERATOR, "--replicas=1")


@pytest.mark.alone
def test_a_job_is_deleted_while_the_dask_operator_is_away(
    cluster: Cluster, namespace: str, bucket: Bucket
) -> None:
    """Its finalizer would hold the DaskCluster, and the workers with it, for ever."""
    job = ClusterJob(cluster, namespace, bucket)
    job.apply(**job.gate(LATE_REGIONS))
    job.at_gate()
    cluster.kubectl("scale", *DASK_OPERATOR, "--replicas=0")
    try:
        job.delete(wait=False)
        job.wait_until(job.gone, "everything of the job gone", 120)
    finally:
        cluster.kubectl("scale", *DASK_OPERATOR, "--replicas=1")


# -- the machine below ---------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.alone
def test_containerd_restarted(half: Half) -> None:
    with machine.down("containerd"):
        time.sleep(2)
    half.finishes(attempt=1)


@pytest.mark.host
@pytest.mark.alone
def test_the_api_server_down_for_half_a_minute(half: Half) -> None:
    with machine.down("kube-apiserver"):
        time.sleep(30)
    half.finishes(attempt=1)


@pytest.mark.host
@pytest.mark.alone
def test_the_node(half: Half, tmp_path: Path) -> None:
    """The kubelet is away for longer than the node's grace period, and the driver goes on writing.

    A second driver, with the next attempt's document, starts outside the kubelet: the store's epoch lets one
    finish and stops the other.
    """
    job = half.job
    with machine.down("kubelet"):
        job.wait_until(lambda: not _node_ready(job.cluster), "the node lost", 60)
        time.sleep(GRACE_SECONDS)
        job.open_gate()
    half.finishes()


def _node_ready(cluster: Cluster) -> bool:
    (node,) = cluster.core.list_node().items
    return any(c.type == "Ready" and c.status == "True" for c in node.status.conditions)


# -- the bucket ----------------------------------------------------------------------------------


def test_the_bucket_failing_for_two_minutes(half: Half) -> None:
    half.job.bucket.go_down()
    time.sleep(120)
    half.job.bucket.heal()
    half.finishes(attempt=1)


def test_a_bucket_that_forbids_ends_the_job_and_a_permission_later_resumes_it(half: Half) -> None:
    job = half.job
    job.bucket.fail_all(403, "^result")
    job.open_gate()
    job.wait_for("Failed", 120, reason="StoreUnreachable")
    job.bucket.heal()
    job.patch(backoffLimit=4)
    job.wait_until(lambda: not job.is_true("Failed"), "a new attempt", 30)
    half.finishes()
