"""Preconditioners of `CgInfluence`, under pyDVL's module path. Each is a configuration: `fit` of the
influence model fits it too.
"""

from influence_calculator.maths.preconditioners import (
    JacobiPreconditioner,
    NystroemPreconditioner,
    Preconditioner,
)

__all__ = ["JacobiPreconditioner", "NystroemPreconditioner", "Preconditioner"]
