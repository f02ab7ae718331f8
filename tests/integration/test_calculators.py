"""The Dask calculator: which work it does how often, and what it refuses before any of it."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster, futures_of, worker_client
from torch.utils import _pytree as pytree

from counting_model import FEATURES, CountingModel, NarrowModel, TurnedModel
from influence_calculator import (
    DaskInfluenceCalculator,
    DirectInfluence,
    DisableClientSingleThreadCheck,
    InfluenceMode,
    InvalidDimensionChunksError,
    NotFittedException,
    SecondOrderMode,
    ThreadSafetyViolationError,
    TorchNumpyConverter,
    UnalignedChunksError,
    UnknownChunksError,
    UnsupportedInfluenceModeException,
    dask_calculator,
    dask_graph,
    groups,
    write_zarr,
)
from influence_calculator.chunk_tasks import WorkerSide

T, N = 11, 14
generator = np.random.default_rng(1)
X_TEST, Y_TEST = generator.random((T, FEATURES), dtype=np.float32), generator.random(T, dtype=np.float32)
X, Y = generator.random((N, FEATURES), dtype=np.float32), generator.random(N, dtype=np.float32)
EXPECTED = (X_TEST * Y_TEST[:, None]) @ (X * Y[:, None]).T
EXPECTED_PERTURBATION = Y[None, :, None] * (X_TEST * Y_TEST[:, None])[:, None, :]
ROW_BYTES = 4 * (FEATURES + 4)
"""A row of factors, and what goes with it in a region against 4 training examples."""


def pair(x: np.ndarray, y: np.ndarray, chunk: int) -> tuple[da.Array, da.Array]:
    return da.from_array(x, chunks=(chunk, -1)), da.from_array(y, chunks=chunk)


def queries(chunk: int = 3) -> tuple[da.Array, da.Array]:
    return pair(X_TEST, Y_TEST, chunk)


def training(chunk: int = 4) -> tuple[da.Array, da.Array]:
    return pair(X, Y, chunk)


def local(model: CountingModel, group_bytes: int | None = None) -> DaskInfluenceCalculator:
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), DisableClientSingleThreadCheck)
    if group_bytes is not None:
        calculator.group_bytes = group_bytes
    return calculator


def computed(array: da.Array) -> Any:
    return array.compute(scheduler="synchronous")


def _direct() -> tuple[DirectInfluence, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A model fitted to the training examples, and those."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = torch.nn.Linear(FEATURES, 1)
    data = [(torch.from_numpy(X), torch.from_numpy(Y))]
    influence = DirectInfluence(linear, _squared_error, 0.5, second_order_mode=SecondOrderMode.GAUSS_NEWTON)
    return influence.fit(data), data


def _squared_error(f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(f[:, 0], y)


def _explicit(model: DirectInfluence) -> Any:
    return model.influences(*map(torch.from_numpy, (X_TEST, Y_TEST, X, Y))).numpy()


def _change(model: DirectInfluence, data: list[tuple[torch.Tensor, torch.Tensor]], change: str) -> None:
    match change:
        case "λ":
            model.with_regularization(5.0)
        case "fit":
            model.fit([(3 * x, y) for x, y in data])


class TestHowOftenItWorks:
    def test_building_a_graph_computes_nothing(self):
        model = CountingModel()
        calculator = local(model)
        calculator.influence_factors(*queries())
        calculator.influences(*queries(), *training())
        calculator.influences_from_factors(da.ones((T, FEATURES), chunks=(3, -1)), *training())
        assert not model.calls

    @pytest.mark.parametrize(
        ("group_bytes", "groups"), [(None, 1), (6 * ROW_BYTES, 2), (3 * ROW_BYTES, 4), (1, 4)]
    )
    def test_factors_once_per_test_chunk_and_a_training_chunk_once_per_group(
        self, group_bytes: int | None, groups: int
    ):
        model = CountingModel()
        influences = local(model, group_bytes).influences(*queries(), *training())
        assert np.allclose(computed(influences), EXPECTED)
        assert model.calls == {"factors": 4, "scores": groups * 4}

    def test_a_chunk_larger_than_the_limit_is_a_group_of_its_own(self):
        model = CountingModel()
        computed(local(model, 4 * ROW_BYTES).influences(*pair(X_TEST, Y_TEST, 6), *training()))
        assert sorted(set(model.rows_per_score)) == [5, 6]

    def test_the_feature_dimensions_of_a_perturbation_count_for_the_group(self):
        model = CountingModel()
        influences = local(model, 6 * ROW_BYTES).influences(
            *queries(), *training(), mode=InfluenceMode.Perturbation
        )
        assert np.allclose(computed(influences), EXPECTED_PERTURBATION)
        assert max(model.rows_per_score) == 3

    def test_without_training_side_each_test_chunk_is_solved_once_and_is_the_training_side(self):
        model = CountingModel()
        influences = local(model).influences(*queries())
        gradients = X_TEST * Y_TEST[:, None]
        assert np.allclose(computed(influences), gradients @ gradients.T)
        assert influences.chunks == ((11,), (3, 3, 3, 2))
        assert model.calls == {"factors": 4, "scores": 4}

    def test_a_model_scores_in_its_own_coordinates_and_factors_are_turned_once_per_group(self):
        model = TurnedModel()
        calculator = local(model, 6 * ROW_BYTES)
        assert np.allclose(computed(calculator.influences(*queries(), *training())), EXPECTED)
        assert model.calls == {"factors": 4, "scores": 8}
        factors = da.from_array((X_TEST * Y_TEST[:, None]).astype(np.float32), chunks=(3, -1))
        assert np.allclose(computed(calculator.influences_from_factors(factors, *training())), EXPECTED)
        assert model.calls == {"factors": 4, "scores": 16, "turned": 2}
        moved = calculator.influences(*queries(), *training(), mode=InfluenceMode.Perturbation)
        assert np.allclose(computed(moved), EXPECTED_PERTURBATION)
        assert model.calls["turned"] == 2

    def test_rows_may_be_narrower_on_their_way(self):
        """Chunks of 3, 3, 3 and 2 examples: none, some or all of them, and one without any example."""
        for narrow, expansions in ((0, 1), (3, 4), (T, 1)):
            model, x = NarrowModel(), X_TEST.copy()
            x[:narrow, -1] = 0
            influences = local(model).influences(*pair(x, Y_TEST, 3), *training())
            assert np.allclose(computed(influences), (x * Y_TEST[:, None]) @ (X * Y[:, None]).T)
            assert model.calls["expanded"] == expansions
        examples = da.concatenate([da.from_array(x[:0]), da.from_array(x)])
        labels = da.concatenate([da.from_array(Y_TEST[:0]), da.from_array(Y_TEST)])
        influences = local(NarrowModel()).influences(examples, labels, *training())
        assert np.allclose(computed(influences), (x * Y_TEST[:, None]) @ (X * Y[:, None]).T)

    def test_a_slice_of_the_result_computes_only_the_groups_it_touches(self):
        model = CountingModel()
        influences = local(model, 3 * ROW_BYTES).influences(*queries(), *training())
        computed(influences[:2, :3])
        assert model.calls == {"factors": 1, "scores": 1}

    def test_a_group_is_no_larger_than_its_scores_against_a_training_chunk_may_be(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(groups, "REGION_BYTES", 6 * 4 * 4)
        influences = local(CountingModel()).influences(*queries(), *training())
        assert influences.chunks == ((6, 5), (4, 4, 4, 2))
        assert np.allclose(computed(influences), EXPECTED)

    def test_chunks_in_memory_that_one_task_reads_have_no_tasks_of_their_own(self):
        influences = local(CountingModel()).influences(*queries(), *training())
        (optimized,) = dask.optimize(influences)
        assert len(dict(optimized.dask)) == 4 + 4 + 1  # factors, regions, the model

    def test_chunks_in_memory_that_several_groups_read_are_tasks_that_run_once(self):
        influences = local(CountingModel(), 3 * ROW_BYTES).influences(*queries(), *training())
        (optimized,) = dask.optimize(influences)
        assert len(dict(optimized.dask)) == 2 * 4 + 4 + 4 * 4 + 1  # x and y, factors, regions, the model

    def test_factors_that_a_worker_put_together_stay_there(self):
        side = WorkerSide(CountingModel(), TorchNumpyConverter(), np.dtype(np.float32))
        alone = len(pickle.dumps(side))
        side.group("first", [np.zeros((10_000, FEATURES), np.float32)])
        assert len(pickle.dumps(side)) == alone


class TestWhatItReturns:
    @pytest.mark.parametrize(
        ("group_bytes", "up_rows", "perturbed_rows"),
        [(None, (11,), (11,)), (6 * ROW_BYTES, (6, 5), (3, 3, 3, 2))],
    )
    def test_the_outputs_chunks_are_groups_of_test_chunks_by_training_chunks(
        self, group_bytes: int | None, up_rows: tuple[int, ...], perturbed_rows: tuple[int, ...]
    ):
        calculator = local(CountingModel(), group_bytes)
        up = calculator.influences(*queries(), *training())
        assert up.chunks == (up_rows, (4, 4, 4, 2))
        perturbation = calculator.influences(*queries(), *training(), mode=InfluenceMode.Perturbation)
        assert perturbation.chunks == (perturbed_rows, (4, 4, 4, 2), (FEATURES,))
        for array in (up, perturbation):
            for index in np.ndindex(*array.numblocks):
                block = array.blocks[index]
                assert computed(block).shape == block.shape

    @pytest.mark.parametrize(("test_chunk", "train_chunk"), [(1, 1), (2, 5), (11, 14), (7, 3)])
    def test_chunk_sizes_do_not_matter(self, test_chunk: int, train_chunk: int):
        calculator = local(CountingModel(), 5 * ROW_BYTES)
        sides = *pair(X_TEST, Y_TEST, test_chunk), *pair(X, Y, train_chunk)
        assert np.allclose(computed(calculator.influences(*sides)), EXPECTED)
        moved = calculator.influences(*sides, mode=InfluenceMode.Perturbation)
        assert np.allclose(computed(moved), EXPECTED_PERTURBATION)

    def test_token_ids_give_scores_with_fractions(self):
        """Mistake 5: an output declared with x's dtype."""
        tokens = da.from_array(np.arange(T * FEATURES).reshape(T, FEATURES), chunks=(3, -1))
        influences = local(CountingModel()).influences(tokens, queries()[1], tokens, queries()[1])
        values = computed(influences)
        assert influences.dtype == values.dtype == np.float32
        assert (values != values.round()).any()

    def test_labels_of_one_dimension_survive_chunks_of_one_example(self):
        """Mistake 6: labels squeezed to zero dimensions."""
        factors = local(CountingModel()).influence_factors(*pair(X_TEST, Y_TEST, 1))
        assert np.allclose(computed(factors), X_TEST * Y_TEST[:, None])

    def test_influences_from_factors_take_the_factors_dtype(self):
        factors = da.from_array((X_TEST * Y_TEST[:, None]).astype(np.float64), chunks=(3, -1))
        influences = local(CountingModel(), 6 * ROW_BYTES).influences_from_factors(
            factors.astype(np.float32), *training()
        )
        assert influences.dtype == np.float32
        assert np.allclose(computed(influences), EXPECTED)

    def test_empty_chunks_are_empty_rows_and_columns(self):
        x_test, y_test = (
            da.from_array(X_TEST, chunks=((3, 0, 8), -1)),
            da.from_array(Y_TEST, chunks=((3, 0, 8),)),
        )
        x, y = da.from_array(X, chunks=((0, 14), -1)), da.from_array(Y, chunks=((0, 14),))
        influences = local(CountingModel()).influences(x_test, y_test, x, y)
        assert np.allclose(computed(influences), EXPECTED)

    def test_n_parameters_are_the_models(self):
        assert local(CountingModel()).n_parameters == FEATURES


class TestOnACluster:
    def test_the_result_is_that_of_this_process_and_writes_itself_in_parallel(self, client: Client, tmp_path):
        calculator = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), client)
        calculator.group_bytes = 6 * ROW_BYTES
        for mode, expected in (
            (InfluenceMode.Up, EXPECTED),
            (InfluenceMode.Perturbation, EXPECTED_PERTURBATION),
        ):
            influences = calculator.influences(*queries(), *training(), mode=mode)
            assert np.allclose(influences.compute(), expected)
        url = str(tmp_path / "influences.zarr")
        calculator.influences(*queries(), *training()).rechunk((3, 4)).to_zarr(url)
        assert np.allclose(da.from_zarr(url).compute(), EXPECTED)

    def test_short_training_chunks_are_joined_while_the_workers_have_enough_to_do(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ):
        """14 chunks of one example: three may share a task, so that two workers have two each at least."""
        calculator = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), client)
        assert calculator.influences(*queries(), *training(1)).chunks[1] == (3, 3, 3, 3, 2)
        monkeypatch.setattr(calculator, "_tasks", 8)
        assert calculator.influences(*queries(), *training(1)).chunks[1] == (1,) * N
        monkeypatch.setattr(calculator, "_tasks", 3)
        for mode, expected in (
            (InfluenceMode.Up, EXPECTED),
            (InfluenceMode.Perturbation, EXPECTED_PERTURBATION),
        ):
            influences = calculator.influences(*queries(), *training(1), mode=mode)
            assert influences.chunks[:2] == ((T,), (4, 4, 4, 2))
            assert np.allclose(influences.compute(), expected)
        calculator.group_bytes = 6 * ROW_BYTES
        two_groups = calculator.influences(*queries(), *training(1))
        assert two_groups.chunks == ((9, 2), (9, 5))
        assert np.allclose(two_groups.compute(), EXPECTED)

    def test_long_training_chunks_are_not_joined(self, client: Client, monkeypatch: pytest.MonkeyPatch):
        calculator = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), client)
        monkeypatch.setattr(calculator, "_tasks", 1)
        example = 4 * (FEATURES + 1 + T)
        for limit, chunks in ((2 * 2 * example, (4, 4, 4, 2)), (2 * example, (2,) * 7)):
            monkeypatch.setattr(groups, "JOINED_BYTES", limit)
            assert calculator.influences(*queries(), *training(2)).chunks[1] == chunks

    def test_the_graph_does_not_hold_the_model(self, client: Client):
        model = CountingModel(ballast=10**6)
        calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
        influences = calculator.influences(*queries(1), *training(1))
        assert len(pickle.dumps(dict(influences.dask))) < model.ballast.nbytes / 10
        assert np.allclose(influences.compute(), EXPECTED)

    def test_a_large_model_is_sent_without_a_warning(self, client: Client):
        calculator = DaskInfluenceCalculator(CountingModel(2 * 10**6), TorchNumpyConverter(), client)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.allclose(calculator.influences(*queries(), *training()).compute(), EXPECTED)

    def test_every_worker_holds_the_model_before_a_task_needs_it(self, client: Client):
        """Dask runs tasks where what they need is, which would be one worker."""
        calculator = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), client)
        sent = client.who_has(futures_of(calculator.influences(*queries(), *training())))
        assert [len(holders) for holders in sent.values()] == [2]

    def test_what_was_sent_stays_as_it_was(self, client: Client):
        options = {"threads_per_worker": 1, "processes": False, "dashboard_address": None}
        with Client(n_workers=1, set_as_default=False, **options) as same_process:
            for own in (client, same_process):
                values = np.zeros(10**5)
                node = dask_graph.sent(own, "values", values)
                values += 1
                assert not own.compute(node).result().any()

    def test_all_workers_may_die_between_two_results(self, client: Client):
        """The model goes with them, and comes again."""
        calculator = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), client)
        influences = calculator.influences(*queries(), *training())
        assert np.allclose(influences.compute(), EXPECTED)
        before = client.run(os.getpid)
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        assert np.allclose(influences.compute(), EXPECTED)
        client.wait_for_workers(len(before))
        assert not set(client.run(os.getpid).values()) & set(before.values())

    @pytest.mark.parametrize("on_workers", [True, False], ids=["workers", "this process"])
    def test_factors_that_were_written_again_are_read_again(self, on_workers: bool, client: Client, tmp_path):
        """Dask calls the arrays of both stores alike, and a lazy array may be computed twice."""
        model = CountingModel()
        calculator = (
            DaskInfluenceCalculator(model, TorchNumpyConverter(), client) if on_workers else local(model)
        )
        url, kept = str(tmp_path / "factors.zarr"), None
        for scale in (1, 2, 3):
            factors = da.from_array(scale * X_TEST * Y_TEST[:, None], chunks=(T, -1))
            write_zarr(factors, url, overwrite=True)
            stored = da.from_zarr(url)
            lazy = calculator.influences_from_factors(stored, *training())
            kept = lazy if kept is None else kept
            for influences in (lazy, kept):
                values = influences.compute() if on_workers else computed(influences)
                assert np.allclose(values, scale * EXPECTED)

    @pytest.mark.parametrize("error", [AssertionError(), ValueError("Sample larger than population")])
    def test_a_worker_that_dies_while_the_model_is_sent_to_all_matters_to_nobody(
        self,
        error: Exception,
        client: Client,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ):
        """As Dask's scheduler then fails."""

        def fails(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(client, "replicate", fails)
        calculator = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), client)
        assert np.allclose(calculator.influences(*queries(), *training()).compute(), EXPECTED)
        assert type(error).__name__ in caplog.text

    def test_a_graph_is_built_before_there_is_a_worker(self):
        options = {"n_workers": 0, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
        with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as none_yet:
            calculator = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), none_yet)
            influences = none_yet.compute(calculator.influences(*queries(), *training()))
            cluster.scale(1)
            assert np.allclose(influences.result(), EXPECTED)

    def test_a_client_that_restarted_its_workers_sends_the_model_again(self):
        options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
        with Client(set_as_default=False, **options) as own:
            calculator = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), own)
            own.compute(calculator.influences(*queries(), *training())).result()
            own.restart()
            influences = own.compute(calculator.influences(*queries(), *training()))
            assert np.allclose(influences.result(), EXPECTED)

    def test_a_result_outlives_the_calculator_that_made_it(self, client: Client):
        """Its graph holds the model that was sent: nobody else does."""
        influences = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), client).influences(
            *queries(), *training()
        )
        gc.collect()
        time.sleep(0.5)  # what nobody holds is forgotten by the scheduler meanwhile
        assert np.allclose(influences.compute(), EXPECTED)

    def test_a_model_that_changed_is_sent_again(self, client: Client):
        model = CountingModel()
        calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
        before = calculator.influence_factors(*queries())
        again = calculator.influence_factors(*queries())
        assert before.name == again.name
        model.scale, model.revision = 2.0, model.revision + 1
        after = calculator.influence_factors(*queries())
        assert np.allclose(2 * before.compute(), after.compute())

    @pytest.mark.parametrize("change", ["λ", "fit"])
    def test_a_lazy_result_is_of_the_model_as_it_was_when_it_was_asked_for(self, change: str):
        """Also without a client, where nothing is sent away."""
        model, data = _direct()
        calculator = local(model)
        before = _explicit(model)
        lazy = calculator.influences(*queries(), *training())
        _change(model, data, change)
        after = _explicit(model)
        assert not np.allclose(before, after, rtol=0.01)
        later = calculator.influences(*queries(), *training())
        assert np.allclose(computed(lazy), before, atol=1e-4)
        assert np.allclose(computed(later), after, atol=1e-4)
        assert np.allclose(computed(lazy), before, atol=1e-4)

    def test_a_model_whose_parameters_changed_in_place_is_sent_again(self, client: Client):
        model, _ = _direct()
        calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
        lazy, before = calculator.influences(*queries(), *training()), _explicit(model)
        assert calculator.influences(*queries(), *training()).name == lazy.name
        with torch.no_grad():
            model.model.weight.mul_(-3)
        after = _explicit(model)
        assert not np.allclose(before, after, rtol=0.01)
        later = calculator.influences(*queries(), *training())
        assert np.allclose(lazy.compute(), before, atol=1e-4)
        assert np.allclose(later.compute(), after, atol=1e-4)

    def test_a_lazy_result_shares_the_models_tensors_until_it_is_computed(self):
        model, _ = _direct()
        local(model).influences(*queries(), *training())
        kept = dask_calculator._as_it_is(model)
        assert kept is not model
        assert kept.model.weight.data_ptr() == model.model.weight.data_ptr()
        assert pytree.tree_leaves(kept._state)[0] is pytree.tree_leaves(model._state)[0]

    def test_a_model_that_cannot_be_copied_is_used_as_it_is(self, caplog: pytest.LogCaptureFixture):
        model, _ = _direct()
        model.model.lock = threading.Lock()
        influences = local(model).influences(*queries(), *training())
        assert "cannot be copied" in caplog.text
        assert np.allclose(computed(influences), _explicit(model), atol=1e-4)

    def test_another_model_in_its_place_is_sent_though_its_revision_is_the_same(self, client: Client):
        first, second = CountingModel(), CountingModel()
        second.scale = 3.0
        calculator = DaskInfluenceCalculator(first, TorchNumpyConverter(), client)
        before = calculator.influence_factors(*queries())
        calculator.influence_function_model = second
        assert np.allclose(3 * before.compute(), calculator.influence_factors(*queries()).compute())

    def test_workers_that_share_a_process_do_not_enter_the_model_together(self):
        class Entered(CountingModel):
            inside = 0
            most = 0

            def _influence_factors(self, x: Any, y: Any) -> Any:
                type(self).inside += 1
                type(self).most = max(self.most, self.inside)
                time.sleep(0.02)
                type(self).inside -= 1
                return super()._influence_factors(x, y)

        with Client(
            n_workers=3, threads_per_worker=1, processes=False, dashboard_address=None, set_as_default=False
        ) as threads:
            calculator = DaskInfluenceCalculator(Entered(), TorchNumpyConverter(), threads)
            threads.compute(calculator.influence_factors(*queries(1))).result()
        assert Entered.most == 1

    def test_workers_with_several_threads_are_refused_unless_the_model_is_thread_safe(self):
        with Client(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, set_as_default=False
        ) as threads:
            with pytest.raises(ThreadSafetyViolationError, match="threads_per_worker=1"):
                DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), threads)
            safe = DaskInfluenceCalculator(CountingModel(is_thread_safe=True), TorchNumpyConverter(), threads)
            values = threads.compute(safe.influences(*queries(), *training())).result()
        assert np.allclose(values, EXPECTED)

    def test_an_asynchronous_client_will_do(self):
        async def influences() -> Any:
            options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
            async with (
                LocalCluster(asynchronous=True, **options) as cluster,
                Client(cluster, asynchronous=True, set_as_default=False) as asynchronous,
            ):
                calculator = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), asynchronous)
                return await asynchronous.compute(calculator.influences(*queries(), *training()))

        assert np.allclose(asyncio.run(influences()), EXPECTED)

    def test_a_client_inside_a_task_will_do(self, client: Client):
        def inside() -> Any:
            with worker_client() as own:
                calculator = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), own)
                return own.compute(calculator.influences(*queries(), *training())).result()

        assert np.allclose(client.submit(inside).result(), EXPECTED)

    def test_with_the_check_disabled_no_client_is_called(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ):
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("the client was called")

        for name in ("scatter", "scheduler_info", "submit", "compute", "get", "map"):
            monkeypatch.setattr(client, name, refuse)
        assert np.allclose(computed(local(CountingModel()).influences(*queries(), *training())), EXPECTED)

    def test_no_global_configuration_is_changed(self, client: Client):
        before = dask.config.collect(), dict(dask.config.config), dict(np.geterr())
        calculator = DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), client)
        calculator.influences(*queries(), *training()).compute()
        assert (dask.config.collect(), dict(dask.config.config), dict(np.geterr())) == before

    def test_importing_the_package_changes_no_global_configuration(self):
        code = (
            "import copy, dask, distributed, numpy, torch, zarr\n"
            "state = lambda: (copy.deepcopy(dask.config.config), copy.deepcopy(zarr.config.config), "
            "numpy.geterr(), torch.get_num_threads(), torch.is_grad_enabled(), "
            "torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype())\n"
            "before = state()\n"
            "import influence_calculator\n"
            "assert state() == before"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestWhatItRefusesWhenTheGraphIsBuilt:
    @pytest.fixture
    def calculator(self) -> DaskInfluenceCalculator:
        return local(CountingModel())

    def test_another_client(self):
        with pytest.raises(ValueError, match=r"client: expected a distributed\.Client"):
            DaskInfluenceCalculator(CountingModel(), TorchNumpyConverter(), "tcp://scheduler:8786")  # type: ignore[arg-type]

    def test_a_model_that_is_not_fitted_until_it_is(self):
        model = CountingModel(is_fitted=False)
        calculator = local(model)
        with pytest.raises(NotFittedException, match=r"fit\(training_data\)"):
            calculator.influences(*queries(), *training())
        model.fit([])
        assert np.allclose(computed(calculator.influences(*queries(), *training())), EXPECTED)

    def test_x_and_y_in_other_chunks(self, calculator: DaskInfluenceCalculator):
        x, y = training()
        for call in (
            lambda: calculator.influence_factors(x, y.rechunk(5)),
            lambda: calculator.influences(x, y.rechunk(5)),
            lambda: calculator.influences(*queries(), x, y.rechunk(5)),
            lambda: calculator.influences_from_factors(da.ones((T, FEATURES)), x, y.rechunk(5)),
        ):
            with pytest.raises(UnalignedChunksError, match="rechunk"):
                call()

    def test_chunked_features(self, calculator: DaskInfluenceCalculator):
        x, y = training()
        cut = x.rechunk((4, 2))
        factors = da.ones((T, FEATURES), chunks=(3, 2))
        for call in (
            lambda: calculator.influence_factors(cut, y),
            lambda: calculator.influences(cut, y),
            lambda: calculator.influences(*queries(), cut, y),
            lambda: calculator.influences_from_factors(factors, x, y),
        ):
            with pytest.raises(InvalidDimensionChunksError, match="but the first"):
                call()

    def test_chunks_of_unknown_size(self, calculator: DaskInfluenceCalculator):
        x, y = training()
        kept = y > 0.5
        with pytest.raises(UnknownChunksError, match=r"x\.compute_chunk_sizes"):
            calculator.influence_factors(x[kept], y[kept])

    @pytest.mark.parametrize(("missing", "given"), [("x", "y"), ("y", "x")])
    def test_one_of_x_and_y_without_the_other(
        self, calculator: DaskInfluenceCalculator, missing: str, given: str
    ):
        side = dict(zip("xy", training(), strict=True))
        with pytest.raises(ValueError, match=f"{missing}: expected it beside {given}"):
            calculator.influences(*queries(), **{given: side[given]})

    @pytest.mark.parametrize("call", ["influences", "influences_from_factors"])
    def test_an_unknown_mode(self, calculator: DaskInfluenceCalculator, call: str):
        left = queries() if call == "influences" else (da.ones((T, FEATURES), chunks=(3, -1)),)
        with pytest.raises(UnsupportedInfluenceModeException, match="'sideways'"):
            getattr(calculator, call)(*left, *training(), mode="sideways")

    def test_factors_without_a_training_side(self, calculator: DaskInfluenceCalculator):
        factors = da.ones((T, FEATURES), chunks=(3, -1))
        with pytest.raises(ValueError, match="x and y: expected the training examples"):
            calculator.influences_from_factors(factors, None, None)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "factors", [da.ones((T, FEATURES + 1)), da.ones(T), da.ones((T, FEATURES), dtype=int)]
    )
    def test_factors_of_another_shape_or_dtype(self, calculator: DaskInfluenceCalculator, factors: da.Array):
        with pytest.raises(ValueError, match="z_test_factors: expected"):
            calculator.influences_from_factors(factors, *training())

    def test_perturbing_token_ids(self, calculator: DaskInfluenceCalculator):
        tokens = da.ones((N, FEATURES), chunks=(4, -1), dtype=np.int64)
        with pytest.raises(ValueError, match="x: expected floats in mode perturbation"):
            calculator.influences(*queries(), tokens, training()[1], mode=InfluenceMode.Perturbation)


class TestTwoModelsAtOnce:
    """Results over the same data: Dask computes one key once, whoever asked for it."""

    def test_results_of_two_models_may_be_computed_together(self):
        strong, _ = _direct()
        weak, _ = _direct()
        weak.with_regularization(5.0)
        data, test = training(), queries()

        def asked(calculator: DaskInfluenceCalculator) -> list[da.Array]:
            return [
                calculator.influences(*test, *data),
                calculator.influence_factors(*test),
                *calculator.influence_factors_and_report(*test)[:1],
                calculator.self_influences(*test),
            ]

        first, second = asked(local(strong)), asked(local(weak))
        together = dask.compute(*first, *second, scheduler="synchronous")
        for array, found in zip([*first, *second], together, strict=True):
            assert np.array_equal(found, computed(array))
        for one, other in zip(together[: len(first)], together[len(first) :], strict=True):
            assert not np.allclose(one, other, rtol=0.1)

    def test_factors_may_be_scored_by_two_models_together(self):
        one, other = _direct()[0], _direct()[0]
        with torch.no_grad():
            other.model.weight.mul_(-3)
        z = da.from_array(np.ones((T, one.n_parameters), np.float32), chunks=(3, -1))
        lazy = [local(model).influences_from_factors(z, *training()) for model in (one, other)]
        found = dask.compute(*lazy, scheduler="synchronous")
        for model, scores in zip((one, other), found, strict=True):
            expected = model.influences_from_factors(
                torch.ones(T, one.n_parameters), *map(torch.from_numpy, (X, Y))
            )
            assert np.allclose(scores, expected.numpy(), atol=1e-4)

    def test_factors_may_be_scored_in_both_modes_together(self):
        calculator = local(CountingModel())
        z = da.from_array(X_TEST * Y_TEST[:, None], chunks=(3, -1))
        lazy = [calculator.influences_from_factors(z, *training(), mode=mode) for mode in InfluenceMode]
        up, moved = dask.compute(*lazy, scheduler="synchronous")
        assert np.allclose(up, EXPECTED)
        assert np.allclose(moved, EXPECTED_PERTURBATION)

    def test_data_with_other_labels_may_be_computed_together(self):
        calculator = local(CountingModel())
        x, y = queries()
        asked = [calculator.self_influences, calculator.influence_factors]
        asked.append(lambda *pair: calculator.influence_factors_and_report(*pair)[0])
        for ask in asked:
            once, twice = dask.compute(ask(x, y), ask(x, 2 * y), scheduler="synchronous")
            assert not np.allclose(once, twice)
