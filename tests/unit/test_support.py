"""The hooks behind the cluster's tests: what a run says that lacks the cluster's host, or any cluster.

Each run is a process of its own with a `K8S_HOME` of its own, so that no cluster of this machine is touched.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import chaos
from cluster import Cluster, Image, Images

ROOT = Path(__file__).parents[2]
OWN = re.compile("TEST_KUBECONFIG|TEST_FAKE_GPUS|IMAGE_REGISTRY|K8S_.*|INFLUENCE_CHAOS|PYTEST_.*|TEST_RUN")
"""Variables of whoever runs this test that must not reach the runs under test."""
LEFT_OUT = re.compile(r"=+ (\d+) tests need the cluster's host; TEST_KUBECONFIG is set: not run =+\n")
ABSENT = {"TEST_KUBECONFIG": "/nonexistent"}
ANY_TEST = "tests/cluster/test_cluster.py::test_every_node_is_ready"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the cluster would lie, and in `bin` programs that come before others."""
    (tmp_path / "first").mkdir()
    return tmp_path


def run(home: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """The exit code of a test run and what it said."""
    environment = {name: value for name, value in os.environ.items() if not OWN.fullmatch(name)}
    environment |= {"K8S_HOME": str(home), "PATH": f"{home}/first:{os.environ['PATH']}"} | variables
    # Only the plugins that our settings need: others import Hypothesis and Zarr for each process.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    plugins = ("-p", "xdist", "-p", "timeout", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *plugins, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, done.stdout + done.stderr


def collected(said: str) -> set[str]:
    """The tests that a run would run."""
    return {line for line in said.splitlines() if re.match(r"tests/\S+::", line)}


def left_out(said: str) -> set[str]:
    """The tests that it lists as not run; it says how many."""
    number, after = re.split(LEFT_OUT, said)[1:]
    names = {line for line in after.splitlines() if re.match(r"tests/\S+::", line)}
    assert len(names) == int(number)
    return names


def test_without_the_host_its_tests_are_listed_by_name_and_all_others_run(home: Path):
    _, on_ours = run(home, "--collect-only", "-q", "-m", "host", "tests/cluster")
    _, said = run(home, "--collect-only", "-q", "tests/cluster", **ABSENT)
    kept, _ = re.split(LEFT_OUT, said)[::2]

    assert left_out(said) == collected(on_ours)
    assert (
        "tests/cluster/test_machine.py::test_a_pid_that_now_belongs_to_another_process_is_not_believed"
        in (left_out(said))
    )
    assert ANY_TEST in collected(kept)
    assert not collected(kept) & left_out(said)


def test_several_processes_list_what_they_left_out_once(home: Path):
    _, on_ours = run(home, "--collect-only", "-q", "tests/cluster/test_machine.py")
    _, said = run(home, "-n", "2", "tests/cluster/test_machine.py", **ABSENT)

    assert "not run" not in on_ours
    assert left_out(said) == collected(on_ours) != set()


def test_somebodys_cluster_needs_a_registry_and_the_test_says_so(home: Path):
    code, said = run(home, ANY_TEST, **ABSENT)

    assert code == 1
    assert "TEST_KUBECONFIG is set and IMAGE_REGISTRY is not: set it to a registry (host/path)" in said
    assert "Traceback" not in said


def test_with_no_cluster_to_be_had_a_test_fails_and_says_why(home: Path):
    """Another Kubernetes is on this machine: nothing is installed."""
    k3s = home / "first/k3s"
    k3s.write_text("#!/bin/sh\n")
    k3s.chmod(0o755)
    is_root = home / "first/id"
    is_root.write_text("#!/bin/sh\necho 0\n")
    is_root.chmod(0o755)
    code, said = run(home, ANY_TEST)

    assert code == 1
    assert "no cluster to test on: " in said
    assert f"this machine has k3s at {k3s}" in said
    assert "Set TEST_KUBECONFIG (and IMAGE_REGISTRY) to test on that cluster" in said
    assert {path.name for path in home.iterdir()} <= {"first", "lock", "tests"}, "nothing was built"


# -- at which moments roles are killed -----------------------------------------------------------


@pytest.mark.parametrize("role", chaos.ROLES)
def test_a_run_kills_at_all_moments_at_one_or_at_one_that_its_word_chooses(
    monkeypatch: pytest.MonkeyPatch, role: str
):
    def moments(word: str) -> list[str]:
        monkeypatch.setenv(chaos.VARIABLE, word)
        return chaos.moments_of(role)

    every = moments("all")
    assert set(every) <= set(chaos.MOMENTS)
    assert every
    assert [moments(moment) for moment in every] == [[moment] for moment in every]
    words = [f"{number:040x}" for number in range(64)]
    chosen = [moments(word) for word in words]
    assert {len(one) for one in chosen} == {1}
    assert {moment for one in chosen for moment in one} == set(every), "the word decides"
    assert chosen == [moments(word) for word in words], "and nothing else does"


def test_a_run_prints_the_word_that_chooses_its_moments(home: Path):
    _, said = run(home, "--collect-only", "-q", "tests/unit/test_support.py", INFLUENCE_CHAOS="region")
    assert "kills in the cluster: " not in said, "-q leaves the header out"
    _, said = run(home, "--collect-only", "tests/unit/test_support.py", INFLUENCE_CHAOS="region")
    assert "driver at region" in said
    assert "(INFLUENCE_CHAOS=region)" in said
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    _, said = run(home, "--collect-only", "tests/unit/test_support.py")
    assert f"(INFLUENCE_CHAOS={head.stdout.strip()[:12] or 'none'})" in said


# -- GPUs that are none --------------------------------------------------------------------------


IMAGES = Images(*[Image("registry/name:tag")] * 4)


def nodes(monkeypatch: pytest.MonkeyPatch, gpus: str) -> tuple[Cluster, list[int]]:
    """A cluster whose one node has so many, and how many it was told to advertise."""
    allocatable = {"nvidia.com/gpu": gpus} if gpus else {}
    told: list[int] = []
    node: dict[str, Any] = {"status": {"allocatable": allocatable}}
    monkeypatch.setattr(Cluster, "get", lambda *_: [node])
    return Cluster(Path("/nonexistent"), IMAGES), told


@pytest.mark.parametrize("gpus", ["", "0"])
def test_nodes_of_somebodys_cluster_pretend_nothing_unasked(monkeypatch: pytest.MonkeyPatch, gpus: str):
    monkeypatch.setenv("TEST_KUBECONFIG", "/nonexistent")
    monkeypatch.delenv("TEST_FAKE_GPUS", raising=False)
    cluster, _ = nodes(monkeypatch, gpus)
    with pytest.raises(RuntimeError, match="set TEST_FAKE_GPUS=yes"):
        cluster.provide_gpus(8)
    with pytest.raises(RuntimeError, match="set TEST_FAKE_GPUS=yes"):
        cluster.advertise_gpus(2)


def test_gpus_of_somebodys_cluster_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEST_KUBECONFIG", "/nonexistent")
    monkeypatch.delenv("TEST_FAKE_GPUS", raising=False)
    cluster, _ = nodes(monkeypatch, "4")
    cluster.provide_gpus(8)


@pytest.mark.parametrize("asked", ["ours", "somebody's, asked"])
def test_nodes_pretend_on_our_cluster_and_where_they_may(monkeypatch: pytest.MonkeyPatch, asked: str):
    monkeypatch.delenv("TEST_KUBECONFIG", raising=False)
    if asked != "ours":
        monkeypatch.setenv("TEST_KUBECONFIG", "/nonexistent")
        monkeypatch.setenv("TEST_FAKE_GPUS", "yes")
    cluster, told = nodes(monkeypatch, "4")
    monkeypatch.setattr(Cluster, "advertise_gpus", lambda _, count: told.append(count))
    cluster.provide_gpus(8)
    assert told == [8]
