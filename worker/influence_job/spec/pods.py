"""The pods of a job: what its user may set on driver, scheduler and workers.

Objects whose schema Kubernetes owns stay open; the API server checks them when the pod is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from influence_job.spec.fields import (
    Annotations,
    Integer,
    Labels,
    ObjectName,
    OpenObject,
    OpenObjects,
    Quantities,
    Quantity,
    SpecModel,
    refuse,
)

_API_SERVER = re.compile(r"(https?://)?kubernetes\.default(\.svc.*)?", re.IGNORECASE)
"""Audiences that API servers accept by default: the names of their Service."""


def _no_token(volumes: list[Any]) -> list[Any]:
    for field, token in projected_tokens(volumes):
        audience = token.get("audience")
        if not audience:
            raise refuse(
                field,
                "expected an audience: without one it is the API server's, and no pod of a job holds such",
            )
        if isinstance(audience, str) and _API_SERVER.fullmatch(audience):
            raise refuse(field, api_audience(audience))
    return volumes


def api_audience(audience: str) -> str:
    """Why a token of this audience is refused."""
    return (
        f"expected the audience of whom the token is for, got {audience[:253]!r}, which is the API server's: "
        "no pod of a job holds such a token"
    )


def projected_tokens(volumes: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every ServiceAccount token that volumes ask for, with the path of its audience below `volumes`."""
    for index, volume in enumerate(volumes):
        projected = volume.get("projected")
        sources = projected.get("sources") if isinstance(projected, dict) else None
        for place, source in enumerate(sources if isinstance(sources, list) else []):
            token = source.get("serviceAccountToken") if isinstance(source, dict) else None
            if isinstance(token, dict):
                yield f"{index}.projected.sources.{place}.serviceAccountToken.audience", token


class ImagePullPolicy(StrEnum):
    """When the kubelet pulls an image."""

    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class ResourcesSpec(SpecModel):
    """Kubernetes resources; `claims` are refused because dask-kubernetes drops them."""

    limits: Quantities = Field(
        default_factory=dict, description="Resource -> most a container may use, such as memory: 16Gi."
    )
    requests: Quantities = Field(
        default_factory=dict, description="Resource -> what the scheduler reserves. Default: the limits."
    )


class PodSettings(SpecModel):
    """Settings of one role's pods. Changes take effect with the next attempt."""

    resources: ResourcesSpec = Field(
        default_factory=ResourcesSpec,
        description="Requests and limits; absent ones come from podDefaults, then from the operator.",
    )
    node_selector: Labels = Field(default_factory=dict, description="Labels that a node must have.")
    tolerations: OpenObjects = Field(default_factory=list, description="Taints the pods tolerate.")
    affinity: OpenObject = Field(default_factory=dict, description="Kubernetes' affinity object.")
    topology_spread_constraints: OpenObjects = Field(default_factory=list, description="As in a pod's spec.")
    priority_class_name: ObjectName | None = Field(None, description="Name of a PriorityClass.")
    labels: Labels = Field(default_factory=dict, description="Further labels of the pods.")
    annotations: Annotations = Field(default_factory=dict, description="Further annotations of the pods.")
    env: OpenObjects = Field(default_factory=list, description="Environment variables, as in a container.")
    env_from: OpenObjects = Field(default_factory=list, description="Sources of environment variables.")
    volumes: Annotated[OpenObjects, AfterValidator(_no_token)] = Field(
        default_factory=list, description="Volumes of the pods."
    )
    volume_mounts: OpenObjects = Field(default_factory=list, description="Where the container mounts them.")
    fs_group: Annotated[Integer, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="Group that owns mounted volumes."
    )
    service_account_name: ObjectName | None = Field(
        None, description="ServiceAccount, for workload identity. Its API token is never mounted."
    )
    image_pull_secrets: OpenObjects = Field(default_factory=list, description="[{name: secret}]")
    image_pull_policy: ImagePullPolicy | None = Field(None, description="Always | IfNotPresent | Never.")
    runtime_class_name: ObjectName | None = Field(None, description="Name of a RuntimeClass.")
    termination_grace_period_seconds: Annotated[Integer, Field(ge=0, le=3600)] | None = Field(
        None, description="Seconds between SIGTERM and SIGKILL; at most 3600."
    )


class WorkersSpec(PodSettings):
    """The Dask workers: one process and one thread each, with its GPU if it asks for one."""

    replicas: Annotated[Integer, Field(ge=1, le=1000)] = Field(
        1, description="Number of workers, 1 to 1000; may change while the job runs. Default 1."
    )
    device_memory: Quantity | None = Field(
        None,
        description="Bytes of GPU memory the plan may use per worker; default 12Gi. On cpu the plan takes "
        "half the workers' memory limit instead (2Gi where none is set).",
    )
