"""What README and docs show is what the code does: examples run, tables name what exists."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from influence_calculator import (
    BlockMode,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
    SolverStatus,
    TracInInfluence,
    torch_dataset_to_dask_array,
)
from influence_calculator.maths import errors as maths_errors
from influence_calculator.maths.ekfac import Unsupported
from influence_calculator.maths.expectation import Expectation
from influence_job import errors
from influence_job.driver.stages import Stages
from influence_job.exit_codes import ExitCode
from influence_job.job_file import load_job
from influence_job.plan import Plan
from influence_job.progress import Stage
from influence_job.spec import InfluenceJob, InfluenceJobSpec, Operation
from influence_job.task import InfluenceTask

ROOT = Path(__file__).parents[2]
README, JOBS, LIBRARY = ROOT / "README.md", ROOT / "docs/jobs.md", ROOT / "docs/library.md"
RESOURCE = ROOT / "docs/custom-resource.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(document: Path, language: str) -> list[str]:
    """The fenced blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)


def table(document: Path, first_column: str) -> list[list[str]]:
    """The rows, as cells, of the table whose first column has that heading; backticks are dropped."""
    _, _, after = document.read_text().partition(f"\n| {first_column} |")
    assert after, f"{document.name} has no table of {first_column}"
    rows = [line for line in after.partition("\n\n")[0].splitlines()[2:] if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split(" | ")] for row in rows]


def run(source: str, names: dict[str, Any]) -> None:
    """Runs an example in a namespace; what it uses must not be deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=DeprecationWarning, module="documented")
        exec(compile(source, "documented", "exec"), names)


@pytest.fixture
def client() -> Iterator[Client]:
    """Workers with one thread each, in this process."""
    with Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as connected:
        yield connected


@pytest.fixture
def names(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the documents take for granted: a small model and its data; the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double().eval()  # its Hessian is positive
    train_set, test_set = (
        TensorDataset(torch.randn(n, 4, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in (20, 6)
    )
    return {
        "__name__": "documented",
        "net": net,
        "loss": F.cross_entropy,
        "train_set": train_set,
        "test_set": test_set,
        "loader": DataLoader(train_set, batch_size=7),
        "client": client,
    }


def in_memory(names: dict[str, Any], model: Any) -> np.ndarray:
    """The influences of the whole training set on the whole test set."""
    return np.asarray(model.influences(*names["test_set"].tensors, *names["train_set"].tensors))


def test_every_python_example_is_one_that_is_run_here_or_by_a_job() -> None:
    """By a job: that of jobs.md, in `test_language_model_jobs`."""
    counted = {document.name: len(examples(document, "python")) for document in DOCUMENTS}
    assert {name: count for name, count in counted.items() if count} == {
        "README.md": 2,
        "jobs.md": 1,
        "library.md": 11,
    }


def test_the_readmes_library_example_gives_the_models_influences(names: dict[str, Any]) -> None:
    _, example = examples(README, "python")
    names["x_test"], names["y_test"] = torch_dataset_to_dask_array(names["test_set"], chunk_size=4)
    names["x_train"], names["y_train"] = torch_dataset_to_dask_array(names["train_set"], chunk_size=8)
    run(example, names)
    expected = in_memory(names, names["model"])
    assert np.allclose(zarr.open_array("scores.zarr", mode="r")[:], expected, rtol=1e-6)


def test_the_readmes_job_example_is_a_task_that_its_manifest_calls(names: dict[str, Any]) -> None:
    module, _ = examples(README, "python")
    (manifest,) = examples(README, "yaml")
    asked = load_job(manifest, "README.md").spec.task
    assert asked.entrypoint == "my_job:task"
    assert module.startswith("# my_job.py\n")
    models = {"model.pt": names["net"]}
    names |= {
        "load_model": models.__getitem__,
        "cross_entropy": F.cross_entropy,
        "training_set": names["train_set"],
        "questions": names["test_set"],
    }
    run(module, names)
    task = names["task"](**asked.arguments)
    assert isinstance(task, InfluenceTask)
    assert task.model is names["net"]
    assert (len(task.train), len(task.test)) == (20, 6)
    batch = task.train.read(3, 7)
    assert task.loss(task.model(batch[0]), batch).shape == ()


def test_the_library_pages_examples_run_one_after_the_other(names: dict[str, Any]) -> None:
    cluster, factors, on_workers, sequential, itself, reports, ekfac, spectral, lissa, products, blocks = (
        examples(LIBRARY, "python")
    )
    run(cluster, names)
    expected = in_memory(names, names["model"])
    assert np.allclose(names["stored"][:], expected, rtol=1e-6)

    run(factors, names)
    assert np.allclose(names["influences"].compute(), expected, rtol=1e-6)

    run(on_workers, names)
    alone = EkfacInfluence(names["net"], True, 0.01).fit(names["loader"])
    assert np.allclose(names["influences_of_ekfac"].compute(), in_memory(names, alone), rtol=1e-6)

    run(sequential, names)
    assert np.allclose(names["influences"], expected, rtol=1e-6)
    assert np.allclose(zarr.open_array("sequential.zarr", mode="r")[:], expected, rtol=1e-6)

    run(itself, names)
    training = names["train_set"].tensors
    assert np.allclose(names["on_themselves"], names["model"].influences(*training, *training).diag())

    run(reports, names)
    assert isinstance(names["model"], CgInfluence)
    assert names["rows"].dtype.names == ("status", "iterations", "residual")
    assert names["rows"]["status"].tolist() == names["solved"].report.status.tolist() == [0] * 6

    run(ekfac, names)
    assert isinstance(names["model"], EkfacInfluence)
    assert np.isfinite(in_memory(names, names["model"])).all()

    run(spectral, names)
    assert isinstance(names["model"], NystroemSketchInfluence)
    assert np.isfinite(in_memory(names, names["model"])).all()

    run(lissa, names)
    assert isinstance(names["model"], LissaInfluence)
    assert np.isfinite(in_memory(names, names["model"])).all()

    for name in ("epoch-1.pt", "epoch-2.pt"):
        torch.save(names["net"].state_dict(), name)
    run(products, names)
    assert isinstance(names["model"], TracInInfluence)
    assert np.isfinite(in_memory(names, names["model"])).all()

    run(blocks, names)
    direct = DirectInfluence(names["net"], names["loss"], 0.01, BlockMode.PARAMETER_WISE)
    expected = in_memory(names, direct.fit(names["train_loader"]))
    assert np.allclose(in_memory(names, names["model"]), expected, rtol=1e-4, atol=1e-8)


def manifests() -> list[Any]:
    """Every YAML example, named by its document."""
    return [
        pytest.param(text, id=f"{document.name}-{number}")
        for document in DOCUMENTS
        for number, text in enumerate(examples(document, "yaml"))
    ]


@pytest.mark.parametrize("manifest", manifests())
def test_every_yaml_example_is_a_job(manifest: str) -> None:
    assert isinstance(load_job(manifest, "example"), InfluenceJob)


def test_the_table_of_reasons_says_what_the_code_says() -> None:
    tree = ast.parse(inspect.getsource(errors.Reason))
    body = tree.body[0].body[1:]  # type: ignore[attr-defined]
    written = [
        [name.value.value, " ".join(text.value.value.split())]
        for name, text in zip(body[::2], body[1::2], strict=True)
    ]
    assert [name for name, _ in written] == [str(reason) for reason in errors.Reason]
    shown = [[name, text] for name, text in table(JOBS, "reason")]
    assert shown == [[name, text.replace("`", "")] for name, text in written]


def test_the_table_of_stages_has_the_order_in_which_each_operation_runs_them() -> None:
    """All but Preflight and Loading, which come before, and Verifying, with which all end."""
    steps = {
        "fit": Stage.FITTING,
        "gradients": Stage.GRADIENTS,
        "factors": Stage.FACTORS,
        "scores": Stage.SCORES,
        "self_influences": Stage.SCORES,
        "verify": Stage.VERIFYING,
    }
    shown = {name: stages.split(" → ") for name, stages in table(JOBS, "operation")}
    assert set(shown) == set(Operation)
    for operation in Operation:
        stages: Any = object.__new__(Stages)
        stages.spec, stages.plan = (
            SimpleNamespace(operation=operation),
            Plan.model_construct(operation=operation),
        )
        entered: list[Stage] = []
        for name, stage in steps.items():
            setattr(stages, name, partial(entered.append, stage))
        stages.run()
        assert entered == [*shown[operation], Stage.VERIFYING]


def test_the_table_of_deadlines_has_each_with_its_default() -> None:
    shown = {name: default for name, default, *_ in table(RESOURCE, "deadline")}
    fields = {field.alias: field.default for field in InfluenceJobSpec.model_fields.values()}
    assert shown == {
        name: "none" if default is None else str(default)
        for name, default in fields.items()
        if name is not None and name.endswith("DeadlineSeconds")
    }


def test_the_table_of_exit_codes_has_each_once() -> None:
    shown = [int(code) for code, _ in table(README, "exit code")]
    assert sorted(shown) == sorted(int(code) for code in ExitCode)


def test_the_table_of_solver_statuses_has_each_with_its_value() -> None:
    shown = [(name, int(value)) for name, value, _ in table(LIBRARY, "`SolverStatus`")]
    assert shown == [(status.name, status.value) for status in SolverStatus]


def test_the_table_of_errors_has_each_of_the_maths_with_its_own_name() -> None:
    shown = {name for name, _ in table(LIBRARY, "error")}
    kinds = {name for name, kind in vars(maths_errors).items() if isinstance(kind, type)}
    assert shown == kinds - {"CalculatorError"}


def test_the_table_of_ekfac_options_names_every_value() -> None:
    options = dict(table(LIBRARY, "option"))
    taken = inspect.signature(EkfacInfluence).parameters
    assert set(options) == {"expectation", "samples", "seed", "unsupported"} <= set(taken)
    for name, values in (("expectation", Expectation), ("unsupported", Unsupported)):
        assert f"{taken[name].default} (default)" in options[name]
        assert all(re.search(rf"\b{value}\b", options[name]) for value in values)


def test_the_table_of_modules_names_modules_that_exist() -> None:
    for theirs, ours in table(LIBRARY, "pyDVL"):
        assert ours == theirs.replace("pydvl.influence", "influence_calculator", 1)
        whole, *others = ours.split(", ")
        for module in (whole, *(f"influence_calculator{other}" for other in others)):
            importlib.import_module(module)


def test_every_link_to_a_file_leads_to_one() -> None:
    broken = [
        f"{document.name}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert broken == []


def test_every_constraint_is_one_exact_version() -> None:
    """No addresses, no options, no duplicates, in one order: any package index will do."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)] == []
    assert lines == sorted(lines, key=str.lower)
    names = [re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines]
    assert len(set(names)) == len(names)
