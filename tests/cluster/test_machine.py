"""The recipe of the test cluster: what it refuses, and what it leaves alone. See tests/cluster/machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import HOME, SCRIPTS, Cluster

pytestmark = pytest.mark.host


class Second:
    """A second cluster beside the one that the tests use, with its binaries."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.settings = {"K8S_HOME": str(home), "K8S_NETNS": home.name, "K8S_API_PORT": "7443"}
        for shared in ("bin", "img"):
            (home / shared).symlink_to(HOME / shared)

    def run(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPTS / script), *arguments],
            env=os.environ | self.settings | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def pod_names(self) -> list[str]:
        kubectl = [str(HOME / "bin/kubectl"), "--kubeconfig", str(self.home / "kubeconfig")]
        said = subprocess.run(
            [*kubectl, "get", "pods", "--all-namespaces", "--output", "name"],
            check=True,
            capture_output=True,
            text=True,
        )
        return said.stdout.split()


@pytest.fixture
def second(cluster: Cluster) -> Iterator[Second]:
    home = Path(tempfile.mkdtemp(prefix="k8s-"))  # short: a socket's path has at most 107 characters
    second = Second(home)
    yield second
    second.run("down.sh", "--purge")
    shutil.rmtree(home)


def traces_of(name: str) -> list[str]:
    """Cgroups, mounts, network namespaces and processes that bear a name."""
    cgroups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{name}")]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    commands = [path for path in Path("/proc").glob("[0-9]*/cmdline") if name in read(path)]
    return [*cgroups, *mounts, *map(str, commands)]


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # ended meanwhile


@pytest.mark.alone
def test_two_clusters_run_side_by_side_and_one_leaves_nothing_behind(
    cluster: Cluster, second: Second
) -> None:
    up = second.run("up.sh")
    assert up.returncode == 0, up.stdout
    (name,) = second.pod_names()
    assert name.startswith("pod/coredns-")
    assert traces_of(second.home.name)
    down = second.run("down.sh", "--purge")
    assert down.returncode == 0, down.stdout
    assert traces_of(second.home.name) == []
    assert sorted(path.name for path in second.home.iterdir()) == ["bin", "img", "kubeconfig", "lock", "pki"]
    assert cluster.core.list_node().items


def test_a_pid_that_now_belongs_to_another_process_is_not_believed(second: Second) -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        (second.home / "run").mkdir()
        for component in ("etcd", "kubelet"):
            (second.home / f"run/{component}.pid").write_text(f"{other.pid} 12345\n")
        assert second.run("down.sh").returncode == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_namespace_of_its_name_that_others_made_is_neither_used_nor_removed(second: Second) -> None:
    name = second.home.name
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        up = second.run("up.sh")
        assert up.returncode == 1
        assert "was not made by this recipe: set K8S_NETNS" in up.stdout
        assert second.run("down.sh", "--purge").returncode == 0
        assert Path(f"/run/netns/{name}").exists()
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_a_port_that_is_taken_is_named_before_anything_starts(cluster: Cluster, second: Second) -> None:
    up = second.run("up.sh", K8S_API_PORT=os.environ.get("K8S_API_PORT", "6443"))
    assert up.returncode == 1
    assert "is taken: set K8S_API_PORT to a free one" in up.stdout
    assert not Path(f"/run/netns/{second.home.name}").exists()


def test_nothing_is_installed_on_a_machine_with_another_kubernetes(second: Second, tmp_path: Path) -> None:
    k3s = tmp_path / "k3s"
    k3s.write_text("#!/bin/sh\n")
    k3s.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    refused = second.run("build.sh", PATH=path)
    assert refused.returncode == 1
    assert f"this machine has k3s at {k3s}" in refused.stdout
    assert "K8S_ALLOW_FOREIGN=yes" in refused.stdout
    allowed = second.run("build.sh", PATH=path, K8S_ALLOW_FOREIGN="yes")
    assert allowed.returncode == 0, allowed.stdout
