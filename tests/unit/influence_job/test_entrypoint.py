"""Where an entry point's code is looked for, and what stands for it in the fingerprint."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import traced_task
from influence_job import entrypoint
from influence_job.data import ArraySource
from influence_job.errors import PermanentError, Reason

TASK = "def task():\n    return None\n"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The image's code and the ConfigMap's mount, as the kubelet makes it: links into a dated folder."""
    image, mount = tmp_path / "image", tmp_path / "mount"
    dated = mount / "..2026"
    image.mkdir()
    dated.mkdir(parents=True)
    return image, mount


def mounted(mount: Path, source: str) -> None:
    (mount / "..2026/probe_task.py").write_text(source)
    (mount / "probe_task.py").symlink_to("..2026/probe_task.py")


def digest(image: Path, mount: Path, folder: Path) -> str:
    """The digest that a process finds which was started in `folder`."""
    code = (
        "from influence_job import entrypoint; "
        f"entrypoint.SOURCE_DIRECTORY = {str(mount)!r}; "
        "print(entrypoint.source_digest('probe_task:task'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(image), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_digest_is_the_files_wherever_it_comes_from(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A job that moves its task from the image into a ConfigMap resumes."""
    image, mount = folders
    (image / "probe_task.py").write_text(TASK)
    from_image = digest(image, tmp_path / "nothing", image)
    (image / "probe_task.py").unlink()
    mounted(mount, TASK)
    assert digest(image, mount, tmp_path) == from_image


def test_a_config_maps_code_replaces_the_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    image, mount = folders
    (image / "probe_task.py").write_text(TASK)
    from_image = digest(image, tmp_path / "nothing", image)
    mounted(mount, f"{TASK}# another\n")
    assert digest(image, mount, image) != from_image


def test_without_a_config_map_nothing_is_added_to_the_path() -> None:
    before = list(sys.path)
    entrypoint.find("influence_job.examples.digits:task")
    assert sys.path == before


def test_what_the_scheduler_unpickles_needs_the_standard_library_alone() -> None:
    unwanted = "{'torch', 'pydantic', 'numpy'}"
    code = f"import sys, influence_job.worker.parcel; print(sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_side_without_examples_is_refused_when_somebody_asks_for_them(side: str) -> None:
    """Not every operation reads both."""
    task = traced_task.task()
    given = replace(task, **{side: ArraySource(*getattr(task, side).read(0, 0))})
    checked = entrypoint.check_task(given, "traced_task:task")
    other = "test" if side == "train" else "train"
    assert getattr(checked, other) is getattr(task, other)
    for ask in (len, lambda source: source.read(0, 1)):
        with pytest.raises(
            PermanentError, match=f"^{side}: expected examples, got an empty data set"
        ) as refused:
            ask(getattr(checked, side))
        assert refused.value.reason is Reason.INVALID_DATA


def test_a_model_on_the_meta_device_is_refused_with_the_cure() -> None:
    """As large ones are built before their weights are loaded."""
    task = replace(traced_task.task(), model=nn.Linear(2, 3, device="meta"))
    with pytest.raises(
        PermanentError, match=r"InfluenceTask\.model: weight, bias: .*load_state_dict"
    ) as refused:
        entrypoint.check_task(task, "traced_task:task")
    assert refused.value.reason is Reason.INVALID_TASK
