"""What is noted at the root of a store when a job ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence_calculator.maths.grad_dot import GradDot
from influence_calculator.maths.shapes import LayerShape, ModelShapes
from influence_job.driver import layout
from influence_job.errors import PermanentError, Reason
from influence_job.plan import Sizes, make_plan
from influence_job.storage.claim import Claim, claim, inspect
from influence_job.storage.ledger import Ledger, Row
from influence_job.storage.store import Store
from manifests import spec


def test_a_driver_that_was_fenced_notes_no_result(tmp_path: Path) -> None:
    """Within the second in which it need not look for others, and with one segment, which is not merged."""
    shapes = ModelShapes(
        parameters={"weight": (4,)},
        layers=(LayerShape("linear", inputs=4, outputs=1, tokens=1, bias=False),),
        itemsize=4,
        model_bytes=16,
        activation_bytes=4,
        example_bytes=16,
        outputs=1,
    )
    plan = make_plan(
        spec(chunks={"test": 2, "train": 2}, method={"name": "GradDot"}),
        GradDot(),
        Sizes(test=2, train=2, shapes=shapes, blocks={"": 4}),
    )
    store = Store.open(str(tmp_path / "x.zarr"))
    ledger = Ledger(store, claim(store, Claim("a", 1, "pod", "Resume")))
    ledger.add([Row("region", 0, "0" * 32, "", "cpu")])
    ledger.flush()
    claim(store, Claim("b", 1, "pod", "Resume"))
    with pytest.raises(PermanentError) as raised:
        layout.complete(store, ledger, plan)
    assert raised.value.reason is Reason.STORE_CLAIMED
    assert not inspect(store).finished
