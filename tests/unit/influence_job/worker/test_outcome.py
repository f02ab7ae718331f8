"""What a task tells of an exception."""

from __future__ import annotations

import torch

from influence_job.errors import Reason
from influence_job.worker.outcome import Outcome


def test_a_gpu_that_is_full_is_told_with_the_field_that_says_how_large_it_is() -> None:
    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    outcome = Outcome()
    assert not outcome.attempt("region", 3, "training examples 0 to 9", work)
    failure = outcome.failure
    assert failure is not None
    assert (failure.kind, failure.index, failure.error) == ("region", 3, None)
    assert failure.reason is Reason.REGION_FAILED
    assert failure.message.startswith("training examples 0 to 9: OutOfMemoryError: CUDA out of memory.")
    assert "workers.deviceMemory" in failure.message
    assert "12 GiB by default" in failure.message
