"""pyDVL's side: EK-FAC, run in pyDVL's own virtual environment."""

from __future__ import annotations

import side
from distributed import Client
from numpy import ndarray
from pydvl.influence import DaskInfluenceCalculator  # type: ignore[import-not-found]  # not installed here
from pydvl.influence.torch import EkfacInfluence  # type: ignore[import-not-found]
from pydvl.influence.torch.util import TorchNumpyConverter  # type: ignore[import-not-found]


def compute(client: Client, inputs: side.Inputs) -> ndarray:
    model = EkfacInfluence(
        inputs.model, update_diagonal=True, hessian_regularization=inputs.workload.regularization
    ).fit(inputs.loader)
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    influences: ndarray = calculator.influences(*inputs.arrays).compute()
    return influences


if __name__ == "__main__":
    side.main("pydvl.influence.torch", compute)
