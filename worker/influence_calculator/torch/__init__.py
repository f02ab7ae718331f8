"""Influence models for torch, under pyDVL's module paths."""

from influence_calculator.maths.checkpoints import Checkpoint
from influence_calculator.torch.gradient_products import GradDotInfluence, TracInInfluence
from influence_calculator.torch.influence_function_model import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
)
from influence_calculator.torch.preconditioner import JacobiPreconditioner, NystroemPreconditioner
from influence_calculator.torch.projected import TrakInfluence
from influence_calculator.torch.util import BlockMode, SecondOrderMode

__all__ = [
    "ArnoldiInfluence",
    "BlockMode",
    "CgInfluence",
    "Checkpoint",
    "DirectInfluence",
    "EkfacInfluence",
    "GradDotInfluence",
    "InverseHarmonicMeanInfluence",
    "JacobiPreconditioner",
    "LissaInfluence",
    "NystroemPreconditioner",
    "NystroemSketchInfluence",
    "SecondOrderMode",
    "TracInInfluence",
    "TrakInfluence",
]
