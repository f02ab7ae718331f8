"""One writer at a time: claims, fencing, and what an Overwrite leaves uncounted."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from influence_job.errors import InfrastructureError, PermanentError, Reason
from influence_job.storage import arrays
from influence_job.storage.claim import (
    Claim,
    Epoch,
    begin,
    check_epoch,
    claim,
    inspect,
)
from influence_job.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "x.zarr"))


def attempt(store: Store, uid: str, number: int = 1, on_existing: str = "Resume") -> Epoch:
    return claim(store, Claim(uid, number, f"pod-{uid}-{number}", on_existing))


def test_nothing_there_is_empty_and_inspecting_writes_nothing(store: Store, tmp_path: Path) -> None:
    existing = inspect(store)
    assert existing.empty
    assert not existing.finished
    assert list(tmp_path.iterdir()) == []


def test_epochs_count_up_and_remember_who_came_before(store: Store) -> None:
    first = attempt(store, "a")
    second = attempt(store, "a", 2)
    third = attempt(store, "b")
    assert [e.number for e in (first, second, third)] == [1, 2, 3]
    assert [e.resumes for e in (first, second, third)] == [False, True, False]
    assert third.previous == {1: first.claim, 2: second.claim}
    assert inspect(store).claims == {1: first.claim, 2: second.claim, 3: third.claim}


def test_more_than_nine_epochs_stay_in_order(store: Store) -> None:
    assert [attempt(store, "a", n).number for n in range(1, 13)] == list(range(1, 13))


def test_of_drivers_that_claim_at_once_each_gets_an_epoch_of_its_own(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        epochs = list(pool.map(lambda n: attempt(store, f"uid-{n}"), range(8)))
    assert sorted(e.number for e in epochs) == list(range(1, 9))
    for epoch in epochs:
        assert inspect(store).claims[epoch.number] == epoch.claim


CLAIMS_OFTEN = """
import sys
from influence_job.storage.claim import Claim, claim
from influence_job.storage.store import Store
store = Store.open(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
for attempt in range(10):
    print(claim(store, Claim(sys.argv[2], attempt, "pod", "Resume")).number)
"""


def test_of_processes_that_claim_at_once_each_gets_epochs_of_its_own(store: Store) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", CLAIMS_OFTEN, store.url]
    with ExitStack() as running:
        processes = [
            running.enter_context(subprocess.Popen([*command, f"uid-{n}"], **pipes)) for n in range(3)
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.close()
        numbers = [int(number) for process in processes for number in process.stdout]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(numbers) == list(range(1, 31))


def test_the_holder_of_the_highest_epoch_may_write(store: Store) -> None:
    attempt(store, "a")
    check_epoch(store, attempt(store, "b"))


def test_a_later_attempt_of_the_same_job_asks_the_earlier_to_run_again(store: Store) -> None:
    epoch = attempt(store, "a")
    attempt(store, "a", 2)
    with pytest.raises(InfrastructureError, match="attempt 2 of this job") as raised:
        check_epoch(store, epoch)
    assert raised.value.reason is Reason.SUPERSEDED


def test_another_job_ends_the_earlier_naming_who_it_is(store: Store) -> None:
    epoch = attempt(store, "a")
    attempt(store, "a", 2)
    attempt(store, "b")
    with pytest.raises(PermanentError, match=r"job b on pod-b-1 took the store over .*\(epoch 3\)") as raised:
        check_epoch(store, epoch)
    assert raised.value.reason is Reason.STORE_CLAIMED


def test_a_claim_that_cannot_be_read_is_another_jobs(store: Store) -> None:
    epoch = attempt(store, "a")
    store.put("ledger/epoch-2", b'{"job_')
    with pytest.raises(PermanentError, match="job unknown"):
        check_epoch(store, epoch)
    assert attempt(store, "a", 2).number == 3


def test_fail_is_refused_where_a_store_is_and_only_there(store: Store) -> None:
    assert attempt(store, "a", on_existing="Fail").number == 1
    with pytest.raises(PermanentError, match=r"output\.onExisting is Fail") as raised:
        attempt(store, "b", on_existing="Fail")
    assert raised.value.reason is Reason.STORE_EXISTS
    assert set(inspect(store).claims) == {1}


@pytest.mark.parametrize("on_existing", ["Resume", "Overwrite", "Fail"])
def test_after_its_first_claim_every_attempt_of_a_uid_resumes(store: Store, on_existing: str) -> None:
    begin(store, attempt(store, "a", 1, on_existing))
    store.put("influences/c/0/0", b"computed")
    second = attempt(store, "a", 2, on_existing)
    assert inspect(store).effective("a", on_existing) == "Resume"
    assert second.resumes
    assert not second.starts_anew
    assert begin(store, second) == second
    assert store.get("influences/c/0/0") == b"computed"


def test_an_overwrite_deletes_everything_but_claims(store: Store) -> None:
    attempt(store, "a")
    arrays.update_attributes(store, {"spec": 1})
    store.put("ledger/1-0", b"segment")
    epoch = attempt(store, "b", on_existing="Overwrite")
    assert store.get("ledger/1-0") == b"segment", "nothing is deleted by claiming"
    begun = begin(store, epoch)
    assert (begun.number, begun.counts_from, begun.starts_anew) == (3, 3, False)
    assert begun.previous == {1: epoch.previous[1], 2: epoch.claim}
    claims = [f"ledger/epoch-{number}" for number in (1, 2, 3)]
    assert store.list() == ["ledger/deleted-before-3", *claims]
    check_epoch(store, begun)


def test_an_overwrite_that_did_not_get_so_far_leaves_what_is_there_to_others(store: Store) -> None:
    attempt(store, "a")
    arrays.update_attributes(store, {arrays.OURS: {"finished": True}})
    assert attempt(store, "b", on_existing="Overwrite").starts_anew  # and failed while it loaded
    existing = inspect(store)
    assert existing.finished
    assert existing.counts_from == 0
    later = attempt(store, "c")
    assert (later.counts_from, later.starts_anew) == (0, False)


@pytest.mark.parametrize("between", [None, "Resume", "Overwrite"])
def test_an_overwrite_that_did_not_get_so_far_is_taken_up_by_its_own_next_attempt(
    store: Store, between: str | None
) -> None:
    """Whatever another job did in between."""
    attempt(store, "a")
    arrays.update_attributes(store, {arrays.OURS: {"finished": True}})
    attempt(store, "b", 1, "Overwrite")
    if between is not None:
        begin(store, attempt(store, "c", 1, between))
        arrays.update_attributes(store, {arrays.OURS: {"finished": True}})
    assert inspect(store).effective("b", "Overwrite") == "Overwrite"
    second = attempt(store, "b", 2, "Overwrite")
    assert (second.starts_anew, second.resumes) == (True, True)
    begun = begin(store, second)
    assert not inspect(store).finished
    third = attempt(store, "b", 3, "Overwrite")
    assert (third.counts_from, third.starts_anew) == (begun.number, False)


def test_an_overwrite_counts_when_it_begins_and_its_deletion_is_finished_by_whoever_comes_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(store, "a")
    arrays.update_attributes(store, {arrays.OURS: {"finished": True}})
    store.put("influences/c/0/0", b"old")
    epoch = attempt(store, "b", on_existing="Overwrite")
    monkeypatch.setattr(store, "delete", _killed)
    with pytest.raises(KeyboardInterrupt):
        begin(store, epoch)
    monkeypatch.undo()

    existing = inspect(store)
    assert existing.must_delete
    assert existing.empty
    assert not existing.finished
    later = attempt(store, "b", 2, "Overwrite")
    assert (later.counts_from, later.overwrites, later.must_delete, later.resumes) == (3, False, True, True)
    assert begin(store, later).number == later.number
    assert store.get("influences/c/0/0") is None
    assert not inspect(store).must_delete


def _killed(_: str) -> None:
    raise KeyboardInterrupt


def test_a_driver_that_was_fenced_deletes_nothing(store: Store) -> None:
    """What is there is of whoever came, who found it to be as it was."""
    attempt(store, "a")
    arrays.update_attributes(store, {arrays.OURS: {"finished": True}})
    store.put("influences/c/0/0", b"computed")
    epoch = attempt(store, "b", on_existing="Overwrite")
    attempt(store, "c")
    with pytest.raises(PermanentError) as raised:
        begin(store, epoch)
    assert raised.value.reason is Reason.STORE_CLAIMED
    assert store.get("influences/c/0/0") == b"computed"
    assert inspect(store).finished


def test_of_one_who_overwrites_and_one_who_claims_at_once_one_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both create the next epoch: there is no moment in which each believes to hold what the other has."""
    attempt(store, "a")
    arrays.update_attributes(store, {arrays.OURS: {"finished": True}})
    epoch = attempt(store, "b", on_existing="Overwrite")
    create, others = store.create_json, []

    def while_another_looked(path: str, document: object) -> bool:
        monkeypatch.setattr(store, "create_json", create)
        if not others:
            begin(store, epoch)
            others.append(path)
        return create(path, document)

    monkeypatch.setattr(store, "create_json", while_another_looked)
    late = attempt(store, "c")
    assert (late.number, late.counts_from) == (4, 3), "it looked again"
    assert not inspect(store).finished


def test_a_driver_that_is_fenced_while_it_deletes_leaves_the_rest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the next driver writes there may have the same names."""
    attempt(store, "a")
    for number in range(200):
        store.put(f"influences/c/{number}/0", b"computed")
    epoch = attempt(store, "b", on_existing="Overwrite")
    monkeypatch.setattr("influence_job.storage.claim.CHECK_SECONDS", 0.0)
    delete = store.delete

    def taken_over(path: str) -> None:
        if path == "influences/c/10/0":
            attempt(store, "c")
        delete(path)

    monkeypatch.setattr(store, "delete", taken_over)
    with pytest.raises(PermanentError) as raised:
        begin(store, epoch)
    assert raised.value.reason is Reason.STORE_CLAIMED
    assert len(store.list("influences/")) > 100
    assert inspect(store).must_delete, "whoever came ends it"


def test_a_zarr_group_that_is_not_ours_is_refused(store: Store) -> None:
    store.put_json("zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {"mine": 1}})
    before = store.get("zarr.json")
    for on_existing in ("Resume", "Overwrite", "Fail"):
        with pytest.raises(PermanentError, match=r"found 'zarr\.json', which no job wrote") as raised:
            attempt(store, "a", on_existing=on_existing)
        assert raised.value.reason is Reason.STORE_EXISTS
    assert store.list() == ["zarr.json"]
    assert store.get("zarr.json") == before


def test_a_finished_store_says_so(store: Store) -> None:
    attempt(store, "a")
    arrays.update_attributes(store, {})
    assert not inspect(store).finished
    arrays.update_attributes(store, {arrays.OURS: {"finished": True}})
    assert inspect(store).finished
    assert not inspect(store).empty


def test_a_reader_sees_the_epoch_that_holds(store: Store) -> None:
    assert inspect(store).latest() is None
    attempt(store, "a")
    begin(store, attempt(store, "b", on_existing="Overwrite"))
    latest = inspect(store).latest()
    assert latest is not None
    assert (latest.number, latest.claim.job_uid, latest.counts_from) == (3, "b", 3)
    store.delete("ledger/deleted-before-3")
    latest = inspect(store).latest()
    assert latest is not None
    assert latest.must_delete


def test_what_a_killed_probe_left_does_not_make_the_store_foreign(store: Store) -> None:
    store.put(".influence-probe-1", b".")
    assert attempt(store, "a").number == 1


def test_an_unknown_on_existing_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="expected Resume, Overwrite or Fail, got 'resume'"):
        attempt(store, "a", on_existing="resume")


def test_a_driver_that_is_fenced_at_its_last_deletion_does_not_note_that_it_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(store, "a")
    store.put("influences/c/0/0", b"computed")
    epoch = attempt(store, "b", on_existing="Overwrite")
    delete = store.delete

    def taken_over(path: str) -> None:
        delete(path)
        attempt(store, "c")

    monkeypatch.setattr(store, "delete", taken_over)
    with pytest.raises(PermanentError) as raised:
        begin(store, epoch)
    assert raised.value.reason is Reason.STORE_CLAIMED
    assert inspect(store).must_delete, "whoever came ends it"
