"""The operator as a process of this machine, against the test cluster: it can be stopped, frozen and killed.

It reaches the API server but no pods, which is enough for whatever is about requests, leases and restarts.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from cluster import Cluster

LEASE_SECONDS = 6
WRITES = {"create", "update", "patch", "delete"}


class OperatorProcess:
    """A running replica."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, log: Path, **settings: str) -> None:
        self.name = name
        self.log = log
        self._health, self._metrics = _free_port(), _free_port()
        given = {
            "image": cluster.images.worker.name,
            "namespace": namespace,
            "watch_namespaces": namespace,
            "pod": name,
            "health_port": str(self._health),
            "metrics_port": str(self._metrics),
            "lease_seconds": str(LEASE_SECONDS),
        } | settings
        environment = {f"INFLUENCE_OPERATOR_{key.upper()}": value for key, value in given.items()}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("INFLUENCE_")}
        command = [sys.executable, "-c", "from influence_operator.cli import main; main()"]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=inherited | environment | {"KUBECONFIG": str(cluster.kubeconfig)},
                stderr=output,
                stdout=output,
            )

    # -- what it says ---------------------------------------------------------------------------

    def probe(self, path: str) -> int:
        """The status code of `/healthz` or `/readyz`; 0 if nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health}{path}", timeout=2) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over the labels that are not given."""
        return sum(
            value
            for sample, found, value in self._samples()
            if sample == name and labels.items() <= found.items()
        )

    def requests(self) -> Counter[tuple[str, str]]:
        """Requests to the API server by verb and resource, those for the lease left out."""
        counted: Counter[tuple[str, str]] = Counter()
        for sample, labels, value in self._samples():
            if sample == "influence_operator_api_requests_total" and labels["resource"] != "leases":
                counted[labels["verb"], labels["resource"]] += int(value)
        return counted

    def writes(self) -> int:
        """Requests that change something."""
        return sum(number for (verb, _), number in self.requests().items() if verb in WRITES)

    def leads(self) -> bool:
        """Whether it has the lease."""
        return self.probe("/healthz") == 200 and self.metric("influence_operator_leader") == 1

    def records(self, severity: str) -> list[str]:
        """Messages of that severity, exceptions included."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        told = [line for line in lines if line["severity"] == severity]
        return [f"{line['message']}\n{line.get('exception', '')}" for line in told]

    # -- what is done to it ---------------------------------------------------------------------

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self._process.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        """Its exit code."""
        return self._process.wait(seconds)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def settle(self, seconds: float = 60) -> None:
        """Waits until it has written nothing for some seconds."""
        deadline, quiet_since, before = time.monotonic() + seconds, time.monotonic(), -1
        while time.monotonic() < deadline:
            now = self.writes()
            if now != before:
                before, quiet_since = now, time.monotonic()
            elif time.monotonic() > quiet_since + 5:
                return
            time.sleep(0.2)
        raise AssertionError(f"it wrote for {seconds:g} s: {self.requests()}")

    def _samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value


@contextmanager
def operator_process(
    cluster: Cluster, namespace: str, name: str, directory: Path, **settings: str
) -> Iterator[OperatorProcess]:
    """A replica that holds its lease in `namespace` and watches that namespace alone."""
    process = OperatorProcess(cluster, namespace, name, directory / f"{name}.log", **settings)
    try:
        yield process
    finally:
        if process.running:
            process.send(signal.SIGKILL)
            process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
