"""What the plan may say besides one group in float32: several groups, other precisions, other hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

import stored
from influence_job.storage.claim import Claim, claim
from influence_job.storage.ledger import Ledger
from jobs import Barrier, Jobs, times_written
from resuming import resume_and_check

PACE = 0.1
SMALL = {"task": {"arguments": {"train": 96, "test": 8}}, "chunks": {"test": 4, "train": 16}}
GROUPS = {
    "task": {"arguments": {"hidden": 40}},
    "workers": {"resources": {"limits": {"memory": "200Ki"}}},
}
"""Factors of 16 of the 24 test examples fit: two groups against 20 training chunks."""


def scores(path: Path) -> np.ndarray:
    values: np.ndarray = xarray.open_zarr(path)["influences"].values
    return values


@pytest.fixture
def finish(jobs: Jobs, tmp_path: Path) -> Callable[..., Path]:
    """Runs a job to its end and returns its store."""

    def made(name: str, changes: dict[str, Any], **settings: Any) -> Path:
        jobs.finish(jobs.manifest(changes), output=tmp_path / name, **settings)
        return tmp_path / name

    return made


def test_several_groups_give_the_scores_of_one(finish: Callable[..., Path]) -> None:
    """Top lists and statistics are merged for each group."""
    several, one = finish("several", GROUPS), finish("one", {"task": GROUPS["task"]})
    assert stored.plan_of(stored.open_store(several)).groups == 2
    assert stored.plan_of(stored.open_store(one)).groups == 1
    largest = np.abs(scores(one)).max()
    np.testing.assert_allclose(scores(several), scores(one), rtol=1e-4, atol=1e-6 * largest)
    opened = xarray.open_zarr(several)
    order = np.argsort(-scores(several), axis=1, kind="stable")[:, :100]
    np.testing.assert_array_equal(opened["most_helpful"].values, order)
    np.testing.assert_allclose(
        opened["score_mean"].values, scores(several).mean(axis=1), rtol=1e-4, atol=1e-5
    )


def test_a_run_killed_in_its_second_group_resumes_with_the_same_bits(
    finish: Callable[..., Path], jobs: Jobs, tmp_path: Path
) -> None:
    """Nothing of the first group is computed again, by another number of workers."""
    expected = stored.result(stored.open_store(finish("undisturbed", GROUPS)))
    path = tmp_path / "killed"
    barrier = Barrier("put", "before", "^influences/c/1/", 4)
    run = jobs.start(jobs.manifest(GROUPS), output=path, pace=PACE, barrier=barrier)
    run.wait_for_barrier()
    run.wait_until(lambda: _held(path) > 20, "a flush of a region of the second group")
    run.kill()
    assert 20 < _held(path) < 40
    resumed = resume_and_check(jobs, path, expected, GROUPS, workers=3)
    written = times_written(resumed, path)
    assert not [name for name in written if name.startswith("influences/c/0/")]


@pytest.mark.parametrize("workers", [1, 2])
def test_products_on_tensor_cores_are_those_of_float32_on_a_processor(
    workers: int, finish: Callable[..., Path]
) -> None:
    plain = stored.result(stored.open_store(finish("plain", SMALL)))
    tf32 = stored.result(stored.open_store(finish("tf32", {**SMALL, "precision": "TF32"}, workers=workers)))
    assert stored.differing(plain, tf32) == []


def test_bfloat16_is_captured_on_every_worker_and_stored_as_float32(finish: Callable[..., Path]) -> None:
    """Two workers give the bits of one, and the scores are close to those of float32."""
    rough = {**SMALL, "precision": "BFloat16"}
    one, two, plain = finish("one", rough, workers=1), finish("two", rough, workers=2), finish("plain", SMALL)
    assert stored.differing(*(stored.result(stored.open_store(path)) for path in (one, two))) == []
    assert scores(one).dtype == np.float32
    assert not np.array_equal(scores(one), scores(plain))
    assert np.corrcoef(scores(one).ravel(), scores(plain).ravel())[0, 1] > 0.98


def test_factors_in_half_precision_are_stored_whole_and_score_nearly_alike(
    finish: Callable[..., Path],
) -> None:
    half, plain = finish("half", {**SMALL, "factorDtype": "BFloat16"}), finish("plain", SMALL)
    kept, whole = (stored.result(stored.open_store(path)) for path in (half, plain))
    factors = [name for name in whole if name.startswith("factors/0/c/")]
    assert factors
    assert all(kept[name] == whole[name] for name in factors)
    assert not np.array_equal(scores(half), scores(plain))
    largest = np.abs(scores(plain)).max()
    np.testing.assert_allclose(scores(half), scores(plain), rtol=0.02, atol=0.005 * largest)


def test_another_processor_is_refused_unless_the_job_allows_it(
    jobs: Jobs, half_done: Any, undisturbed: Any
) -> None:
    """Two kinds of bits never mix by accident."""
    _mark_a_region_as_made_by("torch 2.9; mkl; cpu NEON", half_done.path)
    before = _without_claims(half_done.path)
    refused = jobs.run(jobs.manifest(), output=half_done.path, workers=1)
    assert refused.code == 64
    for word in ("StoreMismatch", "cpu NEON", "output.allowMixedHardware: true", str(half_done.path)):
        assert word in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr
    assert stored.differing(_without_claims(half_done.path), before) == []
    allowed = jobs.manifest({"output": {"allowMixedHardware": True}})
    jobs.finish(allowed, output=half_done.path, workers=1)
    assert stored.differing(stored.result(stored.open_store(half_done.path)), undisturbed.result) == []


@pytest.mark.parametrize(("verify", "reads"), [("None", 0), ("Sample", 16), ("All", 20)])
def test_as_many_regions_are_read_back_as_the_job_says(
    verify: str, reads: int, jobs: Jobs, tmp_path: Path
) -> None:
    """Told by the regions that stay lost: with None, nobody looks."""
    path = tmp_path / "result.zarr"
    run = jobs.start(
        jobs.manifest({"output": {"verify": verify}}),
        output=path,
        barrier=Barrier("enter", "before", "Verifying"),
    )
    run.wait_for_barrier()
    for region in (path / "influences" / "c" / "0").iterdir():
        region.unlink()
    run.open_barrier()
    assert run.wait().code == 0, run.stderr
    assert len(list((path / "influences" / "c" / "0").iterdir())) == reads


def _held(path: Path) -> int:
    held = stored.held(stored.open_store(path)) if (path / "ledger").exists() else set()
    return sum(kind == "region" for kind, _ in held)


def _mark_a_region_as_made_by(environment: str, path: Path) -> None:
    """As if another machine had computed one region of the store."""
    store = stored.open_store(path)
    ledger = Ledger(store, claim(store, Claim("elsewhere", 0, "elsewhere", "Resume")), mixes=True)
    ledger.load()
    row = next(ledger.rows("region"))
    ledger.add([replace(row, environment=environment)])
    ledger.flush()


def _without_claims(path: Path) -> dict[str, bytes]:
    found = stored.contents(stored.open_store(path))
    return {name: data for name, data in found.items() if not name.startswith("ledger/epoch-")}
