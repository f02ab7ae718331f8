"""How the operator's rights are held against the audit log. On a cluster: tests/cluster/test_rights.py."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import machine
from rights import ACCOUNT, Right, of_rules, uncovered, used

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
RIGHTS = {
    *of_rules([{"apiGroups": [""], "resources": ["pods", "pods/log"], "verbs": ["get", "list"]}]),
    *of_rules([{"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get"]}], "own"),
}


def entry(
    verb: str = "get", resource: str = "pods", group: str = "", namespace: str = "team", **fields: Any
) -> dict[str, Any]:
    """A request that was allowed, unless `fields` say otherwise."""
    thing = {"resource": resource, "namespace": namespace} | ({"apiGroup": group} if group else {})
    return {
        "verb": verb,
        "user": {"username": ACCOUNT},
        "objectRef": thing,
        "stageTimestamp": "2026-01-02T03:04:05.000000Z",
        "annotations": {"authorization.k8s.io/decision": "allow"},
    } | fields


REFUSED = {"annotations": {"authorization.k8s.io/decision": "forbid"}}


def test_rules_are_taken_apart() -> None:
    assert {
        Right("", "pods", "", "get"), Right("", "pods", "", "list"),
        Right("", "pods", "log", "get"), Right("", "pods", "log", "list"),
        Right("apps", "deployments", "", "get", "own"),
    } == RIGHTS  # fmt: skip


def test_a_right_counts_as_used_where_a_request_was_allowed_by_it() -> None:
    done = [entry(), entry("list", **REFUSED), entry(resource="deployments", group="apps", namespace="own")]
    assert used(done, RIGHTS) == {
        Right("", "pods", "", "get"),
        Right("apps", "deployments", "", "get", "own"),
    }


@pytest.mark.parametrize(
    "request_",
    [
        entry("delete"),
        entry("delete", **REFUSED),
        entry(objectRef={"resource": "pods", "subresource": "exec"}),
        entry(resource="deployments", namespace="own"),
        entry(resource="deployments", group="apps", namespace="other"),
        entry(resource="deployments", group="apps", namespace="", **REFUSED),
        {"verb": "get", "requestURI": "/metrics"},
    ],
    ids=["verb", "refused", "subresource", "group", "namespace", "everywhere", "no object"],
)
def test_a_request_beyond_the_rules_is_told(request_: dict[str, Any]) -> None:
    within = [entry(), entry(**REFUSED), {"verb": "get", "requestURI": "/apis/apps/v1"}]
    assert uncovered([*within, request_], RIGHTS) == [request_]


def test_the_log_is_read_from_a_time_on_through_renamed_files_and_of_one_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "AUDIT_LOG", tmp_path / "audit.log")

    def line(entry: dict[str, Any]) -> str:
        return json.dumps(entry, separators=(",", ":")) + "\n"

    def write(name: str, *entries: dict[str, Any], end: str = "") -> Path:
        path = tmp_path / name
        path.write_text("".join(map(line, entries)) + end)
        return path

    def at(seconds: float, **fields: Any) -> dict[str, Any]:
        stamp = (NOW + timedelta(seconds=seconds)).isoformat(timespec="microseconds")
        return entry(stageTimestamp=stamp.replace("+00:00", "Z"), **fields)

    other = {"username": ACCOUNT + "-other"}
    impersonated = {"user": {"username": "admin"}, "impersonatedUser": {"username": ACCOUNT}}
    old = write("audit-2026-01-02T03-00-00.000.log", at(60))
    os.utime(old, (0, NOW.timestamp() - 1))
    write("audit-2026-01-02T03-05-00.000.log", at(-0.5), at(0.5, auditID="first"))
    last = at(2, auditID="second")
    write("audit.log", at(1, user=other), at(1, **impersonated), last, end=line(last)[:-2])

    found = [e["auditID"] for e in machine.audited(ACCOUNT, NOW)]

    assert found == ["first", "second"]
