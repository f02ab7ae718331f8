"""The store in Google Cloud Storage: against a running emulator, and one that fails as the real one does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xarray

from faulty_proxy import FaultyProxy
from gcs import GcsEmulator
from influence_job.errors import InfrastructureError, PermanentError, Reason
from influence_job.storage import arrays, objects, retry
from influence_job.storage.claim import Claim, claim, inspect
from influence_job.storage.ledger import Ledger, Row
from influence_job.storage.retry import LIMIT_VARIABLE
from influence_job.storage.store import Store
from store_contract import StoreContract


class TestGoogleCloudStorage(StoreContract):
    @pytest.fixture
    def store(self, gcs: GcsEmulator, gcs_bucket: str) -> Iterator[Store]:
        with Store.open(f"gs://{gcs_bucket}/folder/x.zarr", gcs.storage_options()) as store:
            yield store


class TestTheRootOfABucket(StoreContract):
    @pytest.fixture
    def store(self, gcs: GcsEmulator, gcs_bucket: str) -> Iterator[Store]:
        with Store.open(f"gs://{gcs_bucket}", gcs.storage_options()) as store:
            yield store


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it matters what is tried again, not when."""
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(retry, "LONGEST_WAIT_SECONDS", 0.05)


@pytest.fixture
def url(gcs_bucket: str) -> str:
    return f"gs://{gcs_bucket}/x.zarr"


@pytest.fixture
def store(gcs: GcsEmulator, faulty_gcs: FaultyProxy, url: str) -> Iterator[Store]:
    """A store behind the proxy."""
    with Store.open(url, gcs.storage_options(faulty_gcs.url)) as store:
        yield store


def write_a_small_result(store: Store) -> tuple[np.ndarray, Ledger]:
    """What a job does with a store, in small."""
    store.probe()
    epoch = claim(store, Claim("uid", 1, "pod", "Resume"))
    ledger = Ledger(store, epoch)
    ledger.load()
    arrays.update_attributes(store, {"spec": {}})
    values = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    arrays.create_array(store, "influences", (8, 6), (2, 2), "float32", ("test", "train"))
    for region, (i, j) in enumerate(np.ndindex(4, 3)):
        block = values[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        digest = arrays.write_chunk(store, "influences", (i, j), block)
        ledger.add([Row("region", region, digest, "", "cpu")])
        ledger.flush()
    ledger.compact()
    return values, ledger


def test_xarray_opens_a_bucket(gcs: GcsEmulator, store: Store, url: str) -> None:
    values, _ = write_a_small_result(store)
    data = xarray.open_zarr(url, consolidated=False, storage_options=gcs.storage_options())
    np.testing.assert_array_equal(data.influences.values, values)


def test_each_region_is_one_put(store: Store, faulty_gcs: FaultyProxy) -> None:
    write_a_small_result(store)
    puts = faulty_gcs.puts("influences/c/")
    assert len(puts) == 12
    assert set(puts.values()) == {1}


def test_a_region_of_64_mib_is_one_put(store: Store, faulty_gcs: FaultyProxy) -> None:
    block = np.zeros((1024, 16 * 1024), "float32")
    arrays.create_array(store, "influences", block.shape, block.shape, "float32", ("test", "train"))
    arrays.write_chunk(store, "influences", (0, 0), block)
    requests = [r for r in faulty_gcs.log if r.object_name.endswith("influences/c/0/0")]
    assert [(r.action, r.status) for r in requests] == [("PUT", 200)]
    assert len(store.get("influences/c/0/0") or b"") == block.nbytes + 4


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_job_finishes_when_every_nth_request_is_refused_for_now(
    store: Store, faulty_gcs: FaultyProxy, n: int
) -> None:
    faulty_gcs.fail_every(n, 503, 429, 500, 502, 408)
    values, ledger = write_a_small_result(store)
    np.testing.assert_array_equal(arrays.read_array(store, "influences"), values)
    assert ledger.missing("region", 12).tolist() == []
    refused = [r for r in faulty_gcs.log if not r.reached]
    assert len(refused) >= 40 // n
    assert set(faulty_gcs.puts("influences/c/").values()) == {1}


@pytest.mark.usefixtures("short_waits")
def test_a_listing_of_many_pages_repeats_the_page_that_failed_and_no_other(
    gcs: GcsEmulator, faulty_gcs: FaultyProxy, store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PAGE_OBJECTS", 10)
    paths = [f"ledger/1-{n:04d}" for n in range(25)]
    with Store.open(url, gcs.storage_options()) as direct, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda path: direct.put(path, b"."), paths))
    faulty_gcs.fail_every(2, 503)
    assert store.list("ledger/") == paths
    assert sum(r.reached for r in faulty_gcs.log) == 3


def test_an_upload_whose_answer_was_lost_is_repeated(store: Store, faulty_gcs: FaultyProxy) -> None:
    faulty_gcs.lose_answers(1, "object")
    store.put("object", b"content")
    assert store.get("object") == b"content"
    assert list(faulty_gcs.puts("object").values()) == [2]


def test_a_claim_whose_answer_was_lost_is_known_as_our_own(store: Store, faulty_gcs: FaultyProxy) -> None:
    faulty_gcs.lose_answers(1, "epoch-1")
    epoch = claim(store, Claim("uid", 1, "pod", "Resume"))
    assert epoch.number == 1
    assert inspect(store).claims == {1: epoch.claim}


def test_an_outage_shorter_than_the_limit_is_waited_for(store: Store, faulty_gcs: FaultyProxy) -> None:
    faulty_gcs.go_down()
    healing = threading.Timer(3.0, faulty_gcs.heal)
    healing.start()
    start = time.monotonic()
    store.put("object", b"content")
    assert time.monotonic() - start > 2.5
    healing.join()
    assert store.get("object") == b"content"


def test_an_outage_longer_than_the_limit_asks_for_another_run_which_resumes(
    gcs: GcsEmulator, faulty_gcs: FaultyProxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "2")
    with Store.open(url, gcs.storage_options(faulty_gcs.url)) as store:
        first = Ledger(store, claim(store, Claim("uid", 1, "pod", "Resume")))
        first.add([Row("region", 0, "", "", "cpu")])
        first.flush()
        first.add([Row("region", 1, "", "", "cpu")])
        faulty_gcs.go_down()
        start = time.monotonic()
        with pytest.raises(InfrastructureError, match=r"gs://.*run the job again") as raised:
            first.flush()
        assert raised.value.reason is Reason.STORE_UNREACHABLE
        assert time.monotonic() - start < 4, "gcsfs must not retry on its own"
        faulty_gcs.heal()
        second = Ledger(store, claim(store, Claim("uid", 2, "pod", "Resume")))
        second.load()
        assert second.missing("region", 2).tolist() == [1]


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize(
    ("status", "cure", "requests"), [(403, "grant this identity", 1), (401, "log in", 3)]
)
def test_without_permission_the_job_ends_naming_url_and_cure_and_a_rerun_continues(
    store: Store, faulty_gcs: FaultyProxy, url: str, status: int, cure: str, requests: int
) -> None:
    store.put("before", b"kept")
    faulty_gcs.fail_all(status)
    faulty_gcs.clear_log()
    with pytest.raises(PermanentError, match=f"{url}: writing after: .*{cure}") as raised:
        store.put("after", b"lost")
    assert raised.value.reason is Reason.STORE_UNREACHABLE
    assert len(faulty_gcs.log) == requests
    for refused in (store.probe, store.list, lambda: store.get("before"), lambda: inspect(store)):
        with pytest.raises(PermanentError, match=cure):
            refused()
    faulty_gcs.heal()
    assert store.list() == ["before"]


def test_permission_to_read_alone_is_found_by_the_probe(store: Store, faulty_gcs: FaultyProxy) -> None:
    faulty_gcs.fail_all(403, matching="influence-probe")
    assert inspect(store).empty
    with pytest.raises(PermanentError, match="grant this identity read, write and delete"):
        store.probe()


def test_a_missing_bucket_is_named(gcs: GcsEmulator) -> None:
    with Store.open("gs://no-such-bucket-here/x.zarr", gcs.storage_options()) as store:
        for action in (store.probe, store.list, lambda: inspect(store)):
            with pytest.raises(
                PermanentError, match=r"gs://no-such-bucket-here/x\.zarr: .*create the bucket"
            ):
                action()


def test_a_store_that_was_closed_leaves_no_connection_open(store: Store) -> None:
    store.put("object", b"content")
    session = store._backend._filesystem.session  # type: ignore[attr-defined]
    store.close()
    assert session.closed
