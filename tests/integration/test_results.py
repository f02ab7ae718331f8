"""What a finished store holds: the right numbers under the right names, readable by xarray, checksummed."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr
from torch.func import functional_call, grad, hessian, vmap

import stored
import traced_task
from influence_calculator import (
    BlockMode,
    GradDotInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    LograInfluence,
    Relative,
    SecondOrderMode,
    TrakInfluence,
)
from jobs import Barrier, Jobs, times_written

LAMBDA = 0.05
SMALL = {"task": {"arguments": {"train": 96, "test": 8}}, "chunks": {"test": 4, "train": 16}}


def test_a_good_run_says_nothing_but_its_stages(undisturbed: Any) -> None:
    """No log of Dask, no warning of a library."""
    lines = undisturbed.run.stderr.splitlines()
    stages = "Preflight|Loading|Fitting|Factors|Scores|Verifying"
    assert [line for line in lines if not re.match(rf"({stages}): ", line)] == []


def test_xarray_reads_influences_by_test_and_train(undisturbed: Any) -> None:
    """With the task's annotations as coordinates."""
    opened = xarray.open_zarr(undisturbed.path)
    assert opened["influences"].dims == ("test", "train")
    assert opened["influences"].shape == (traced_task.TEST, traced_task.TRAIN)
    assert opened["influences"].dtype == np.float32
    assert np.isfinite(opened["influences"].values).all()
    task = traced_task.task()
    for side, source in (("test", task.test), ("train", task.train)):
        labels = source.read(0, len(source))[1]
        assert opened[f"{side}_label"].dims == (side,)
        np.testing.assert_array_equal(opened[f"{side}_label"].values, labels.numpy())
        assert np.isfinite(opened[f"{side}_confidence"].values).all()


def test_what_is_not_computed_yet_reads_as_nan(half_done: Any) -> None:
    """A half finished store opens like a finished one, and no missing score looks like a number."""
    found = xarray.open_zarr(half_done.path)["influences"].values
    plan, store = stored.plan_of(stored.open_store(half_done.path)), stored.open_store(half_done.path)
    written = times_written(half_done.run, half_done.run.folder.parent / "result.zarr")
    held = {index for kind, index in stored.held(store) if kind == "region"}
    missing = 0
    for index in range(plan.regions):
        group, chunk = plan.unravel(index)
        block = found[slice(*plan.group_range(group)), slice(*plan.train_range(chunk))]
        if index in held:
            assert np.isfinite(block).all()
        elif f"influences/c/{group}/{chunk}" not in written:
            assert np.isnan(block).all()
            missing += 1
    assert held
    assert missing


def test_a_region_with_one_flipped_byte_cannot_be_read(finished_copy: Path) -> None:
    """Whichever byte it is: every one of the object is tried, data and checksum."""
    region = finished_copy / "influences" / "c" / "0" / "3"
    whole = region.read_bytes()
    assert len(whole) == traced_task.TEST * 32 * 4 + 4
    scores = xarray.open_zarr(finished_copy, chunks=None)["influences"]
    direct = zarr.open_array(finished_copy / "influences", mode="r")
    survived = []
    for place in range(len(whole)):
        region.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        for read in (lambda: scores[:, 96:128].values, lambda: direct[:, 96:128]):
            try:
                read()
            except ValueError as error:
                assert "checksum" in str(error).lower()  # noqa: PT017
            else:
                survived.append(place)
    assert survived == []
    region.write_bytes(whole)
    assert np.isfinite(scores[:, 96:128].values).all()


def test_a_region_that_is_cut_short_cannot_be_read(finished_copy: Path) -> None:
    """As after a crash of a file system that had not written all."""
    region = finished_copy / "influences" / "c" / "0" / "3"
    region.write_bytes(region.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"(?i)checksum|size|reshape|buffer"):
        zarr.open_array(finished_copy / "influences", mode="r")[:, 96:128]


def test_regions_that_rot_before_they_are_verified_are_computed_again(
    jobs: Jobs, tmp_path: Path, undisturbed: Any
) -> None:
    """`verify: All` reads every region back, computes those that differ again, and says so."""
    path = tmp_path / "result.zarr"
    barrier = Barrier("enter", "before", "Verifying")
    run = jobs.start(jobs.manifest({"output": {"verify": "All"}}), "--json", output=path, barrier=barrier)
    run.wait_for_barrier()
    flipped, lost = (path / "influences" / "c" / "0" / chunk for chunk in ("3", "11"))
    stored.rot(flipped, lost)
    run.open_barrier()
    assert run.wait().code == 0, run.stderr
    written = {n: times for n, times in times_written(run, path).items() if n.startswith("influences/c/")}
    assert {name for name, times in written.items() if times > 1} == {"influences/c/0/3", "influences/c/0/11"}
    assert any("2 regions" in warning for warning in json.loads(run.stdout)["warnings"])
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []


def test_the_last_document_tells_shape_bytes_and_digest(undisturbed: Any) -> None:
    """`--json` prints it, for scripts."""
    document = json.loads(undisturbed.run.stdout)
    result = document["result"]
    assert document["finished"] is True
    assert result["shape"] == [traced_task.TEST, traced_task.TRAIN]
    assert result["bytes"] == traced_task.TEST * traced_task.TRAIN * 4
    assert result["url"] == str(undisturbed.path)
    assert re.fullmatch("[0-9a-f]{32}", result["digest"])
    assert [stage["name"] for stage in document["stages"]] == [
        *("Preflight", "Loading", "Fitting", "Factors", "Scores", "Verifying")
    ]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "Direct", "regularization": LAMBDA, "secondOrder": "GeneralizedGaussNewton"},
        {
            "name": "Cg",
            "regularization": LAMBDA,
            "secondOrder": "GeneralizedGaussNewton",
            "rtol": 1e-6,
        },
        {
            "name": "Lissa",
            "regularization": LAMBDA,
            "secondOrder": "GeneralizedGaussNewton",
            "rtol": 3e-6,
            "scale": 3,
        },
    ],
    ids=["Direct", "Cg", "Lissa"],
)
def test_scores_are_those_of_the_definition(method: dict[str, Any], jobs: Jobs, tmp_path: Path) -> None:
    """`g_test · (H + λI)^-1 · g_train` with signs, scale and order, against an explicit H in float64."""
    path = tmp_path / "result.zarr"
    jobs.finish(jobs.manifest({**SMALL, "method": method}), output=path)
    oracle = Oracle.of_small_task()
    found = xarray.open_zarr(path)["influences"].values
    np.testing.assert_allclose(found, oracle.influences(), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("method", "model"),
    [
        (
            {
                "name": "Lissa",
                "regularization": LAMBDA,
                "secondOrder": "GeneralizedGaussNewton",
                "maxiter": 30,
                "batchSize": 10,
                "seed": 3,
            },
            lambda net, loss: LissaInfluence(
                net,
                loss,
                LAMBDA,
                maxiter=30,
                second_order_mode=SecondOrderMode.GENERALIZED_GAUSS_NEWTON,
                batch_size=10,
                seed=3,
                warn_on_max_iteration=False,
            ),
        ),
        (
            {
                "name": "InverseHarmonicMean",
                "regularization": 0.1,
                "relative": True,
                "blocks": "LayerWise",
            },
            lambda net, loss: InverseHarmonicMeanInfluence(net, loss, Relative(0.1), BlockMode.LAYER_WISE),
        ),
        ({"name": "GradDot", "regularization": None}, GradDotInfluence),
        (
            {"name": "Trak", "regularization": 0.05, "rank": 20, "seed": 3},
            lambda net, loss: TrakInfluence(net, loss, 0.05, 20, 3),
        ),
        (
            {"name": "Logra", "regularization": 0.1, "relative": True, "rank": 4, "seed": 3},
            lambda net, loss: LograInfluence(net, loss, Relative(0.1), 4, 3),
        ),
    ],
    ids=["Lissa in parts", "InverseHarmonicMean", "GradDot", "Trak", "Logra"],
)
def test_scores_are_those_of_the_library(
    method: dict[str, Any], model: Any, jobs: Jobs, tmp_path: Path
) -> None:
    """Whatever chunks the job reads its training data in."""
    path = tmp_path / "result.zarr"
    jobs.finish(jobs.manifest({**SMALL, "method": method}), output=path)
    task = traced_task.task(train=96, test=8)
    train, test = task.train.read(0, 96), task.test.read(0, 8)
    fitted = model(task.model, torch.nn.functional.cross_entropy).fit([train[:2]])
    expected = fitted.influences(*test[:2], *train[:2]).numpy()
    found = xarray.open_zarr(path)["influences"].values
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_perturbation_gives_one_number_per_input_feature(jobs: Jobs, tmp_path: Path) -> None:
    """`∇x (z_test · g_train(x))`, with the training input's dimensions."""
    path = tmp_path / "result.zarr"
    method = {"name": "Direct", "regularization": LAMBDA, "secondOrder": "GeneralizedGaussNewton"}
    jobs.finish(jobs.manifest({**SMALL, "mode": "Perturbation", "method": method}), output=path)
    found = xarray.open_zarr(path)["influences"]
    assert found.dims == ("test", "train", "feature_0")
    np.testing.assert_allclose(found.values, Oracle.of_small_task().perturbations(), rtol=2e-3, atol=2e-5)


def test_influences_from_stored_factors_equal_those_computed_at_once(
    jobs: Jobs, tmp_path: Path, undisturbed: Any
) -> None:
    """InfluenceFactors, then InfluencesFromFactors: the same numbers, without fitting or solving again.

    Factors by parameter are turned back into EK-FAC's basis, which rounds; those of an Influences job are
    in it already, and give the same bits.
    """
    factors, path = tmp_path / "factors.zarr", tmp_path / "result.zarr"
    made = jobs.finish(jobs.manifest({"operation": "InfluenceFactors"}), output=factors)
    assert not [name for name in times_written(made, factors) if name.startswith("influences")]
    from_factors = {"operation": "InfluencesFromFactors", "factors": {"url": str(factors)}}
    second = jobs.finish(jobs.manifest(from_factors), output=path)
    assert not [name for name in times_written(second, path) if name.startswith(("factors/0", "fit/c"))]
    ours, theirs = (zarr.open_group(place, mode="r") for place in (path, undisturbed.path))
    scale = np.abs(theirs["influences"][:]).max()
    for name in ("influences", "most_harmful_score", "score_mean"):
        np.testing.assert_allclose(ours[name][:], theirs[name][:], rtol=1e-4, atol=1e-5 * scale)
    for name in ("test_label", "test_confidence"):
        np.testing.assert_array_equal(ours[name][:], theirs[name][:])
    assert "test_label" in xarray.open_zarr(path)["influences"].coords
    by_parameter = zarr.open_group(factors, mode="r")["factors/0"]
    assert by_parameter.shape[0] == traced_task.TEST
    assert "block" in by_parameter.attrs
    assert by_parameter.attrs["basis"] == "parameters"
    assert theirs["factors/0"].attrs["basis"] == "method"
    again = {"operation": "InfluencesFromFactors", "factors": {"url": str(undisturbed.path)}}
    jobs.finish(jobs.manifest(again), output=tmp_path / "again.zarr")
    same = zarr.open_group(tmp_path / "again.zarr", mode="r")
    for name in ("influences", "most_helpful", "most_harmful_score", "score_mean"):
        np.testing.assert_array_equal(same[name][:], theirs[name][:])


def test_factors_of_other_parameters_are_refused(jobs: Jobs, tmp_path: Path, undisturbed: Any) -> None:
    """Scores of one model's factors with another model's gradients mean nothing."""
    path = tmp_path / "result.zarr"
    from_factors = {"operation": "InfluencesFromFactors", "factors": {"url": str(undisturbed.path)}}
    run = jobs.run(jobs.manifest(from_factors), output=path, env={"TRACED_MODEL_SCALE": "0.6"}, workers=1)
    assert run.code == 64
    assert "spec.factors.url" in run.stderr
    assert "model: " in run.stderr
    other = {**from_factors, "method": {"regularization": 0.1}}
    run = jobs.run(jobs.manifest(other), output=path, workers=1)
    assert run.code == 64
    assert "method.regularization" in run.stderr


def test_factors_that_are_missing_or_not_finished_are_refused(
    jobs: Jobs, tmp_path: Path, half_done: Any
) -> None:
    """Before any worker starts and by the plan, with what to do."""
    for place, words in ((half_done.path, "not finished"), (tmp_path / "nothing.zarr", "found none")):
        changes = {"operation": "InfluencesFromFactors", "factors": {"url": str(place)}}
        run = jobs.run(jobs.manifest(changes), output=tmp_path / "result.zarr")
        planned = jobs.plan(jobs.manifest(changes))
        for code, said in ((run.code, run.stderr), (planned.returncode, planned.stderr)):
            assert code == 64
            assert "spec.factors.url" in said
            assert words in said


def test_without_the_matrix_the_top_and_the_statistics_are_the_same(
    jobs: Jobs, tmp_path: Path, undisturbed: Any
) -> None:
    """`dense: false` stores no score, and what `show` reads is bit for bit what a dense run stores."""
    path = tmp_path / "result.zarr"
    jobs.finish(jobs.manifest({"output": {"dense": False}}), output=path)
    store = stored.result(stored.open_store(path))
    assert not [name for name in store if name.startswith("influences")]
    for name, data in undisturbed.result.items():
        if name.startswith(("most_", "score_")):
            assert store[name] == data, name


def test_top_and_statistics_are_those_of_the_matrix(undisturbed: Any) -> None:
    """Sorted by score, the lower index first among equals; statistics over all training examples."""
    opened = xarray.open_zarr(undisturbed.path)
    scores = opened["influences"].values
    helpful = np.argsort(-scores, axis=1, kind="stable")[:, :100]
    harmful = np.argsort(scores, axis=1, kind="stable")[:, :100]
    np.testing.assert_array_equal(opened["most_helpful"].values, helpful)
    np.testing.assert_array_equal(opened["most_harmful"].values, harmful)
    np.testing.assert_array_equal(
        opened["most_helpful_score"].values, np.take_along_axis(scores, helpful, axis=1)
    )
    exact = scores.astype(np.float64)
    np.testing.assert_allclose(opened["score_mean"].values, exact.mean(axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(opened["score_std"].values, exact.std(axis=1), rtol=1e-9)
    np.testing.assert_array_equal(opened["score_max"].values, exact.max(axis=1))
    assert not opened["score_nonfinite"].values.any()


class Oracle:
    """The small task's influences from an explicit Gauss-Newton matrix, in float64, by torch.func alone."""

    def __init__(self) -> None:
        task = traced_task.task(train=96, test=8)
        self.model = task.model.double()
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        self.train = [leaf.double() if leaf.is_floating_point() else leaf for leaf in task.train.read(0, 96)]
        self.test = [leaf.double() if leaf.is_floating_point() else leaf for leaf in task.test.read(0, 8)]

    @staticmethod
    @cache
    def of_small_task() -> Oracle:
        return Oracle()

    def influences(self) -> np.ndarray:
        """`[T, N]`."""
        gradients = vmap(self._gradient, (0, 0))(*self.train)
        return (self.factors() @ gradients.T).numpy()

    def perturbations(self) -> np.ndarray:
        """`[T, N, F]`."""

        def one(z: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return grad(lambda moved: z @ self._gradient(moved, y))(x)

        over_train = vmap(one, (None, 0, 0))
        return torch.stack([over_train(z, *self.train) for z in self.factors()]).numpy()

    @cache  # noqa: B019, one oracle lives as long as the tests
    def factors(self) -> torch.Tensor:
        """`[T, P]`."""
        jacobian = vmap(torch.func.jacrev(self._outputs), (None, 0))(
            self._flat(self.parameters), self.train[0]
        )
        curvature = vmap(hessian(self._loss), (0, 0))(self._logits(), self.train[1])
        h = torch.einsum("nop,noq,nqr->pr", jacobian, curvature, jacobian) / len(self.train[0])
        gradients = vmap(self._gradient, (0, 0))(*self.test)
        return torch.linalg.solve(h + LAMBDA * torch.eye(len(h), dtype=h.dtype), gradients.T).T

    def _logits(self) -> torch.Tensor:
        return self.model(self.train[0]).detach()

    def _loss(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, label)

    def _gradient(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return grad(lambda flat: self._loss(self._outputs(flat, x), y))(self._flat(self.parameters))

    def _outputs(self, flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([p.numel() for p in self.parameters.values()])
        named = {
            n: piece.view(p.shape) for piece, (n, p) in zip(pieces, self.parameters.items(), strict=True)
        }
        return functional_call(self.model, named, (x,))

    @staticmethod
    def _flat(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([p.reshape(-1) for p in parameters.values()])
