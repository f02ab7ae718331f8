"""Fixtures that several folders of tests share: a storage emulator, and a proxy that makes it fail."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from faulty_proxy import FaultyProxy, running_proxy
from gcs import GcsEmulator, running_emulator

# Read when gcsfs is imported: without it each first access of an emulator's bucket stalls for a minute.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


@pytest.fixture(scope="session")
def gcs() -> Iterator[GcsEmulator]:
    """A running Google Cloud Storage emulator."""
    with running_emulator() as emulator:
        yield emulator


@pytest.fixture
def gcs_bucket(gcs: GcsEmulator) -> str:
    """The name of a new, empty bucket."""
    return gcs.new_bucket()


@pytest.fixture
def faulty_gcs(gcs: GcsEmulator) -> Iterator[FaultyProxy]:
    """A proxy before the emulator, without faults until told."""
    with running_proxy(gcs.endpoint) as proxy:
        yield proxy
