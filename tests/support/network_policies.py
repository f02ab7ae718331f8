"""Compiles NetworkPolicies into packet-filter rules; `packet_filter` puts them into force.

Pure: from the objects that the API server lists to the text that iptables-restore reads. What a policy
forbids is dropped. A field that this does not know is an error, never a rule that lets everybody in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

EGRESS, INGRESS = "INFLUENCE-EGRESS", "INFLUENCE-INGRESS"
"""Chains: what pods may reach, and who may reach them."""
ANYBODY = "0.0.0.0/0"


@dataclass(frozen=True)
class Seen:
    """What rules are made from."""

    policies: list[Object]
    pods: list[Object]
    namespaces: dict[str, Mapping[str, str]]
    """Their labels, by name."""


def rules(seen: Seen) -> list[str]:
    """Lines for iptables-restore: both chains, whole."""
    lines = [f":{chain} - [0:0]" for chain in (EGRESS, INGRESS)]
    lines += [
        f"-A {chain} -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN" for chain in (EGRESS, INGRESS)
    ]
    for pod in filter(address, seen.pods):
        lines += _of_pod(pod, seen)
    return lines


def address(pod: Object) -> str:
    """The pod's IP address while it is its own; empty when it has ended or uses the node's."""
    ended = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
    return "" if ended or pod["spec"].get("hostNetwork") else str(pod.get("status", {}).get("podIP", ""))


def _of_pod(pod: Object, seen: Seen) -> Iterator[str]:
    for chain, kind, own, other in ((EGRESS, "Egress", "-s", "-d"), (INGRESS, "Ingress", "-d", "-s")):
        policies = [policy for policy in seen.policies if _chooses(policy, pod, kind)]
        for policy in policies:
            for rule in policy["spec"].get(kind.lower()) or []:
                for peer in _addresses(rule.get("to" if kind == "Egress" else "from"), policy, seen):
                    for ports in _ports(rule.get("ports")):
                        yield f"-A {chain} {own} {address(pod)} {other} {peer}{ports} -j RETURN"
        if policies:
            yield f"-A {chain} {own} {address(pod)} -j DROP"


def _chooses(policy: Object, pod: Object, kind: str) -> bool:
    spec = policy["spec"]
    types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]
    here = policy["metadata"]["namespace"] == pod["metadata"]["namespace"]
    return kind in types and here and matches(spec["podSelector"], _labels(pod))


def _addresses(peers: list[Object] | None, policy: Object, seen: Seen) -> list[str]:
    if not peers:
        return [ANYBODY]
    return [found for peer in peers for found in _addresses_of(peer, policy, seen)]


def _addresses_of(peer: Object, policy: Object, seen: Seen) -> Iterator[str]:
    unknown = set(peer) - {"podSelector", "namespaceSelector"}
    if unknown:
        raise NotImplementedError(f"{policy['metadata']['name']}: no rule is known for {unknown}")
    for pod in filter(address, seen.pods):
        namespace = pod["metadata"]["namespace"]
        if "namespaceSelector" in peer:
            there = matches(peer["namespaceSelector"], seen.namespaces.get(namespace, {}))
        else:
            there = namespace == policy["metadata"]["namespace"]
        if there and matches(peer.get("podSelector", {}), _labels(pod)):
            yield address(pod)


def _ports(ports: list[Object] | None) -> Iterator[str]:
    if not ports:
        yield ""
    for entry in ports or []:
        protocol, port = entry.get("protocol", "TCP").lower(), entry.get("port")
        if isinstance(port, str):
            raise NotImplementedError(f"no rule is known for the named port {port}")
        to = f":{entry['endPort']}" if "endPort" in entry else ""
        yield f" -p {protocol}" + (f" --dport {port}{to}" if port else "")


def matches(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector chooses an object."""
    wanted = (selector.get("matchLabels") or {}).items()
    expressions = selector.get("matchExpressions") or []
    return all(labels.get(k) == v for k, v in wanted) and all(_holds(e, labels) for e in expressions)


def _holds(expression: Object, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or []
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[expression["operator"]]


def _labels(obj: Object) -> Mapping[str, str]:
    labels: Mapping[str, str] = obj["metadata"].get("labels") or {}
    return labels
