"""The job that sets everything, for the tests of single builders."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from attempts import build, from_file
from influence_operator.manifests.attempt import AttemptManifests

HERE = Path(__file__).parent


@pytest.fixture
def source() -> dict[str, Any]:
    """The ConfigMap that `everything.yaml` names."""
    return {"data": {"my_task.py": "task = None\n", "job.json": "{}"}, "binaryData": {"weights.npy": "AAA="}}


@pytest.fixture
def everything(source: dict[str, Any]) -> AttemptManifests:
    """A GPU job with every pod setting."""
    return build(from_file(HERE / "everything.yaml"), source)


@pytest.fixture
def now() -> datetime:
    """Some moment."""
    return datetime(2026, 3, 1, 12, tzinfo=UTC)
