"""Leaves tests out that need the cluster's host when the cluster is somebody else's, and lists them by name.

Hooks of pytest; `tests/conftest.py` imports them, since the process that prints the summary of a run over
several processes reads no other conftest. Nothing is skipped silently: what was left out is the last thing
that a run says.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

CLUSTER_VARIABLE = "TEST_KUBECONFIG"
_LEFT_OUT = pytest.StashKey[set[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests marked `host` when the cluster was given by its kubeconfig alone."""
    if CLUSTER_VARIABLE not in os.environ:
        return
    left_out = [item for item in items if item.get_closest_marker("host")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    config.stash.setdefault(_LEFT_OUT, set()).update(item.nodeid for item in left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tells the process that prints the summary."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = sorted(session.config.stash.get(_LEFT_OUT, set()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Hears it from the processes that ran the tests."""
    told = getattr(node, "workeroutput", {}).get("left_out", [])
    node.config.stash.setdefault(_LEFT_OUT, set()).update(told)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Lists what was left out."""
    names = sorted(config.stash.get(_LEFT_OUT, set()))
    if names:
        terminalreporter.section(
            f"{len(names)} tests need the cluster's host; {CLUSTER_VARIABLE} is set: not run"
        )
        for name in names:
            terminalreporter.line(name)
