"""What the operator builds, on a real cluster: accepted, admitted, and a Dask cluster that speaks TLS alone.

The manifests belong to a ConfigMap here instead of an InfluenceJob, so that no operator looks after them.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml

from attempts import all_of, pod_metadata, pod_specs, spec_of
from cluster import CHECKOUT, Cluster
from influence_operator.cluster.certificates import attempt_material
from influence_operator.manifests import names
from influence_operator.manifests.attempt import AttemptManifests, attempt_manifests
from influence_operator.settings import Defaults, Settings
from manifests import manifest

EVERYTHING = CHECKOUT / "tests/unit/influence_operator/manifests/everything.yaml"
SOURCE = {"data": {"my_task.py": "task = None\n"}}
SMALL = {"resources": {"requests": {"cpu": "20m", "memory": "100Mi"}}}
START_SECONDS = 120
Object = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Running:
    """A DaskCluster of ours with its ConfigMap, Secret and policies."""

    cluster: Cluster
    namespace: str
    uid: str

    @property
    def selector(self) -> str:
        return f"{names.JOB_UID}={self.uid}"

    def pods(self, role: names.Role) -> list[Object]:
        """Those that are not on their way out."""
        selector = f"{self.selector},{names.ROLE}={role}"
        found = self.cluster.get("pods", namespace=self.namespace, selector=selector)
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def python(self, role: names.Role, script: str) -> Any:
        """What a script in a pod of the role prints, from JSON."""
        pod = self.pods(role)[0]["metadata"]["name"]
        program = ("python", "-c", textwrap.dedent(script))
        said = self.cluster.kubectl("exec", pod, "--namespace", self.namespace, "--", *program)
        return json.loads(said)

    def connected(self) -> set[str]:
        """Names of the workers that the scheduler knows."""
        script = """
            import urllib.request
            url = "http://127.0.0.1:8787/api/v1/get_workers"
            print(urllib.request.urlopen(url, timeout=5).read().decode())
        """
        return {worker["name"] for worker in self.python(names.Role.SCHEDULER, script)["workers"]}

    def wait(self, predicate: Any, what: str) -> Any:
        return self.cluster.wait_until(predicate, what, START_SECONDS, self.namespace)


@pytest.fixture(scope="module")
def running(cluster: Cluster, dask_operator: None) -> Iterator[Running]:
    """A scheduler and two workers, ready."""
    namespace = cluster.make_namespace()
    try:
        yield start(cluster, namespace)
    finally:
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def start(cluster: Cluster, namespace: str) -> Running:
    owner = make_owner(cluster, namespace)
    document = manifest(workers={"replicas": 2} | SMALL, scheduler=SMALL)
    made = built(document, owner, cluster.images.worker.name)
    secret = {**made.secret, "data": encoded(material())}
    for child in (made.config_map, secret, *made.network_policies, made.dask_cluster):
        create(cluster, child)
    running = Running(cluster, namespace, owner["metadata"]["uid"])
    running.wait(lambda: running.pods(names.Role.SCHEDULER), "a scheduler")
    running.wait(lambda: len(running.connected()) == 2, "two workers")
    return running


@pytest.fixture
def classes(cluster: Cluster) -> Iterator[None]:
    """What the job that sets everything refers to, beyond its namespace."""
    scheduling, node = "scheduling.k8s.io/v1", "node.k8s.io/v1"
    priorities = [
        {"apiVersion": scheduling, "kind": "PriorityClass", "metadata": {"name": name}, "value": 1}
        for name in ("batch", "important")
    ]
    runtimes = [
        {"apiVersion": node, "kind": "RuntimeClass", "metadata": {"name": name}, "handler": "runc"}
        for name in ("gvisor", "nvidia")
    ]
    cluster.apply(*priorities, *runtimes)
    yield
    cluster.kubectl("delete", "priorityclass", "batch", "important")
    cluster.kubectl("delete", "runtimeclass", "gvisor", "nvidia")


def make_owner(cluster: Cluster, namespace: str) -> Object:
    cluster.kubectl("create", "configmap", "digits", "--namespace", namespace)
    owner: Object = cluster.get("configmap", "digits", namespace)
    return owner


def built(document: Object, owner: Object, image: str) -> AttemptManifests:
    """The first attempt of the job in `document`, as if `owner` were that job."""
    spec = spec_of(document)
    return attempt_manifests(owner, spec, 1, Settings(Defaults(image=image)), SOURCE)


def create(cluster: Cluster, child: Object, *options: str) -> None:
    """Strict: a field that the API server would drop is an error."""
    cluster.kubectl("create", "--validate=strict", "--filename", "-", *options, stdin=json.dumps(child))


def material() -> dict[str, str]:
    now = datetime.now(UTC)
    return attempt_material("test", now, now + timedelta(days=1))


def encoded(files: dict[str, str]) -> dict[str, str]:
    return {name: base64.b64encode(text.encode()).decode() for name, text in files.items()}


@pytest.mark.parametrize("case", ["digits", "everything"])
def test_every_manifest_is_accepted_and_every_pod_admitted_where_pods_are_restricted(
    cluster: Cluster, namespace: str, dask_operator: None, classes: None, case: str
) -> None:
    cluster.kubectl("create", "serviceaccount", "bucket-writer", "--namespace", namespace)
    path = EVERYTHING if case == "everything" else CHECKOUT / "examples/digits.yaml"
    made = built(yaml.safe_load(path.read_text()), make_owner(cluster, namespace), "influence-worker")
    secret = {**made.secret, "data": encoded(material())}
    for child in (*(m for m in all_of(made) if m["kind"] != "Secret"), secret):
        create(cluster, child, "--dry-run=server")
    for role, spec in pod_specs(made).items():
        metadata = {"generateName": f"{role}-", "namespace": namespace, **pod_metadata(made)[role]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        create(cluster, pod, "--dry-run=server")


def test_workers_register_under_the_names_of_their_deployments(running: Running) -> None:
    deployments = running.cluster.get(
        "deployments", namespace=running.namespace, selector=f"{running.selector},{names.ROLE}=worker"
    )
    assert running.connected() == {deployment["metadata"]["name"] for deployment in deployments}


def test_our_label_selects_everything_that_dask_kubernetes_makes(running: Running) -> None:
    def count(kind: str) -> int:
        return len(running.cluster.get(kind, namespace=running.namespace, selector=running.selector))

    found = {kind: count(kind) for kind in ("deployments", "services", "daskworkergroups", "networkpolicies")}
    assert found == {"deployments": 3, "services": 1, "daskworkergroups": 1, "networkpolicies": 3}
    assert len(running.pods(names.Role.SCHEDULER)) == 1
    assert len(running.pods(names.Role.WORKER)) == 2


def test_a_worker_is_ready_once_it_listens(running: Running) -> None:
    def ready() -> list[str]:
        conditions = [pod["status"]["conditions"] for pod in running.pods(names.Role.WORKER)]
        return [c["status"] for found in conditions for c in found if c["type"] == "Ready"]

    running.wait(lambda: ready() == ["True", "True"], "ready workers")


@pytest.mark.parametrize("role", [names.Role.SCHEDULER, names.Role.WORKER])
def test_a_process_writes_to_scratch_space_alone_and_has_no_token(running: Running, role: names.Role) -> None:
    script = """
        import json, os, pathlib
        def writes(folder):
            try:
                (pathlib.Path(folder) / "own").write_text("x")
                return True
            except OSError:
                return False
        scratch = ["/tmp", os.path.expanduser("~"), "/dev/shm"]
        others = ["/", "/opt", "/etc/influence/tls"]
        print(json.dumps({
            "scratch": [writes(folder) for folder in scratch],
            "others": [writes(folder) for folder in others],
            "key": os.access("/etc/influence/tls/tls.key", os.R_OK),
            "token": os.path.exists("/var/run/secrets/kubernetes.io/serviceaccount"),
            "uid": os.getuid() > 0,
        }))
    """
    assert running.python(role, script) == {
        "scratch": [True] * 3,
        "others": [False] * 3,
        "key": True,
        "token": False,
        "uid": True,
    }


def test_only_a_client_with_the_attempts_certificate_gets_in(running: Running) -> None:
    """From within a pod of the attempt, where no NetworkPolicy stands between."""
    script = f"""
        import json, os, pathlib
        tls = pathlib.Path("/etc/influence/tls")
        for name in [name for name in os.environ if name.startswith("DASK_")]:
            del os.environ[name]
        from distributed import Client, Security
        other = {material()!r}
        for name, text in other.items():
            pathlib.Path("/tmp", name).write_text(text)

        def connects(address, ca=None, cert=None):
            given = {{}}
            if ca:
                given = {{"tls_ca_file": str(ca / "ca.crt"), "require_encryption": True}}
            if cert:
                given |= {{"tls_client_cert": str(cert / "tls.crt"), "tls_client_key": str(cert / "tls.key")}}
            try:
                with Client(address, security=Security(**given), timeout=10) as client:
                    return client.submit(sum, [1, 2]).result(timeout=20) == 3
            except Exception as error:
                return type(error).__name__

        own, foreign = pathlib.Path("/etc/influence/tls"), pathlib.Path("/tmp")
        tls, plain = "tls://127.0.0.1:8786", "tcp://127.0.0.1:8786"
        print(json.dumps([
            connects(tls, own, own), connects(tls, own), connects(tls, own, foreign),
            connects(tls, foreign, foreign), connects(plain),
        ]))
    """
    answer = running.python(names.Role.SCHEDULER, script)
    assert answer[0] is True
    assert [type(other) for other in answer[1:]] == [str] * 4, answer


def test_a_worker_that_is_deleted_leaves_by_request_and_another_takes_its_name(running: Running) -> None:
    pod = running.pods(names.Role.WORKER)[0]
    name, address = pod["metadata"]["name"], pod["status"]["podIP"]
    known = running.connected()
    running.cluster.kubectl("delete", "pod", name, "--namespace", running.namespace)
    scheduler = running.pods(names.Role.SCHEDULER)[0]["metadata"]["name"]
    said = running.cluster.kubectl("logs", scheduler, "--namespace", running.namespace)
    assert f"Retired worker 'tls://{address}:40000'" in said
    running.wait(lambda: running.connected() == known, "a worker of the same name")
