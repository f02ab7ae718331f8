"""Provenance names what made the store, and imports nothing for it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version

import pytest

from influence_job.storage.provenance import provenance


def test_names_versions_image_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFLUENCE_IMAGE_DIGEST", "sha256:abc")
    told = provenance("torch 2, H100", {"untracked": ("0.weight",), "excluded": ()})
    assert told["imageDigest"] == "sha256:abc"
    assert told["environment"] == "torch 2, H100"
    assert told["leftOut"] == {"untracked": ["0.weight"], "excluded": []}
    assert told["versions"]["python"] == platform.python_version()
    for package in ("torch", "zarr", "influence-operator"):
        assert told["versions"][package] == version(package)
    assert json.loads(json.dumps(told)) == told


def test_outside_an_image_there_is_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFLUENCE_IMAGE_DIGEST", raising=False)
    assert provenance()["imageDigest"] is None


def test_the_storage_package_imports_neither_torch_nor_dask() -> None:
    code = (
        "import sys\n"
        "from influence_job.storage import arrays, ledger, provenance, sink_arrays, store\n"
        "provenance.provenance()\n"
        "print(sorted({'torch', 'dask', 'distributed', 'gcsfs', 'aiohttp'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
