"""What a store says of its making: versions, image, environment, parameters left out. Told, never compared.

What must be equal for equal bits is in the fingerprint and in the ledger's rows.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

IMAGE_DIGEST_VARIABLE = "INFLUENCE_IMAGE_DIGEST"
"""Set by the operator in the pods of a job."""

_PACKAGES = (
    "influence-operator",
    "torch",
    "numpy",
    "zarr",
    "dask",
    "distributed",
    "fsspec",
    "gcsfs",
    "s3fs",
)


def provenance(
    environment: str | None = None, left_out: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """The provenance of this process, for the root attributes.

    Args:
        environment: the numerical environment as a worker describes it, once one is known.
        left_out: why -> names of the model's parameters that contribute nothing, once they are known.
    """
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "imageDigest": os.environ.get(IMAGE_DIGEST_VARIABLE) or None,
        "environment": environment,
        "leftOut": {why: list(names) for why, names in (left_out or {}).items()},
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that matter, as installed; read without importing any."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
