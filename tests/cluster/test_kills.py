"""Everything that a job stands on is killed once while the job is half done.

Each test stops the job at a gate with some rows in the ledger and some not, kills, opens the gate, and
looks: the job completes, its result is bit for bit that of an undisturbed run, no row that the ledger held
was written twice, others than the killed did the rest, and `backoffLimit` was used up only where it should
be. The job's own pods are killed at moments that `chaos` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from kubernetes import client

import chaos
from cluster import Cluster
from kills import WORKERS, Half, address
from pods import pod as pod_of

pytestmark = pytest.mark.usefixtures("operator")


# -- pods of the job -----------------------------------------------------------------------------


@pytest.mark.parametrize("moment", chaos.moments_of("worker"))
def test_a_worker_pod(start: Callable[..., Half], moment: str) -> None:
    half = start(moment).reached()
    old = half.workers()
    half.kill("worker")
    half.replaced("worker", WORKERS)
    if half.place.several:
        half.replaced_at_the_gate(old)
    half.finishes()


@pytest.mark.parametrize("moment", chaos.moments_of("workers"))
def test_all_workers(start: Callable[..., Half], moment: str) -> None:
    half = start(moment).reached()
    old = half.workers()
    half.kill("worker", WORKERS)
    half.replaced_at_the_gate(old)
    half.finishes()


@pytest.mark.parametrize("moment", chaos.moments_of("scheduler"))
def test_the_scheduler(start: Callable[..., Half], moment: str) -> None:
    """The driver waits for the new one; its futures are gone, its ledger is not."""
    half = start(moment).reached()
    half.kill("scheduler")
    half.replaced("scheduler")
    half.finishes()


@pytest.mark.parametrize("moment", chaos.moments_of("driver"))
def test_the_driver_pod(start: Callable[..., Half], moment: str) -> None:
    """An attempt whose driver vanished counts only if it recorded nothing, as far as the operator knows."""
    half = start(moment).reached()
    half.known_to_the_operator()
    half.kill("driver")
    half.killed |= half.workers()  # they end with their attempt
    half.finishes(attempt=2)
    half.recorded_by_others()


@pytest.mark.parametrize("moment", chaos.moments_of("eviction"))
def test_an_eviction(start: Callable[..., Half], moment: str) -> None:
    """The Job controller replaces the driver's pod: the same attempt."""
    half = start(moment).reached()
    (driver,) = half.job.running("driver")
    half.killed = {address(pod) for pod in half.job.pods("driver")}
    eviction = client.V1Eviction(metadata=client.V1ObjectMeta(name=driver, namespace=half.job.namespace))
    half.job.cluster.core.create_namespaced_pod_eviction(driver, half.job.namespace, eviction)
    half.replaced("driver")
    half.finishes(attempt=1)
    half.recorded_by_others()


@pytest.fixture
def two_gpus(cluster: Cluster) -> Iterator[None]:
    """All that the node has to give, and a class of pods that may take them from others."""
    urgent = {"metadata": {"name": "urgent"}, "value": 1000}
    cluster.apply({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass"} | urgent)
    cluster.advertise_gpus(2)
    yield
    cluster.advertise_gpus(8)
    cluster.kubectl("delete", "priorityclass", "urgent")


@pytest.mark.alone
def test_a_preemption(start: Callable[..., Half], two_gpus: None) -> None:
    """A pod of a higher PriorityClass takes the GPU of a worker, and later gives it back."""
    half = start(workers={"resources": {"limits": {"nvidia.com/gpu": "1"}}}).reached()
    job, old = half.job, half.workers()
    job.cluster.apply(_urgent(job.cluster), namespace=job.namespace)
    job.wait_until(lambda: len(old & half.workers()) < WORKERS, "a worker preempted", 60)
    job.wait_until(lambda: ("Normal", "Preempted") in job.events_of("Pod"), "its Event", 30)
    half.killed, half.mark = old - half.workers(), len(job.bucket.log())
    job.kubectl("delete", "pod", "urgent", "--grace-period=0", "--force")
    half.replaced("worker", WORKERS)
    half.replaced_at_the_gate(old)
    half.finishes()


def _urgent(cluster: Cluster) -> dict[str, object]:
    resources = {"requests": {"cpu": "10m"}, "limits": {"nvidia.com/gpu": "1"}}
    spec = pod_of(cluster.images.operator.name, "sleep", "600", resources=resources)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "urgent"},
        "spec": spec | {"priorityClassName": "urgent"},
    }
