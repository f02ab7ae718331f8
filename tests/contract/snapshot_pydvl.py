"""Writes `pydvl_signatures.json`: the signatures of pyDVL that this library promises to keep.

`make bench` runs it with the Python of pyDVL's own virtual environment; it is never this project's:

    .venv/bin/python tests/benchmarks/run.py --only signatures
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import sys
import warnings
from importlib.metadata import version

PROMISED = {
    "": [
        "DaskInfluenceCalculator",
        "SequentialInfluenceCalculator",
        "DisableClientSingleThreadCheck",
        "InfluenceMode",
    ],
    ".influence_calculator": [
        "DaskInfluenceCalculator",
        "SequentialInfluenceCalculator",
        "DisableClientSingleThreadCheck",
        "UnalignedChunksError",
        "InvalidDimensionChunksError",
        "ThreadSafetyViolationError",
    ],
    ".array": [
        "LazyChunkSequence",
        "NestedLazyChunkSequence",
        "SequenceAggregator",
        "NestedSequenceAggregator",
        "ListAggregator",
        "NestedListAggregator",
        "NumpyConverter",
    ],
    ".types": ["InfluenceMode", "UnsupportedInfluenceModeException"],
    ".base_influence_function_model": [
        "InfluenceFunctionModel",
        "ComposableInfluence",
        "NotFittedException",
        "NotImplementedLayerRepresentationException",
    ],
    ".torch": [
        "DirectInfluence",
        "CgInfluence",
        "EkfacInfluence",
        "ArnoldiInfluence",
        "NystroemSketchInfluence",
        "InverseHarmonicMeanInfluence",
        "LissaInfluence",
        "JacobiPreconditioner",
        "NystroemPreconditioner",
        "BlockMode",
        "SecondOrderMode",
    ],
    ".torch.influence_function_model": [
        "DirectInfluence",
        "CgInfluence",
        "EkfacInfluence",
        "ArnoldiInfluence",
        "NystroemSketchInfluence",
        "InverseHarmonicMeanInfluence",
        "LissaInfluence",
    ],
    ".torch.preconditioner": ["JacobiPreconditioner", "NystroemPreconditioner"],
    ".torch.util": [
        "TorchNumpyConverter",
        "TorchCatAggregator",
        "NestedTorchCatAggregator",
        "torch_dataset_to_dask_array",
        "BlockMode",
        "SecondOrderMode",
    ],
}
"""Module (after the package's own name) -> names that users import from there."""

BUILDING_BLOCKS = {
    ".types": [
        "Batch",
        "GradientProvider",
        "BilinearForm",
        "Operator",
        "OperatorGradientComposition",
        "BlockMapper",
    ],
    ".torch.base": [
        "TorchBatch",
        "TorchGradientProvider",
        "OperatorBilinearForm",
        "DictBilinearForm",
        "LowRankBilinearForm",
        "TensorOperator",
        "TensorDictOperator",
        "TorchOperatorGradientComposition",
        "TorchBlockMapper",
        "TorchComposableInfluence",
    ],
    ".torch.batch_operation": [
        "HessianBatchOperation",
        "GaussNewtonBatchOperation",
        "InverseHarmonicMeanBatchOperation",
        "ChunkAveraging",
        "PointAveraging",
    ],
    ".torch.operator": [
        "HessianOperator",
        "GaussNewtonOperator",
        "InverseHarmonicMeanOperator",
        "DirectSolveOperator",
        "LissaOperator",
        "LowRankOperator",
        "MatrixOperator",
        "CgOperator",
    ],
    ".torch.functional": [
        "LowRankProductRepresentation",
        "create_batch_hvp_function",
        "create_batch_loss_function",
        "create_empirical_loss_function",
        "create_hvp_function",
        "create_matrix_jacobian_product_function",
        "create_per_sample_gradient_function",
        "create_per_sample_loss_function",
        "create_per_sample_mixed_derivative_function",
        "gauss_newton",
        "hessian",
        "hvp",
        "model_hessian_nystroem_approximation",
        "operator_nystroem_approximation",
        "operator_spectral_approximation",
        "randomized_nystroem_approximation",
    ],
    ".torch.util": ["get_model_parameters"],
}
"""The same for what models are composed of: imported from these modules alone."""


def promised() -> dict[str, list[str]]:
    """Module -> all names that are promised there."""
    modules = {**PROMISED, **BUILDING_BLOCKS}
    return {module: [*PROMISED.get(module, ()), *BUILDING_BLOCKS.get(module, ())] for module in modules}


def described(thing: object) -> dict[str, object]:
    """A function's parameters, a class's public methods and properties, an enum's members."""
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):
        return {"members": {name: member.value for name, member in thing.__members__.items()}}
    if inspect.isclass(thing):
        return {"bases": _builtin_bases(thing), "public": _public(thing)}
    return {"parameters": parameters(thing)}


def parameters(function: object) -> list[list[str]]:
    """Name, kind and default of each parameter, without `self`."""
    found = inspect.signature(function).parameters.values()
    return [
        [parameter.name, parameter.kind.name, _default(parameter.default)]
        for parameter in found
        if parameter.name != "self"
    ]


def _default(value: object) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else repr(value)


def _public(kind: type) -> dict[str, object]:
    found: dict[str, object] = {}
    written = [base for base in kind.__mro__ if base.__module__ not in ("builtins", "typing")]
    for name in sorted({name for base in written for name in vars(base)}):
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        member = inspect.getattr_static(kind, name)
        if isinstance(member, property):
            found[name] = "property"
        elif callable(getattr(kind, name)):
            found[name] = parameters(getattr(kind, name))
    return found


def _builtin_bases(kind: type) -> list[str]:
    return [base.__name__ for base in kind.__mro__ if base.__module__ == "builtins" and base is not object]


def defined(package: str) -> dict[str, list[str]]:
    """Module -> public classes and functions that `package` defines there, promised or not."""
    found = {}
    for module in promised():
        here = importlib.import_module(package + module)
        found[module] = sorted(
            name
            for name, thing in vars(here).items()
            if not name.startswith("_")
            and (inspect.isclass(thing) or inspect.isfunction(thing))
            and thing.__module__ == here.__name__
        )
    return found


def snapshot(package: str) -> dict[str, dict[str, object]]:
    """The promised names as `package` has them."""
    return {
        module: {name: described(getattr(importlib.import_module(package + module), name)) for name in names}
        for module, names in promised().items()
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    taken = {
        "version": version("pydvl"),
        "modules": snapshot("pydvl.influence"),
        "defined": defined("pydvl.influence"),
    }
    json.dump(taken, sys.stdout, indent=1, sort_keys=True)
    print()
