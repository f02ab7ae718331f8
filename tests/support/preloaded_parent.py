"""The process that has imported what a job's processes need, once, and forks them: see `preloaded`.

A script; its one argument is the file descriptor on which requests come. It has one thread and computes
nothing, so what it forks stands where a process stands that has imported its modules and begins: with its own
session, environment, folder, output, module search path and Dask configuration. Each runs its entry point and
ends as an interpreter ends. Those that `multiprocessing` will be asked to spawn are forked beforehand, from
the same state, and wait to be told who they are; when there are no more of them, one is spawned as always.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import signal
import socket
import sys
import types
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

MODULES = (
    "influence_job.cli.main",
    "influence_job.local",
    "dask.__main__",
    "distributed.cli.dask_worker",
    "influence_job.remote",
    "influence_job.methods",
    "influence_job.plan",
    "influence_job.worker.loading",
    "influence_calculator.torch.base",  # of tasks that use the library, with dask.array, xarray and pandas
    "torch.fx.experimental.symbolic_shapes",
    "numpy",
    "gcsfs",
    "s3fs",
)
"""With all that they import, in the order of `influence run`: of exceptions that are known when Dask is
imported, it sends the traceback, too.
"""
LARGEST_REQUEST = 1 << 20
MOST_DESCRIPTORS = 64
ABOVE_ALL_TARGETS = 512
"""Descriptors at these numbers are in nobody's way."""

_own_path = {str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
_installed = [place for place in sys.path if place not in _own_path]


def serve(requests: socket.socket) -> NoReturn:
    """Forks a process for every request until nobody can ask any more."""
    while True:
        text, descriptors = socket.recv_fds(requests, LARGEST_REQUEST, MOST_DESCRIPTORS)[:2]
        if not text:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            _fork_and_report(json.loads(text), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _fork_and_report(request: dict[str, Any], out: int, err: int, report: int) -> NoReturn:
    """Writes the new process's id to `report`, and when it has ended its exit code as `subprocess` counts."""
    pid = os.fork()
    if pid == 0:
        os.close(report)
        _become(request, out, err)
    os.close(out)
    os.close(err)
    os.write(report, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any], out: int, err: int) -> NoReturn:
    """Runs the entry point and exits with its code."""
    os.setsid()
    os.chdir(request["cwd"])
    _take([out, err], [1, 2])
    _set_environment(request["env"])
    sys.argv = request["argv"]
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [str(Path(sys.argv[0]).parent), *paths, *_installed]
    main = types.ModuleType("__main__")
    main.__file__ = sys.argv[0]
    sys.modules["__main__"] = main
    _refresh()
    util.spawnv_passfds = _Spares(request["spares"]).spawn  # type: ignore[attr-defined]
    module, _, function = request["entry"].partition(":")
    sys.exit(getattr(importlib.import_module(module), function)())


class _Spares:
    """Forked processes that wait to become what `multiprocessing` spawns."""

    def __init__(self, count: int) -> None:
        self._spawn = util.spawnv_passfds  # type: ignore[attr-defined]
        self._waiting: list[tuple[int, socket.socket]] = []
        for _ in range(count):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
            if pid == 0:
                ours.close()
                for _, other in self._waiting:
                    other.close()
                util.spawnv_passfds = self._spawn  # type: ignore[attr-defined]
                _become_spawned(theirs)
            theirs.close()
            self._waiting.append((pid, ours))

    def spawn(self, path: str, args: Sequence[str], passed: Sequence[int]) -> int:
        """As `multiprocessing.util.spawnv_passfds`: returns the id of a child that runs `args`."""
        if "--multiprocessing-fork" not in [os.fsdecode(arg) for arg in args] or not self._waiting:
            return int(self._spawn(path, args, passed))
        pid, channel = self._waiting.pop(0)
        order = {
            "code": os.fsdecode(args[args.index("-c") + 1]),
            "env": dict(os.environ),
            "cwd": str(Path.cwd()),
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "descriptors": sorted(passed),
        }
        with channel:
            try:
                socket.send_fds(channel, [json.dumps(order).encode()], order["descriptors"])
            except BrokenPipeError:  # somebody killed it
                return int(self._spawn(path, args, passed))
        return pid


def _become_spawned(channel: socket.socket) -> None:
    """Waits for what to be, and is it; ends when nobody can tell any more."""
    text, received = socket.recv_fds(channel, LARGEST_REQUEST, MOST_DESCRIPTORS)[:2]
    if not text:
        os._exit(0)
    channel.close()
    order = json.loads(text)
    signal.pthread_sigmask(signal.SIG_SETMASK, order["blocked"])
    _take(received, order["descriptors"])
    os.chdir(order["cwd"])
    _set_environment(order["env"])
    _refresh()
    sys.argv = ["-c", "--multiprocessing-fork"]
    exec(order["code"], {"__name__": "__mp_spawned__"})


def _take(descriptors: Sequence[int], numbers: Sequence[int]) -> None:
    """Gives open files the numbers under which they are known here."""
    moved = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, ABOVE_ALL_TARGETS) for each in descriptors]
    for each in descriptors:
        os.close(each)
    for each, number in zip(moved, numbers, strict=True):
        os.dup2(each, number)
        os.close(each)


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _refresh() -> None:
    """What imports took from the environment, or from chance, is taken again."""
    import dask
    import numpy as np
    from distributed.config import initialize_logging

    dask.config.refresh()
    initialize_logging(dask.config.config)
    np.random.seed()


def main() -> None:
    for name in MODULES:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread would be missing in every fork"
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
