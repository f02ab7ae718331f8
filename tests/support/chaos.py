"""At which moments the cluster's tests kill what a job stands on: one per role and run, or all of them.

`INFLUENCE_CHAOS` chooses: `all` takes every moment (`make chaos`), the name of a moment that one, and any
other word one moment per role, by its digest. By default it is the commit's hash. Hooks of pytest that
`tests/conftest.py` imports set it for all processes of a run and print it, so that a run can be repeated.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

VARIABLE = "INFLUENCE_CHAOS"
ALL = "all"
MOMENTS = ("fit", "factors", "region", "last")
"""In the middle of a stage, and before the very last rows."""
ROLES = ("worker", "workers", "scheduler", "driver", "eviction", "operator", "dask-operator")
"""`worker` is one of them, `workers` are all; `eviction` is the driver's."""


def moments_of(role: str) -> list[str]:
    """The moments at which this run kills it."""
    word = os.environ[VARIABLE]
    if word == ALL:
        return list(MOMENTS)
    if word in MOMENTS:
        return [word]
    digest = hashlib.sha256(f"{word} {role}".encode()).digest()
    return [MOMENTS[int.from_bytes(digest, "big") % len(MOMENTS)]]


def pytest_configure() -> None:
    """Before other processes of the run are started, which inherit it."""
    os.environ.setdefault(VARIABLE, _commit())


def pytest_report_header() -> str:
    """How to have the same moments again."""
    chosen = ", ".join(f"{role} at {' '.join(moments_of(role))}" for role in ROLES)
    return f"kills in the cluster: {chosen} ({VARIABLE}={os.environ[VARIABLE]})"


def _commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()[:12] or "none"
