"""The GPUs of one machine, one for each worker of `influence run`."""

from __future__ import annotations

import os

import pytest

from influence_job.dask_settings import VISIBLE_GPUS
from influence_job.local import local_cluster


@pytest.mark.parametrize(
    ("workers", "gpus", "seen"),
    [
        (2, ["4", "GPU-8932f937"], ["4", "GPU-8932f937"]),
        (3, ["0", "1"], ["0", "0", "1"]),
        (2, ["5"], ["5", "5"]),
        (2, [], [None, None]),
    ],
)
def test_each_worker_sees_one_gpu(
    workers: int, gpus: list[str], seen: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or all of them would compute on the first."""
    monkeypatch.delenv(VISIBLE_GPUS, raising=False)
    with local_cluster(workers, gpus) as connect, connect() as client:
        answers = client.run(os.getenv, VISIBLE_GPUS)
    assert sorted(answers.values(), key=str) == seen
    assert VISIBLE_GPUS not in os.environ
