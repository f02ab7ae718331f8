"""Planned bytes against what a process measured: within 20 % and 200 MiB."""

from __future__ import annotations

import json

import pytest

import preloaded
from peak_memory import assert_planned


def _measured(*arguments: object) -> dict[str, int]:
    result: dict[str, int] = json.loads(preloaded.output("measured_memory:main", *arguments))
    return result


@pytest.mark.parametrize(
    ("method", "mode", "hidden", "examples", "micro_batch", "rows", "stage"),
    [
        ("direct", "empirical_fisher", 100, 64, 32, 16, "fit"),
        ("direct", "empirical_fisher", 100, 64, 32, 16, "factors"),
        ("direct", "hessian", 100, 256, 256, 16, "factors"),
        ("cg", "hessian", 900, 64, 32, 24, "factors"),
        ("cg", "empirical_fisher", 900, 128, 64, 24, "factors"),
        ("cg", "hessian", 900, 256, 128, 16, "capture"),
        ("cg of tokens", "hessian", 3000, 64, 64, 4, "factors"),
        ("cg of tokens", "generalized_gauss_newton", 3000, 64, 64, 4, "factors"),
        ("cg with jacobi", "hessian", 900, 64, 32, 8, "fit"),
        ("cg with nystroem", "generalized_gauss_newton", 900, 64, 32, 8, "fit"),
        ("cg with nystroem", "generalized_gauss_newton", 900, 64, 32, 8, "factors"),
        ("cg by passes", "hessian", 900, 64, 32, 24, "factors"),
        ("arnoldi", "hessian", 900, 64, 32, 24, "fit"),
        ("arnoldi", "empirical_fisher", 900, 128, 64, 24, "fit"),
        ("nystroem", "empirical_fisher", 900, 128, 64, 24, "fit"),
        ("lissa", "hessian", 900, 64, 32, 24, "factors"),
        ("lissa", "empirical_fisher", 900, 128, 64, 24, "factors"),
        ("lissa in parts", "generalized_gauss_newton", 900, 128, 32, 24, "factors"),
        ("inverse harmonic mean", "empirical_fisher", 2000, 64, 64, 32, "factors"),
        ("inverse harmonic mean", "empirical_fisher", 900, 16, 16, 48, "factors"),
        ("trak", "empirical_fisher", 900, 128, 64, 96, "factors"),
        # Gradients would be 415 MB.
        ("logra", "empirical_fisher", 900, 128, 128, 16, "capture"),
        ("logra of high rank", "empirical_fisher", 900, 128, 64, 16, "factors"),
        ("logra by parameter", "empirical_fisher", 2000, 64, 64, 64, "factors"),
        ("arnoldi", "hessian", 2000, 32, 32, 64, "factors"),
        ("arnoldi", "empirical_fisher", 2000, 64, 64, 16, "capture"),
        ("nystroem", "generalized_gauss_newton", 2000, 32, 32, 64, "factors"),
        ("nystroem", "generalized_gauss_newton", 2000, 64, 64, 16, "capture"),
        ("ekfac of tokens", "hessian", 2000, 128, 128, 32, "fit"),
        ("ekfac of tokens", "hessian", 2000, 128, 128, 32, "factors"),
        ("ekfac of tokens", "hessian", 2000, 128, 128, 32, "capture"),
        ("ekfac", "hessian", 2000, 64, 64, 16, "factors"),
        ("ekfac", "hessian", 2000, 128, 64, 32, "capture"),
        ("trak", "empirical_fisher", 2000, 128, 64, 32, "fit"),
        ("logra", "empirical_fisher", 2000, 128, 128, 32, "fit"),
        ("tracin", "hessian", 2000, 64, 32, 24, "factors"),
        ("tracin", "hessian", 2000, 64, 32, 24, "capture"),
        ("grad-dot", "hessian", 900, 128, 64, 96, "factors"),
    ],
)
def test_a_footprint_is_what_the_stage_takes(
    method: str, mode: str, hidden: int, examples: int, micro_batch: int, rows: int, stage: str
) -> None:
    seen = _measured(method, mode, hidden, examples, micro_batch, rows, stage, "cpu")
    assert_planned(seen["planned"], seen["seen"])
