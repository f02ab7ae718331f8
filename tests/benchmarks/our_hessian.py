"""Our side of solving with the Hessian: directly, and by conjugate gradients to a residual."""

from __future__ import annotations

import side
import workload
from distributed import Client
from numpy import ndarray
from torch.nn import functional as F

from influence_calculator import DaskInfluenceCalculator
from influence_calculator.torch import CgInfluence, DirectInfluence
from influence_calculator.torch.util import TorchNumpyConverter


def compute(client: Client, inputs: side.Inputs) -> ndarray:
    λ = inputs.workload.regularization
    unfitted: CgInfluence | DirectInfluence
    if inputs.method == "cg":
        unfitted = CgInfluence(inputs.model, F.cross_entropy, λ, rtol=0.0, atol=workload.FEW_RESIDUAL)
    else:
        unfitted = DirectInfluence(inputs.model, F.cross_entropy, λ)
    calculator = DaskInfluenceCalculator(unfitted.fit(inputs.loader), TorchNumpyConverter(), client)
    influences: ndarray = calculator.influences(*inputs.arrays).compute()
    return influences


if __name__ == "__main__":
    side.main("influence_calculator.torch", compute)
