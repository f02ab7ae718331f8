"""A symmetric matrix by some of its eigenpairs, as a building block.

Shapes: P parameters, r eigenpairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LowRankProductRepresentation:
    """`V D Vᵀ`.

    Raises:
        ValueError: shapes that do not fit, or tensors on two devices.
    """

    eigen_vals: Tensor
    """Diagonal of D, `[r]`."""
    projections: Tensor
    """V, `[P, r]`, orthonormal columns."""

    def __post_init__(self) -> None:
        if self.eigen_vals.device != self.projections.device:
            raise ValueError(
                f"eigen_vals: expected the device of projections, {self.projections.device}, got "
                f"{self.eigen_vals.device}; move one of them"
            )
        if self.projections.ndim != 2 or tuple(self.eigen_vals.shape) != tuple(self.projections.shape[1:]):
            raise ValueError(
                f"projections: expected [P, r] with one column for each of the eigenvalues "
                f"{list(self.eigen_vals.shape)}, got {list(self.projections.shape)}; eigenvectors are columns"
            )

    @property
    def device(self) -> torch.device:
        """Where both tensors are."""
        return self.projections.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the eigenvectors."""
        return self.projections.dtype

    def to(self, device: torch.device | str) -> LowRankProductRepresentation:
        """The representation on a device."""
        return LowRankProductRepresentation(self.eigen_vals.to(device), self.projections.to(device))
