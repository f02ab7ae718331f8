"""What keeps one pod from running, in the words of whoever said so: kubelet, scheduler, or API server.

These are `ClusterReady`'s reasons. They never fail a job by themselves: a node may come, a quota be raised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from influence_operator.decisions import observed, words
from influence_operator.decisions.reasons import Reason
from influence_operator.decisions.snapshot import Object
from influence_operator.decisions.view import seconds_between

UNSCHEDULABLE_SECONDS = 5.0
"""Every pod is unschedulable for a moment while the last one's GPU is given back."""
_PULLING = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
    | {"RegistryUnavailable", "SignatureValidationFailed"}
)
_CREATING = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreCreateHookError"}
)
_UNMADE = frozenset({"ContainerCreating", "PodInitializing"})
_NOT_FOUND = re.compile(
    r"\b(secret|configmap|serviceaccount|persistentvolumeclaim|storageclass|runtimeclass)s? \S+ not found"
    r"|\bno PriorityClass with name"
    r"|\breferences non-existent (secret|config) key"
    r"|\bcouldn't find key",
    re.IGNORECASE,
)
_VOLUMES = frozenset({"FailedMount", "FailedAttachVolume", "FailedMapVolume"})


@dataclass(frozen=True)
class Problem:
    """A reason of `ClusterReady`, and the words that go with it."""

    reason: Reason
    message: str

    def of(self, subject: str) -> Problem:
        """The same, saying what it is about."""
        return Problem(self.reason, words.sentence(f"{subject}: {self.message}"))


def pod_problem(pod: Object, now: datetime) -> Problem | None:
    """What the kubelet or the scheduler has against a pod that is to run."""
    for container in observed.containers(pod):
        waiting = observed.look(container, "state", "waiting")
        if found := _container_problem(container, observed.text(waiting, "reason"), waiting):
            return found
    scheduled = observed.condition(pod, "PodScheduled")
    if observed.text(scheduled, "status") != "False":
        return None
    waited = seconds_between(observed.moment(scheduled, "lastTransitionTime") or observed.created(pod), now)
    if waited < UNSCHEDULABLE_SECONDS:
        return None
    message = observed.text(scheduled, "message") or observed.text(scheduled, "reason")
    return Problem(Reason.MISSING_REFERENCE if _missing(message) else Reason.UNSCHEDULABLE, message)


def event_problem(event: Object, pod: Object) -> Problem | None:
    """What a Warning says about a pod whose containers are not made yet."""
    unmade = any(
        observed.text(container, "state", "waiting", "reason") in _UNMADE
        for container in observed.containers(pod)
    )
    message = observed.text(event, "message")
    if not unmade or observed.text(event, "reason") not in _VOLUMES:
        return None
    return Problem(Reason.MISSING_REFERENCE if _missing(message) else Reason.VOLUME_FAILED, message)


def refusal(message: str) -> Problem:
    """What the API server's refusal of an object means."""
    if "exceeded quota" in message:
        return Problem(Reason.QUOTA_EXCEEDED, message)
    if "violates PodSecurity" in message:
        return Problem(Reason.POD_SECURITY_REFUSED, message)
    if _missing(message):
        return Problem(Reason.MISSING_REFERENCE, message)
    return Problem(Reason.REFUSED, message)


def _container_problem(container: Mapping[str, Any], reason: str, waiting: object) -> Problem | None:
    message = observed.text(waiting, "message") or reason
    if reason in _PULLING:
        return Problem(Reason.IMAGE_PULL_FAILED, message)
    if reason in _CREATING:
        return Problem(Reason.MISSING_REFERENCE if _missing(message) else Reason.CONTAINER_FAILED, message)
    if reason == "CrashLoopBackOff":
        last = observed.look(container, "lastState", "terminated")
        code, why = observed.whole(last, "exitCode"), observed.text(last, "reason")
        name = observed.text(container, "name")
        return Problem(Reason.CONTAINER_FAILED, f"container {name} ends with exit code {code} ({why})")
    return None


def _missing(message: str) -> bool:
    return _NOT_FOUND.search(message) is not None
