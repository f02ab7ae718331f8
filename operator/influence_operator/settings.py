"""What an operator's process is told: read once from the environment, then frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from influence_job.spec import Quantity


@dataclass(frozen=True)
class Defaults:
    """What jobs get that do not say otherwise."""

    image: str
    """Worker image of jobs without `spec.image`."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    driver_cpu: Quantity = field(default=Quantity("500m"))
    """Requested by a driver's container; no limit."""
    driver_memory: Quantity = field(default=Quantity("2Gi"))
    """Requested by a driver's container, and its limit."""
    scheduler_cpu: Quantity = field(default=Quantity("500m"))
    scheduler_memory: Quantity = field(default=Quantity("2Gi"))
    worker_cpu: Quantity = field(default=Quantity("1"))
    worker_memory: Quantity = field(default=Quantity("4Gi"))


@dataclass(frozen=True)
class Settings:
    """The operator's configuration. Every field can be set as INFLUENCE_OPERATOR_<NAME>."""

    defaults: Defaults
    namespace: str = "influence-operator"
    """Where this operator runs and holds its Lease."""
    pod: str = "influence-operator"
    """This replica's name, its identity in the Lease."""
    lease_name: str = "influence-operator"
    """The Lease that the replicas of one installation contend for; another installation in the namespace has
    another."""
    operator_selector: Mapping[str, str] = field(
        default_factory=lambda: {"app.kubernetes.io/name": "influence-operator"}
    )
    """Labels of the operator's own pods, which NetworkPolicies let in."""
    metrics_namespace: str = ""
    """Namespace whose pods may read `/metrics` of drivers; empty: nobody."""
    api_audiences: tuple[str, ...] = ()
    """Audiences of tokens that the API server accepts, beside those of the operator's own token: volumes of
    jobs that ask for such a token are refused."""
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
    log_format: Literal["json", "plain"] = "json"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


PREFIX = "INFLUENCE_OPERATOR_"


def read(environ: Mapping[str, str]) -> Settings:
    """The settings in `environ`.

    Raises:
        ValueError: naming the variable, what was expected and what came.
    """
    given = {name[len(PREFIX) :].lower(): value for name, value in environ.items() if name.startswith(PREFIX)}
    if not given.get("image"):
        raise ValueError(f"{PREFIX}IMAGE: expected the image of drivers and workers, got nothing")
    kinds = {f.name: str(f.type) for f in fields(Defaults) if f.name in given}
    chosen = {name: _parse(name, kind, given.pop(name)) for name, kind in kinds.items()}
    defaults = Defaults(**chosen)  # type: ignore[arg-type]
    values: dict[str, object] = {}
    for name, text in given.items():
        kind = {f.name: str(f.type) for f in fields(Settings)}.get(name)
        if kind is None or name == "defaults":
            # A Service called influence-operator puts such variables into every pod of its namespace.
            hint = "; set enableServiceLinks: false" if "_port" in name or "service_" in name else ""
            raise ValueError(f"{PREFIX}{name.upper()}: no such setting{hint}")
        values[name] = _parse(name, kind, text)
    return Settings(defaults, **values)  # type: ignore[arg-type]


def _parse(name: str, kind: str, text: str) -> object:
    try:
        if kind in ("int", "float"):
            return _positive(kind, text)
        if kind == "Quantity":
            return Quantity(text)
        if kind.startswith("tuple"):
            return tuple(part for part in text.split(",") if part)
        if kind.startswith("Mapping"):
            return dict(_pair(part) for part in text.split(",") if part)
        if kind.startswith("Literal") and repr(text) not in kind:
            raise ValueError
    except ValueError:
        expected = _EXPECTED.get(kind.partition("[")[0], kind)
        hint = "; set enableServiceLinks: false" if text.startswith("tcp://") else ""
        raise ValueError(f"{PREFIX}{name.upper()}: expected {expected}, got {text!r}{hint}") from None
    return text


_EXPECTED = {
    "int": "a whole number above 0",
    "float": "a number above 0",
    "Quantity": "a quantity such as 16Gi, 500m or 1",
    "Mapping": "key=value,key=value",
}


def _positive(kind: str, text: str) -> int | float:
    number = int(text) if kind == "int" else float(text)
    if not 0 < number < 1e9:
        raise ValueError
    return number


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError
    return key, value
