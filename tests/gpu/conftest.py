"""Without a CUDA device every test here fails and says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs import Jobs


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("torch.cuda.is_available() is False: these tests need a GPU", pytrace=False)
    return torch.device("cuda")


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """Jobs in a folder of the test's own; what still runs at its end is killed."""
    made = Jobs(tmp_path, installed=True)
    yield made
    made.close()
