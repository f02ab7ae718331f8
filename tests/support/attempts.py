"""InfluenceJobs as an API server would return them, and the manifests of their first attempt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from influence_job.spec import InfluenceJob, InfluenceJobSpec
from influence_operator.manifests.attempt import AttemptManifests, attempt_manifests
from influence_operator.settings import Defaults, Settings
from manifests import manifest

UID = "3f2a91c0-5b7d-4e61-9c8e-0d1f2a3b4c5d"
NAMESPACE = "research"
SETTINGS = Settings(Defaults(image="registry.example/influence-worker:0.1.0"), metrics_namespace="monitoring")


def stored(document: dict[str, Any], namespace: str = NAMESPACE, uid: str = UID) -> dict[str, Any]:
    """A manifest with the metadata that the API server adds."""
    metadata = {**document["metadata"], "namespace": namespace, "uid": uid, "generation": 1}
    return {**document, "metadata": metadata}


def job(**changes: Any) -> dict[str, Any]:
    """The stored job of `manifests.manifest(**changes)`."""
    return stored(manifest(**changes))


def from_file(path: Path) -> dict[str, Any]:
    """The stored job of a YAML file."""
    return stored(yaml.safe_load(path.read_text()))


def spec_of(job: dict[str, Any]) -> InfluenceJobSpec:
    """Its parsed spec."""
    return InfluenceJob.model_validate(job, by_alias=True, by_name=False).spec


def build(
    job: dict[str, Any], source: dict[str, Any] | None = None, settings: Settings = SETTINGS, attempt: int = 1
) -> AttemptManifests:
    """The manifests of an attempt of `job`."""
    return attempt_manifests(job, spec_of(job), attempt, settings, source)


def all_of(made: AttemptManifests) -> list[dict[str, Any]]:
    """In the order of creation."""
    return [made.config_map, made.secret, *made.network_policies, made.driver_job, made.dask_cluster]


def pod_specs(made: AttemptManifests) -> dict[str, dict[str, Any]]:
    """Role -> pod spec."""
    cluster = made.dask_cluster["spec"]
    return {
        "driver": made.driver_job["spec"]["template"]["spec"],
        "scheduler": cluster["scheduler"]["spec"],
        "worker": cluster["worker"]["spec"],
    }


def pod_metadata(made: AttemptManifests) -> dict[str, dict[str, Any]]:
    """Role -> labels and annotations of the pod."""
    cluster = made.dask_cluster["spec"]
    return {
        "driver": made.driver_job["spec"]["template"]["metadata"],
        "scheduler": cluster["scheduler"]["metadata"],
        "worker": cluster["worker"]["metadata"],
    }


def containers(made: AttemptManifests) -> dict[str, dict[str, Any]]:
    """Role -> its one container."""
    return {role: spec["containers"][0] for role, spec in pod_specs(made).items()}


def variables(container: dict[str, Any]) -> dict[str, Any]:
    """Name -> value, of variables that have one."""
    return {item["name"]: item["value"] for item in container["env"] if "value" in item}
