"""The environment of a job's containers: what they need from us, what we suggest, what the user adds.

Dask reads its configuration from it: `a.b-c` as `DASK_A__B_C`, with Python literals as values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from influence_job.dask_settings import SETTINGS, THREAD_SETTINGS
from influence_job.document import TLS_DIRECTORY
from influence_job.spec import Device
from influence_operator.manifests import names
from influence_operator.manifests.child import Attempt
from influence_operator.manifests.names import Role

HOME = "/home/influence"
"""Writable, unlike the image; where data sets and models are cached."""
Variable = dict[str, Any]

_TLS = {
    "distributed.comm.require-encryption": True,
    "distributed.comm.tls.ca-file": f"{TLS_DIRECTORY}/ca.crt",
    **{
        f"distributed.comm.tls.{role}.{part}": f"{TLS_DIRECTORY}/tls.{suffix}"
        for role in ("scheduler", "worker", "client")
        for part, suffix in (("cert", "crt"), ("key", "key"))
    },
}
_COMMS = {
    # A partition sends no reset: the lost side is noticed after this time. Below 11 s connections that are
    # alive break, since Dask divides it among its keepalive probes.
    "distributed.comm.timeouts.tcp": "12s",
}
_SCHEDULER = {
    # `api` is how workers are retired. Not in the list: the proxy, which fetches from any address for anyone.
    "distributed.scheduler.http.routes": [
        "distributed.http.scheduler.api",
        "distributed.http.scheduler.info",
        "distributed.http.scheduler.prometheus",
        "distributed.http.health",
    ],
}
_WORKER = {"distributed.worker.http.routes": ["distributed.http.health"]}
_NANNY = {
    # What a nanny, which these workers go without, would set.
    "OPENBLAS_NUM_THREADS": "1",
}
_GPU = {
    # GKE mounts the driver's libraries here, where a plain python image does not look.
    "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64",
    "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
}
_SET_BY_DASK_KUBERNETES = "DASK_WORKER_NAME"


def environment(attempt: Attempt, role: Role) -> list[Variable]:
    """All variables of a role's container. Users' cannot replace what the job depends on."""
    required = _required(attempt, role)
    user = [dict(variable) for variable in attempt.pod(role).env]
    reserved = {_canonical(variable["name"]) for variable in required} | {_SET_BY_DASK_KUBERNETES}
    user = [variable for variable in user if _canonical(str(variable.get("name"))) not in reserved]
    given = {str(variable.get("name")) for variable in user}
    suggested = [_variable(n, v) for n, v in _suggested(attempt, role).items() if n not in given]
    # Ours first, because a value may refer to those above it as $(POD_IP).
    return [*required, *suggested, *user]


def environment_sources(attempt: Attempt, role: Role) -> list[Variable]:
    """`envFrom`: the storage's credentials, where data is read or written, then the user's."""
    user = [dict(source) for source in attempt.pod(role).env_from]
    credentials = attempt.spec.output.credentials_secret_ref
    if credentials is None or role is Role.SCHEDULER:
        return user
    return [{"secretRef": {"name": credentials.name}}, *user]


def dask_environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Dask configuration as environment variables."""
    return {
        "DASK_" + key.replace(".", "__").replace("-", "_").upper(): _literal(value)
        for key, value in settings.items()
    }


def _required(attempt: Attempt, role: Role) -> list[Variable]:
    values = dask_environment({**SETTINGS, **_COMMS, **_TLS})
    match role:
        case Role.SCHEDULER:
            values |= dask_environment(_SCHEDULER)
        case Role.WORKER:
            values |= dask_environment(_WORKER) | THREAD_SETTINGS
            # dask-kubernetes would set one without TLS, in a cluster domain that not every cluster has.
            values["DASK_SCHEDULER_ADDRESS"] = names.scheduler_address(attempt.base, attempt.namespace)
    return [
        _from_field("POD_NAME", "metadata.name"),
        _from_field("POD_NAMESPACE", "metadata.namespace"),
        _from_field("POD_IP", "status.podIP"),
        *(_variable(name, value) for name, value in values.items()),
    ]


def _suggested(attempt: Attempt, role: Role) -> dict[str, str]:
    # Libraries that ask who they are fail for a uid that /etc/passwd does not know.
    values = {"HOME": HOME, "USER": "influence"}
    if role is Role.WORKER:
        values |= _NANNY
        if attempt.spec.resolved_device is Device.CUDA:
            values |= _GPU
    return values


def _variable(name: str, value: str) -> Variable:
    return {"name": name, "value": value}


def _from_field(name: str, path: str) -> Variable:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _literal(value: object) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def _canonical(name: str) -> str:
    """Dask takes `DASK_a__b-c` for `DASK_A__B_C`."""
    return name.upper().replace("-", "_") if name.upper().startswith("DASK_") else name
