"""Whole jobs into a bucket, through a proxy that counts requests and fails as storage does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

import stored
from faulty_proxy import FaultyProxy
from gcs import GcsEmulator
from jobs import Barrier, Jobs, Run

PACE = 0.15
REGION = r"/influences/c/0/\d+$"
OUTAGE_SECONDS = 120


class Bucket:
    """A job whose output is a store in a bucket behind the proxy."""

    def __init__(self, jobs: Jobs, gcs: GcsEmulator, proxy: FaultyProxy, name: str) -> None:
        self.jobs, self.proxy = jobs, proxy
        self.url = f"gs://{name}/folder/result.zarr"
        self.options = gcs.storage_options(proxy.url)
        self.store = stored.open_store(self.url, gcs.storage_options())

    def manifest(self, **output: Any) -> Path:
        """The traced job with this output."""
        return self.jobs.manifest({"output": {"url": self.url, "storageOptions": self.options, **output}})

    def resume_and_check(self, expected: dict[str, bytes]) -> None:
        """A rerun finishes, with the expected bits, and writes nothing that the ledger held."""
        rows = stored.held(self.store)
        finished = stored.held_objects(self.store, rows)
        self.proxy.clear_log()
        self.jobs.finish(self.manifest())
        inside = "folder/result.zarr/"
        again = [n for n in self.proxy.puts() if finished.fullmatch(n.removeprefix(inside))]
        assert not again, f"the ledger held these before: {again}"
        assert stored.differing(stored.result(self.store), expected) == []

    def regions_stored(self) -> int:
        return len(self.proxy.puts(REGION))

    def regions_held(self) -> int:
        return sum(kind == "region" for kind, _ in stored.held(self.store))


@pytest.fixture
def bucket(jobs: Jobs, gcs: GcsEmulator, faulty_gcs: FaultyProxy, gcs_bucket: str) -> Bucket:
    """An empty bucket of the test's own."""
    return Bucket(jobs, gcs, faulty_gcs, gcs_bucket)


def test_a_bucket_is_written_resumed_refused_and_overwritten(
    bucket: Bucket, undisturbed: Any, jobs: Jobs
) -> None:
    """The same bits as on files, each region in one PUT; xarray opens the url."""
    jobs.finish(bucket.manifest())
    assert stored.differing(stored.result(bucket.store), undisturbed.result) == []
    assert set(bucket.proxy.puts(REGION).values()) == {1}
    assert bucket.regions_stored() == 20
    opened = xarray.open_zarr(bucket.url, storage_options=bucket.options)
    assert opened["influences"].dims == ("test", "train")
    assert np.isfinite(opened["influences"].values).all()

    bucket.resume_and_check(undisturbed.result)
    assert bucket.regions_stored() == 0

    before = stored.contents(bucket.store)
    other = {
        "output": {"url": bucket.url, "storageOptions": bucket.options},
        "method": {"regularization": 0.1},
    }
    refused = jobs.run(jobs.manifest(other))
    assert refused.code == 64
    assert "method.regularization" in refused.stderr
    assert jobs.run(bucket.manifest(onExisting="Fail")).code == 64
    assert stored.contents(bucket.store) == before

    bucket.proxy.clear_log()
    jobs.finish(bucket.manifest(onExisting="Overwrite"))
    assert bucket.regions_stored() == 20
    assert stored.differing(stored.result(bucket.store), undisturbed.result) == []


def test_a_killed_run_resumes_in_a_bucket(bucket: Bucket, undisturbed: Any, jobs: Jobs) -> None:
    """Counted by the requests that reach the storage."""
    run = jobs.start(bucket.manifest(), pace=PACE, barrier=Barrier("put", "before", "^influences/c/", 7))
    run.wait_for_barrier()
    run.wait_until(lambda: bucket.regions_held() > 0, "a flush of regions")
    run.kill()
    assert 0 < bucket.regions_held() < 20
    bucket.resume_and_check(undisturbed.result)
    assert 0 < bucket.regions_stored() < 20


def test_a_missing_bucket_is_named(bucket: Bucket, jobs: Jobs) -> None:
    """Nobody retries for ten minutes what a typo made."""
    bucket.url = "gs://no-such-bucket-here/result.zarr"
    run = jobs.run(bucket.manifest(), timeout=60)
    assert run.code == 64
    assert "no-such-bucket-here" in run.stderr
    assert "create the bucket" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("status", [429, 503])
def test_a_storage_that_fails_every_seventh_request_is_retried(
    status: int, bucket: Bucket, undisturbed: Any, jobs: Jobs
) -> None:
    """The run finishes, and nothing counts against a region."""
    bucket.proxy.fail_every(7, status)
    run = jobs.finish(bucket.manifest(), "--json")
    assert '"failed": 0' in run.stdout
    bucket.proxy.heal()
    assert sum(request.status == status for request in bucket.proxy.log) > 5
    assert stored.differing(stored.result(bucket.store), undisturbed.result) == []


def test_an_outage_of_two_minutes_is_waited_for(bucket: Bucket, undisturbed: Any, jobs: Jobs) -> None:
    """It begins while regions are written; every process goes on by itself when it ends."""
    run = jobs.start(bucket.manifest(), pace=PACE)
    run.wait_until(lambda: bucket.regions_stored() >= 5, "five regions")
    bucket.proxy.go_down()
    with pytest.raises(AssertionError, match="without an end of the outage"):
        run.wait_until(lambda: False, "an end of the outage", timeout=OUTAGE_SECONDS)
    assert run.code is None, run.stderr
    bucket.proxy.heal()
    assert run.wait(90).code == 0, run.stderr
    assert stored.differing(stored.result(bucket.store), undisturbed.result) == []


def test_a_withdrawn_permission_ends_with_64_and_a_rerun_finishes(
    bucket: Bucket, undisturbed: Any, jobs: Jobs
) -> None:
    """What is done is kept; the message says what to grant."""
    run = jobs.start(bucket.manifest(), pace=PACE)
    run.wait_until(lambda: bucket.regions_held() >= 1, "a region in the ledger")
    bucket.proxy.fail_all(403, REGION)
    assert run.wait().code == 64
    assert re.search(r"StoreUnreachable.*grant", run.stderr, re.DOTALL), run.stderr
    assert bucket.url in run.stderr
    assert "Traceback" not in run.stderr
    assert bucket.regions_held() < 20
    bucket.proxy.heal()
    bucket.resume_and_check(undisturbed.result)


def test_a_bucket_nobody_may_write_to_is_refused_before_a_worker_starts(bucket: Bucket, jobs: Jobs) -> None:
    """The probe in Preflight meets the 403."""
    bucket.proxy.fail_all(403)
    run = jobs.run(bucket.manifest(), timeout=30)
    assert run.code == 64
    assert bucket.url in run.stderr
    assert "grant" in run.stderr


def test_an_unreachable_storage_ends_with_75_after_the_limit(bucket: Bucket, jobs: Jobs) -> None:
    """Ten minutes by default; the environment shortens it. Running again later can help, so 75."""
    bucket.proxy.go_down()
    run: Run = jobs.run(bucket.manifest(), env={"INFLUENCE_STORAGE_RETRY_SECONDS": "3"}, timeout=60)
    assert run.code == 75
    assert "StoreUnreachable" in run.stderr
