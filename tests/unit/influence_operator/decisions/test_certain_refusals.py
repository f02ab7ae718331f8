"""Pods that every API server refuses are refused with the spec, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from influence_operator.decisions.specification import RefusedSpecError, spec_of
from operator_objects import World, influence_job

GPU = "nvidia.com/gpu"
DATA = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
VOLUME = {"volumes": [{"name": "data", "emptyDir": {}}]}


def resources(limits: dict[str, Any] | None = None, requests: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"resources": {"limits": limits or {}, "requests": requests or {}}}


def refusal(**spec: Any) -> str:
    """Why the spec is refused; empty if it is not."""
    try:
        spec_of(influence_job(**spec), ())
    except RefusedSpecError as error:
        return str(error)
    return ""


REFUSED = [
    (
        {"workers": resources({"memory": "1Gi"}, {"memory": "2Gi"})},
        "spec.workers.resources.requests.memory: expected at most the limit, 1Gi, got 2Gi; "
        "lower it, or raise spec.workers.resources.limits.memory",
    ),
    (
        {"podDefaults": resources({"cpu": "500m"}), "driver": resources(None, {"cpu": 1})},
        "spec.driver.resources.requests.cpu: expected at most the limit, 500m, got 1; "
        "lower it, or raise spec.podDefaults.resources.limits.cpu",
    ),
    (
        {"podDefaults": resources({"memory": "1Gi"}, {"memory": "2Gi"})},
        "spec.podDefaults.resources.requests.memory: expected at most the limit, 1Gi, got 2Gi; "
        "lower it, or raise spec.podDefaults.resources.limits.memory",
    ),
    (
        {"workers": resources(None, {GPU: 1})},
        f"spec.workers.resources.requests.{GPU}: expected a limit of the same number, got none; "
        f"set spec.workers.resources.limits.{GPU}: 1",
    ),
    (
        {"podDefaults": resources(None, {GPU: 1})},
        f"spec.podDefaults.resources.requests.{GPU}: expected a limit of the same number, got none; "
        f"set spec.workers.resources.limits.{GPU}: 1",
    ),
    (
        {"workers": resources({GPU: 2}, {GPU: 1})},
        f"spec.workers.resources.requests.{GPU}: expected the limit, 2, got 1; "
        "remove it: the limit is requested",
    ),
    (
        {"workers": resources({GPU: "0.5"})},
        f"spec.workers.resources.limits.{GPU}: expected a whole number of devices, got 0.5; write 1 or more",
    ),
    (
        {"scheduler": DATA},
        "spec.scheduler.volumeMounts[0].name: expected a volume of the scheduler's pods, got 'data'; "
        "add it to spec.scheduler.volumes",
    ),
    (
        {"podDefaults": DATA, "driver": VOLUME, "workers": VOLUME},
        "spec.podDefaults.volumeMounts[0].name: expected a volume of the scheduler's pods, got 'data'; "
        "add it to spec.podDefaults.volumes",
    ),
    (
        {"driver": {"volumeMounts": [{"mountPath": "/data"}]}},
        "spec.driver.volumeMounts[0].name: expected a volume of the driver's pods, got nothing; "
        "add it to spec.driver.volumes",
    ),
    (
        {"workers": {"volumeMounts": [{"name": "influence-task", "mountPath": "/data"}]}},
        "spec.workers.volumeMounts[0].name: expected a volume of the worker's pods, got 'influence-task'; "
        "add it to spec.workers.volumes",
    ),
]


@pytest.mark.parametrize(("spec", "message"), REFUSED)
def test_the_field_is_named_with_what_was_expected_and_the_cure(spec: dict[str, Any], message: str):
    assert refusal(**spec) == message


LEGAL = [
    {"workers": resources({GPU: 1})},
    {"workers": resources({GPU: 1}, {GPU: "1000m"})},
    {"podDefaults": resources({GPU: 1}), "workers": resources(None, {GPU: 1})},
    {"podDefaults": resources(None, {GPU: 1}), "workers": resources({GPU: 2})},
    {
        "podDefaults": resources({"memory": "1Gi"}),
        "workers": resources({"memory": "8Gi"}, {"memory": "8192Mi"}),
    },
    {"podDefaults": resources(None, {"memory": "8Gi"}), "scheduler": resources({"memory": "1Gi"})},
    {"workers": resources({"cpu": "250m"})},
    {"workers": resources(None, {"memory": "64Gi", "cpu": 8, "ephemeral-storage": "1Ti"})},
    {"workers": resources({"memory": "0.5Gi"}, {"memory": "512Mi"})},
    {"podDefaults": DATA | VOLUME},
    {"podDefaults": VOLUME, "workers": DATA},
    {"workers": DATA, "podDefaults": VOLUME, "driver": VOLUME},
    {"workers": {"volumeMounts": [{"name": "tmp", "mountPath": "/scratch"}]}},
    {"workers": {"volumeMounts": [{"name": "influence-tls", "mountPath": "/x"}]}},
    {
        "task": {"entrypoint": "a:b", "source": {"configMap": {"name": "code"}}},
        "workers": {"volumeMounts": [{"name": "influence-task", "mountPath": "/x"}]},
    },
]


@pytest.mark.parametrize("spec", LEGAL)
def test_what_an_api_server_may_take_is_left_to_it(spec: dict[str, Any]):
    assert refusal(**spec) == ""


def test_a_job_whose_pods_cannot_be_made_starts_none_and_stalls():
    world = World(influence_job(workers=resources(None, {GPU: 1})))
    assert not world.step().actions
    assert world.condition("Stalled") == "True InvalidSpec"
