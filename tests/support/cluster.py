"""The cluster that tests run on: ours (tests/cluster/machine), or the one that TEST_KUBECONFIG names.

`prepare` brings it up and builds the images; the fixtures of tests/cluster/conftest.py hand it out.
Nothing is mocked: kubectl, helm and the `kubernetes` client talk to a real API server.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from kubernetes import client, config
from urllib3.exceptions import HTTPError

from host_tests import CLUSTER_VARIABLE

CHECKOUT = Path(__file__).parents[2]
SCRIPTS = CHECKOUT / "tests/cluster/machine"
HOME = Path(os.environ.get("K8S_HOME", "~/.cache/influence-cluster")).expanduser()
OWN_LABEL = "influence-tests"
"""On every namespace that tests make."""
POLL_SECONDS = 0.4
FAKE_GPUS_VARIABLE = "TEST_FAKE_GPUS"
"""`yes`: nodes of a cluster that is somebody else's may be made to advertise GPUs, too."""

T = TypeVar("T")


def prepare() -> None:
    """Brings up the cluster and builds the images; quick when both are there.

    Raises:
        RuntimeError: there is no cluster to be had, and why.
    """
    if CLUSTER_VARIABLE not in os.environ:
        for script in ("build.sh", "up.sh", "images.sh"):
            _run_script(script)
        return
    if "IMAGE_REGISTRY" not in os.environ:
        raise RuntimeError(
            f"{CLUSTER_VARIABLE} is set and IMAGE_REGISTRY is not: set it to a registry (host/path) that "
            "this machine may push to and the cluster's nodes may pull from"
        )
    _run_script("images.sh")


@dataclass(frozen=True)
class Image:
    """An image of this checkout."""

    name: str
    """registry/repository:tag"""

    @property
    def repository(self) -> str:
        return self.name.rpartition(":")[0]

    @property
    def tag(self) -> str:
        return self.name.rpartition(":")[2]


@dataclass(frozen=True)
class Images:
    """All of them, as `make images` left them."""

    operator: Image
    worker: Image
    dask_operator: Image
    gcs: Image

    @classmethod
    def read(cls, path: Path) -> Images:
        pairs = dict(line.split("=", 1) for line in path.read_text().splitlines())
        names = ("OPERATOR", "WORKER", "DASK_OPERATOR", "GCS")
        return cls(*(Image(pairs[f"{name}_IMAGE"]) for name in names))


@dataclass(frozen=True)
class Cluster:
    """A running cluster whose nodes can pull our images."""

    kubeconfig: Path
    images: Images

    @classmethod
    def connect(cls) -> Cluster:
        """The cluster as `prepare` left it."""
        if CLUSTER_VARIABLE not in os.environ:
            return cls(HOME / "kubeconfig", Images.read(HOME / "images.env"))
        registry = re.sub("[^a-zA-Z0-9.-]", "_", os.environ["IMAGE_REGISTRY"])
        return cls(Path(os.environ[CLUSTER_VARIABLE]), Images.read(HOME / f"images.{registry}.env"))

    @cached_property
    def api(self) -> client.ApiClient:
        """For the typed clients: `client.BatchV1Api(cluster.api)`."""
        return config.new_client_from_config(str(self.kubeconfig))

    def token_of(self, account: str, namespace: str) -> str:
        """A new token of a ServiceAccount."""
        return self.kubectl("create", "token", account, "--namespace", namespace).strip()

    def api_as(self, account: str, namespace: str) -> client.ApiClient:
        """The same for a ServiceAccount, by a token of its own: what it may do, not what we may."""
        token = self.token_of(account, namespace)
        settings = client.Configuration()
        settings.host = self.api.configuration.host
        settings.ssl_ca_cert = self.api.configuration.ssl_ca_cert
        settings.api_key["authorization"] = f"Bearer {token}"
        return client.ApiClient(settings)

    @cached_property
    def core(self) -> client.CoreV1Api:
        return client.CoreV1Api(self.api)

    @cached_property
    def objects(self) -> client.CustomObjectsApi:
        return client.CustomObjectsApi(self.api)

    def kubectl(self, *arguments: str, stdin: str | None = None, seconds: float = 120) -> str:
        """What `kubectl ARGUMENTS` prints.

        Raises:
            CommandError: it failed; `output` has its words.
        """
        return _run([tool("kubectl"), "--kubeconfig", str(self.kubeconfig), *arguments], stdin, seconds)

    def helm(self, *arguments: str, seconds: float = 300) -> str:
        """What `helm ARGUMENTS` prints; raises as `kubectl` does."""
        return _run([tool("helm"), "--kubeconfig", str(self.kubeconfig), *arguments], None, seconds)

    def get(self, kind: str, name: str = "", namespace: str = "", selector: str = "") -> Any:
        """An object, or without a name the list of those that the label selector chooses."""
        where = ["--namespace", namespace] if namespace else []
        which = [name] if name else ["--selector", selector] if selector else []
        found = json.loads(self.kubectl("get", kind, *which, *where, "--output", "json"))
        return found if name else found["items"]

    def apply(self, *documents: dict[str, Any], namespace: str = "") -> None:
        """Server-side, as the project's users do."""
        stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(documents)})
        where = ["--namespace", namespace] if namespace else []
        self.kubectl("apply", "--server-side", "--force-conflicts", "--filename", "-", *where, stdin=stdin)

    def make_namespace(self, name: str = "") -> str:
        """A namespace that enforces the restricted Pod Security Standard; by default a new one.

        It takes pods: they need the ServiceAccount that the controller manager makes a moment later.
        """
        name = name or f"test-{uuid.uuid4().hex[:8]}"
        labels = {OWN_LABEL: "true", "pod-security.kubernetes.io/enforce": "restricted"}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        what = f"the ServiceAccount of namespace {name}"
        self.wait_until(lambda: self.get("serviceaccount", "default", name), what, 60)
        return name

    def provide_gpus(self, count: int) -> None:
        """Has nodes advertise so many, unless the cluster is somebody else's and has GPUs of its own.

        Raises:
            RuntimeError: it has none, and nobody said that nodes may pretend.
        """
        if _may_fake_gpus() or not any(map(_gpus, self.get("nodes"))):
            self.advertise_gpus(count)

    def advertise_gpus(self, count: int) -> None:
        """Every node says that it has so many `nvidia.com/gpu`; there is no device behind it.

        Raises:
            RuntimeError: the cluster is somebody else's, and nobody said that its nodes may be changed.
        """
        if not _may_fake_gpus():
            raise RuntimeError(
                f"the tests need {count} nvidia.com/gpu per node, which need no device behind them: set "
                f"{FAKE_GPUS_VARIABLE}=yes to have every node of the cluster advertise so many"
            )
        patch = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(count)}]
        for node in self.core.list_node().items:
            self.kubectl(
                *("patch", "node", node.metadata.name, "--subresource=status", "--type=json"),
                *("--patch", json.dumps(patch)),
            )
        for node in self.core.list_node().items:
            self.wait_until(
                lambda name=node.metadata.name: (
                    self.core.read_node(name).status.allocatable.get("nvidia.com/gpu") == str(count)
                ),
                f"node {node.metadata.name} to have {count} GPUs to give",
                seconds=60,
            )

    def wait_until(self, predicate: Callable[[], T], what: str, seconds: float, namespace: str = "") -> T:
        """The first true value of the predicate.

        Raises:
            AssertionError: none came in time; says what stands in the namespace.
        """
        deadline = time.monotonic() + seconds
        trouble = ""
        while time.monotonic() < deadline:
            try:
                if value := predicate():
                    return value
                trouble = ""
            except (CommandError, client.ApiException, HTTPError) as error:
                trouble = f"; at last it raised {error}"
            time.sleep(POLL_SECONDS)
        state = f"\n{self.describe(namespace)}" if namespace else ""
        raise AssertionError(f"waited {seconds:g} s for {what}{trouble}{state}")

    def describe(self, namespace: str) -> str:
        """What a person would look at first: objects, events, the pods' last words."""
        kinds = "influencejobs,daskclusters,jobs,deployments,pods,services,networkpolicies"
        questions = [
            ("get", kinds, "--output", "wide", "--ignore-not-found"),
            ("get", "pods", "--output", "wide"),
            ("get", "events", "--sort-by=.lastTimestamp", "--no-headers"),
        ]
        parts = [self._try(*question, "--namespace", namespace) for question in questions]
        with contextlib.suppress(CommandError):
            jobs = self.get("influencejobs", namespace=namespace)
            parts += [f"{job['metadata']['name']}: {json.dumps(job.get('status'))}" for job in jobs]
        for pod in self._try("get", "pods", "--output", "name", "--namespace", namespace).split():
            words = self._try("logs", pod, "--all-containers", "--tail=15", "--namespace", namespace)
            parts.append(f"--- {pod}\n{words}")
        return "\n".join(part.rstrip() for part in parts if part)

    def _try(self, *arguments: str) -> str:
        try:
            return self.kubectl(*arguments, seconds=20)
        except CommandError as error:
            return f"(kubectl {' '.join(arguments)}: {error.output.strip()})\n"


class CommandError(RuntimeError):
    """A command failed; `output` is what it said."""

    def __init__(self, command: list[str], code: int | None, output: str) -> None:
        ended = "was stopped" if code is None else f"ended with {code}"
        super().__init__(f"{Path(command[0]).name} {' '.join(command[1:])} {ended}: {output.strip()}")
        self.output = output


def _may_fake_gpus() -> bool:
    return CLUSTER_VARIABLE not in os.environ or os.environ.get(FAKE_GPUS_VARIABLE) == "yes"


def _gpus(node: Any) -> bool:
    return node["status"].get("allocatable", {}).get("nvidia.com/gpu", "0") != "0"


def tool(name: str) -> str:
    """The path of kubectl or helm: the cluster's own, else the machine's."""
    own = HOME / "bin" / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is neither at {own} nor in PATH: install it, or run `make cluster`")
    return found


def _run(command: list[str], stdin: str | None, seconds: float) -> str:
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise CommandError(command, None, f"no end after {seconds:g} s") from None
    if done.returncode != 0:
        raise CommandError(command, done.returncode, done.stderr + done.stdout)
    return done.stdout


def _run_script(name: str) -> None:
    done = subprocess.run(
        [str(SCRIPTS / name)],
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"no cluster to test on: {SCRIPTS / name} failed\n{done.stdout[-3000:]}")
