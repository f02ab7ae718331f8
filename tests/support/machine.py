"""The host of the test cluster, for tests marked `host`: its components' processes and its audit log.

Only for the cluster of tests/cluster/machine; with TEST_KUBECONFIG there is no host to be had.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import HOME, SCRIPTS

AUDIT_LOG = HOME / "log/audit.log"
_CLONE_NEWNET = 0x40000000


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


class Relay:
    """Ports of an address in the cluster's network namespace, at 127.0.0.1 of this machine.

    Needs neither API server nor kubelet, which a `kubectl port-forward` does.
    """

    def __init__(self, address: str, *ports: int) -> None:
        self._servers = {port: _RelayServer((address, port)) for port in ports}
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, port: int) -> str:
        """Where the port answers."""
        return f"http://127.0.0.1:{self._servers[port].server_address[1]}"

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()


class _RelayServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        super().__init__(("127.0.0.1", 0), _RelayHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that break are what tests make."""


class _RelayHandler(socketserver.BaseRequestHandler):
    server: _RelayServer

    def handle(self) -> None:
        _enter_the_namespace()  # this thread alone, which ends with its connection
        with socket.create_connection(self.server.target, timeout=10) as inside:
            inside.settimeout(None)
            back = threading.Thread(target=_pump, args=(inside, self.request), daemon=True)
            back.start()
            _pump(self.request, inside)
            back.join()


def _enter_the_namespace() -> None:
    name = os.environ.get("K8S_NETNS", "influence-cluster")
    with Path(f"/run/netns/{name}").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def audited(user: str, since: datetime) -> Iterator[dict[str, Any]]:
    """What a user asked the API server since then, from files that it renamed when large, too."""
    marked = f'"username":"{user}"'.encode()
    begin = since.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    for path in (*sorted(AUDIT_LOG.parent.glob("audit-*.log")), AUDIT_LOG):
        if path.stat().st_mtime < since.timestamp():
            continue
        with path.open("rb") as file:
            for line in file:
                if marked not in line or not line.endswith(b"\n"):  # its end is still to be written
                    continue
                entry = json.loads(line)
                if entry["user"].get("username") == user and entry["stageTimestamp"] >= begin:
                    yield entry


class AuditLog:
    """What the API server was asked after this object was made.

    The file stays open: the API server renames it when it is large, and goes on in a new one.
    """

    def __init__(self) -> None:
        self._file = AUDIT_LOG.open("rb")
        self._file.seek(0, os.SEEK_END)
        self._rest = b""
        """The beginning of a line whose end is not there yet."""
        self._entries: list[dict[str, Any]] = []

    def entries(self, user: str = "") -> list[dict[str, Any]]:
        """Events of the API group audit.k8s.io, whole; `user` chooses those of one user."""
        self._read_on()
        if os.fstat(self._file.fileno()).st_ino != AUDIT_LOG.stat().st_ino:
            self._read_on()
            self._file.close()
            self._file = AUDIT_LOG.open("rb")
            self._read_on()
        return [entry for entry in self._entries if not user or entry["user"].get("username") == user]

    def _read_on(self) -> None:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        # What was being written when the log was opened is half a line.
        self._entries += [json.loads(line) for line in lines if line.startswith(b"{")]
