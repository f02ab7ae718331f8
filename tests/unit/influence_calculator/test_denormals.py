"""Denormal numbers while influences are computed."""

from __future__ import annotations

import torch

from influence_calculator.maths.denormals import denormals_flushed

DENORMAL = 1e-40


def _product() -> float:
    return float(torch.tensor(DENORMAL) * 1.0)


def test_denormals_are_zero_inside_and_numbers_again_outside() -> None:
    assert _product() != 0
    with denormals_flushed():
        assert _product() == 0
    assert _product() != 0


def test_a_thread_that_flushed_before_still_does_afterwards() -> None:
    torch.set_flush_denormal(True)
    try:
        with denormals_flushed():
            pass
        assert _product() == 0
    finally:
        torch.set_flush_denormal(False)


def test_an_exception_leaves_the_thread_as_it_was() -> None:
    try:
        with denormals_flushed():
            raise ValueError
    except ValueError:
        pass
    assert _product() != 0
