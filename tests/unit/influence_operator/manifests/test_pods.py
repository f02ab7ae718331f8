"""What all pods of a job have in common: security, scratch space, credentials, source."""

from __future__ import annotations

from typing import Any

import pytest

from attempts import build, containers, job, pod_specs
from influence_job.document import (
    CREDENTIALS_DIRECTORY,
    DIRECTORY,
    FILE,
    SOURCE_DIRECTORY,
    TLS_DIRECTORY,
)
from influence_job.exit_codes import ExitCode
from influence_operator.manifests.attempt import AttemptManifests

ROLES = ("driver", "scheduler", "worker")


def mounted(made: AttemptManifests, role: str) -> dict[str, dict[str, Any]]:
    """Mount path -> the volume that is mounted there."""
    volumes = {volume["name"]: volume for volume in pod_specs(made)[role]["volumes"]}
    assert len(volumes) == len(pod_specs(made)[role]["volumes"])
    return {mount["mountPath"]: volumes[mount["name"]] for mount in containers(made)[role]["volumeMounts"]}


@pytest.mark.parametrize("role", ROLES)
def test_a_pod_fits_the_restricted_standard_and_holds_no_token(everything: Any, role: str) -> None:
    spec = pod_specs(everything)[role]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


@pytest.mark.parametrize("role", ROLES)
def test_what_can_be_written_has_a_size(role: str) -> None:
    found = mounted(build(job()), role)
    for path in ("/tmp", "/home/influence", "/dev/shm"):
        assert found[path]["emptyDir"]["sizeLimit"]


def test_a_users_volume_takes_the_place_of_scratch_space_by_name_or_by_path() -> None:
    big = {"name": "tmp", "emptyDir": {"sizeLimit": "1Ti"}}
    found = mounted(build(job(workers={"volumes": [big]})), "worker")
    assert found["/tmp"] == big

    disk = {"name": "disk", "persistentVolumeClaim": {"claimName": "disk"}}
    mounts = [{"name": "disk", "mountPath": "/tmp/"}]
    made = build(job(workers={"volumes": [disk], "volumeMounts": mounts}))
    found = mounted(made, "worker")
    assert found["/tmp/"] == disk
    assert "/tmp" not in found
    assert "tmp" not in [volume["name"] for volume in pod_specs(made)["worker"]["volumes"]]


def test_a_users_volume_never_takes_the_place_of_the_certificate() -> None:
    fake = {"name": "influence-tls", "emptyDir": {}}
    elsewhere = {"name": "data", "emptyDir": {}}
    mounts = [{"name": "data", "mountPath": TLS_DIRECTORY}]
    made = build(job(podDefaults={"volumes": [fake, elsewhere], "volumeMounts": mounts}))
    for role in ROLES:
        assert mounted(made, role)[TLS_DIRECTORY]["secret"]["secretName"] == "digits-3f2a9-1"


def test_the_driver_alone_reads_the_job_document() -> None:
    made = build(job())
    assert mounted(made, "driver")[DIRECTORY]["configMap"] == {
        "name": "digits-3f2a9-1",
        "items": [{"key": FILE, "path": FILE}],
    }
    assert DIRECTORY not in mounted(made, "scheduler")
    assert DIRECTORY not in mounted(made, "worker")


def test_credentials_go_to_driver_and_workers_as_files_and_environment(everything: Any) -> None:
    for role in ("driver", "worker"):
        assert mounted(everything, role)[CREDENTIALS_DIRECTORY]["secret"]["secretName"] == "bucket-key"
        assert {"secretRef": {"name": "bucket-key"}} in containers(everything)[role]["envFrom"]
    assert CREDENTIALS_DIRECTORY not in mounted(everything, "scheduler")
    assert containers(everything)["scheduler"]["envFrom"] == [{"configMapRef": {"name": "settings"}}]


@pytest.mark.parametrize("role", ROLES)
def test_source_files_stand_alone_in_the_source_directory(everything: Any, role: str) -> None:
    items = mounted(everything, role)[SOURCE_DIRECTORY]["configMap"]["items"]
    assert {item["path"] for item in items} == {"my_task.py", "job.json", "weights.npy"}
    assert FILE not in {item["key"] for item in items}


def test_the_driver_is_retried_by_its_job_only_when_it_was_disrupted() -> None:
    spec = build(job()).driver_job["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    final, disrupted = spec["podFailurePolicy"]["rules"]
    assert final["action"] == "FailJob"
    assert final["onExitCodes"]["values"] == [ExitCode.PERMANENT]
    assert final["onExitCodes"]["containerName"] == containers(build(job()))["driver"]["name"]
    assert disrupted["action"] == "Ignore"
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
