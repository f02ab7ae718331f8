"""Environment variables: Dask reads back what was meant, and users cannot undo it."""

from __future__ import annotations

from typing import Any

import dask.config
import pytest

from attempts import build, containers, job, variables
from influence_job.dask_settings import SETTINGS, THREAD_SETTINGS

ROLES = ("driver", "scheduler", "worker")


def configuration(role: str, **changes: Any) -> dict[str, Any]:
    """What Dask makes of a container's environment."""
    return dask.config.collect_env(variables(containers(build(job(**changes)))[role]))


@pytest.mark.parametrize("role", ROLES)
def test_dask_reads_the_same_settings_as_on_one_machine(role: str) -> None:
    found = configuration(role)
    for key, value in SETTINGS.items():
        assert dask.config.get(key, config=found) == value


@pytest.mark.parametrize("role", ROLES)
def test_every_role_speaks_tls_alone(role: str) -> None:
    comm = configuration(role)["distributed"]["comm"]
    assert dask.config.get("require-encryption", config=comm) is True
    for part in ("scheduler", "worker", "client"):
        assert comm["tls"][part] == {
            "cert": "/etc/influence/tls/tls.crt",
            "key": "/etc/influence/tls/tls.key",
        }


def test_workers_compute_with_the_thread_settings_of_a_local_run() -> None:
    assert THREAD_SETTINGS.items() <= variables(containers(build(job()))["worker"]).items()


def test_the_schedulers_http_api_can_retire_workers_and_fetches_from_nowhere() -> None:
    routes = dask.config.get("distributed.scheduler.http.routes", config=configuration("scheduler"))
    assert "distributed.http.scheduler.api" in routes
    assert "distributed.http.health" in routes
    assert "distributed.http.proxy" not in routes


@pytest.mark.parametrize(
    "name",
    [
        "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION",
        "DASK_distributed__comm__require-encryption",
        "MKL_CBWR",
        "DASK_SCHEDULER_ADDRESS",
        "DASK_WORKER_NAME",
        "POD_IP",
    ],
)
def test_a_user_cannot_replace_what_a_worker_depends_on(name: str) -> None:
    plain = containers(build(job()))["worker"]["env"]
    changed = containers(build(job(workers={"env": [{"name": name, "value": "mine"}]})))["worker"]["env"]
    assert changed == plain


@pytest.mark.parametrize("name", ["HOME", "OPENBLAS_NUM_THREADS", "DASK_LOGGING__DISTRIBUTED"])
def test_a_user_may_replace_what_is_only_a_suggestion(name: str) -> None:
    env = containers(build(job(workers={"env": [{"name": name, "value": "mine"}]})))["worker"]["env"]
    assert [item["value"] for item in env if item["name"] == name] == ["mine"]


def test_the_gpus_libraries_are_found_where_gke_puts_them() -> None:
    gpu = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
    values = {role: variables(c) for role, c in containers(build(job(workers=gpu))).items()}
    assert values["worker"]["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert values["worker"]["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "LD_LIBRARY_PATH" not in values["driver"]
    assert "LD_LIBRARY_PATH" not in variables(containers(build(job()))["worker"])


def test_pythons_path_is_the_images_or_the_users_also_where_there_is_a_source(everything: Any) -> None:
    """The mounted code is found without it (`influence_job.entrypoint`)."""
    for role in ROLES:
        assert "PYTHONPATH" not in variables(containers(everything)[role])
    users = {"env": [{"name": "PYTHONPATH", "value": "/opt/research"}]}
    source = {"entrypoint": "task:task", "source": {"configMap": {"name": "task"}}}
    made = build(job(task=source, podDefaults=users), source={"data": {"task.py": ""}})
    for role in ROLES:
        assert variables(containers(made)[role])["PYTHONPATH"] == "/opt/research"
