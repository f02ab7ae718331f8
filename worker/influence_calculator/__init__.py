"""Which training examples made the model behave like this? Influence functions for torch models.

Influences are `z_test · g_train` with factors `z_test = (H + λI)^-1 g_test`, `[T, N]`. Positive: the
training example helps, removing it raises the test loss by about score / N. Neither negated nor divided
by N. In mode perturbation `∇x (z_test · g_train(x))`, `[T, N, F...]`.

Names, arguments and module paths are those of pyDVL 0.10's `pydvl.influence`: replacing that prefix of an
import suffices.
"""

from influence_calculator.array import (
    LazyChunkSequence,
    ListAggregator,
    NestedLazyChunkSequence,
    NestedListAggregator,
    NestedSequenceAggregator,
    NumpyConverter,
    SequenceAggregator,
)
from influence_calculator.base_influence_function_model import ComposableInfluence, InfluenceFunctionModel
from influence_calculator.errors import (
    InvalidDimensionChunksError,
    MisalignedChunksError,
    NotFittedException,
    NotImplementedLayerRepresentationException,
    OneShotIterableError,
    RandomOrderError,
    SolverWarning,
    ThreadSafetyViolationError,
    UnalignedChunksError,
    UnknownChunksError,
    UnsupportedInfluenceModeException,
)
from influence_calculator.influence_calculator import (
    DaskInfluenceCalculator,
    DisableClientSingleThreadCheck,
    SequentialInfluenceCalculator,
)
from influence_calculator.maths.blocks import Relative
from influence_calculator.maths.errors import (
    CalculatorError,
    CaptureMismatchError,
    NotFiniteError,
    SingularCurvatureError,
    TrainingModeError,
    UnsupportedInputError,
    UnsupportedLossError,
    UnsupportedModelError,
)
from influence_calculator.maths.method import Solved, SolverReport, SolverStatus
from influence_calculator.torch import (
    ArnoldiInfluence,
    BlockMode,
    CgInfluence,
    Checkpoint,
    DirectInfluence,
    EkfacInfluence,
    GradDotInfluence,
    InverseHarmonicMeanInfluence,
    JacobiPreconditioner,
    LissaInfluence,
    NystroemPreconditioner,
    NystroemSketchInfluence,
    SecondOrderMode,
    TracInInfluence,
    TrakInfluence,
)
from influence_calculator.torch.util import (
    NestedTorchCatAggregator,
    TorchCatAggregator,
    TorchNumpyConverter,
    torch_dataset_to_dask_array,
)
from influence_calculator.types import InfluenceMode
from influence_calculator.zarr_writer import write_zarr

__all__ = [
    "ArnoldiInfluence",
    "BlockMode",
    "CalculatorError",
    "CaptureMismatchError",
    "CgInfluence",
    "Checkpoint",
    "ComposableInfluence",
    "DaskInfluenceCalculator",
    "DirectInfluence",
    "DisableClientSingleThreadCheck",
    "EkfacInfluence",
    "GradDotInfluence",
    "InfluenceFunctionModel",
    "InfluenceMode",
    "InvalidDimensionChunksError",
    "InverseHarmonicMeanInfluence",
    "JacobiPreconditioner",
    "LazyChunkSequence",
    "LissaInfluence",
    "ListAggregator",
    "MisalignedChunksError",
    "NestedLazyChunkSequence",
    "NestedListAggregator",
    "NestedSequenceAggregator",
    "NestedTorchCatAggregator",
    "NotFiniteError",
    "NotFittedException",
    "NotImplementedLayerRepresentationException",
    "NumpyConverter",
    "NystroemPreconditioner",
    "NystroemSketchInfluence",
    "OneShotIterableError",
    "RandomOrderError",
    "Relative",
    "SecondOrderMode",
    "SequenceAggregator",
    "SequentialInfluenceCalculator",
    "SingularCurvatureError",
    "Solved",
    "SolverReport",
    "SolverStatus",
    "SolverWarning",
    "ThreadSafetyViolationError",
    "TorchCatAggregator",
    "TorchNumpyConverter",
    "TracInInfluence",
    "TrainingModeError",
    "TrakInfluence",
    "UnalignedChunksError",
    "UnknownChunksError",
    "UnsupportedInfluenceModeException",
    "UnsupportedInputError",
    "UnsupportedLossError",
    "UnsupportedModelError",
    "torch_dataset_to_dask_array",
    "write_zarr",
]
