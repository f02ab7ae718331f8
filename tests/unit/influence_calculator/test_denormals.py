"""Denormal numbers while influences are computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from influence_calculator import (
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InfluenceMode,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
)
from influence_calculator.maths.denormals import denormals_flushed
from influence_calculator.torch.blockwise import TorchBlockwiseInfluence
from model_cases import MLP

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_contexts_nest_whatever_the_default_dtype_is(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with denormals_flushed():
            with denormals_flushed():
                pass
            inside = float(torch.tensor(DENORMAL, dtype=torch.float32) * 1.0)
    finally:
        torch.set_default_dtype(before)
    assert inside == 0


def test_an_exception_leaves_the_thread_as_it_was() -> None:
    try:
        with denormals_flushed():
            raise ValueError
    except ValueError:
        pass
    assert _product() != 0


def test_the_threads_that_share_an_operation_do_as_the_one_that_calls() -> None:
    """They exist before: threads that start meanwhile would take it over from this one."""
    many = torch.full((2**20,), DENORMAL)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert (many * 1.0).count_nonzero() == len(many)
        with denormals_flushed():
            products = many * 1.0
        assert products.view(torch.int32).count_nonzero() == 0
        assert (many * 1.0).view(torch.int32).count_nonzero() == len(many)
    finally:
        torch.set_num_threads(before)


class Recording:
    """A loss that notes whether denormals were zero when it was called."""

    def __init__(self) -> None:
        self.flushed: set[bool] = set()

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.flushed.add(_product() == 0)
        return MLP.loss(outputs, y)


Model = TorchBlockwiseInfluence
MODELS: dict[str, Callable[[Recording], Model]] = {
    "direct": lambda loss: DirectInfluence(MLP.model(), loss, regularization=0.1),
    "cg": lambda loss: CgInfluence(MLP.model(), loss, regularization=0.1),
    "ekfac": lambda loss: EkfacInfluence(MLP.model(), True, 0.1, loss=loss),
    "lissa": lambda loss: LissaInfluence(MLP.model(), loss, regularization=0.1),
    "inverse harmonic mean": lambda loss: InverseHarmonicMeanInfluence(MLP.model(), loss, 0.1),
}
QUESTIONS: dict[str, Callable[[Model], object]] = {
    "factors": lambda model: model.influence_factors(*MLP.test()),
    "each other": lambda model: model.influences(*MLP.test()),
    "scores": lambda model: model.influences_from_factors(
        torch.ones(2, model.n_parameters, dtype=torch.float64), *MLP.train()
    ),
    "by block": lambda model: model.influences_by_block(*MLP.test(), *MLP.train()),
    "perturbations": lambda model: model.influences(
        *MLP.test(), *MLP.train(), mode=InfluenceMode.Perturbation
    ),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_model_flushes_denormals_while_it_differentiates_and_only_then(
    build: Callable[[Recording], Model],
) -> None:
    loss = Recording()
    model = build(loss).fit([MLP.train()])
    assert loss.flushed == {True}, "fit"
    for name, ask in QUESTIONS.items():
        loss.flushed.clear()
        ask(model)
        assert loss.flushed == {True}, name
        assert _product() != 0, name
