"""Planned bytes against what torch allocates on a GPU: within 20 % and 200 MiB."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jobs import SUPPORT
from peak_memory import assert_planned


@pytest.mark.parametrize(
    ("method", "mode", "hidden", "examples", "micro_batch", "rows", "stage"),
    [
        ("direct", "empirical_fisher", 150, 512, 256, 64, "fit"),
        ("direct", "empirical_fisher", 150, 512, 256, 64, "factors"),
        ("cg", "hessian", 3000, 64, 32, 32, "factors"),
        ("cg", "generalized_gauss_newton", 3000, 128, 64, 32, "factors"),
        ("cg", "hessian", 3000, 128, 64, 16, "capture"),
        ("cg of tokens", "generalized_gauss_newton", 5000, 64, 64, 16, "factors"),
        ("cg with jacobi", "hessian", 3000, 64, 32, 8, "fit"),
        ("cg with nystroem", "generalized_gauss_newton", 3000, 64, 32, 8, "fit"),
        ("cg with nystroem", "generalized_gauss_newton", 3000, 64, 32, 8, "factors"),
        ("cg by passes", "hessian", 3000, 64, 32, 32, "factors"),
        ("arnoldi", "hessian", 3000, 64, 32, 32, "fit"),
        ("arnoldi", "empirical_fisher", 3000, 128, 64, 32, "fit"),
        ("nystroem", "empirical_fisher", 3000, 128, 64, 32, "fit"),
        ("lissa", "hessian", 3000, 64, 32, 32, "factors"),
        ("lissa in parts", "generalized_gauss_newton", 3000, 128, 32, 32, "factors"),
        ("inverse harmonic mean", "empirical_fisher", 3000, 128, 64, 32, "factors"),
        ("trak", "empirical_fisher", 3000, 128, 64, 64, "factors"),
        ("logra", "empirical_fisher", 3000, 1024, 1024, 16, "capture"),
        ("logra of high rank", "empirical_fisher", 3000, 128, 64, 16, "factors"),
        ("logra by parameter", "empirical_fisher", 3000, 128, 64, 64, "factors"),
        ("grad-dot", "hessian", 3000, 128, 64, 64, "factors"),
        ("grad-dot", "hessian", 3000, 128, 64, 64, "capture"),
        ("ekfac", "empirical_fisher", 3000, 256, 128, 32, "fit"),
        ("ekfac", "empirical_fisher", 3000, 256, 128, 32, "factors"),
        ("ekfac", "empirical_fisher", 3000, 256, 128, 32, "capture"),
    ],
)
def test_a_footprint_is_what_the_stage_takes(
    method: str, mode: str, hidden: int, examples: int, micro_batch: int, rows: int, stage: str
) -> None:
    arguments = map(str, (method, mode, hidden, examples, micro_batch, rows, stage, "cuda"))
    script = [sys.executable, str(SUPPORT / "measured_memory.py"), *arguments]
    run = subprocess.run(script, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert_planned(seen["planned"], seen["seen"])
