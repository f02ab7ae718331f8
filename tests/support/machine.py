"""The host of the test cluster, for tests marked `host`: its components' processes and its audit log.

Only for the cluster of tests/cluster/machine; with TEST_KUBECONFIG there is no host to be had.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import HOME, SCRIPTS

AUDIT_LOG = HOME / "log/audit.log"


def pid(component: str) -> int:
    """Of `kubelet`, `containerd`, `kube-apiserver`, `etcd`, ...: run/COMPONENT.pid."""
    return int((HOME / f"run/{component}.pid").read_text().split()[0])


def kill(component: str) -> None:
    """Ends a component's process without warning; its containers go on. `bring_up` starts it again."""
    number = pid(component)
    os.kill(number, signal.SIGKILL)
    while Path(f"/proc/{number}").exists():
        time.sleep(0.01)


def bring_up() -> None:
    """Starts every component that does not run, and waits until the node is Ready."""
    subprocess.run([str(SCRIPTS / "up.sh")], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def down(component: str) -> Iterator[None]:
    """The component is away inside the block, and back after it."""
    kill(component)
    try:
        yield
    finally:
        bring_up()


def inside(*command: str, seconds: float = 60) -> str:
    """What a command prints in the cluster's network namespace, where pods and services have addresses."""
    done = subprocess.run(
        [str(SCRIPTS / "inside.sh"), *command], capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


class AuditLog:
    """What the API server was asked after this object was made."""

    def __init__(self) -> None:
        self._begin = AUDIT_LOG.stat().st_size

    def entries(self, user: str = "") -> list[dict[str, Any]]:
        """Events of the API group audit.k8s.io, whole; `user` chooses those of one user."""
        with AUDIT_LOG.open("rb") as log:
            log.seek(self._begin)
            lines = log.read().splitlines()
        found = [json.loads(line) for line in lines if line.endswith(b"}")]
        return [entry for entry in found if not user or entry["user"]["username"] == user]
