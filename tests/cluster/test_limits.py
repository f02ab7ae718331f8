"""How long a job may take, how often it may fail, what is left of it, and whose it is."""

from __future__ import annotations

import datetime
import time
from typing import Any

import pytest

from cluster import Cluster, CommandError
from cluster_jobs import ClusterJob
from cluster_storage import Bucket

pytestmark = pytest.mark.usefixtures("operator")

SMALL = {"workers": {"replicas": 1}}
BROKEN = {"task": {"entrypoint": "gated_digits:broken", "arguments": None}, **SMALL}
"""Fails as soon as a worker calls the entry point."""
MISSING_BUCKET = {"output": {"url": "gs://there-is-no-such-bucket/result.zarr"}, **SMALL}
"""Fails in preflight."""


@pytest.fixture
def job(cluster: Cluster, namespace: str, bucket: Bucket) -> ClusterJob:
    return ClusterJob(cluster, namespace, bucket)


def seconds(status: dict[str, Any], begin: str, end: str) -> float:
    first, second = (datetime.datetime.fromisoformat(status[name]) for name in (begin, end))
    return (second - first).total_seconds()


def absent(job: ClusterJob) -> bool:
    try:
        job.get()
    except CommandError as error:
        return "NotFound" in error.output
    return False


# -- deadlines -----------------------------------------------------------------------------------


def test_a_job_ends_at_its_active_deadline_and_its_pods_with_it(job: ClusterJob) -> None:
    job.apply_misbehaving(activeDeadlineSeconds=8, **SMALL)
    failed = job.wait_for("Failed", 40, reason="DeadlineExceeded")
    assert "activeDeadlineSeconds, 8 s" in failed["message"]
    assert 8 <= seconds(job.status, "startTime", "completionTime") <= 20
    assert job.status["activeSeconds"] >= 8
    assert job.is_true("Stalled")
    job.wait_until(lambda: not job.pods(), "no pod left", 40)


def test_a_job_whose_pods_never_come_ends_at_its_startup_deadline_saying_why(job: ClusterJob) -> None:
    nowhere = {"nodeSelector": {"no.such/node": "true"}}
    job.apply(startupDeadlineSeconds=12, podDefaults=nowhere, **SMALL)
    failed = job.wait_for("Failed", 40, reason="StartupDeadlineExceeded")
    assert "startupDeadlineSeconds, 12 s" in failed["message"]
    assert "Unschedulable" in failed["message"]
    assert "didn't match Pod's node affinity/selector" in failed["message"]
    job.wait_until(lambda: not job.pods(), "no pod left", 40)


def test_suspended_time_counts_for_no_deadline(job: ClusterJob) -> None:
    limits = {"activeDeadlineSeconds": 5, "startupDeadlineSeconds": 5, "progressDeadlineSeconds": 5}
    job.apply(suspend=True, **limits, **SMALL)
    time.sleep(8)
    assert job.is_true("Suspended")
    assert not job.is_true("Failed")


def test_a_job_that_stands_still_ends_at_its_progress_deadline_which_counts(job: ClusterJob) -> None:
    job.apply(progressDeadlineSeconds=8, backoffLimit=0, **SMALL, **job.gate("^influences/c/"))
    failed = job.wait_for("Failed", 120, reason="BackoffLimitExceeded")
    assert "ProgressDeadlineExceeded" in failed["message"]
    assert "progressDeadlineSeconds, 8 s" in failed["message"]
    assert job.counted_failures == 1


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "reason"), [(3, "DriverFailed"), (75, "DriverLost")])
def test_a_driver_that_crashes_is_tried_again_as_often_as_backoff_limit_says(
    job: ClusterJob, code: int, reason: str
) -> None:
    """Lost infrastructure, exit code 75, counts like every other failure where nothing was recorded."""
    crash = {"driver": {"env": [{"name": "EXIT_CODE", "value": str(code)}]}}
    job.apply_misbehaving(backoffLimit=1, **crash, **SMALL)
    job.wait_until(lambda: job.status.get("phase") == "Retrying", "Retrying", 40)
    attempts = job.status["attempts"]
    assert (attempts["counted"], attempts["countedFailures"], attempts["lastExitCode"]) == (True, 1, code)
    waited = seconds(attempts, "ended", "nextStart")
    assert waited == 10
    failed = job.wait_for("Failed", 60, reason="BackoffLimitExceeded")
    assert failed["message"].startswith(f"2 counted failures, backoffLimit is 1; the last: {reason}")
    assert (job.attempt, job.counted_failures) == (2, 2)
    assert job.events().count(("Normal", "AttemptStarted")) == 2
    assert job.events().count(("Warning", "AttemptEnded")) == 2


# -- what is left --------------------------------------------------------------------------------


def kinds_left(job: ClusterJob) -> set[str]:
    kinds = "jobs,daskclusters,deployments,services,configmaps,secrets,networkpolicies,pods"
    return {child["kind"] for child in job.children(kinds)}


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("Workers", {"Job", "Pod", "ConfigMap"}),
        ("All", {"ConfigMap"}),
        (
            "None",
            {"Job", "Pod", "ConfigMap", "Secret", "NetworkPolicy", "DaskCluster", "Deployment", "Service"},
        ),
    ],
)
def test_an_ended_job_leaves_what_its_cleanup_policy_says(
    job: ClusterJob, policy: str, left: set[str]
) -> None:
    job.apply(cleanupPolicy=policy, **BROKEN)
    job.wait_for("Failed", 120, reason="InvalidTask")
    job.wait_until(lambda: kinds_left(job) == left, f"{sorted(left)} left", 60)
    if policy != "All":
        [driver] = [pod["metadata"]["name"] for pod in job.pods("driver")]
        assert "error: InvalidTask" in job.kubectl("logs", driver)
    if policy == "None":
        time.sleep(5)
        assert kinds_left(job) == left


def test_an_ended_job_is_deleted_when_its_time_to_live_is_over(job: ClusterJob) -> None:
    job.apply(ttlSecondsAfterFinished=10, **MISSING_BUCKET)
    job.wait_for("Failed", 60)
    ended = datetime.datetime.fromisoformat(job.status["completionTime"])
    job.wait_until(lambda: absent(job), "the job deleted", 40)
    assert datetime.datetime.now(datetime.UTC) - ended >= datetime.timedelta(seconds=10)
    job.wait_until(job.gone, "everything of the job gone", 30)


# -- whose it is ---------------------------------------------------------------------------------


def test_a_job_that_somebody_else_manages_is_left_alone_until_it_is_handed_over(job: ClusterJob) -> None:
    job.apply(managedBy="kueue.x-k8s.io/multikueue", **MISSING_BUCKET)
    time.sleep(5)
    assert job.status == {"observedGeneration": -1}
    assert not job.children("jobs,pods,configmaps")
    assert not job.events()
    job.patch(managedBy=None)
    job.wait_until(lambda: job.attempt == 1, "the first attempt", 60)
    job.patch(managedBy="somebody/else")
    generation = job.get()["metadata"]["generation"]
    time.sleep(3)
    assert job.status["observedGeneration"] < generation, "hands off from then on"
