"""What a job stands on goes away while the job is half done, and comes back.

The operators, containerd, the API server, the node and the bucket. `test_kills` does it to the job's own
pods and says what must hold.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import chaos
import chart
import machine
import stored
from cluster import SCRIPTS, Cluster
from cluster_jobs import STORE, TASK, ClusterJob, merged
from cluster_storage import NAMESPACE as STORAGE_NAMESPACE
from cluster_storage import PORT, ClusterStorage
from influence_job.document import FILE, PROGRESS_PORT
from kills import REGION, WORKERS, Half, address

pytestmark = pytest.mark.usefixtures("operator")

RIGHT_SECONDS = 10.0
"""After a new leader has taken the lease, everything is right within this time."""


# -- our operator --------------------------------------------------------------------------------


@contextmanager
def _away(cluster: Cluster, deployment: str, replicas: int) -> Iterator[None]:
    """None of a Deployment's pods runs inside the block, ended without grace; they come back after it."""
    scale = ("scale", f"deployment/{deployment}", "--namespace", chart.NAMESPACE)
    cluster.kubectl(*scale, "--replicas=0")
    try:
        cluster.wait_until(lambda: not _end_pods(cluster, deployment), f"no {deployment}", 30)
        yield
    finally:
        cluster.kubectl(*scale, f"--replicas={replicas}")


def _end_pods(cluster: Cluster, deployment: str) -> list[str]:
    names = sorted(chart.names(chart.pods(cluster, deployment)))
    if names:
        cluster.kubectl(
            *("delete", "pods", *names, "--namespace", chart.NAMESPACE),
            *("--grace-period=0", "--force", "--ignore-not-found"),
        )
    return names


@pytest.mark.alone
@pytest.mark.parametrize("moment", chaos.moments_of("operator"))
def test_the_operator(start: Callable[..., Half], moment: str) -> None:
    """Both replicas at once; the job does not notice."""
    half = start(moment).reached()
    taken = _lease(half.job.cluster)[1]
    assert len(_end_pods(half.job.cluster, chart.OPERATOR)) == 2
    half.finishes()
    assert _lease(half.job.cluster)[1] > taken


@pytest.mark.alone
def test_what_happened_while_no_operator_was_there(
    cluster: Cluster, namespace: str, storage: ClusterStorage, undisturbed: dict[str, bytes]
) -> None:
    """One job finishes, one is deleted, one suspended: each is right within ten seconds of the new lease."""
    names = ("finishing", "deleted", "suspended")
    finishing, deleted, suspended = (
        ClusterJob(cluster, namespace, storage.new_bucket(), name) for name in names
    )
    workers = {"workers": {"replicas": 1, "terminationGracePeriodSeconds": 2}}
    for job in (finishing, deleted, suspended):
        job.apply(**merged(job.gate(REGION.path), workers))
    for job in (finishing, deleted, suspended):
        Half(job, REGION, undisturbed).reached()
    before = _lease(cluster)[1]
    with _away(cluster, chart.OPERATOR, 2):
        finishing.open_gate()
        deleted.delete(wait=False)
        suspended.patch(suspend=True)
        finishing.wait_until(lambda: _driver_succeeded(finishing), "the driver finished", 120)
        assert not finishing.is_true("Complete")
    taken = cluster.wait_until(lambda: _taken_after(cluster, before), "a new leader", 60)
    deleted.wait_until(deleted.gone, "nothing of the deleted job left", RIGHT_SECONDS)
    assert _seconds_after(taken, finishing.wait_for("Complete", 60)) <= RIGHT_SECONDS
    assert _seconds_after(taken, suspended.wait_for("Suspended", 60)) <= RIGHT_SECONDS
    assert not suspended.pods()
    assert stored.differing(finishing.result(), undisturbed) == []


def _driver_succeeded(job: ClusterJob) -> bool:
    return any(found.get("status", {}).get("succeeded") for found in job.children("jobs"))


def _lease(cluster: Cluster) -> tuple[str, datetime.datetime]:
    """Who leads, and since when."""
    spec = chart.lease(cluster)
    return str(spec.holder_identity or ""), spec.acquire_time


def _taken_after(cluster: Cluster, before: datetime.datetime) -> datetime.datetime | None:
    holder, taken = _lease(cluster)
    return taken if holder and taken > before else None


def _seconds_after(taken: datetime.datetime, condition: dict[str, Any]) -> float:
    became = datetime.datetime.fromisoformat(condition["lastTransitionTime"])
    return (became - taken).total_seconds()


# -- the dask operator ---------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.parametrize("moment", chaos.moments_of("dask-operator"))
def test_the_dask_operator(start: Callable[..., Half], moment: str) -> None:
    """It is away while a worker dies and while the job ends, whose cluster its finalizer would keep."""
    half = start(moment).reached()
    with _away(half.job.cluster, chart.DASK_OPERATOR, 1):
        half.kill("worker")
        half.replaced("worker", WORKERS)
        half.finishes()
        half.job.wait_until(lambda: not half.job.pods("worker"), "no worker left", 90)


@pytest.mark.alone
def test_a_job_is_deleted_while_the_dask_operator_is_away(start: Callable[..., Half]) -> None:
    """Its finalizer would hold the DaskCluster, and the workers with it, for ever."""
    job = start().reached().job
    with _away(job.cluster, chart.DASK_OPERATOR, 1):
        job.delete(wait=False)
        job.wait_until(job.gone, "everything of the job gone", 120)


# -- the machine below ---------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.alone
def test_containerd_restarted(start: Callable[..., Half]) -> None:
    half = start().reached()
    before = machine.pid("containerd")
    with machine.down("containerd"):
        time.sleep(2)
    assert machine.pid("containerd") != before
    half.finishes()


@pytest.mark.host
@pytest.mark.alone
def test_the_api_server_down_for_half_a_minute(start: Callable[..., Half]) -> None:
    """The job needs none; the operator finds out afterwards."""
    half = start().reached()
    with chart.without_api_server(half.job.cluster):
        half.job.open_gate()
        time.sleep(30)
        written = half.job.bucket.puts(rf"^{STORE}/influences/c/0/\d+$")
    assert len(written) == REGION.total, "the job went on meanwhile"
    half.finished()


@pytest.mark.host
@pytest.mark.alone
def test_the_node(start: Callable[..., Half], tmp_path: Path) -> None:
    """The kubelet is away for longer than the node's grace period, and the driver goes on writing.

    A second driver with the next attempt's document, started outside the kubelet, takes the store over: it
    finishes and the first one stops. Kubernetes itself moves no pod when the only node is lost.
    """
    half = start(pace=3.0)
    job = half.job
    job.wait_until(lambda: _store_begun(job) and len(job.held_regions()) >= 2, "two regions done", 180)
    at_kill = job.held_regions()
    (driver,) = job.pods("driver")
    first = address(driver)
    next_attempt = _NextAttempt(job, tmp_path)
    with machine.down("kubelet"):
        job.wait_until(lambda: not _node_ready(job.cluster), "the node lost", 60)
        half.reached()
        assert job.held_regions() > at_kill, "the driver went on writing"
        with next_attempt.drive() as second:
            job.wait_until(lambda: not _answers(first), "the first driver stopped", 90)
            assert second.poll() is None
            job.open_gate()
            assert second.wait(timeout=120) == 0, next_attempt.log.read_text()
    # The operator learns of the first driver's end, and the attempt that it starts finds nothing to do. If
    # this took longer than pods tolerate a lost node, they are evicted, which is no end of an attempt.
    evicted = _is_marked_for_deletion(job, driver["metadata"]["name"])
    half.finished(attempt=1 if evicted else 2)
    assert job.status["attempts"]["lastReason"] == "Complete"
    assert evicted or ("Warning", "AttemptEnded") in job.events()


@pytest.mark.host
@pytest.mark.alone
def test_a_job_is_suspended_while_its_node_is_away(start: Callable[..., Half]) -> None:
    """Pods that nobody ends stay Terminating; 60 s after their grace period they count as lost."""
    grace = {"terminationGracePeriodSeconds": 2}
    half = start(driver=grace, scheduler=grace, workers=grace).reached()
    job = half.job
    with machine.down("kubelet"):
        asked = time.monotonic()
        job.patch(suspend=True)
        job.wait_until(lambda: not job.pods(), "every pod asked to end", 60)
        assert not job.is_true("Suspended"), "they may still run"
        job.wait_for("Suspended", 2 + 60 + 30)
        assert time.monotonic() - asked >= 60  # the grace period's two seconds are for whole seconds
        terminating = [pod for pod in job.children("pods") if "deletionTimestamp" in pod["metadata"]]
        assert {pod["metadata"]["labels"]["influence-operator.dev/role"] for pod in terminating} == {
            "driver", "scheduler", "worker",
        }, "the pods still stand"  # fmt: skip
    job.patch(suspend=False)
    half.finishes(attempt=2)


def _store_begun(job: ClusterJob) -> bool:
    return bool(job.bucket.puts(rf"^{STORE}/influences/c/"))


def _is_marked_for_deletion(job: ClusterJob, pod: str) -> bool:
    """Whether a lost node's pod was evicted."""
    about = f"reason=TaintManagerEviction,involvedObject.name={pod}"
    told = job.kubectl("get", "events", "--field-selector", about, "--output", "jsonpath={.items[*].message}")
    return "Marking for deletion" in told


def _node_ready(cluster: Cluster) -> bool:
    (node,) = cluster.core.list_node().items
    return any(c.type == "Ready" and c.status == "True" for c in node.status.conditions)


def _answers(pod_address: str) -> bool:
    """Whether a driver still serves its progress; asked past the kubelet."""
    relay = machine.Relay(pod_address, PROGRESS_PORT)
    try:
        with urllib.request.urlopen(f"{relay.url(PROGRESS_PORT)}/healthz", timeout=5):
            return True
    except OSError:
        return False
    finally:
        relay.close()


class _NextAttempt:
    """A driver of attempt 2 as a process in the cluster's network namespace; it shares attempt 1's workers.

    Cluster names mean nothing to the process, and an address says the same.
    """

    def __init__(self, job: ClusterJob, folder: Path) -> None:
        self._folder, self.log = folder, folder / "drive.log"
        (made,) = job.children("configmaps")
        (scheduler,) = job.pods("scheduler")
        storage = job.cluster.core.read_namespaced_service("gcs", STORAGE_NAMESPACE).spec.cluster_ip
        document = json.loads(made["data"][FILE])
        document |= {"attempt": 2, "scheduler": f"tls://{address(scheduler)}:8786"}
        document["job"]["spec"]["output"]["storageOptions"]["endpoint_url"] = f"http://{storage}:{PORT}"
        (folder / FILE).write_text(json.dumps(document))
        secret = job.cluster.get("secret", made["metadata"]["name"], job.namespace)
        for name, content in secret["data"].items():
            (folder / name).write_bytes(base64.b64decode(content))

    @contextmanager
    def drive(self) -> Iterator[subprocess.Popen[bytes]]:
        """The running driver."""
        command = [
            *(str(SCRIPTS / "inside.sh"), str(Path(sys.executable).with_name("influence")), "drive"),
            *("--document", str(self._folder / FILE), "--tls", str(self._folder), "--host", "127.0.0.1"),
            *("--termination-message", str(self._folder / "last-words")),
            *("--progress-port", "0", "--metrics-port", "0"),
        ]
        environment = os.environ | {"PYTHONPATH": str(TASK.parent), "POD_NAME": "outside"}
        with self.log.open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


# -- the bucket ----------------------------------------------------------------------------------


def test_the_bucket_failing_for_two_minutes(start: Callable[..., Half]) -> None:
    """Everybody tries again, the driver's ledger as well as the workers' regions."""
    half = start().reached()
    bucket = half.job.bucket
    bucket.fail_all(503, f"^{STORE}")
    half.job.open_gate()
    time.sleep(120)
    bucket.heal()
    half.finished()
    refused = [r for r in bucket.log()[half.mark :] if r.status == 503 and r.action == "PUT"]
    assert {r.object_name for r in refused if r.object_name.startswith(f"{STORE}/influences/c/")}


def test_a_bucket_that_forbids_ends_the_job_and_a_permission_later_resumes_it(
    start: Callable[..., Half],
) -> None:
    half = start().reached()
    job = half.job
    job.bucket.fail_all(403, f"^{STORE}")
    job.open_gate()
    job.wait_for("Failed", 120, reason="StoreUnreachable")
    job.bucket.heal()
    job.patch(backoffLimit=4)
    job.wait_until(lambda: not job.is_true("Failed"), "a new attempt", 60)
    half.finished(attempt=2)
