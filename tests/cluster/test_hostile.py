"""Drivers that answer, and end, with whatever they like: the operator believes what it can check, no more.

A driver's pod runs its user's code. Nothing it says may crash the operator, make it ask hotter, or change
what the status says of the job, unless it is this job's own document. The same for specs that only our own
rules refuse.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

import pytest

import machine
from chart import operator_processes
from cluster import Cluster
from cluster_jobs import ClusterJob, merged
from cluster_storage import Bucket
from host_tests import CLUSTER_VARIABLE
from influence_operator.cluster.audiences import audiences_of

pytestmark = pytest.mark.usefixtures("operator")

WINDOW_SECONDS = 20
OPERATOR = "system:serviceaccount:influence-system:influence-operator"
REQUESTS = WINDOW_SECONDS / 2
"""Most that a job may cost the API server in that time while it waits; its warnings are listed every 5 s."""


@pytest.fixture
def job(cluster: Cluster, namespace: str, bucket: Bucket) -> ClusterJob:
    return ClusterJob(cluster, namespace, bucket)


def environment(**variables: str) -> dict[str, Any]:
    """The driver's."""
    return {"driver": {"env": [{"name": name, "value": value} for name, value in variables.items()]}}


class Requests:
    """The operator's requests about a namespace from now on; nobody counts them without the host."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._log = None if CLUSTER_VARIABLE in os.environ else machine.AuditLog()

    def count(self) -> Counter[str]:
        entries = self._log.entries(OPERATOR) if self._log else []
        about = [entry for entry in entries if entry.get("objectRef", {}).get("namespace") == self._namespace]
        return Counter(f"{entry['verb']} {entry['objectRef']['resource']}" for entry in about)


# -- /progress -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers",
    [
        ["huge", "bomb", "slow", "silent", "no_http", "broken", "elsewhere"],
        ["other_job", "other_attempt", "wrong_types", "wrong_envelope", "deep", "endless_number", "no_json"],
    ],
    ids=["transport", "content"],
)
def test_hostile_answers_at_progress_change_nothing(job: ClusterJob, answers: list[str]) -> None:
    processes = operator_processes(job.cluster)
    job.apply_misbehaving(**environment(ANSWERS=",".join(answers)))
    job.wait_until(lambda: answered(job), "the driver's first hostile answer", 60)
    before = job.wait_until(lambda: settled(job), "a settled status", 60)
    requests, begin = Requests(job.namespace), time.monotonic()
    told = len(answered(job))
    time.sleep(WINDOW_SECONDS)
    asked, took = len(answered(job)) - told, time.monotonic() - begin
    made = requests.count()
    job.wait_until(lambda: set(answered(job)) == set(answers), "every answer given", 60)
    after = job.get()
    assert after["status"] == before["status"]
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"], "nothing is written"
    assert not job.children("daskclusters")
    assert "the redirect was followed" not in log(job)
    assert asked <= took / 2, "asked again hot"
    assert made.total() <= REQUESTS, made
    assert operator_processes(job.cluster) == processes


def settled(job: ClusterJob) -> dict[str, Any] | None:
    """The job, once what its honest answers said is written, and that no other answer can be read."""
    found = job.get()
    reasons = {c["type"]: c["reason"] for c in found["status"].get("conditions", [])}
    unreachable = reasons.get("ClusterReady") == "DriverUnreachable"
    return found if unreachable and found["status"].get("stage") == "Preflight" else None


def log(job: ClusterJob) -> str:
    """What the driver printed; nothing as long as there is none."""
    drivers = job.running("driver")
    return job.kubectl("logs", *drivers) if drivers else ""


def answered(job: ClusterJob) -> list[str]:
    """The hostile answers so far."""
    lines = log(job).splitlines()
    return [line.removeprefix("answers ") for line in lines if line.startswith("answers ")]


def test_a_driver_of_another_contract_stalls_the_job_until_its_image_is_changed(job: ClusterJob) -> None:
    """Nothing of its documents is believed but their version; the next attempt runs the other image."""
    grace = {"terminationGracePeriodSeconds": 1}
    speaking = environment(ANSWERS="other_contract")
    job.apply_misbehaving(**merged(speaking, {"driver": grace}))
    job.wait_until(lambda: job.is_true("Stalled"), "Stalled", 90)
    stalled = job.condition("Stalled")
    assert stalled["reason"] == "ImageIncompatible"
    assert "contract version 9" in stalled["message"]
    assert "set image" in stalled["message"]
    assert job.condition("Ready")["status"] == "False"
    assert not job.condition("Complete")
    assert "result" not in job.status
    assert not job.children("daskclusters")
    assert job.attempt == 1
    job.patch(image=job.cluster.images.worker.name, driver={"env": None})
    job.wait_until(lambda: job.attempt == 2, "the next attempt", 60)
    job.wait_until(lambda: not job.condition("Stalled"), "no longer stalled", 30)
    job.wait_until(lambda: job.running("driver"), "the driver of the other image", 60)
    assert job.counted_failures == 0
    assert job.events().count(("Warning", "ImageIncompatible")) == 1


# -- last words ----------------------------------------------------------------------------------


def test_hostile_last_words_end_the_job_as_its_exit_code_says(
    cluster: Cluster, namespace: str, bucket: Bucket
) -> None:
    """Several jobs at once: what is none of a job's own documents is quoted at most."""
    kinds = ["huge", "binary", "types", "foreign", "finished", "hostile"]
    processes = operator_processes(cluster)
    jobs = {kind: ClusterJob(cluster, namespace, bucket, kind) for kind in kinds}
    for kind, job in jobs.items():
        job.apply_misbehaving(**environment(LAST_WORDS=kind, EXIT_CODE="64"))
    for kind, job in jobs.items():
        failed = job.wait_for("Failed", 90, reason="PermanentError")
        assert job.is_true("Stalled"), kind
        assert not job.condition("Complete"), kind
        assert "result" not in job.status, kind
        assert len(failed["message"]) <= 1024, kind
        assert failed["message"].isprintable(), kind
    for kind in ("huge", "binary", "types", "foreign"):
        assert jobs[kind].status["stage"] == "Preflight", "what the driver had said at /progress stays"
        assert jobs[kind].status["attempts"]["recorded"] == 0, kind
    hostile = jobs["hostile"].condition("Failed")["message"]
    assert "<script>alert(1)</script>" in hostile, "its own words, made printable"
    assert operator_processes(cluster) == processes
    for job in jobs.values():
        job.wait_until(lambda job=job: not job.children("secrets,networkpolicies"), "its guards deleted", 30)
    time.sleep(2)
    requests = Requests(namespace)
    time.sleep(5)
    assert not requests.count(), "jobs that ended cost nothing"


# -- what our own rules refuse -------------------------------------------------------------------


def token(**source: str) -> dict[str, Any]:
    """A volume with a ServiceAccount's token."""
    return {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token"} | source}]}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a type": (
        {"workers": {"env": [{"name": "A", "value": 1}]}},
        "spec.workers.env[0].value: expected text",
    ),
    "what dask drops": (
        {"scheduler": {"volumes": [{"name": "v", "image": {"reference": "a"}}]}},
        "spec.scheduler.volumes[0].image: unknown to dask-kubernetes",
    ),
    "a token": (
        {"driver": {"volumes": [token()]}},
        "spec.driver.volumes[0].projected.sources[0].serviceAccountToken.audience: expected",
    ),
    "a token with the API server's name": (
        {"scheduler": {"volumes": [token(audience="https://kubernetes.default.svc.cluster.local")]}},
        "spec.scheduler.volumes[0].projected.sources[0].serviceAccountToken.audience: expected",
    ),
    "a null": (
        {"output": {"storageOptions": {"a": [{"b": None}]}}},
        "spec.output.storageOptions.a[0].b: expected a value",
    ),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_spec_that_only_the_operators_rules_refuse_stalls_the_job_until_it_is_mended(
    job: ClusterJob, changes: dict[str, Any], words: str
) -> None:
    """The condition names the field within seconds, nothing is started, and nothing is tried again."""
    job.apply_source()
    create(job, job.manifest(**changes))
    job.wait_until(lambda: job.is_true("Stalled"), "Stalled", 30)
    stalled = job.condition("Stalled")
    assert stalled["reason"] == "InvalidSpec"
    assert words in stalled["message"]
    assert job.condition("Ready")["status"] == "False"
    assert job.status["observedGeneration"] == 1
    assert ("Warning", "InvalidSpec") in job.events()
    time.sleep(2)  # its own status is a change too, at which it looks once
    requests = Requests(job.namespace)
    time.sleep(5)
    assert not requests.count(), "nothing is tried again"
    assert not job.children("jobs,configmaps,secrets,networkpolicies,daskclusters")
    mend(job, changes)
    job.wait_until(lambda: job.attempt == 1, "the first attempt", 60)
    assert not job.condition("Stalled")


def test_no_pod_gets_a_token_of_an_audience_that_this_api_server_accepts(job: ClusterJob) -> None:
    """Whatever its audiences are called; the operator reads them off its own token."""
    account = ("default", "--namespace", job.namespace)
    accepted = job.wait_until(
        lambda: audiences_of(job.cluster.kubectl("create", "token", *account)), "the account"
    )
    job.apply(workers={"volumes": [token(audience=accepted[-1])]})
    job.wait_until(lambda: job.is_true("Stalled"), "Stalled", 10)
    stalled = job.condition("Stalled")
    assert stalled["reason"] == "InvalidSpec"
    assert (
        f"serviceAccountToken.audience: expected the audience of whom the token is for, got {accepted[-1]!r}"
        in (stalled["message"])
    )


def create(job: ClusterJob, document: dict[str, Any]) -> None:
    """Through the API, since kubectl drops nulls."""
    group, version = document["apiVersion"].split("/")
    job.cluster.objects.create_namespaced_custom_object(
        group, version, job.namespace, "influencejobs", document
    )


def mend(job: ClusterJob, changes: dict[str, Any]) -> None:
    """Takes the changes back."""
    [(field, below)] = changes.items()
    [(name, value)] = below.items()
    job.patch(**{field: {name: dict.fromkeys(value) if isinstance(value, dict) else None}})


def test_pod_settings_that_the_api_server_refuses_are_named_and_can_be_mended(job: ClusterJob) -> None:
    """Nobody has a schema of a toleration before the pod is made."""
    job.apply(driver={"tolerations": [{"key": "a", "effect": "Never"}]}, workers={"replicas": 1})

    def refused() -> str:
        said = job.condition("ClusterReady")
        return str(said["message"]) if said.get("reason") == "Refused" else ""

    said = job.wait_until(refused, "Refused", 60)
    assert said.startswith("refused: Job digits-")
    assert "tolerations[2].effect" in said
    assert '"Never"' in said
    requests = Requests(job.namespace)
    time.sleep(WINDOW_SECONDS)
    made = requests.count()
    assert max(made.values(), default=0) <= REQUESTS / 2, f"tried again hot: {made}"
    job.patch(driver={"tolerations": None})
    job.wait_until(lambda: job.condition("Ready").get("reason") == "Running", "preflight passed", 60)
    assert job.counted_failures == 0
