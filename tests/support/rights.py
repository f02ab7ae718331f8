"""What the operator may do by its roles, and what it did by the audit log, in the same words.

Used by tests/cluster/test_rights.py. A request is covered if the roles allow it, whatever the API server did:
one that has just started knows no roles yet and refuses everybody for a second, and a release that is being
uninstalled loses its roles before its pods.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from chart import NAMESPACE, OPERATOR
from cluster import Cluster

Object = dict[str, Any]

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{OPERATOR}"
DISCOVERY = ("/api", "/apis")
"""What a client asks to learn which kinds there are; every account may (system:discovery)."""


class Right(NamedTuple):
    """As a rule grants it, or as a request needs it."""

    group: str
    resource: str
    subresource: str
    verb: str
    namespace: str = ""
    """Empty: everywhere."""


FOR_OTHER_CLUSTERS = {
    # The admission plugin OwnerReferencesPermissionEnforcement asks whether the operator has it before it may
    # set `blockOwnerDeletion`; no request ever needs it.
    Right("influence-operator.dev", "influencejobs", "finalizers", "update"),
}
"""Granted without being used here."""


def granted(cluster: Cluster) -> set[Right]:
    """By every role that is bound to the operator's ServiceAccount."""
    account = {"kind": "ServiceAccount", "name": OPERATOR, "namespace": NAMESPACE}
    bindings = [
        *cluster.get("clusterrolebindings"),
        *json.loads(cluster.kubectl("get", "rolebindings", "--all-namespaces", "--output=json"))["items"],
    ]
    found: set[Right] = set()
    for binding in bindings:
        if account in binding.get("subjects", []):
            namespace = binding["metadata"].get("namespace", "")
            role = cluster.get(binding["roleRef"]["kind"], binding["roleRef"]["name"], namespace)
            found |= of_rules(role["rules"], namespace)
    return found


def of_rules(rules: list[Object], namespace: str = "") -> set[Right]:
    """Each right by itself, in the namespace of the binding."""
    return {
        Right(group, *((resource + "/").split("/")[:2]), verb, namespace)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def uncovered(entries: Iterable[Object], rights: set[Right]) -> list[Object]:
    """Requests that no rule allows."""
    return [entry for entry in entries if not _discovers(entry) and _rule(entry, rights) is None]


def used(entries: Iterable[Object], rights: set[Right]) -> set[Right]:
    """Those by which a request was allowed."""
    allowed = (e for e in entries if e["annotations"]["authorization.k8s.io/decision"] == "allow")
    return {rule for entry in allowed if (rule := _rule(entry, rights))}


def _discovers(entry: Object) -> bool:
    return "objectRef" not in entry and entry["requestURI"].startswith(DISCOVERY)


def _rule(entry: Object, rights: set[Right]) -> Right | None:
    """The right that allows a request."""
    thing = entry.get("objectRef")
    if thing is None:
        return None
    of_thing = (thing.get(name, "") for name in ("apiGroup", "resource", "subresource"))
    needed = Right(*of_thing, entry["verb"], thing.get("namespace", ""))
    return next((right for right in (needed._replace(namespace=""), needed) if right in rights), None)
