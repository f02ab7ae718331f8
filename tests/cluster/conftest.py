"""Fixtures of the tests that run on a real cluster: itself, what is installed in it, a namespace per test.

Everything is set up once per run, by whichever process comes first. Tests run side by side in namespaces of
their own; one that breaks a part that others need is marked `alone`. Without a cluster they fail, saying why.
"""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import chart
import cluster as cluster_support
import cluster_storage
from cluster import HOME, OWN_LABEL, Cluster
from cluster_jobs import ClusterJob
from cluster_storage import Bucket, ClusterStorage
from influence_job.crd import PLURAL, custom_resource_definition
from influence_job.spec import API_VERSION
from kills import PLACES, Half
from turns import once, turn

TIMEOUT_SECONDS = 900
"""Of a test here: pods start, nodes are lost and found."""
LOCKS = HOME / "tests"
SINCE = LOCKS / "operator-since"
GPUS = 8
"""What the node advertises; tests marked `alone` may change it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Only the test itself counts towards the limit: its fixtures may have to build a cluster.

    What looks back at all other tests comes last.
    """
    here = Path(__file__).parent
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
    for item in items:
        if here in item.path.parents and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS, func_only=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test that failed shows what stands in its namespace."""
    report = yield
    arguments = getattr(item, "funcargs", {})
    if report.when == "call" and report.failed and "namespace" in arguments:
        report.sections.append(("the namespace", arguments["cluster"].describe(arguments["namespace"])))
    return report


@pytest.fixture(scope="session")
def cluster(testrun_uid: str) -> Cluster:
    """A running cluster that has our images, and GPUs to give."""

    def bring_up() -> None:
        cluster_support.prepare()
        ours = Cluster.connect()
        remove_old_namespaces(ours)
        ours.provide_gpus(GPUS)

    try:
        set_up_once(testrun_uid, "cluster", bring_up)
    except RuntimeError as error:
        pytest.fail(str(error), pytrace=False)
    return Cluster.connect()


@pytest.fixture(scope="session")
def operator(cluster: Cluster, testrun_uid: str) -> None:
    """Our operator and the dask operator, from our chart; none of an earlier run is left."""

    def install() -> None:
        chart.install(cluster)
        cluster.wait_until(lambda: chart.pods(cluster) == chart.replicas(cluster), "old replicas gone", 60)
        once(LOCKS, os.environ.get("TEST_RUN", testrun_uid), "operator-since", note)

    def note() -> None:
        SINCE.write_text(datetime.datetime.now(datetime.UTC).isoformat())

    set_up_once(testrun_uid, "operator", install)


@pytest.fixture(scope="session")
def operator_since(operator: None) -> datetime.datetime:
    """When the operator was first installed for this run. `make test` is one run: TEST_RUN names it."""
    return datetime.datetime.fromisoformat(SINCE.read_text())


@pytest.fixture(scope="session")
def crd(cluster: Cluster, testrun_uid: str) -> Cluster:
    """The cluster, which knows InfluenceJobs as this checkout defines them; no operator is needed."""

    def define() -> None:
        cluster.apply(custom_resource_definition())
        # Established comes a moment before it is served.
        jobs = f"/apis/{API_VERSION}/{PLURAL}?limit=1"
        cluster.wait_until(lambda: cluster.kubectl("get", "--raw", jobs), "InfluenceJobs to be served", 30)

    set_up_once(testrun_uid, "crd", define)
    return cluster


@pytest.fixture(scope="session")
def dask_operator(operator: None) -> None:
    """The controller of dask-kubernetes, for tests that need nothing else."""


@pytest.fixture(scope="session")
def storage(cluster: Cluster, testrun_uid: str) -> Iterator[ClusterStorage]:
    """The storage emulator in the cluster."""
    set_up_once(testrun_uid, "storage", lambda: cluster_storage.install(cluster))
    storage = ClusterStorage(cluster)
    yield storage
    storage.close()


@pytest.fixture(autouse=True)
def take_turn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked `alone` run while no other does, and leave the operators as they found them."""
    alone = request.node.get_closest_marker("alone") is not None
    with turn(LOCKS, alone=alone):
        yield
        if alone and "operator" in request.fixturenames:
            chart.wait_for_replicas(Cluster.connect())


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A new namespace that enforces the restricted Pod Security Standard; KEEP_NAMESPACES keeps it."""
    name = cluster.make_namespace()
    yield name
    if "KEEP_NAMESPACES" not in os.environ:
        cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def bucket(storage: ClusterStorage) -> Bucket:
    """A new, empty bucket, with its request log and its faults."""
    return storage.new_bucket()


@pytest.fixture(scope="session")
def share(testrun_uid: str) -> Callable[[str, Callable[[], bytes]], bytes]:
    """What the first process of this run that asks makes, for all of them."""

    def share(name: str, make: Callable[[], bytes]) -> bytes:
        path = LOCKS / f"shared-{name}-{testrun_uid}"
        set_up_once(testrun_uid, name, lambda: path.write_bytes(make()))
        return path.read_bytes()

    return share


@pytest.fixture(scope="session")
def undisturbed(
    cluster: Cluster, operator: None, storage: ClusterStorage, share: Callable[..., bytes]
) -> dict[str, bytes]:
    """The result of the same job that nobody disturbs."""

    def run() -> bytes:
        namespace = cluster.make_namespace()
        try:
            job = ClusterJob(cluster, namespace, storage.new_bucket()).apply()
            return pickle.dumps(job.complete().result())
        finally:
            cluster.kubectl("delete", "namespace", namespace, "--wait=false")

    result: dict[str, bytes] = pickle.loads(share("undisturbed", run))
    return result


@pytest.fixture
def start(
    cluster: Cluster, namespace: str, bucket: Bucket, undisturbed: dict[str, bytes]
) -> Callable[..., Half]:
    """Starts a job with two workers that will stand at a moment of `chaos`."""

    def start(moment: str = "region", pace: float = 0.0, **changes: Any) -> Half:
        job = ClusterJob(cluster, namespace, bucket)
        job.apply(**(job.gate(PLACES[moment].path, pace=pace) | changes))
        return Half(job, PLACES[moment], undisturbed)

    return start


def set_up_once(run: str, name: str, action: Callable[[], None]) -> None:
    """In one process of the run, and not while a test that runs alone has broken something."""

    def in_turn() -> None:
        with turn(LOCKS, alone=False):
            action()

    once(LOCKS, run, name, in_turn)


def remove_old_namespaces(cluster: Cluster) -> None:
    """What runs that were killed left behind; namespaces of the last two hours may be in use."""
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=2)
    for found in cluster.core.list_namespace(label_selector=OWN_LABEL).items:
        if found.metadata.creation_timestamp < begin and found.metadata.name.startswith("test-"):
            cluster.kubectl("delete", "namespace", found.metadata.name, "--wait=false")
