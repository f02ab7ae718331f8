"""Jobs with a model of Hugging Face, by the task that the documentation shows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xarray
from torch import Tensor, nn
from torch.nn import functional as F

import adapters_task
import language_models as lm
from influence_calculator import DirectInfluence, EkfacInfluence, SecondOrderMode
from influence_job.storage.arrays import OURS
from jobs import INFLUENCE, Jobs

DOCUMENT = Path(__file__).parents[2] / "docs" / "jobs.md"
TRAIN, TEST = 40, 6
ENCODER = r"encoder.*(query|key|value|dense)"
GAUSS_NEWTON = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
DIRECT = {"name": "Direct", "regularization": 0.05, "secondOrder": "GeneralizedGaussNewton"}
JOB: dict[str, Any] = {"task": {"entrypoint": "reviews:task"}, "chunks": {"test": 4, "train": 16}}


class _Wrapped(nn.Module):
    """The saved model for calculators that call `model(x)`: x is a dict."""

    net: nn.Module

    def __init__(self, folder: Path, parameters: str = "") -> None:
        super().__init__()
        self.net = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(re.search(parameters, name) is not None)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.net(**x).logits
        return logits


def _data(count: int, seed: int) -> tuple[Any, Tensor]:
    batch = lm.sentences(count, seed)
    return batch, batch.pop("labels")


@pytest.fixture
def saved(jobs: Jobs) -> Path:
    """A tiny BERT, its examples and the documented task, where the job looks for them."""
    folder = jobs.folder / "model"
    bert: Any = lm.bert().float()
    bert.save_pretrained(folder)
    for side, count, seed in (("train", TRAIN, 1), ("test", TEST, 2)):
        batch = lm.sentences(count, seed)
        rows = [{name: values[i].clone() for name, values in batch.items()} for i in range(count)]
        torch.save(rows, folder / f"{side}.pt")
    section = DOCUMENT.read_text().split("### Hugging Face models", 1)[1]
    [code, *_] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (jobs.folder / "reviews.py").write_text(code)
    return folder


def test_ekfac_and_a_full_gradient_method_give_the_librarys_influences(
    saved: Path, jobs: Jobs, tmp_path: Path
) -> None:
    """All parameters of BERT: embeddings, norms, attention and the classifier, by their own names."""
    ekfac = {"name": "Ekfac", "regularization": 0.05, "unsupported": "Diagonal"}
    models = {
        "Ekfac": EkfacInfluence(
            _Wrapped(saved), update_diagonal=True, regularization=0.05, unsupported="diagonal"
        ),
        "Direct": DirectInfluence(
            _Wrapped(saved),
            F.cross_entropy,
            0.05,
            second_order_mode=GAUSS_NEWTON,
        ),
    }
    for method in (ekfac, DIRECT):
        path = tmp_path / f"{method['name']}.zarr"
        changes = {**JOB, "method": method, "task": {**JOB["task"], "arguments": {"folder": str(saved)}}}
        jobs.finish(jobs.manifest(changes), output=path)
        model = models[str(method["name"])].fit([_data(TRAIN, 1)])
        expected = model.influences(*_data(TEST, 2), *_data(TRAIN, 1))
        found = xarray.open_zarr(path, consolidated=False)["influences"]
        error = np.linalg.norm(found - expected.numpy()) / np.linalg.norm(expected.numpy())
        assert error < 1e-3, method["name"]


def test_the_parts_of_its_tokens_are_the_librarys(saved: Path, jobs: Jobs, tmp_path: Path) -> None:
    arguments = {"folder": str(saved), "parameters": ENCODER}
    changes = {
        **JOB,
        "operation": "InfluencesByToken",
        "method": DIRECT,
        "task": {**JOB["task"], "arguments": arguments},
    }
    jobs.finish(jobs.manifest(changes), output=tmp_path / "parts.zarr")
    model = DirectInfluence(
        _Wrapped(saved, ENCODER),
        F.cross_entropy,
        0.05,
        second_order_mode=GAUSS_NEWTON,
    ).fit([_data(TRAIN, 1)])
    expected = model.influences_by_token(*_data(TEST, 2), *_data(TRAIN, 1)).numpy()
    found = xarray.open_zarr(tmp_path / "parts.zarr", consolidated=False)["influences"].values
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    words = lm.sentences(TRAIN, 1)["attention_mask"].bool().numpy()
    assert not found[:, ~words].any()
    assert found[:, words].any()


@pytest.mark.parametrize("excluded", [True, False], ids=["Ekfac", "Direct"])
def test_low_rank_adapters_in_a_frozen_model_give_the_librarys_influences(
    excluded: bool, jobs: Jobs, tmp_path: Path
) -> None:
    """The store names what contributes nothing: the frozen model, and for EK-FAC a norm."""
    method = {"name": "Ekfac", "regularization": 0.05, "unsupported": "Exclude"} if excluded else DIRECT
    path, net = tmp_path / "result.zarr", lm.Packed(adapters_task.model())
    changes = {"task": {"entrypoint": "adapters_task:task"}, "method": method, "chunks": JOB["chunks"]}
    jobs.finish(jobs.manifest(changes), output=path, workers=1)
    model = (
        EkfacInfluence(net, update_diagonal=True, regularization=0.05, unsupported="exclude")
        if excluded
        else DirectInfluence(net, F.cross_entropy, 0.05, second_order_mode=GAUSS_NEWTON)
    )
    test, train = (lm.packed(lm.sentences(*sizes)) for sizes in (adapters_task.TEST, adapters_task.TRAIN))
    expected = model.fit([train]).influences(*test, *train).numpy()
    opened = xarray.open_zarr(path, consolidated=False)
    assert np.linalg.norm(opened["influences"] - expected) < 1e-8 * np.linalg.norm(expected)
    every = dict(adapters_task.model().named_parameters())
    untracked = [name for name, value in every.items() if not value.requires_grad]
    assert opened.attrs[OURS]["provenance"]["leftOut"] == {
        "untracked": untracked,
        "excluded": [f"{adapters_task.NORM}.{name}" for name in ("weight", "bias")] if excluded else [],
    }
    run = subprocess.run([INFLUENCE, "show", str(path)], capture_output=True, text=True, check=True)
    shown = " ".join(run.stdout.split())
    assert f'not tracked: {len(untracked)} of the model\'s parameters ("{untracked[0]}", ' in shown
    names = f'("{adapters_task.NORM}.weight", "{adapters_task.NORM}.bias")'
    assert (f"left out by the method: 2 of the model's parameters {names}" in shown) == excluded
