"""The kinds of objects that the operator asks an API server for, and what it may do with each.

`RIGHTS` is the whole of the operator's RBAC: the chart's roles are held against it by a test, and
`cluster.api` refuses a request that it does not list, so that the table cannot fall behind the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Kind:
    """A kind, and how its objects are addressed."""

    kind: str
    group: str
    version: str
    plural: str

    @property
    def api_version(self) -> str:
        """`apiVersion` of its manifests."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str | None = None, subresource: str = "") -> str:
        """The path at the API server; without a name that of the collection."""
        parts = ["/apis", self.group, self.version] if self.group else ["/api", self.version]
        if namespace is not None:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


INFLUENCE_JOB: Final = Kind("InfluenceJob", "influence-operator.dev", "v1alpha1", "influencejobs")
CONFIG_MAP: Final = Kind("ConfigMap", "", "v1", "configmaps")
NETWORK_POLICY: Final = Kind("NetworkPolicy", "networking.k8s.io", "v1", "networkpolicies")
JOB: Final = Kind("Job", "batch", "v1", "jobs")
DASK_CLUSTER: Final = Kind("DaskCluster", "kubernetes.dask.org", "v1", "daskclusters")
DASK_WORKER_GROUP: Final = Kind("DaskWorkerGroup", "kubernetes.dask.org", "v1", "daskworkergroups")
DEPLOYMENT: Final = Kind("Deployment", "apps", "v1", "deployments")
SERVICE: Final = Kind("Service", "", "v1", "services")
POD: Final = Kind("Pod", "", "v1", "pods")
SECRET: Final = Kind("Secret", "", "v1", "secrets")
EVENT: Final = Kind("Event", "", "v1", "events")
LEASE: Final = Kind("Lease", "coordination.k8s.io", "v1", "leases")

DASK_KINDS: Final = (DASK_CLUSTER, DASK_WORKER_GROUP)
"""Their CRDs belong to dask-kubernetes and may be absent."""
CHILD_KINDS: Final = (CONFIG_MAP, NETWORK_POLICY, JOB, *DASK_KINDS, DEPLOYMENT, SERVICE, POD)
"""Watched wherever they carry the label of a job's UID."""
WATCHED_KINDS: Final = (INFLUENCE_JOB, *CHILD_KINDS)
KINDS: Final = (*WATCHED_KINDS, SECRET, EVENT, LEASE)


def kind_of(api_version: str, kind: str) -> Kind:
    """The kind that a manifest or an action names.

    Raises:
        LookupError: it is none of the operator's.
    """
    for known in KINDS:
        if (known.api_version, known.kind) == (api_version, kind):
            return known
    raise LookupError(f"{api_version} {kind}: expected one of {', '.join(k.kind for k in KINDS)}")


@dataclass(frozen=True)
class Right:
    """What the operator does with one resource. The chart grants this and nothing else."""

    kind: Kind
    verbs: tuple[str, ...]
    subresource: str = ""
    own_namespace: bool = False
    """Needed in the operator's namespace only; the others wherever jobs may be."""


WATCH: Final = ("list", "watch")

RIGHTS: Final = (
    Right(INFLUENCE_JOB, (*WATCH, "delete")),  # delete: ttlSecondsAfterFinished
    Right(INFLUENCE_JOB, ("patch",), "status"),
    # Only where the admission plugin OwnerReferencesPermissionEnforcement is on: `blockOwnerDeletion`.
    Right(INFLUENCE_JOB, ("update",), "finalizers"),
    Right(CONFIG_MAP, ("get", *WATCH, "create", "delete")),
    Right(SECRET, ("create", "delete")),
    Right(NETWORK_POLICY, ("get", *WATCH, "create", "delete")),
    Right(JOB, ("get", *WATCH, "create", "delete")),
    # patch: replicas; a finalizer that holds up a deletion; the status, to heal a cluster without workers
    Right(DASK_CLUSTER, ("get", *WATCH, "create", "patch", "delete")),
    Right(DASK_WORKER_GROUP, WATCH),
    Right(DEPLOYMENT, (*WATCH, "delete")),  # delete: of workers that were retired
    Right(SERVICE, WATCH),
    Right(POD, WATCH),
    Right(EVENT, ("create", "list")),
    Right(LEASE, ("get", "create", "update"), own_namespace=True),
)


def allowed(kind: Kind, verb: str, subresource: str = "") -> bool:
    """Whether the table lists the request."""
    return any(r.kind == kind and r.subresource == subresource and verb in r.verbs for r in RIGHTS)
