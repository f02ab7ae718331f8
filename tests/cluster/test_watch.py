"""`influence watch` against a real API server, through a connection that can be cut.

No operator is needed: the tests write the status, and `managedBy` keeps others from it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import Cluster
from influence_job.crd import PLURAL
from influence_job.spec import API_VERSION
from job_samples import VALID

GROUP, VERSION = API_VERSION.split("/")
SECONDS = 30


class Cable:
    """A port that leads to the API server, until it is pulled."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.plug()

    def plug(self) -> None:
        """Accepts connections, on the same port each time."""
        listener = socket.create_server(("127.0.0.1", self.port), reuse_port=True)
        self._listener, self.port = listener, listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def pull(self) -> None:
        """Ends what is connected and refuses what comes."""
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=_copy, args=(one, other), daemon=True).start()


def _copy(one: socket.socket, other: socket.socket) -> None:
    with one, contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_RDWR)


class Watching:
    """A running `influence watch`."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-c", "from influence_job.cli import main; main()", "watch", *arguments]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def line(self, part: str) -> str:
        """The next line that holds `part`."""
        deadline = time.monotonic() + SECONDS
        seen = []
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                seen.append(self._lines.get(timeout=0.2))
                if part in seen[-1]:
                    return seen[-1]
        raise AssertionError(f"no line with {part!r}, but {seen}")

    def code(self) -> int:
        return self._process.wait(SECONDS)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))


@pytest.fixture
def cable(crd: Cluster) -> Iterator[Cable]:
    host, port = crd.api.configuration.host.removeprefix("https://").rsplit(":", 1)
    cable = Cable(host, int(port))
    yield cable
    with contextlib.suppress(OSError):
        cable.pull()


@pytest.fixture
def kubeconfig(crd: Cluster, cable: Cable, namespace: str, tmp_path: Path) -> Path:
    """The cluster's, by way of the cable, with the test's namespace as the default."""
    settings = yaml.safe_load(crd.kubeconfig.read_text("utf-8"))
    [entry] = settings["clusters"]
    host = entry["cluster"]["server"].removeprefix("https://").rsplit(":", 1)[0]
    entry["cluster"] |= {"server": f"https://127.0.0.1:{cable.port}", "tls-server-name": host}
    settings["contexts"][0]["context"]["namespace"] = namespace
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(settings), "utf-8")
    return path


@pytest.fixture
def watching(kubeconfig: Path) -> Iterator[Watching]:
    with contextlib.closing(Watching("sample", "--kubeconfig", str(kubeconfig))) as watching:
        yield watching


def create(crd: Cluster, namespace: str) -> None:
    document = copy.deepcopy(VALID["shortest"])
    document["spec"]["managedBy"] = "tests"
    crd.objects.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, document)


def write(crd: Cluster, namespace: str, **status: Any) -> None:
    crd.objects.patch_namespaced_custom_object_status(
        GROUP, VERSION, namespace, PLURAL, "sample", {"status": {"observedGeneration": 1, **status}}
    )


def holds(kind: str, reason: str, message: str) -> list[dict[str, str]]:
    times = {"lastTransitionTime": "2026-01-01T00:00:00Z"}
    return [{"type": kind, "status": "True", "reason": reason, "message": message, **times}]


def test_a_job_is_awaited_and_watched_until_it_is_complete(
    crd: Cluster, namespace: str, watching: Watching
) -> None:
    watching.line(f"waiting for influencejob sample in namespace {namespace}")
    create(crd, namespace)
    watching.line("sample: not yet seen by the operator")
    write(crd, namespace, phase="Running")
    watching.line("sample: Running")
    result = {"url": "gs://bucket/digits.zarr", "shape": [300, 1400], "dtype": "float32"}
    write(crd, namespace, phase="Complete", conditions=holds("Complete", "Complete", "done"), result=result)
    watching.line("complete: 300 × 1400 float32 in gs://bucket/digits.zarr")
    assert watching.code() == 0


def test_a_failed_job_ends_it_with_64(crd: Cluster, namespace: str, watching: Watching) -> None:
    create(crd, namespace)
    write(crd, namespace, phase="Failed", conditions=holds("Failed", "InvalidTask", "ValueError: no"))
    watching.line("failed: InvalidTask: ValueError: no")
    assert watching.code() == 64


def test_an_api_server_that_is_away_for_a_while_is_told_and_nothing_is_missed(
    crd: Cluster, namespace: str, watching: Watching, cable: Cable
) -> None:
    create(crd, namespace)
    write(crd, namespace, phase="Pending")
    watching.line("sample: Pending")
    cable.pull()
    watching.line("does not answer, trying again")
    write(crd, namespace, phase="Running")
    cable.plug()
    watching.line("answers again")
    watching.line("sample: Running")
    write(crd, namespace, phase="Complete", conditions=holds("Complete", "Complete", "done"))
    assert watching.code() == 0


def test_a_deleted_job_ends_it(crd: Cluster, namespace: str, watching: Watching) -> None:
    create(crd, namespace)
    watching.line("sample: not yet seen")
    crd.kubectl("delete", "influencejob", "sample", "--namespace", namespace)
    watching.line("deleted; what it stored is still at gs://bucket/digits.zarr")
    assert watching.code() == 64


def test_a_job_that_was_deleted_and_made_again_meanwhile_is_another(
    crd: Cluster, namespace: str, watching: Watching, cable: Cable
) -> None:
    create(crd, namespace)
    watching.line("sample: not yet seen")
    cable.pull()
    crd.kubectl("delete", "influencejob", "sample", "--namespace", namespace)
    create(crd, namespace)
    cable.plug()
    watching.line("deleted")
    assert watching.code() == 64


def test_scripts_read_one_json_document_per_change(crd: Cluster, namespace: str, kubeconfig: Path) -> None:
    create(crd, namespace)
    with contextlib.closing(
        Watching("sample", "--kubeconfig", str(kubeconfig), "-n", namespace, "--json")
    ) as watching:
        first = json.loads(watching.line("{"))
        assert first["metadata"]["name"] == "sample"
        assert (first["deleted"], first["status"]) == (False, {"observedGeneration": -1})
        write(crd, namespace, phase="Complete", conditions=holds("Complete", "Complete", "done"))
        assert json.loads(watching.line("{"))["status"]["phase"] == "Complete"
        assert watching.code() == 0


def test_a_cluster_that_does_not_answer_at_first_is_not_waited_for(cable: Cable, kubeconfig: Path) -> None:
    cable.pull()
    with contextlib.closing(Watching("sample", "--kubeconfig", str(kubeconfig))) as watching:
        watching.line("does not answer")
        assert watching.code() == 75


def test_somebody_without_the_right_is_told_so(crd: Cluster, namespace: str, kubeconfig: Path) -> None:
    settings = yaml.safe_load(kubeconfig.read_text("utf-8"))
    token = crd.token_of("default", namespace)
    settings["users"][0]["user"] = {"token": token}
    kubeconfig.write_text(yaml.safe_dump(settings), "utf-8")
    with contextlib.closing(Watching("sample", "--kubeconfig", str(kubeconfig))) as watching:
        assert namespace in watching.line(f"does not let you watch {PLURAL} in namespace")
        assert watching.code() == 64
