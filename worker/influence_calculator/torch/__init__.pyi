from .gradient_products import Checkpoint, GradDotInfluence, TracInInfluence
from .influence_function_model import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
)
from .preconditioner import JacobiPreconditioner, NystroemPreconditioner
from .projected import LograInfluence, TrakInfluence
from .util import BlockMode, SecondOrderMode

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
    "LograInfluence",
    "NystroemPreconditioner",
    "NystroemSketchInfluence",
    "SecondOrderMode",
    "TracInInfluence",
    "TrakInfluence",
]
