"""Rows of factors and gradients are read only as what they were stored as."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from influence_job.errors import PermanentError, Reason
from influence_job.storage import arrays
from influence_job.storage.store import Store
from influence_job.worker.factors import read_rows

VALUES = np.arange(20, dtype=np.float32).reshape(4, 5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Four rows of five columns, in chunks of three by two."""
    made = Store.open(str(tmp_path / "x.zarr"))
    arrays.create_array(
        made, "gradients/0", (4, 5), (3, 2), "float32", ("train", "column_0"), {"block": "body"}
    )
    for i, j in arrays.array_info(made, "gradients/0").indices():
        arrays.write_chunk(made, "gradients/0", (i, j), VALUES[3 * i : 3 * i + 3, 2 * j : 2 * j + 2])
    return made


def session(widths: dict[str, int], maker: str = "") -> Any:
    """As far as rows are read by it."""
    layout, spec = SimpleNamespace(factor_widths=widths), SimpleNamespace(earlier_maker=maker)
    return SimpleNamespace(spec=spec, layout=layout, result_dtype=torch.float32)


def test_rows_are_read_across_chunks(store: Store) -> None:
    rows = read_rows(session({"body": 5}), store, "gradients/0", "body", 1, 4)
    np.testing.assert_array_equal(rows.numpy(), VALUES[1:4])


@pytest.mark.parametrize(
    ("block", "width"), [("body", 7), ("body", 3), ("head", 5)], ids=["wider", "narrower", "another block"]
)
def test_columns_of_another_block_or_number_are_refused(store: Store, block: str, width: int) -> None:
    """What they lack would be whatever lay in memory."""
    own = session({block: width}, "a TrainingGradients job")
    arrays.of_earlier_job(store, "spec.gradients.url")
    with pytest.raises(PermanentError) as caught:
        read_rows(own, store, "gradients/0", block, 0, 4)
    assert caught.value.reason is Reason.STORE_MISMATCH
    assert caught.value.message == (
        f"spec.gradients.url: {store.url}/gradients/0 holds 5 columns of block 'body', this job has {width} "
        f"of block '{block}'; take the store of a TrainingGradients job with the same task and method"
    )


def test_of_factors_and_of_its_own_rows_a_job_says_another_cure(store: Store) -> None:
    with pytest.raises(PermanentError, match=r"spec.output.url: .*; start anew with output.onExisting: Over"):
        read_rows(session({"body": 7}), store, "gradients/0", "body", 0, 4)
    arrays.of_earlier_job(store, "spec.factors.url")
    with pytest.raises(
        PermanentError, match=r"spec.factors.url: .*take the store of an InfluenceFactors job"
    ):
        read_rows(session({"body": 7}, "an InfluenceFactors job"), store, "gradients/0", "body", 0, 4)
