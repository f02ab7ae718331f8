"""What a task says of its examples, as columns of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from influence_calculator.maths.objective import xy_objective
from influence_job.data import ArraySource
from influence_job.task import InfluenceTask
from influence_job.worker.annotations import annotate


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, np.uint16], ids=str)
def test_whole_numbers_and_truth_values_become_int64(dtype: Any) -> None:
    """In which -1 says that nothing is computed yet: a bool would read as False, and others have no -1."""
    x, y = torch.ones(3, 2), torch.tensor([0, 1, 1])
    column = y.to(dtype) if isinstance(dtype, torch.dtype) else y.numpy().astype(dtype)
    model = nn.Linear(2, 2).eval()
    loss = nn.CrossEntropyLoss()
    source = ArraySource(x, y)
    task = InfluenceTask(
        model, loss, train=source, test=source, annotate=lambda batch, outputs: {"kind": column}
    )
    found = annotate(task, xy_objective(model, loss), (x, y))["kind"]
    assert found.dtype == np.int64
    assert found.tolist() == [0, 1, 1]
