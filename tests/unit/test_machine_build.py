"""What tests/cluster/machine/build.sh builds and what it leaves alone; the programs it calls only pretend."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

MACHINE = Path(__file__).parents[2] / "tests/cluster/machine"
SCRIPT = (MACHINE / "build.sh").read_text()
STUBS = {
    "id": "echo 0",
    "dpkg-query": "echo installed",
    "gcc": 'while [ "$1" != -o ]; do shift; done; echo pause >"$2"',
    "go": r"""
version=${!#}; version=${version#*@}
echo "${!#}" >>"$BUILT"
program() { printf '#!/bin/sh\necho %s\n' "$2" >"$GOBIN/$1"; chmod +x "$GOBIN/$1"; }
case ${!#} in
  tool) program kubelet "Kubernetes $KUBERNETES" ;;
  */coredns@*) program coredns "CoreDNS-${version#v}" ;;
  */helm@*) program helm "${ANSWER:-$version}" ;;
esac
""",
    "buildah": r"""
case "$*" in
  *" from scratch") echo container ;;
  *" push "*)
    archive=${!#} archive=${archive#docker-archive:}
    echo "image ${archive##*:}" >>"$BUILT"
    echo x >"${archive%%:*}" ;;
esac
""",
}


class Machine:
    """A folder for the cluster, and programs that write down what they were told to build."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "built"
        programs = folder / "programs"
        programs.mkdir()
        for name, text in STUBS.items():
            (programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (programs / name).chmod(0o755)
        kubernetes = re.search(
            r"^\tk8s.io/kubernetes (v[0-9.]+)", (MACHINE / "go.mod").read_text(), re.MULTILINE
        )
        assert kubernetes
        self._environment = os.environ | {
            "K8S_HOME": str(folder / "home"),
            "K8S_ALLOW_FOREIGN": "yes",
            "PATH": f"{programs}:{os.environ['PATH']}",
            "BUILT": str(self._log),
            "KUBERNETES": kubernetes[1],
        }

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        self._log.write_text("")
        return subprocess.run(
            [str(MACHINE / "build.sh")],
            env=self._environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def built(self) -> list[str]:
        """What a run that succeeds has built."""
        done = self.run()
        assert done.returncode == 0, done.stdout + done.stderr
        return self._log.read_text().splitlines()

    def has(self, name: str, says: str) -> None:
        """Another version is there."""
        (self.folder / "home/bin" / name).write_text(f"#!/bin/sh\necho {says}\n")


def version(name: str) -> str:
    found = re.search(rf"^{name}=(v\S+)", SCRIPT, re.MULTILINE)
    assert found
    return found[1]


COREDNS = f"github.com/coredns/coredns@{version('COREDNS')}"
HELM = f"helm.sh/helm/v3/cmd/helm@{version('HELM')}"
COREDNS_IMAGE = f"image {version('COREDNS').removeprefix('v')}"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_everything_is_built_once(machine: Machine):
    assert machine.built() == ["tool", COREDNS, HELM, "image 1", COREDNS_IMAGE]
    assert machine.built() == []


def test_another_version_of_coredns_is_replaced_and_so_is_its_image(machine: Machine):
    machine.built()
    machine.has("coredns", "CoreDNS-1.0.0")
    assert machine.built() == [COREDNS, COREDNS_IMAGE]
    assert machine.built() == []


def test_another_version_of_helm_is_replaced(machine: Machine):
    machine.built()
    machine.has("helm", "v3.0.0")
    assert machine.built() == [HELM]


def test_what_calls_itself_something_else_than_was_built_is_told(machine: Machine):
    """Else it would be built in every run."""
    done = machine.run(ANSWER="v0.0.1")
    assert done.returncode == 1
    assert f"in version {version('HELM')} from helm.sh/helm/v3/cmd/helm, got v0.0.1" in done.stderr


def test_the_cluster_runs_the_coredns_that_is_built():
    assert f"coredns:{version('COREDNS').removeprefix('v')}" in (MACHINE / "coredns.yaml").read_text()
