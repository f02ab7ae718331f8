"""The states of one InfluenceJob in a cluster, as they come: for `influence watch`.

Lists, then watches, then lists again, so that neither a closed watch nor an API server that was away for a
while loses the last state. The package `kubernetes` is imported when it is needed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from influence_job.crd import PLURAL
from influence_job.spec import API_VERSION

WATCH_SECONDS = 60
"""The API server ends a watch after so long, and the job is listed again."""
CONNECT_SECONDS = 5
LONGEST_PAUSE = 10.0
PATIENCE_SECONDS = 600.0
"""Without an answer for so long an API server that did answer is given up."""
_IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

Job = dict[str, Any]


class ClusterLostError(Exception):
    """The API server does not answer: not at all, or not for `PATIENCE_SECONDS`."""


@dataclass(frozen=True)
class Change:
    """A state of the job."""

    job: Job | None
    """None: there is no such job yet."""
    deleted: bool = False
    """`job` is its last state."""


class Jobs:
    """The jobs of one namespace, at the API server that a kubeconfig names."""

    def __init__(self, kubeconfig: str | None, context: str | None, namespace: str | None) -> None:
        """Raises ClickException: no package `kubernetes`, or no cluster that is configured."""
        try:
            from kubernetes import client
        except ImportError as error:
            raise click.ClickException(
                "watching needs the package kubernetes: pip install 'influence-operator[operator]'"
            ) from error
        configuration = client.Configuration()
        # One try at a time: this module does the waiting, and says so.
        configuration.retries = False
        configured = _configure(configuration, kubeconfig, context)
        self.namespace = namespace or configured
        self.server: str = configuration.host
        self._objects = client.CustomObjectsApi(client.ApiClient(configuration))

    def changes(self, name: str, tell: Callable[[str], None]) -> Iterator[Change]:
        """Every state of the job, the present one first; ends after its deletion, else never.

        Raises:
            ClickException: the cluster refuses, or serves no InfluenceJobs.
            ClusterLostError: it does not answer.
        """
        last: Change | None = None
        for change in self._answers(name, tell):
            if last and last.job and (change.deleted or _uid(change.job) != _uid(last.job)):
                yield Change(last.job if change.job is None else change.job, deleted=True)
                return
            if last is None or _version(change.job) != _version(last.job):
                yield change
            last = change

    def _answers(self, name: str, tell: Callable[[str], None]) -> Iterator[Change]:
        """What the API server answers, over outages and closed watches; the same state may come again."""
        answered, pause = 0.0, 1.0
        while True:
            try:
                for change in self._look(name):
                    if pause > 1:
                        tell(f"{self.server} answers again")
                    answered, pause = time.monotonic(), 1.0
                    yield change
                answered = time.monotonic()  # the watch's regular end
            except _transient() as error:
                if not answered or time.monotonic() - answered > PATIENCE_SECONDS:
                    raise ClusterLostError(f"{self.server} does not answer: {_words(error)}") from error
                if pause == 1:
                    tell(f"{self.server} does not answer, trying again: {_words(error)}")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _look(self, name: str) -> Iterator[Change]:
        """The present state, then what the API server tells until it closes the watch."""
        from kubernetes import client, watch

        group, version = API_VERSION.split("/")
        where: dict[str, Any] = {
            "group": group,
            "version": version,
            "namespace": self.namespace,
            "plural": PLURAL,
            "field_selector": f"metadata.name={name}",
        }
        list_jobs = self._objects.list_namespaced_custom_object
        try:
            found: Any = list_jobs(**where, _request_timeout=(CONNECT_SECONDS, WATCH_SECONDS))
            yield Change(found["items"][0] if found["items"] else None)
            events: Iterator[Any] = watch.Watch().stream(
                list_jobs,
                **where,
                resource_version=found["metadata"]["resourceVersion"],
                timeout_seconds=WATCH_SECONDS,
                _request_timeout=(CONNECT_SECONDS, WATCH_SECONDS + 15),
            )
            for event in events:
                yield Change(event["object"], deleted=event["type"] == "DELETED")
        except client.ApiException as error:
            if error.status == 410:
                return  # the watch fell behind; the next list has the present state
            if error.status in (401, 403, 404):
                raise click.ClickException(self._refusal(error)) from error
            raise

    def _refusal(self, error: Any) -> str:
        if error.status == 404:
            return f"{self.server} serves no InfluenceJobs: install the operator there, or choose a --context"
        return f"{self.server} does not let you watch {PLURAL} in namespace {self.namespace}: {_words(error)}"


def _configure(configuration: Any, kubeconfig: str | None, context: str | None) -> str:
    """Fills in where the API server is and who asks; returns the namespace to look into."""
    from kubernetes import config

    try:
        config.load_kube_config(kubeconfig, context, client_configuration=configuration)
        contexts, current = config.list_kube_config_contexts(kubeconfig)
        chosen = next((entry for entry in contexts if entry["name"] == context), current)
        return str(chosen["context"].get("namespace") or "default")
    except config.ConfigException as error:
        if kubeconfig or context or not _IN_CLUSTER.exists():
            raise click.ClickException(
                f"no cluster to look at: {error}; set KUBECONFIG, or name a file with --kubeconfig"
            ) from error
        config.load_incluster_config(configuration)
        return _IN_CLUSTER.read_text("utf-8")


def _transient() -> tuple[type[Exception], ...]:
    """What an API server that restarts, or a network that is away, looks like."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    return ApiException, HTTPError, OSError


def _words(error: Exception) -> str:
    """The server's own sentence where it sent one."""
    try:
        return str(json.loads(error.body)["message"])  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError, KeyError):
        return str(getattr(error, "reason", None) or error).rpartition(">: ")[2]


def _uid(job: Job | None) -> str | None:
    return job["metadata"]["uid"] if job else None


def _version(job: Job | None) -> str | None:
    return job["metadata"]["resourceVersion"] if job else None
