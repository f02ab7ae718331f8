"""Fixtures that several folders of tests share: storage emulators, and a proxy that makes one fail."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import gcs as google
import s3 as amazon
from chaos import pytest_configure, pytest_report_header  # noqa: F401  (hooks)
from faulty_proxy import FaultyProxy, running_proxy
from gcs import GcsEmulator
from host_tests import (  # noqa: F401  (hooks)
    pytest_collection_modifyitems,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from recorded import pytest_terminal_summary_of_figures  # noqa: F401  (hook)
from s3 import S3Emulator

# Read when gcsfs is imported: without it each first access of an emulator's bucket stalls for a minute.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# For the workers that tests start themselves; `influence_job.local` says what it is good for.
os.environ.setdefault("DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED", "false")


@pytest.fixture(scope="session")
def gcs() -> Iterator[GcsEmulator]:
    """A running Google Cloud Storage emulator."""
    with google.running_emulator() as emulator:
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


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Emulator]:
    """A running S3 emulator."""
    with amazon.running_emulator() as emulator:
        yield emulator


@pytest.fixture
def s3_bucket(s3: S3Emulator) -> str:
    """The name of a new, empty bucket."""
    return s3.new_bucket()
