"""What every storage system must do for a store: inherited by one test class per system.

A subclass gives the fixture `store`, an empty store at a location nobody else uses.
"""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from influence_job.errors import PermanentError, Reason
from influence_job.storage import arrays, claim, ledger
from influence_job.storage.store import Store


class StoreContract:
    def test_what_is_put_is_read_back(self, store: Store) -> None:
        store.put("a/b", b"one")
        store.put("a/b", b"two")
        assert store.get("a/b") == b"two"

    def test_an_object_that_is_not_there_reads_as_none(self, store: Store) -> None:
        assert store.get("a/b") is None
        store.put("a/b", b"")
        assert store.get("a/b") == b""
        assert store.get("a/b/c") is None
        assert store.get("a") is None

    def test_only_the_first_create_of_a_path_succeeds(self, store: Store) -> None:
        assert store.create("a/b", b"first")
        assert not store.create("a/b", b"second")
        assert not store.create("a/b", b"first")
        assert store.get("a/b") == b"first"

    def test_of_creates_at_the_same_time_exactly_one_succeeds(self, store: Store) -> None:
        barrier = threading.Barrier(8)

        def create(number: int) -> bool:
            barrier.wait()
            return store.create("contested", str(number).encode())

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert store.get("contested") == str(won.index(True)).encode()

    def test_lists_paths_by_prefix_and_never_from_a_cache(self, store: Store) -> None:
        assert store.list("a/") == []
        other = pickle.loads(pickle.dumps(store))
        for path in ("a/x-1", "a/x-2", "a/y/x-3", "ab"):
            other.put(path, b".")
        other.close()
        assert store.list("a/") == ["a/x-1", "a/x-2", "a/y/x-3"]
        assert store.list("a/x") == ["a/x-1", "a/x-2"]
        assert store.list("a") == ["a/x-1", "a/x-2", "a/y/x-3", "ab"]
        store.delete("a/x-1")
        assert store.list("") == ["a/x-2", "a/y/x-3", "ab"]

    def test_deleting_what_is_not_there_is_no_error(self, store: Store) -> None:
        store.delete("a/b")
        store.delete_prefix("a/", guard=lambda: None)
        assert store.list() == []

    def test_deletes_by_prefix_but_what_is_to_be_kept(self, store: Store) -> None:
        for path in ("a/1", "a/2", "b/1"):
            store.put(path, b".")
        store.delete_prefix("a/", guard=lambda: None, keep=lambda path: path == "a/2")
        assert store.list() == ["a/2", "b/1"]

    def test_reads_many_objects_in_the_order_asked_for(self, store: Store) -> None:
        paths = [f"many/{i}" for i in range(50)]
        for path in paths[::2]:
            store.put(path, path.encode())
        assert list(store.get_many(paths)) == [
            (path, path.encode() if i % 2 == 0 else None) for i, path in enumerate(paths)
        ]

    def test_a_probe_leaves_nothing_behind(self, store: Store) -> None:
        store.probe()
        assert store.list() == []
        assert store.first_path() is None

    def test_json_that_is_broken_is_named(self, store: Store) -> None:
        store.put_json("good.json", {"a": [1, None]})
        assert store.get_json("good.json") == {"a": [1, None]}
        assert store.get_json("none.json") is None
        store.put("bad.json", b"{")
        with pytest.raises(PermanentError, match=r"bad\.json: expected JSON") as raised:
            store.get_json("bad.json")
        assert raised.value.reason is Reason.STORE_CORRUPT

    def test_an_array_is_read_back_whole_and_by_chunk(self, store: Store) -> None:
        values = np.arange(35, dtype="float32").reshape(5, 7)
        arrays.create_array(store, "influences", (5, 7), (2, 3), "float32", ("test", "train"))
        for i, j in np.ndindex(3, 3):
            arrays.write_chunk(store, "influences", (i, j), values[2 * i : 2 * i + 2, 3 * j : 3 * j + 3])
        again = pickle.loads(pickle.dumps(store))
        np.testing.assert_array_equal(arrays.read_array(again, "influences"), values)
        np.testing.assert_array_equal(arrays.read_chunk(again, "influences", (2, 2)), values[4:, 6:])
        again.close()

    def test_a_later_attempt_finds_what_the_ledger_of_an_earlier_one_holds(self, store: Store) -> None:
        first = ledger.Ledger(store, claim.claim(store, claim.Claim("uid", 1, "pod-1", "Resume")))
        row = ledger.Row("region", 7, "ab" * 16, "cd" * 16, "cpu")
        first.add([row])
        first.flush()
        epoch = claim.claim(store, claim.Claim("uid", 2, "pod-2", "Resume"))
        second = ledger.Ledger(store, epoch)
        second.load()
        assert epoch.resumes
        assert list(second.rows("region")) == [row]

    def test_overwriting_leaves_the_claims_and_nothing_else(self, store: Store) -> None:
        claim.claim(store, claim.Claim("uid-1", 1, "pod", "Resume"))
        arrays.update_attributes(store, {"spec": {}})
        store.put("influences/c/0/0", b"old")
        epoch = claim.claim(store, claim.Claim("uid-2", 1, "pod", "Overwrite"))
        claim.begin(store, epoch)
        assert [p for p in store.list() if not p.startswith("ledger/epoch-")] == ["ledger/deleted-before-3"]
        assert claim.inspect(store).attributes == {}

    def test_what_is_not_ours_is_refused_and_not_touched(self, store: Store) -> None:
        store.put("photos/holiday.jpg", b"precious")
        with pytest.raises(PermanentError, match="found 'photos") as raised:
            claim.claim(store, claim.Claim("uid", 1, "pod", "Overwrite"))
        assert raised.value.reason is Reason.STORE_EXISTS
        assert store.list() == ["photos/holiday.jpg"]
