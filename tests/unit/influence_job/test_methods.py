"""From the spec's method to the calculator's: every field arrives, and nothing else does."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from influence_calculator.maths.arnoldi import Arnoldi
from influence_calculator.maths.blocks import BlockMode, Relative
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.grad_dot import GradDot
from influence_calculator.maths.inverse_harmonic_mean import InverseHarmonicMean
from influence_calculator.maths.lissa import Lissa
from influence_calculator.maths.logra import Logra
from influence_calculator.maths.method import Method
from influence_calculator.maths.nystroem_sketch import NystroemSketch
from influence_calculator.maths.preconditioners import JacobiPreconditioner, NystroemPreconditioner
from influence_calculator.maths.tracin import TracIn
from influence_calculator.maths.trak import Trak
from influence_job.methods import build, method_of
from manifests import spec

BLOCKS = {"head": ["2.weight", "2.bias"]}
CASES: dict[str, tuple[dict[str, Any], Method]] = {
    "Direct as it comes": ({"name": "Direct", "regularization": 0.3}, Direct(0.3)),
    "Direct, every field": (
        {
            "name": "Direct",
            "regularization": 0.3,
            "relative": True,
            "blocks": "LayerWise",
            "secondOrder": "EmpiricalFisher",
        },
        Direct(Relative(0.3), BlockMode.LAYER_WISE, SecondOrderMode.EMPIRICAL_FISHER),
    ),
    "λ per block": (
        {
            "name": "Direct",
            "regularization": 0.3,
            "regularizationByBlock": {"head": 0.5},
            "blocks": "Custom",
            "customBlocks": BLOCKS,
        },
        Direct({"head": 0.5}, {"head": ("2.weight", "2.bias")}),
    ),
    "Cg as it comes": (
        {"name": "Cg", "regularization": 0.3},
        Cg(0.3, rtol=1e-4, atol=0.0, maxiter=None, simultaneous=True, preconditioner=None),
    ),
    "Cg, every field": (
        {
            "name": "Cg",
            "regularization": 0.3,
            "rtol": 1e-6,
            "atol": 1e-9,
            "maxiter": 7,
            "simultaneous": False,
            "preconditioner": {"name": "Nystroem", "rank": 5},
            "blocks": "ParameterWise",
            "secondOrder": "GeneralizedGaussNewton",
        },
        Cg(
            0.3,
            rtol=1e-6,
            atol=1e-9,
            maxiter=7,
            simultaneous=False,
            preconditioner=NystroemPreconditioner(5),
            blocks=BlockMode.PARAMETER_WISE,
            second_order=SecondOrderMode.GENERALIZED_GAUSS_NEWTON,
        ),
    ),
    "Cg with Jacobi": (
        {"name": "Cg", "regularization": 0.3, "preconditioner": {"name": "Jacobi", "samples": 4}},
        Cg(0.3, preconditioner=JacobiPreconditioner(4)),
    ),
    "Cg of all workers": (
        {"name": "Cg", "regularization": 0.3, "products": "Distributed"},
        Cg(0.3, solves_by_passes=True),
    ),
    "Arnoldi as it comes": (
        {"name": "Arnoldi", "regularization": 0.3},
        Arnoldi(0.3, rank=10, krylov_dimension=None, tol=1e-6, max_iter=None, complement=True, seed=0),
    ),
    "Arnoldi, every field": (
        {
            "name": "Arnoldi",
            "regularization": 0,
            "rank": 7,
            "krylovDimension": 30,
            "tol": 1e-4,
            "maxIter": 3,
            "complement": False,
            "seed": 9,
            "blocks": "LayerWise",
            "secondOrder": "EmpiricalFisher",
        },
        Arnoldi(0.0, 7, 30, 1e-4, 3, False, BlockMode.LAYER_WISE, SecondOrderMode.EMPIRICAL_FISHER, seed=9),
    ),
    "Nyström as it comes": (
        {"name": "NystroemSketch", "regularization": 0.3, "rank": 7},
        NystroemSketch(0.3, 7),
    ),
    "Nyström, every field": (
        {
            "name": "NystroemSketch",
            "regularization": 0.3,
            "relative": True,
            "rank": 7,
            "seed": 9,
            "blocks": "LayerWise",
            "secondOrder": "EmpiricalFisher",
        },
        NystroemSketch(Relative(0.3), 7, BlockMode.LAYER_WISE, SecondOrderMode.EMPIRICAL_FISHER, 9),
    ),
    "Lissa as it comes": (
        {"name": "Lissa", "regularization": 0.3},
        Lissa(0.3, maxiter=1000, dampen=0.0, scale=10.0, rtol=1e-4, atol=0.0, batch_size=None, seed=0),
    ),
    "Lissa, every field": (
        {
            "name": "Lissa",
            "regularization": 0.3,
            "rtol": 1e-6,
            "atol": 1e-9,
            "maxiter": 7,
            "scale": 2.5,
            "dampen": 0.1,
            "batchSize": 32,
            "seed": 9,
            "blocks": "LayerWise",
            "secondOrder": "EmpiricalFisher",
        },
        Lissa(
            0.3,
            maxiter=7,
            dampen=0.1,
            scale=2.5,
            rtol=1e-6,
            atol=1e-9,
            batch_size=32,
            seed=9,
            blocks=BlockMode.LAYER_WISE,
            second_order=SecondOrderMode.EMPIRICAL_FISHER,
        ),
    ),
    "InverseHarmonicMean as it comes": (
        {"name": "InverseHarmonicMean", "regularization": 0.3},
        InverseHarmonicMean(0.3),
    ),
    "InverseHarmonicMean, every field": (
        {
            "name": "InverseHarmonicMean",
            "regularization": 0.3,
            "relative": True,
            "blocks": "ParameterWise",
        },
        InverseHarmonicMean(Relative(0.3), BlockMode.PARAMETER_WISE),
    ),
    "GradDot": ({"name": "GradDot"}, GradDot()),
    "TracIn": ({"name": "TracIn"}, TracIn()),
    "Trak as it comes": ({"name": "Trak", "regularization": 0.3, "rank": 7}, Trak(0.3, 7)),
    "Trak, every field": ({"name": "Trak", "regularization": 0, "rank": 7, "seed": 9}, Trak(0.0, 7, 9)),
    "Logra as it comes": ({"name": "Logra", "regularization": 0.3, "rank": 7}, Logra(0.3, 7)),
    "Logra, every field": (
        {"name": "Logra", "regularization": 0.3, "relative": True, "rank": 7, "seed": 9},
        Logra(Relative(0.3), 7, 9),
    ),
    "Ekfac as it comes": (
        {"name": "Ekfac", "regularization": 0.3},
        Ekfac(0.3, update_diagonal=True, expectation="sampled", samples=1, seed=0, unsupported="refuse"),
    ),
    "Ekfac, every field": (
        {
            "name": "Ekfac",
            "regularization": 0.3,
            "updateDiagonal": False,
            "expectation": "Empirical",
            "samples": 3,
            "seed": 9,
            "unsupported": "Exclude",
        },
        Ekfac(0.3, update_diagonal=False, expectation="empirical", samples=3, seed=9, unsupported="exclude"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_method_is_built_with_the_values_of_the_spec(name: str) -> None:
    given, expected = CASES[name]
    assert build(spec(method=given).method) == expected


NOT_OF_THE_METHOD = {"in_eigenspace", "projected"}
"""Follows from the operation."""


@pytest.mark.parametrize(
    "kind", [Direct, Cg, Lissa, InverseHarmonicMean, Ekfac, Arnoldi, NystroemSketch, Trak, Logra]
)
def test_every_value_of_a_method_differs_somewhere_from_its_default(kind: type[Method]) -> None:
    """Else a field that the builder forgets would not be missed."""
    made = [expected for _, expected in CASES.values() if type(expected) is kind]
    for field in (field for field in fields(kind) if field.name not in NOT_OF_THE_METHOD):
        assert any(getattr(method, field.name) != field.default for method in made), field.name


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("expectation", ("Sampled", "Exact", "Empirical")),
        ("unsupported", ("Refuse", "Diagonal", "Exclude")),
    ],
)
def test_every_word_of_ekfac_is_one_of_the_calculators(field: str, words: tuple[str, ...]) -> None:
    for word in words:
        made = build(spec(method={"name": "Ekfac", "regularization": 0.1, field: word}).method)
        assert getattr(made, field) == word.lower()


@pytest.mark.parametrize(
    ("changes", "narrow"),
    [
        ({}, True),
        ({"operation": "SelfInfluence"}, True),
        ({"operation": "TrainingGradients"}, True),
        ({"operation": "InfluencesFromGradients", "gradients": {"url": "gradients.zarr"}}, True),
        ({"mode": "Perturbation"}, False),
        ({"operation": "InfluenceFactors"}, False),
        ({"operation": "InfluencesFromFactors", "factors": {"url": "factors.zarr"}}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("complement", [True, False])
def test_representations_are_narrow_where_nobody_needs_a_column_per_parameter(
    changes: dict[str, Any], narrow: bool, complement: bool
) -> None:
    given = {"name": "Arnoldi", "regularization": 0.3, "complement": complement}
    made = method_of(spec(method=given, **changes))
    assert isinstance(made, Arnoldi)
    assert made.in_eigenspace is (narrow and not complement)
    for name in ("Trak", "Logra"):
        made = method_of(spec(method={"name": name, "regularization": 0.3, "rank": 5}, **changes))
        assert isinstance(made, Trak | Logra)
        assert made.projected is narrow


def test_they_are_narrow_block_by_block_too() -> None:
    given = {"name": "Arnoldi", "regularization": 0.3, "complement": False, "blocks": "LayerWise"}
    made = method_of(spec(operation="InfluencesByBlock", method=given))
    assert isinstance(made, Arnoldi)
    assert made.in_eigenspace
