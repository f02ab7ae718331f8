"""The first thing a visitor does: the example on real images, its answer, and a kill half way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

import stored
from jobs import Jobs

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that `make run` makes."""
    made = Jobs(tmp_path_factory.mktemp("digits"))
    path = made.folder / "digits.zarr"
    run = made.finish(EXAMPLE, output=path, workers=None)
    assert "influence show" in run.stdout
    return path


def test_show_names_the_training_images_behind_each_misread_digit(digits: Path) -> None:
    """Those of the largest and the smallest score, with their labels."""
    opened = xarray.open_zarr(digits)
    scores = opened["influences"].values
    assert scores.shape == (300, 1400)
    label, predicted = opened["test_label"].values, opened["test_predicted"].values
    cases = _show(digits, "--top", "3")["tests"]
    assert cases
    for case in cases:
        row = case["test"]
        assert label[row] != predicted[row]
        for side, order in (("mostHelpful", -scores[row]), ("mostHarmful", scores[row])):
            named = [entry["train"] for entry in case[side]]
            assert named == np.argsort(order, kind="stable")[:3].tolist()
            labels = [entry["coordinates"]["label"] for entry in case[side]]
            assert labels == opened["train_label"].values[named].tolist()


def test_a_run_that_is_killed_half_way_ends_with_the_same_bits(
    digits: Path, jobs: Jobs, tmp_path: Path
) -> None:
    """As any user would kill it: no test code is inside, the first stored regions are the signal."""
    path = tmp_path / "digits.zarr"
    run = jobs.start(EXAMPLE, output=path, workers=2)
    run.wait_until(lambda: len(list(path.glob("influences/c/0/*"))) >= 3, "three regions")
    run.kill()
    jobs.finish(EXAMPLE, output=path, workers=1)
    one, other = (stored.result(stored.open_store(place)) for place in (path, digits))
    assert stored.differing(one, other) == []


def _show(path: Path, *options: str) -> Any:
    command = [str(Path(sys.executable).with_name("influence")), "show", str(path), "--json", *options]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
