"""Requests and limits of the containers."""

from __future__ import annotations

from typing import Any

import pytest

from attempts import build, containers, job

Resources = dict[str, dict[str, str]]


def resources(**changes: Any) -> dict[str, Resources]:
    """Role -> resources of its container."""
    return {role: container["resources"] for role, container in containers(build(job(**changes))).items()}


def test_every_container_has_requests_and_a_memory_limit_without_being_told() -> None:
    assert resources() == {
        "driver": {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "2Gi"}},
        "scheduler": {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "2Gi"}},
        "worker": {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "4Gi"}},
    }


def test_a_limit_is_the_request_too() -> None:
    found = resources(workers={"resources": {"limits": {"nvidia.com/gpu": 1, "cpu": 4, "memory": "16Gi"}}})
    assert found["worker"]["requests"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    assert found["worker"]["limits"] == found["worker"]["requests"]


def test_a_request_is_taken_as_it_stands() -> None:
    found = resources(workers={"resources": {"limits": {"cpu": 4}, "requests": {"cpu": "100m"}}})
    assert found["worker"]["requests"]["cpu"] == "100m"
    assert found["worker"]["limits"]["cpu"] == "4"


def test_the_default_memory_limit_is_never_below_a_request() -> None:
    found = resources(workers={"resources": {"requests": {"memory": "32Gi"}}})
    assert found["worker"]["limits"]["memory"] == "32Gi"
    found = resources(workers={"resources": {"requests": {"memory": "1Gi"}}})
    assert found["worker"] == {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "4Gi"}}


@pytest.mark.parametrize("kind", ["limits", "requests"])
def test_driver_and_scheduler_never_inherit_devices(kind: str) -> None:
    found = resources(
        podDefaults={"resources": {kind: {"nvidia.com/gpu": 1, "example.com/nic": 2, "memory": "8Gi"}}}
    )
    for role in ("driver", "scheduler"):
        assert not [name for part in found[role].values() for name in part if "/" in name]
        assert found[role]["requests"]["memory"] == "8Gi"
    assert found["worker"][kind]["nvidia.com/gpu"] == "1"


def test_a_driver_that_asks_for_a_device_gets_it() -> None:
    found = resources(driver={"resources": {"limits": {"nvidia.com/gpu": 1}}})
    assert found["driver"]["limits"]["nvidia.com/gpu"] == "1"


def test_an_own_limit_replaces_a_request_of_the_defaults() -> None:
    found = resources(
        podDefaults={"resources": {"requests": {"cpu": 2, "memory": "8Gi"}}},
        driver={"resources": {"limits": {"cpu": 1, "memory": "1Gi"}}},
    )
    assert found["driver"]["requests"] == {"cpu": "1", "memory": "1Gi"}


def test_quantities_are_strings_in_every_manifest() -> None:
    found = resources(workers={"resources": {"limits": {"cpu": 1.5, "memory": 2_000_000_000}}})
    assert found["worker"]["limits"] == {"cpu": "1.5", "memory": "2000000000"}
