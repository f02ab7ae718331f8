"""Requests and limits of a container: the user's, then what every container must have."""

from __future__ import annotations

from influence_job.spec import Quantity, ResourcesSpec
from influence_operator.manifests.names import Role
from influence_operator.settings import Defaults


def container_resources(role: Role, given: ResourcesSpec, defaults: Defaults) -> dict[str, dict[str, str]]:
    """Requests for cpu and memory and a memory limit, whatever was `given`.

    A given limit is the request too unless one was given, as Kubernetes does it, so that a worker with a
    GPU, cpu and memory limits is the last to be evicted. Quantities are strings: dask-kubernetes takes no
    numbers.
    """
    cpu, memory = _defaults(role, defaults)
    limits = dict(given.limits)
    if "memory" not in limits:
        limits["memory"] = max(memory, given.requests.get("memory", memory), key=lambda q: q.value)
    requests = {**limits, "cpu": limits.get("cpu", cpu), **given.requests}
    return {"requests": _strings(requests), "limits": _strings(limits)}


def _defaults(role: Role, defaults: Defaults) -> tuple[Quantity, Quantity]:
    match role:
        case Role.DRIVER:
            pair = defaults.driver_cpu, defaults.driver_memory
        case Role.SCHEDULER:
            pair = defaults.scheduler_cpu, defaults.scheduler_memory
        case Role.WORKER:
            pair = defaults.worker_cpu, defaults.worker_memory
    return Quantity(pair[0]), Quantity(pair[1])


def _strings(quantities: dict[str, Quantity]) -> dict[str, str]:
    return {name: str(quantity) for name, quantity in sorted(quantities.items())}
