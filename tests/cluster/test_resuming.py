"""What was done counts on: after a failure and a change of the spec, a lost status, another job's claim.

Every job here stands half done at its gate first, and its result must be that of a job that nobody disturbed,
bit for bit, with nothing computed again that the ledger held. `test_kills` does it to the job's processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import stored
from cluster_jobs import STORE, ClusterJob
from influence_job.document import FILE
from kills import Half
from surroundings import tag_image

pytestmark = pytest.mark.usefixtures("operator")


@pytest.mark.parametrize("change", [pytest.param("image", marks=pytest.mark.host), "memory"])
def test_a_failed_job_resumes_when_its_image_or_memory_changes(
    start: Callable[..., Half], change: str
) -> None:
    """Same task source, so the same fingerprint; the next attempt's pods are made from the new spec."""
    half = start().reached()
    job = half.job
    job.bucket.fail_all(403, f"^{STORE}")
    job.open_gate()
    job.wait_for("Failed", 120, reason="StoreUnreachable")
    job.bucket.heal()
    if change == "image":
        image = tag_image(job.cluster.images.worker.name, job.namespace)
        job.patch(image=image)
    else:
        job.patch(workers={"resources": {"limits": {"memory": "2100Mi"}}})
    job.wait_until(lambda: not job.is_true("Failed"), "a new attempt", 60)
    half.finished(attempt=2)
    if change == "image":
        assert driver_images(job) == {image}
    else:
        assert spec_of_attempt(job, 2)["workers"]["resources"]["limits"]["memory"] == "2100Mi"


def spec_of_attempt(job: ClusterJob, attempt: int) -> dict[str, Any]:
    """As its driver read it."""
    label = "influence-operator.dev/attempt"
    made = job.children("configmaps")
    [document] = [m["data"][FILE] for m in made if m["metadata"]["labels"][label] == str(attempt)]
    return dict(json.loads(document)["job"]["spec"])


def driver_images(job: ClusterJob) -> set[str]:
    """Of the drivers' Jobs that are left."""
    specs = [made["spec"]["template"]["spec"] for made in job.children("jobs")]
    return {container["image"] for spec in specs for container in spec["containers"]}


def test_a_job_whose_status_was_lost_goes_on_in_the_same_attempt(start: Callable[..., Half]) -> None:
    """The number of an attempt stands on its children, so that no name is used twice."""
    half = start().reached()
    job = half.job
    [driver] = job.children("jobs")
    lost = {"status": {"conditions": [], "attempts": None, "startTime": None}}
    job.kubectl(
        *("patch", "influencejob", job.name, "--subresource=status", "--type=merge"),
        *("--patch", json.dumps(lost)),
    )
    job.wait_until(lambda: job.attempt == 1, "the attempt known again", 30)
    half.finishes()
    assert [made["metadata"]["uid"] for made in job.children("jobs")] == [driver["metadata"]["uid"]]
    assert job.status["startTime"]


def test_a_job_that_claims_the_store_of_a_running_one_stops_it_and_goes_on(
    start: Callable[..., Half], undisturbed: dict[str, bytes]
) -> None:
    """Two jobs with one output: the first ends as Failed and writes no more; what it recorded counts."""
    half = start().reached()
    first = half.job
    second = ClusterJob(first.cluster, first.namespace, first.bucket, "second")
    second.apply()
    failed = first.wait_for("Failed", 90, reason="StoreClaimed")
    assert f"job {second.uid}" in failed["message"]
    assert "two jobs cannot write to one output.url" in failed["message"]
    assert first.is_true("Stalled")
    assert (first.attempt, first.counted_failures) == (1, 0), "no retry can cure it"
    second.complete()
    assert stored.differing(second.result(), undisturbed) == []
    assert set(first.writes_of(half.held).values()) == {1}
    assert second.attempt == 1
