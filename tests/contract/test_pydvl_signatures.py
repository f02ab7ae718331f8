"""What users of pyDVL 0.10 call exists here under the same module path with the same arguments."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import influence_calculator
from influence_calculator import errors
from influence_calculator.maths import errors as maths_errors

HERE = Path(__file__).parent
PYDVL = json.loads((HERE / "pydvl_signatures.json").read_text())

FITTED_BY_THE_MODEL = "a preconditioner is a configuration here; fitting the influence model fits it"
DIFFERENCES = {
    ".torch.util torch_dataset_to_dask_array": (
        "resulting_dtype defaults to None, each entry's own dtype: pyDVL declares float32 whatever the "
        "chunks hold, and labels declared as floats fail in a loss that wants integers"
    ),
    ".torch.batch_operation PointAveraging.__init__": (
        "no batch_dim: results of a batch do not tell how many examples it has (their first dimension counts "
        "right-hand sides); the numbers are a second argument of the call"
    ),
    **{
        f"{module} {kind}.{member}": FITTED_BY_THE_MODEL
        for module in (".torch", ".torch.preconditioner")
        for kind in ("JacobiPreconditioner", "NystroemPreconditioner")
        for member in (
            "fit",
            "is_fitted",
            "modify_regularization_requires_fit",
            "regularization",
            "solve",
            "to",
        )
    },
    **{
        f"{module} NystroemPreconditioner.{member}": reason
        for module in (".torch", ".torch.preconditioner")
        for member, reason in (
            ("low_rank_approx", FITTED_BY_THE_MODEL),
            ("rank", "a field of the instance, not a property of the class"),
        )
    },
}
"""Module and name -> why it differs from pyDVL. Arguments added at the end, with defaults, do not count."""


RESHAPING = "reshaping inside of pyDVL's functions; theirs and ours take vectors and rows"
LEFT_OUT = {
    ".torch.influence_function_model TorchInfluenceFunctionModel": (
        "there, but made of a method, which a job can store; a user's model is a TorchComposableInfluence"
    ),
    ".torch.preconditioner Preconditioner": f"there, without fit and solve: {FITTED_BY_THE_MODEL}",
    ".torch.util EkfacRepresentation": "a fit is a state by pass and layer here, the same for every method",
    ".torch.util ModelInfoMixin": "its properties stand in the models' base",
    ".torch.util ModelParameterDictBuilder": "TorchComposableInfluence.parameter_dict has what it builds",
    ".torch.util TorchLinalgEighException": "torch's own error says as much",
    ".torch.util safe_torch_linalg_eigh": "as TorchLinalgEighException",
    ".torch.util empirical_cross_entropy_loss_fn": "the pseudo-gradient whose curvature was wrong",
    ".torch.util to_model_device": "`tensor.to(model.device)`",
    **{
        f".torch.util {name}": RESHAPING
        for name in ("align_structure", "align_with_model", "flatten_dimensions", "reshape_vector_to_tensors")
    },
}
"""Module and name -> why pyDVL's public name of a module that is mirrored here is not promised."""


def _script() -> Any:
    """The script that took pyDVL's signatures; it takes ours too."""
    spec = importlib.util.spec_from_file_location("snapshot_pydvl", HERE / "snapshot_pydvl.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Where `ours` cannot be called as `theirs`: "" for the thing itself, or ".member"."""
    found = []
    if "members" in theirs and not theirs["members"].items() <= ours["members"].items():
        found.append("")
    if "parameters" in theirs and not _callable_alike(theirs["parameters"], ours["parameters"]):
        found.append("")
    if not set(theirs.get("bases", ())) <= set(ours.get("bases", ())):
        found.append("")
    for name, member in theirs.get("public", {}).items():
        own = ours["public"].get(name)
        if member != own and not (isinstance(own, list) and _callable_alike(member, own)):
            found.append(f".{name}")
    return found


def _callable_alike(theirs: list[list[str]], ours: list[list[str]]) -> bool:
    added = ours[len(theirs) :]
    return ours[: len(theirs)] == theirs and all(default != "required" for _, _, default in added)


def test_the_snapshot_is_of_the_version_and_the_names_that_are_promised():
    assert PYDVL["version"] == "0.10.0"
    taken = {module: set(names) for module, names in PYDVL["modules"].items()}
    assert taken == {module: set(names) for module, names in _script().promised().items()}


def test_every_name_can_be_called_as_in_pydvl_but_for_the_differences_listed():
    ours = json.loads(json.dumps(_script().snapshot("influence_calculator")))
    found = {
        f"{module} {name}{place}"
        for module, names in PYDVL["modules"].items()
        for name, theirs in names.items()
        for place in _differences(theirs, ours[module][name])
    }
    assert found == set(DIFFERENCES)


def test_what_pydvl_defines_is_promised_or_left_out_for_a_reason():
    promised = _script().promised()
    assert PYDVL["defined"].keys() == promised.keys()
    left_out = {
        f"{module} {name}"
        for module, names in PYDVL["defined"].items()
        for name in set(names) - set(promised[module])
    }
    assert left_out == set(LEFT_OUT)


@pytest.mark.parametrize("module", _script().PROMISED)
def test_every_name_but_building_blocks_is_importable_from_the_package_itself(module: str):
    for name in _script().PROMISED[module]:
        there = getattr(importlib.import_module(f"influence_calculator{module}"), name)
        assert getattr(influence_calculator, name) is there
        assert name in influence_calculator.__all__


@pytest.mark.parametrize("module", [errors, maths_errors], ids=lambda module: module.__name__)
def test_everything_that_is_raised_by_name_can_be_caught_by_its_name_from_the_package(module: Any):
    defined = {name: kind for name, kind in vars(module).items() if isinstance(kind, type)}
    assert len(defined) >= 8
    for name, kind in defined.items():
        assert getattr(influence_calculator, name) is kind
        assert name in influence_calculator.__all__
        assert issubclass(kind, ValueError | UserWarning)


def test_a_changed_signature_would_be_seen():
    theirs = {"bases": [], "public": {"call": [["x", "POSITIONAL_OR_KEYWORD", "required"]]}}
    renamed = [["z", "POSITIONAL_OR_KEYWORD", "required"]]
    for changed in (renamed, [*theirs["public"]["call"], ["n", "KEYWORD_ONLY", "required"]]):
        assert _differences(theirs, {"bases": [], "public": {"call": changed}}) == [".call"]
    assert _differences(theirs, {"bases": [], "public": {}}) == [".call"]
