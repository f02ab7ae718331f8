"""What users import from pyDVL's module of this name."""

from influence_calculator.torch.low_rank import LowRankProductRepresentation

__all__ = ["LowRankProductRepresentation"]
