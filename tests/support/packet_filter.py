"""The test cluster's NetworkPolicies in force, and a record of who talked to whom.

Its bridge plugin ignores policies. `enforced` compiles those that are applied (`network_policies`) into
iptables rules of the cluster's network namespace, again whenever a pod or a policy changes, and takes them
away at the end. As with every plugin the node itself (the kubelet's probes) and connections that are open
already are let through. `recorded` tells the connections that conntrack saw. Only for tests marked `host`
and `alone`.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from kubernetes import client

from cluster import SCRIPTS, Cluster
from machine import inside
from network_policies import EGRESS, INGRESS, Seen, address, rules

COUNTERS = "INFLUENCE-COUNTERS"
"""Counts tries before they are judged."""
JUMPS = (("FORWARD", COUNTERS), ("FORWARD", EGRESS), ("FORWARD", INGRESS), ("INPUT", EGRESS))
"""Pods reach each other by FORWARD, the node and its API server by INPUT."""
POLL_SECONDS = 0.3
_IPTABLES = ("iptables", "--wait", "10")


class Enforced:
    """Policies in force; keeps the rules up to date from a thread of its own."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._written: list[str] = []
        self._pods: dict[str, dict[str, Any]] = {}
        self._services: set[str] = set()
        self._trouble: Exception | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        _restore([f":{COUNTERS} - [0:0]"])
        self._update()
        self._jump()
        self._thread.start()

    def stop(self) -> None:
        """Follows the cluster no more.

        Raises:
            RuntimeError: the rules could not be kept up to date, so that what was seen says nothing.
        """
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        if self._trouble:
            raise RuntimeError("the packet filter did not follow the cluster") from self._trouble

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Nothing is forbidden inside the block."""
        _remove_jumps()
        try:
            yield
        finally:
            self._jump()

    def count(self, source: str, port: int) -> Callable[[], int]:
        """From now on counts the connections that an address tries to open to a port of any pod."""
        rule = ("-s", f"{source}/32", "-p", "tcp", "-m", "tcp", "--dport", str(port))
        inside(*_IPTABLES, "-A", COUNTERS, *rule, "--syn")

        def tries() -> int:
            listed = inside(*_IPTABLES, "-n", "-v", "-x", "-L", COUNTERS)
            return sum(
                int(line.split()[0])
                for line in listed.splitlines()
                if source in line.split() and f"dpt:{port}" in line.split()
            )

        return tries

    def pod(self, found: str) -> dict[str, Any] | None:
        """The pod that has the address, or had it."""
        return self._pods.get(found)

    def is_service(self, found: str) -> bool:
        """Whether it is a Service's address: where a flow goes that no pod is ready for."""
        return found in self._services

    def _jump(self) -> None:
        for hook, chain in reversed(JUMPS):
            inside(*_IPTABLES, "-I", hook, "1", "-j", chain)

    def _follow(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            try:
                self._update()
            except Exception as error:
                self._trouble = error

    def _update(self) -> None:
        now = seen(self._cluster)
        self._pods |= {address(pod): pod for pod in now.pods if address(pod)}
        services = _listed(self._cluster.core.list_service_for_all_namespaces)
        self._services |= {service["spec"].get("clusterIP") for service in services}
        lines = rules(now)
        if lines != self._written:
            _restore(lines)
            self._written = lines


@contextmanager
def enforced(cluster: Cluster) -> Iterator[Enforced]:
    """Every NetworkPolicy of the cluster holds inside the block."""
    with _broom():
        filter_ = Enforced(cluster)
        try:
            filter_.start()
            yield filter_
        finally:
            filter_.stop()


@contextmanager
def _broom() -> Iterator[None]:
    """A process that takes all rules away when the block ends or this process dies, however it does."""
    sweep = [f"while iptables --wait -D {hook} -j {chain}; do :; done" for hook, chain in JUMPS]
    sweep += [f"iptables --wait {do} {chain}" for do in ("-F", "-X") for chain in (COUNTERS, EGRESS, INGRESS)]
    command = [str(SCRIPTS / "inside.sh"), "sh", "-c", f"cat; {'; '.join(sweep)}"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        yield
    finally:
        process.stdin.close()
        process.wait(timeout=60)


def _remove_jumps() -> None:
    for hook, chain in JUMPS:
        with contextlib.suppress(RuntimeError):
            while True:
                inside(*_IPTABLES, "-D", hook, "-j", chain)


def _restore(lines: list[str]) -> None:
    """Replaces the chains that are named in `lines`, all at once."""
    text = "\n".join(["*filter", *lines, "COMMIT", ""])
    command = [str(SCRIPTS / "inside.sh"), "iptables-restore", "--wait", "10", "--noflush"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr}\n{text}")


def seen(cluster: Cluster) -> Seen:
    """What the policies mean now."""
    networking = client.NetworkingV1Api(cluster.api)
    namespaces = _listed(cluster.core.list_namespace)
    return Seen(
        policies=_listed(networking.list_network_policy_for_all_namespaces),
        pods=_listed(cluster.core.list_pod_for_all_namespaces),
        namespaces={n["metadata"]["name"]: n["metadata"].get("labels", {}) for n in namespaces},
    )


def _listed(question: Callable[..., Any]) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads(question(_preload_content=False).data)["items"]
    return items


# -- who talked to whom --------------------------------------------------------------------------


class Flow(NamedTuple):
    """A connection, after the address of a service became that of a pod."""

    source: str
    destination: str
    protocol: str
    port: int


class Recorded:
    """Flows that conntrack told of, each as soon as its first packet was let through."""

    def __init__(self) -> None:
        command = [str(SCRIPTS / "inside.sh"), "conntrack", "-E", "-e", "NEW", "-b", "8388608"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._flows: list[Flow] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def flows(self) -> list[Flow]:
        assert self._process.poll() is None, "conntrack ended: some flows were not seen"
        return list(self._flows)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=10)
        self._thread.join(timeout=10)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            protocol = re.search(r"\[NEW\] (tcp|udp)\b", line)
            fields = re.findall(r"(src|dst|sport|dport)=(\S+)", line)
            if protocol and len(fields) == 8:  # the second half is the way back
                asked, answers = dict(fields[:4]), dict(fields[4:])
                self._flows.append(
                    Flow(asked["src"], answers["src"], protocol.group(1), int(answers["sport"]))
                )


@contextmanager
def recorded() -> Iterator[Recorded]:
    """Records flows inside the block."""
    record = Recorded()
    try:
        yield record
    finally:
        record.stop()
