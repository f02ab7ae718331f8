"""The store in S3, and a whole job into it, against a running emulator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import xarray

import stored
from influence_job.errors import PermanentError, Reason
from influence_job.storage.store import Store
from jobs import Barrier, Jobs
from s3 import S3Emulator
from store_contract import StoreContract


class TestS3(StoreContract):
    @pytest.fixture
    def store(self, s3: S3Emulator, s3_bucket: str) -> Iterator[Store]:
        with Store.open(f"s3://{s3_bucket}/folder/x.zarr", s3.storage_options()) as store:
            yield store


def test_a_missing_bucket_is_named(s3: S3Emulator) -> None:
    with (
        Store.open("s3://no-such-bucket-here/x.zarr", s3.storage_options()) as store,
        pytest.raises(PermanentError, match=r"no-such-bucket-here.*create the bucket") as raised,
    ):
        store.probe()
    assert raised.value.reason is Reason.STORE_UNREACHABLE


def test_a_killed_job_resumes_in_s3_with_the_bits_that_files_have(
    s3: S3Emulator, s3_bucket: str, undisturbed: Any, jobs: Jobs
) -> None:
    """Another job is refused there, and xarray opens the url."""
    url, options = f"s3://{s3_bucket}/folder/result.zarr", s3.storage_options()
    output = {"url": url, "storageOptions": options}
    with stored.open_store(url, options) as store:
        manifest = jobs.manifest({"output": output})
        run = jobs.start(manifest, barrier=Barrier("put", "before", "^influences/c/", 7))
        run.wait_for_barrier()
        run.kill()
        assert stored.differing(stored.result(store), undisturbed.result)

        jobs.finish(manifest)
        assert stored.differing(stored.result(store), undisturbed.result) == []

        other = jobs.manifest({"output": output, "method": {"regularization": 0.1}})
        refused = jobs.run(other)
        assert refused.code == 64
        assert "method.regularization" in refused.stderr

    opened = xarray.open_zarr(url, storage_options=options)
    assert opened["influences"].dims == ("test", "train")
    assert np.isfinite(opened["influences"].values).all()
