"""What a driver says of solves that did not converge."""

from __future__ import annotations

import pytest

from influence_job.driver.stages import unsolved
from manifests import spec

BEGINNING = "some examples were not solved to tolerance: "
STATUS = "see solver_status in the store, raise "


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"CONVERGED": 3, "MAX_ITERATIONS": 0}, None),
        (
            {"CONVERGED": 3, "MAX_ITERATIONS": 2, "INDEFINITE": 1},
            f"{BEGINNING}2 max_iterations, 1 indefinite; {STATUS}maxiter, rtol or regularization",
        ),
        ({"NOT_FINITE": 2}, f"{BEGINNING}2 not_finite; {STATUS}maxiter or regularization"),
    ],
)
@pytest.mark.parametrize("name", ["Cg", "Lissa"])
def test_the_tolerance_is_named_where_steps_ran_out(
    name: str, counts: dict[str, int], said: str | None
) -> None:
    """Rounding may keep a residual above it, however many steps are allowed."""
    assert unsolved(counts, spec(method={"name": name, "regularization": 0.1}).method) == said


def test_methods_without_a_tolerance_have_none_to_raise() -> None:
    said = unsolved({"MAX_ITERATIONS": 1}, spec(method={"name": "Direct", "regularization": 0.1}).method)
    assert said == f"{BEGINNING}1 max_iterations; {STATUS}maxiter or regularization"
