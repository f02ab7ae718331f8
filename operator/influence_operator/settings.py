"""What an operator's process is told: read once from the environment, then frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Defaults:
    """What jobs get that do not say otherwise."""

    image: str
    """Worker image of jobs without `spec.image`."""
    image_pull_policy: str = "IfNotPresent"
    driver_cpu: str = "500m"
    """Requested by a driver's container; no limit."""
    driver_memory: str = "2Gi"
    """Requested by a driver's container, and its limit."""
    scheduler_cpu: str = "500m"
    scheduler_memory: str = "2Gi"
    worker_cpu: str = "1"
    worker_memory: str = "4Gi"


@dataclass(frozen=True)
class Settings:
    """The operator's configuration. Every field can be set as INFLUENCE_OPERATOR_<NAME>."""

    defaults: Defaults
    namespace: str = "influence-operator"
    """Where this operator runs and holds its Lease."""
    pod: str = "influence-operator"
    """This replica's name, its identity in the Lease."""
    operator_selector: Mapping[str, str] = field(
        default_factory=lambda: {"app.kubernetes.io/name": "influence-operator"}
    )
    """Labels of the operator's own pods, which NetworkPolicies let in."""
    metrics_namespace: str = ""
    """Namespace whose pods may read `/metrics` of drivers; empty: nobody."""
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces that are watched; empty: all."""
    health_port: int = 8081
    metrics_port: int = 9090
    resync_seconds: float = 300.0
    """Every job is looked at again this often."""
    lease_seconds: int = 15
    """A leader that did not renew for so long is followed by another."""
    status_writes_per_second: float = 10.0
    """Progress over all jobs; transitions are never delayed."""


PREFIX = "INFLUENCE_OPERATOR_"


def read(environ: Mapping[str, str]) -> Settings:
    """The settings in `environ`.

    Raises:
        ValueError: naming the variable, what was expected and what came.
    """
    given = {name[len(PREFIX) :].lower(): value for name, value in environ.items() if name.startswith(PREFIX)}
    names = {f.name: f.type for f in fields(Defaults)}
    if not given.get("image"):
        raise ValueError(f"{PREFIX}IMAGE: expected the image of drivers and workers, got nothing")
    defaults = Defaults(**{name: given.pop(name) for name in list(given) if name in names})
    values: dict[str, object] = {}
    for name, text in given.items():
        kind = {f.name: str(f.type) for f in fields(Settings)}.get(name)
        if kind is None or name == "defaults":
            raise ValueError(f"{PREFIX}{name.upper()}: no such setting")
        values[name] = _parse(name, kind, text)
    return Settings(defaults, **values)  # type: ignore[arg-type]


def _parse(name: str, kind: str, text: str) -> object:
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
        if kind.startswith("tuple"):
            return tuple(part for part in text.split(",") if part)
        if kind.startswith("Mapping"):
            return dict(part.split("=", 1) for part in text.split(",") if part)
    except ValueError:
        raise ValueError(f"{PREFIX}{name.upper()}: expected {kind}, got {text!r}") from None
    return text
