"""pyDVL's side of solving with the Hessian, run in pyDVL's own virtual environment."""

from __future__ import annotations

import side
import workload
from distributed import Client
from numpy import ndarray
from pydvl.influence import DaskInfluenceCalculator  # type: ignore[import-not-found]  # not installed here
from pydvl.influence.torch import CgInfluence, DirectInfluence  # type: ignore[import-not-found]
from pydvl.influence.torch.util import TorchNumpyConverter  # type: ignore[import-not-found]
from torch.nn import functional as F


def compute(client: Client, inputs: side.Inputs) -> ndarray:
    λ = inputs.workload.regularization
    if inputs.method == "cg":
        # It ends where a residual's norm is below atol².
        unfitted = CgInfluence(
            inputs.model,
            F.cross_entropy,
            λ,
            rtol=0.0,
            atol=workload.FEW_RESIDUAL**0.5,
            solve_simultaneously=True,
        )
    else:
        unfitted = DirectInfluence(inputs.model, F.cross_entropy, λ)
    calculator = DaskInfluenceCalculator(unfitted.fit(inputs.loader), TorchNumpyConverter(), client)
    influences: ndarray = calculator.influences(*inputs.arrays).compute()
    return influences


if __name__ == "__main__":
    side.main("pydvl.influence.torch", compute)
