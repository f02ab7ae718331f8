"""The ledger: what is flushed lasts, what is not is done again, and nothing of it grows large."""

from __future__ import annotations

import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from influence_job.errors import InfrastructureError, PermanentError, Reason
from influence_job.storage import ledger as ledger_module
from influence_job.storage.claim import Claim, begin, claim, inspect
from influence_job.storage.ledger import Ledger, Row, indices_since
from influence_job.storage.rows import Table
from influence_job.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "x.zarr"))


def next_ledger(
    store: Store, uid: str = "uid", on_existing: str = "Resume", *, mixes: bool = False
) -> Ledger:
    ledger = Ledger(store, claim(store, Claim(uid, 1, "pod", on_existing)), mixes)
    ledger.load()
    return ledger


def row(index: int, kind: str = "region", environment: str = "cpu") -> Row:
    return Row(kind, index, f"{index:032x}", f"{index + 1:032x}", environment)


def segments(store: Store) -> list[str]:
    return [path for path in store.list("ledger/") if path[7:8].isdigit()]


def test_what_was_flushed_is_done_for_the_next_attempt_and_what_was_not_is_missing(store: Store) -> None:
    first = next_ledger(store)
    first.add([row(0), row(2)])
    first.flush()
    first.add([row(1)])
    assert first.has("region", 1)
    assert first.pending == 1

    second = next_ledger(store)
    assert second.count("region") == 2
    assert [second.has("region", i) for i in range(4)] == [True, False, True, False]
    assert second.missing("region", 4).tolist() == [1, 3]
    assert second.row("region", 2) == row(2)
    with pytest.raises(KeyError, match="region 1 is not in the ledger"):
        second.row("region", 1)


def test_kinds_are_counted_apart(store: Store) -> None:
    first = next_ledger(store)
    first.add([row(0), row(1), row(0, "factors"), row(5, "fit/covariance/range")])
    first.flush()
    second = next_ledger(store)
    assert second.kinds() == ["factors", "fit/covariance/range", "region"]
    assert [second.count(kind) for kind in (*second.kinds(), "merge")] == [1, 1, 2, 0]
    assert second.missing("merge", 2).tolist() == [0, 1]
    assert second.missing("region", 0).tolist() == []


def test_rows_come_back_as_they_were_whatever_their_strings(store: Store) -> None:
    rows = [
        Row("region", 0, "ab" * 16, "", "cpu"),
        Row("region", 1, "AB" * 16, "cd" * 16, "H100 ü"),
        Row("region", 2, "not a digest", "g" * 32, "cpu"),
        Row("region", 5000, "", "ab" * 15 + " a", ""),
    ]
    first = next_ledger(store, mixes=True)
    first.add(rows)
    first.flush()
    second = next_ledger(store)
    assert list(first.rows("region")) == list(second.rows("region")) == rows


def test_a_row_that_comes_again_replaces_the_earlier_one(store: Store) -> None:
    first = next_ledger(store, mixes=True)
    first.add([Row("region", 3, "odd", "odd", "cpu")])
    first.flush()
    first.add([row(3, environment="gpu")])
    first.flush()
    for ledger in (first, next_ledger(store)):
        assert list(ledger.rows("region")) == [row(3, environment="gpu")]
        assert ledger.count("region") == 1


def test_rows_of_two_environments_mix_only_if_they_may(store: Store) -> None:
    ledger = next_ledger(store)
    for rows in ([row(0), row(1, environment="gpu")], [row(0), row(1)], [row(2, environment="gpu")]):
        before = ledger.count("region")
        if {r.environment for r in rows} == {"cpu"}:
            ledger.add(rows)
            continue
        with pytest.raises(PermanentError, match=r"begun on \['cpu'\], this worker is 'gpu'") as raised:
            ledger.add(rows)
        assert raised.value.reason is Reason.STORE_MISMATCH
        assert ledger.count("region") == before
    ledger.flush()
    with pytest.raises(PermanentError, match="allowMixedHardware: true"):
        next_ledger(store).refuse_other("gpu")
    next_ledger(store).refuse_other("cpu")
    next_ledger(store, mixes=True).add([row(2, environment="gpu")])


def test_every_flush_is_a_new_object_and_none_is_written_twice(store: Store) -> None:
    ledger = next_ledger(store)
    for index in range(3):
        ledger.add([row(index)])
        ledger.flush()
        ledger.flush()
    assert segments(store) == ["ledger/1-0", "ledger/1-1", "ledger/1-2"]


def test_a_driver_with_a_lower_epoch_writes_nothing_more(store: Store) -> None:
    first = next_ledger(store)
    first.add([row(0)])
    next_ledger(store)
    with pytest.raises(InfrastructureError) as raised:
        first.flush()
    assert raised.value.reason is Reason.SUPERSEDED
    assert segments(store) == []


def test_without_pending_rows_a_flush_looks_for_a_higher_epoch_once_a_second(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
    first = next_ledger(store)
    next_ledger(store, "other")
    now[0] += 0.9
    first.flush()
    now[0] += 0.2
    with pytest.raises(PermanentError) as raised:
        first.flush()
    assert raised.value.reason is Reason.STORE_CLAIMED


def test_flushes_are_due_after_a_second_or_256_rows(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
    ledger = next_ledger(store)
    ledger.add(row(i) for i in range(255))
    ledger.flush_if_due()
    assert (ledger.pending, len(segments(store))) == (255, 0)
    ledger.add([row(255)])
    ledger.flush_if_due()
    assert (ledger.pending, len(segments(store))) == (0, 1)
    ledger.add([row(256)])
    now[0] += 1.0
    ledger.flush_if_due()
    assert (ledger.pending, len(segments(store))) == (0, 2)


def test_rows_stay_pending_when_the_storage_fails(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = next_ledger(store)
    ledger.add([row(0)])

    def fail(path: str, data: bytes) -> None:
        raise InfrastructureError(Reason.STORE_UNREACHABLE, "outage")

    with monkeypatch.context() as outage:
        outage.setattr(store, "put", fail)
        with pytest.raises(InfrastructureError):
            ledger.flush()
    ledger.flush()
    assert next_ledger(store).has("region", 0)


def test_after_an_overwrite_earlier_segments_never_count_even_while_they_exist(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next_ledger(store)
    first.add([row(0)])
    first.flush()
    epoch = claim(store, Claim("other", 1, "pod", "Overwrite"))
    second = Ledger(store, epoch)
    with monkeypatch.context() as slow:
        slow.setattr(store, "delete", lambda path: None)
        second.go_on_as(begin(store, epoch))
    second.load()
    assert second.count("region") == 0
    second.add([row(1)])
    second.flush()
    third = next_ledger(store, "other", "Overwrite")
    assert segments(store) == ["ledger/1-0", "ledger/3-0"]
    assert third.missing("region", 2).tolist() == [0]


def test_every_flipped_byte_of_a_segment_is_found_and_the_segment_named(store: Store) -> None:
    epoch = claim(store, Claim("uid", 1, "pod", "Resume"))
    first = Ledger(store, epoch)
    first.add([row(0), Row("factors", 1, "odd", "", "cpu")])
    first.flush()
    whole = store.get("ledger/1-0")
    assert whole is not None
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        store.put("ledger/1-0", bytes(changed))
        with pytest.raises(PermanentError, match=r"ledger/1-0: a segment of the ledger cannot") as raised:
            Ledger(store, epoch).load()
        assert raised.value.reason is Reason.STORE_CORRUPT


@pytest.mark.parametrize("length", [0, 3, 11, 60])
def test_a_segment_that_was_cut_short_is_found(store: Store, length: int) -> None:
    first = next_ledger(store)
    first.add([row(0)])
    first.flush()
    store.put("ledger/1-0", (store.get("ledger/1-0") or b"")[:length])
    with pytest.raises(PermanentError, match="ledger/1-0"):
        next_ledger(store)


def test_a_long_job_leaves_few_segments(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush each second makes 86400 a day: hours to read and to delete in a bucket."""
    monkeypatch.setattr("influence_job.storage.ledger.MOST_SEGMENTS", 5)
    ledger, most = next_ledger(store), 0
    for index in range(23):
        ledger.add([row(index)])
        ledger.flush()
        most = max(most, len(segments(store)))
        assert next_ledger_of(store, ledger).count("region") == index + 1
    assert most == 5
    second = next_ledger(store)
    second.add([row(23)])
    second.flush()
    second.add([row(24)])
    second.flush()
    assert second.missing("region", 25).tolist() == []
    assert indices_since(store, 2, 0, "region") >= {23, 24}, "what a worker finds of the present epoch"
    assert next_ledger(store).missing("region", 25).tolist() == []


def test_segments_that_are_made_one_while_they_are_read_are_all_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver that is replaced may be at it."""
    first = next_ledger(store)
    for index in range(4):
        first.add([row(index)])
        first.flush()
    epoch = claim(store, Claim("uid", 1, "pod", "Resume"))
    monkeypatch.setattr(first, "guard", Unguarded())  # it checked just before
    listed = store.list

    def list_and_merge(prefix: str) -> list[str]:
        found = listed(prefix)
        monkeypatch.setattr(store, "list", listed)
        first.compact()
        return found

    monkeypatch.setattr(store, "list", list_and_merge)
    second = Ledger(store, epoch)
    second.load()
    assert second.missing("region", 4).tolist() == []


class Unguarded:
    def check(self) -> None:
        """Passes."""

    check_if_due = check


def next_ledger_of(store: Store, ledger: Ledger) -> Ledger:
    """What one who only reads finds."""
    epoch = inspect(store).latest()
    assert epoch is not None
    reader = Ledger(store, epoch)
    reader.load()
    return reader


def test_compacting_leaves_one_segment_with_all_rows(store: Store) -> None:
    first = next_ledger(store)
    for index in range(5):
        first.add([row(index), row(index, "factors")])
        first.flush()
    second = next_ledger(store, mixes=True)
    second.add([row(9, environment="gpu")])
    second.compact()
    assert len(segments(store)) == 1
    third = next_ledger(store)
    assert list(third.rows("region")) == [*map(row, range(5)), row(9, environment="gpu")]
    assert list(third.rows("factors")) == [row(index, "factors") for index in range(5)]
    third.compact()
    assert len(segments(store)) == 1


@pytest.mark.parametrize("deletions", range(4))
def test_compacting_may_be_killed_at_any_deletion(
    store: Store, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    first = next_ledger(store)
    for index in range(4):
        first.add([row(index)])
        first.flush()
    delete, left = store.delete, [deletions]

    def dying(path: str) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        delete(path)

    with monkeypatch.context() as death:
        death.setattr(store, "delete", dying)
        with pytest.raises(KeyboardInterrupt):
            first.compact()
    second = next_ledger(store)
    assert list(second.rows("region")) == [row(i) for i in range(4)]


def test_rows_may_be_added_from_many_threads_while_another_flushes(store: Store) -> None:
    ledger = next_ledger(store)
    threads = [
        threading.Thread(target=lambda n=n: [ledger.add([row(i)]) for i in range(n, 2000, 4)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ledger.flush()
    ledger.flush()
    assert next_ledger(store).missing("region", 2000).tolist() == []
    assert ledger.count("region") == 2000


def test_a_row_that_was_forgotten_is_missing_until_it_comes_again(store: Store) -> None:
    ledger = next_ledger(store)
    ledger.add([Row("region", 0, "odd", "", "cpu"), row(1)])
    ledger.forget("region", [0, 7])
    assert ledger.missing("region", 2).tolist() == [0]
    assert ledger.count("region") == 1
    ledger.add([row(0)])
    assert list(ledger.rows("region")) == [row(0), row(1)]


def test_a_row_takes_little_memory() -> None:
    table, batch, batches = Table(), 20_000, 5
    tracemalloc.start()
    try:
        for start in range(0, batch * batches, batch):
            table.insert([row(start + i) for i in range(batch)])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / (batch * batches) < 60, "a million rows stay below 60 MB"


def test_a_hundred_thousand_rows_are_added_within_a_second() -> None:
    rows = [row(i) for i in range(100_000)]
    start = time.process_time()
    Table().insert(rows)
    assert time.process_time() - start < 1.0


def test_a_worker_finds_what_was_flushed_since_its_task_was_submitted(store: Store) -> None:
    """What is older may be damaged, and submitted again for that reason."""
    earlier = next_ledger(store)
    earlier.add([row(9)])
    earlier.flush()
    driver = next_ledger(store)
    driver.add([row(0)])
    driver.flush()
    submitted = driver.next_segment
    assert indices_since(store, 2, submitted, "region") == set()
    for rows in ([row(1), row(2)], [row(3), row(4, kind="merge")]):
        driver.add(rows)
        driver.flush()
    driver.add([row(5)])
    assert indices_since(store, 2, submitted, "region") == {1, 2, 3}


def test_a_driver_that_was_fenced_merges_no_segments(store: Store) -> None:
    """Within the second in which it need not look for others."""
    first = next_ledger(store)
    for index in range(3):
        first.add([row(index)])
        first.flush()
    before = segments(store)
    next_ledger(store, "other")
    with pytest.raises(PermanentError) as raised:
        first.compact()
    assert raised.value.reason is Reason.STORE_CLAIMED
    assert segments(store) == before
