"""The store on files and in memory, and its errors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from influence_job.errors import PermanentError, Reason
from influence_job.storage.store import Store
from store_contract import StoreContract


class TestLocalFiles(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return Store.open(str(tmp_path / "new" / "x.zarr"))


class TestMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return Store.open(f"memory://{uuid.uuid4().hex}/x.zarr")


@pytest.mark.parametrize("way", ["put", "create"])
def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_write_returns(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses its power keeps what the ledger calls done."""
    done: list[str] = []

    def note(owner: Any, name: str, place: Callable[..., str | Path]) -> None:
        real = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            done.append(f"{name} {Path(place(*arguments)).relative_to(tmp_path)}")
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)

    note(os, "fsync", lambda descriptor: Path(f"/proc/self/fd/{descriptor}").readlink())
    note(Path, "mkdir", lambda folder: folder)
    note(Path, "replace", lambda _, target: target)
    note(os, "link", lambda _, target: target)
    getattr(Store.open(str(tmp_path / "x.zarr")), way)("a/b/0", b"data")
    assert done[:2] == ["mkdir x.zarr", "fsync ."]
    assert done[2:6] == ["mkdir x.zarr/a", "fsync x.zarr", "mkdir x.zarr/a/b", "fsync x.zarr/a"]
    file, *name = done[6:]
    assert file.startswith("fsync x.zarr/a/b/.influence-")
    assert name == [f"{'replace' if way == 'put' else 'link'} x.zarr/a/b/0", "fsync x.zarr/a/b"]


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/a/b.zarr", "/a/b.zarr"),
        ("file:///a/b%20c.zarr", "/a/b c.zarr"),
        ("b.zarr", "{cwd}/b.zarr"),
        ("~/b.zarr", "{home}/b.zarr"),
    ],
)
def test_local_urls_become_absolute_paths(
    url: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store.open(url).url == path.format(cwd=tmp_path, home=Path.home())


def test_a_home_of_nobody_is_refused() -> None:
    with pytest.raises(
        PermanentError, match=r"^output\.url: expected a path below a home that is there"
    ) as refused:
        Store.open("~nosuchuser/x.zarr")
    assert refused.value.reason is Reason.INVALID_SPEC


def test_opening_writes_nothing(tmp_path: Path) -> None:
    Store.open(str(tmp_path / "x.zarr"))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scheme_is_refused_naming_those_that_work() -> None:
    with pytest.raises(
        PermanentError, match=r"output\.url: expected a path or one of file, gs, s3, got 'ftp"
    ):
        Store.open("ftp://host/x.zarr")


def test_s3_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(PermanentError, match=r"install influence-operator\[s3\]"):
        Store.open("s3://bucket/x.zarr")


def test_s3_asks_once_and_leaves_retries_to_us() -> None:
    pytest.importorskip("s3fs", reason="s3:// is an extra")
    store = Store.open("s3://bucket/x.zarr", {"key": "k", "secret": "s"})
    filesystem = store._backend._filesystem  # type: ignore[attr-defined]
    assert filesystem.retries == 1
    assert filesystem.config_kwargs["retries"] == {"total_max_attempts": 1}
    store.close()


def test_a_file_where_the_store_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.zarr").write_text("a file")
    with pytest.raises(PermanentError, match=r"choose another output\.url") as raised:
        Store.open(str(tmp_path / "x.zarr")).probe()
    assert raised.value.reason is Reason.STORE_EXISTS
    assert (tmp_path / "x.zarr").read_text() == "a file"


def test_deleting_the_last_object_of_a_folder_removes_the_folder(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "x.zarr"))
    store.put("a/b/c", b".")
    store.delete("a/b/c")
    assert list((tmp_path / "x.zarr").iterdir()) == []


KILLED_BEFORE_THE_RENAME = """
import os, sys
from pathlib import Path
from influence_job.storage.store import Store
store = Store.open(sys.argv[1])
store.put("a/object", b"old")
Path.replace = lambda *_: os.kill(os.getpid(), 9)
os.link = lambda *_: os.kill(os.getpid(), 9)
if sys.argv[2] == "put":
    store.put("a/object", b"new and longer")
else:
    store.create("a/claim", b"never")
"""


@pytest.mark.parametrize("action", ["put", "create"])
def test_a_process_killed_while_writing_leaves_the_old_object_or_none(tmp_path: Path, action: str) -> None:
    url = str(tmp_path / "x.zarr")
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED_BEFORE_THE_RENAME), url, action])
    assert killed.returncode == -9
    assert len(list((tmp_path / "x.zarr" / "a").iterdir())) == 2, "the kill came before the write"
    store = Store.open(url)
    assert store.list() == ["a/object"]
    assert store.get("a/object") == b"old"
    assert store.create("a/claim", b"mine")


def test_create_works_on_file_systems_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    store = Store.open(str(tmp_path / "x.zarr"))
    assert store.create("claim", b"first")
    assert not store.create("claim", b"second")
    assert store.get("claim") == b"first"


def test_a_write_that_fails_leaves_no_passing_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(str(tmp_path / "x.zarr"))
    (tmp_path / "x.zarr" / "a" / "folder").mkdir(parents=True)
    with pytest.raises(PermanentError):
        store.put("a", b"cannot take a folder's name")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    for write in (store.put, store.create):
        with pytest.raises(PermanentError, match="free space"):
            write("b", b"too long")
    assert [path for path in (tmp_path / "x.zarr").rglob("*") if path.is_file()] == []
