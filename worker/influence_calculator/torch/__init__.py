"""Influence models for torch, under pyDVL's module paths."""

from influence_calculator.torch.influence_function_model import (
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
)
from influence_calculator.torch.preconditioner import JacobiPreconditioner, NystroemPreconditioner
from influence_calculator.torch.util import BlockMode, SecondOrderMode

__all__ = [
    "BlockMode",
    "CgInfluence",
    "DirectInfluence",
    "EkfacInfluence",
    "InverseHarmonicMeanInfluence",
    "JacobiPreconditioner",
    "LissaInfluence",
    "NystroemPreconditioner",
    "SecondOrderMode",
]
