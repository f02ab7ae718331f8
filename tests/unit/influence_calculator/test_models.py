"""The torch models: pyDVL's constructors and contract around the methods of the maths."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from influence_calculator import (
    ArnoldiInfluence,
    BlockMode,
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    DisableClientSingleThreadCheck,
    EkfacInfluence,
    GradDotInfluence,
    InfluenceMode,
    InverseHarmonicMeanInfluence,
    JacobiPreconditioner,
    LissaInfluence,
    NotFittedException,
    NotImplementedLayerRepresentationException,
    NystroemPreconditioner,
    NystroemSketchInfluence,
    OneShotIterableError,
    Relative,
    SecondOrderMode,
    SolverStatus,
    SolverWarning,
    TorchNumpyConverter,
    UnsupportedInfluenceModeException,
    torch_dataset_to_dask_array,
)
from influence_calculator.maths import training_batches
from influence_calculator.maths.training_batches import KEPT_BYTES
from influence_calculator.torch import base, training_data
from influence_calculator.torch.base import TorchInfluenceFunctionModel
from influence_calculator.torch.blockwise import TorchBlockwiseInfluence
from influence_calculator.torch.training_data import in_one_order
from model_cases import LOGISTIC, MLP

CASE = MLP
X, Y = CASE.train()
X_TEST, Y_TEST = CASE.test()
λ = 0.1
FISHER = {"regularization": λ, "second_order_mode": SecondOrderMode.GENERALIZED_GAUSS_NEWTON}
"""A positive curvature, so that every method has an answer."""


def batches(size: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


def direct(**changes: Any) -> DirectInfluence:
    return DirectInfluence(CASE.model(), CASE.loss, **{**FISHER, **changes})


def conjugate(**changes: Any) -> CgInfluence:
    exact = {"rtol": 1e-12, "atol": 0.0, "solve_simultaneously": True}
    return CgInfluence(CASE.model(), CASE.loss, **{**FISHER, **exact, **changes})


def ekfac(**changes: Any) -> EkfacInfluence:
    return EkfacInfluence(
        CASE.model(), loss=CASE.loss, **{"regularization": λ, "expectation": "exact", **changes}
    )


def arnoldi(**changes: Any) -> ArnoldiInfluence:
    exact = {"rank": 60, "use_woodbury": True}
    return ArnoldiInfluence(CASE.model(), CASE.loss, **{**FISHER, **exact, **changes})


def nystroem(**changes: Any) -> NystroemSketchInfluence:
    return NystroemSketchInfluence(CASE.model(), CASE.loss, **{**FISHER, "rank": 60, **changes})


def lissa(**changes: Any) -> LissaInfluence:
    exact = {"rtol": 1e-11, "scale": 1.6}
    return LissaInfluence(CASE.model(), CASE.loss, **{**FISHER, **exact, **changes})


def harmonic(**changes: Any) -> InverseHarmonicMeanInfluence:
    return InverseHarmonicMeanInfluence(CASE.model(), CASE.loss, **{"regularization": λ, **changes})


Build = Callable[..., TorchBlockwiseInfluence]
MODELS: dict[str, Build] = {
    "direct": direct,
    "cg": conjugate,
    "ekfac": ekfac,
    "arnoldi": arnoldi,
    "nystroem": nystroem,
    "lissa": lissa,
    "inverse harmonic mean": harmonic,
}


@pytest.fixture(params=MODELS)
def build(request: pytest.FixtureRequest) -> Build:
    """One constructor after the other: what follows holds for all models."""
    return MODELS[request.param]


@pytest.fixture
def layer_wise(build: Build) -> Build:
    """One block per layer, which EK-FAC always has."""
    return build if build is ekfac else partial(build, block_structure=BlockMode.LAYER_WISE)


@pytest.fixture
def expected(build: Build) -> Tensor:
    """The influences of the method fitted to one batch; those that solve exactly have the same."""
    reference = build() if build in (ekfac, harmonic) else direct()
    return reference.fit([(X, Y)]).influences(X_TEST, Y_TEST, X, Y)


class TestContract:
    def test_an_unfitted_model_is_refused_by_every_question(self, build):
        model = build()
        assert not model.is_fitted
        for ask in (
            lambda: model.influence_factors(X, Y),
            lambda: model.influences(X_TEST, Y_TEST, X, Y),
            lambda: model.influences_from_factors(torch.ones(2, model.n_parameters), X, Y),
            lambda: model.solve(X, Y),
            lambda: model.influences_by_block(X_TEST, Y_TEST, X, Y),
            lambda: model.influence_factors_by_block(X, Y),
        ):
            with pytest.raises(NotFittedException, match=type(model).__name__):
                ask()

    def test_fit_returns_the_fitted_model(self, build):
        model = build()
        assert model.fit(batches()) is model
        assert model.is_fitted

    def test_parameters_are_counted_and_hooks_are_not_thread_safe(self, build):
        model = build()
        assert model.n_parameters == sum(p.numel() for p in CASE.model().parameters())
        assert not model.is_thread_safe
        assert model.factor_dtype == np.float64

    def test_influences_are_those_from_factors(self, build, expected: Tensor):
        model = build().fit(batches())
        factors = model.influence_factors(X_TEST, Y_TEST)
        assert factors.shape == (len(X_TEST), model.n_parameters)
        assert torch.allclose(model.influences_from_factors(factors, X, Y), expected, rtol=1e-7)
        assert torch.allclose(model.influences(X_TEST, Y_TEST, X, Y), expected, rtol=1e-7)

    def test_influences_are_those_from_the_models_own_representation(self, build, expected: Tensor):
        model = build().fit(batches())
        left = model.expanded(model.left(X_TEST, Y_TEST))
        assert torch.allclose(model.influences_from_left(left, X, Y), expected, rtol=1e-7)
        turned = model.left_of_factors(model.influence_factors(X_TEST, Y_TEST))
        assert torch.allclose(turned, left, rtol=1e-7, atol=1e-10)

    def test_without_training_side_the_test_side_is_both(self, build):
        model = build().fit(batches())
        both = model.influences(X_TEST, Y_TEST, X_TEST, Y_TEST)
        assert torch.allclose(model.influences(X_TEST, Y_TEST), both)
        perturbation = {"mode": InfluenceMode.Perturbation}
        moved = model.influences(X_TEST, Y_TEST, X_TEST, Y_TEST, **perturbation)
        assert torch.allclose(model.influences(X_TEST, Y_TEST, **perturbation), moved)

    def test_without_training_side_each_example_is_differentiated_once(self, monkeypatch: pytest.MonkeyPatch):
        model = direct().fit(batches())
        seen: list[int] = []
        fitted = model._require_fitted()
        gradients, right = fitted.gradients, fitted.right
        monkeypatch.setattr(
            fitted, "gradients", lambda o, batch: seen.append(len(batch[0])) or gradients(o, batch)
        )
        monkeypatch.setattr(fitted, "right", lambda batch: seen.append(len(batch[0])) or right(batch))
        model.influences(X_TEST, Y_TEST)
        assert seen == [len(X_TEST)]

    def test_a_training_example_that_is_its_own_test_example_helps(self, build):
        """The sign: more weight on an example lowers its own loss."""
        model = build().fit(batches())
        assert (model.influences(X, Y).diagonal() > 0).all()

    def test_a_perturbation_is_the_gradient_of_the_influence_by_the_training_input(self, build):
        model = build().fit(batches())
        moved = model.influences(X_TEST, Y_TEST, X[:3], Y[:3], InfluenceMode.Perturbation)
        assert moved.shape == (len(X_TEST), 3, *X.shape[1:])
        step, factors = 1e-6, model.influence_factors(X_TEST, Y_TEST)
        there, back = X[:3].clone(), X[:3].clone()
        there[:, 1] += step
        back[:, 1] -= step
        slope = (
            model.influences_from_factors(factors, there, Y[:3])
            - model.influences_from_factors(factors, back, Y[:3])
        ) / (2 * step)
        assert torch.allclose(moved[:, :, 1], slope, rtol=1e-5, atol=1e-7)

    def test_one_of_x_and_y_without_the_other_is_refused(self, build):
        model = build().fit(batches())
        with pytest.raises(ValueError, match="y: expected it beside x"):
            model.influences(X_TEST, Y_TEST, X)
        with pytest.raises(ValueError, match="x: expected it beside y"):
            model.influences_by_block(X_TEST, Y_TEST, y=Y)

    def test_an_unknown_mode_is_refused(self, build):
        model = build().fit(batches())
        with pytest.raises(UnsupportedInfluenceModeException, match="sideways"):
            model.influences(X_TEST, Y_TEST, X, Y, mode="sideways")

    def test_factors_of_another_width_are_refused(self, build):
        model = build().fit(batches())
        with pytest.raises(ValueError, match=r"z_test_factors: expected shape \[t, "):
            model.influences_from_factors(torch.ones(2, 3), X, Y)

    def test_a_pickled_model_answers_the_same(self, build):
        model = build().fit(DataLoader(TensorDataset(X, Y), batch_size=5))
        copy = pickle.loads(pickle.dumps(model))
        assert torch.equal(copy.influences(X_TEST, Y_TEST, X, Y), model.influences(X_TEST, Y_TEST, X, Y))

    def test_to_returns_the_model(self, build, expected: Tensor):
        """Mistake 7: `.to(device)` that returns nothing."""
        model = build().fit(batches())
        assert model.to(torch.device("cpu")) is model
        assert torch.allclose(model.influences(X_TEST, Y_TEST, X, Y), expected, rtol=1e-7)

    def test_half_precision_models_answer_in_float32(self):
        model = DirectInfluence(LOGISTIC.model(torch.bfloat16), LOGISTIC.loss, regularization=1.0)
        x, y = (part[:8] for part in LOGISTIC.train())
        assert model.factor_dtype == np.float32
        factors = model.fit([(x.bfloat16(), y)]).influence_factors(x.bfloat16(), y)
        assert factors.dtype == torch.float32


class TestFit:
    @pytest.mark.parametrize("size", [1, 5, 23])
    def test_batches_do_not_matter(self, build, size: int, expected: Tensor):
        model = build().fit(batches(size))
        assert torch.allclose(model.influences(X_TEST, Y_TEST, X, Y), expected, rtol=1e-7)

    @pytest.mark.parametrize("shuffle", [False, True])
    def test_a_loader_shuffled_or_not_gives_the_numbers_of_a_list(
        self, build, shuffle: bool, expected: Tensor
    ):
        loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=shuffle)
        assert torch.allclose(build().fit(loader).influences(X_TEST, Y_TEST, X, Y), expected, rtol=1e-7)

    def test_a_shuffled_loader_is_read_in_one_order_by_every_pass(self):
        read: list[int] = []

        class Recorded(TensorDataset):
            def __getitem__(self, index: Any) -> Any:
                read.append(int(index))
                return super().__getitem__(index)

        loader = DataLoader(Recorded(X, Y), batch_size=4, shuffle=True)
        model = conjugate(preconditioner=JacobiPreconditioner())
        model.fit(loader).influence_factors(X_TEST, Y_TEST)
        later = read[4:]  # the first batch is read alone, for the probe
        assert len(later) >= 2 * len(X)
        assert sorted(later[: len(X)]) == list(range(len(X)))
        assert later[: len(X)] == later[len(X) : 2 * len(X)]

    @pytest.mark.parametrize(("limit", "readings"), [(KEPT_BYTES, 1), (1, 2)])
    def test_a_fit_of_two_passes_reads_data_once_that_fits_into_memory(
        self, monkeypatch: pytest.MonkeyPatch, limit: int, readings: int
    ):
        monkeypatch.setattr(training_batches, "KEPT_BYTES", limit)
        read: list[int] = []

        class Recorded(TensorDataset):
            def __getitem__(self, index: Any) -> Any:
                read.append(int(index))
                return super().__getitem__(index)

        ekfac(update_diagonal=True).fit(DataLoader(Recorded(X, Y), batch_size=4))
        assert len(read) == 4 + readings * len(X)  # the first batch is read alone, for the probe

    @pytest.mark.parametrize("shuffle", [False, True])
    def test_a_dataset_of_tensors_is_cut_as_its_loader_collates(self, shuffle: bool):
        class Collated(TensorDataset):
            """Read example by example, as every other dataset."""

        def cut(dataset: TensorDataset) -> list[Any]:
            order = torch.Generator().manual_seed(1)
            return list(in_one_order(DataLoader(dataset, batch_size=5, shuffle=shuffle, generator=order)))

        tensors = (X, torch.arange(len(X)), X[:, None])
        for ours, theirs in zip(cut(TensorDataset(*tensors)), cut(Collated(*tensors)), strict=True):
            assert type(ours) is type(theirs)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def test_a_sampler_that_leaves_examples_out_is_respected(self):
        kept = [3, 1, 4, 15, 9, 2, 6, 5]
        loader = DataLoader(TensorDataset(X, Y), batch_size=3, sampler=kept)
        subset = DataLoader(Subset(TensorDataset(X, Y), sorted(kept)), batch_size=8)
        by_sampler, by_subset = (
            direct().fit(data).influences(X_TEST, Y_TEST, X, Y) for data in (loader, subset)
        )
        assert torch.allclose(by_sampler, by_subset)

    def test_a_loader_without_batching_is_read(self):
        loader = DataLoader(batches(), batch_size=None)
        assert direct().fit(loader).is_fitted

    def test_a_weighted_sampler_may_repeat_examples(self):
        sampler = WeightedRandomSampler([1.0] * len(X), 10, generator=torch.Generator().manual_seed(0))
        assert direct().fit(DataLoader(TensorDataset(X, Y), batch_size=3, sampler=sampler)).is_fitted

    @pytest.mark.parametrize("one_pass", [direct, ekfac, nystroem])
    def test_an_iterator_suffices_for_one_pass(self, one_pass: Build):
        model = one_pass().fit(iter(batches()))
        expected = one_pass().fit(batches()).influences(X_TEST, Y_TEST, X, Y)
        assert torch.allclose(model.influences(X_TEST, Y_TEST, X, Y), expected, rtol=1e-7)

    @pytest.mark.parametrize(
        "several",
        [
            lambda: conjugate(preconditioner=JacobiPreconditioner()),
            conjugate,
            lambda: ekfac(update_diagonal=True),
            arnoldi,
        ],
    )
    def test_an_iterator_is_refused_for_several_passes_before_any(self, several: Build):
        def unread() -> Iterator[Any]:
            raise AssertionError("the data was read")
            yield

        with pytest.raises(OneShotIterableError, match=r"data: expected .* pass a list, a DataLoader"):
            several().fit(unread())

    def test_no_data_is_refused(self, build):
        with pytest.raises(ValueError, match="data: expected at least one batch"):
            build().fit([])

    def test_a_loader_that_drops_all_of_its_examples_holds_none(self, build):
        for shuffle in (False, True):
            loader = DataLoader(TensorDataset(X, Y), batch_size=99, drop_last=True, shuffle=shuffle)
            with pytest.raises(ValueError, match="data: expected at least one batch"):
                build().fit(loader)

    def test_a_loaders_processes_are_set_up_as_the_user_says(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ):
        order = torch.Generator().manual_seed(1)
        loader = DataLoader(
            Subset(TensorDataset(X, Y), range(len(X))),
            batch_size=5,
            shuffle=True,
            generator=order,
            num_workers=1,
            worker_init_fn=print,
            multiprocessing_context="fork",
        )
        made: list[DataLoader[Any]] = []
        monkeypatch.setattr(
            training_data, "DataLoader", lambda *a, **k: made.append(DataLoader(*a, **k)) or made[-1]
        )
        kept = training_data._LoaderInOneOrder(loader)
        assert sum(len(x) for x, _ in kept) == len(X)
        assert (made[0].num_workers, made[0].worker_init_fn) == (1, print)
        assert made[0].multiprocessing_context.get_start_method() == "fork"
        assert sum(len(x) for x, _ in pickle.loads(pickle.dumps(kept))) == len(X)
        assert made[1].num_workers == 0
        assert capfd.readouterr().out == "0\n"

    def test_items_that_are_no_pairs_are_refused(self, build):
        with pytest.raises(ValueError, match=r"data: expected items \(x, y\), got tuple of 3"):
            build().fit([(X, Y, Y)])

    def test_dropout_left_on_is_refused(self):
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double().train()
        with pytest.raises(ValueError, match="dropout"):
            DirectInfluence(model, CASE.loss, regularization=1.0).fit(batches())


class TestRegularization:
    def test_another_regularization_needs_no_new_fit(self, build):
        changed = build().fit(batches())
        before = changed.revision
        assert changed.with_regularization(1.0) is changed
        assert changed.revision > before
        fitted = build(regularization=1.0).fit(batches())
        ask = (X_TEST, Y_TEST, X, Y)
        assert torch.allclose(changed.influences(*ask), fitted.influences(*ask), rtol=1e-9)

    def test_one_number_per_block_counts_for_its_block(self, layer_wise: Build):
        """Mistake 7: a dict per block refused because the check is inverted."""
        blocks = {"0": 0.1, "2": 0.5, "4": 2.0}
        by_dict = layer_wise(regularization=blocks).fit(batches())
        found = by_dict.influence_factors_by_block(X_TEST, Y_TEST)
        for block, number in blocks.items():
            alone = layer_wise(regularization=number).fit(batches())
            rows = alone.influence_factors_by_block(X_TEST, Y_TEST)[block]
            assert torch.allclose(found[block], rows, rtol=1e-7)

    @pytest.mark.parametrize("given", [{"0": 0.1}, {"0": 0.1, "2": 0.1, "4": 0.1, "5": 0.1}])
    def test_a_dict_that_does_not_cover_the_blocks_is_refused_and_changes_nothing(self, layer_wise, given):
        model = layer_wise().fit(batches())
        before = model.influences(X_TEST, Y_TEST, X, Y)
        with pytest.raises(ValueError, match="regularization"):
            model.with_regularization(given)
        assert torch.equal(model.influences(X_TEST, Y_TEST, X, Y), before)

    def test_one_that_the_fit_does_not_do_is_refused_and_changes_nothing(self):
        model = CgInfluence(MLP.model(), MLP.loss, 1.0, rtol=1e-3).fit(batches())
        before = model.influences(X_TEST, Y_TEST, X, Y)
        for refused, message in ((Relative(0.1), "expected 'trace'"), (-1.0, "regularization: ")):
            with pytest.raises(ValueError, match=message):
                model.with_regularization(refused)
            assert torch.equal(model.influences(X_TEST, Y_TEST, X, Y), before)

    @pytest.mark.parametrize(
        "model",
        [
            DirectInfluence,
            CgInfluence,
            ArnoldiInfluence,
            partial(NystroemSketchInfluence, rank=3),
            LissaInfluence,
            InverseHarmonicMeanInfluence,
        ],
    )
    def test_the_old_name_is_accepted_with_a_deprecation_warning(self, model):
        with pytest.warns(DeprecationWarning, match="hessian_regularization is called regularization"):
            old = model(CASE.model(), CASE.loss, hessian_regularization=0.25)
        assert old.method.regularization == 0.25

    def test_both_names_at_once_are_refused(self):
        with pytest.raises(TypeError, match="got both"):
            DirectInfluence(CASE.model(), CASE.loss, regularization=1.0, hessian_regularization=1.0)


class TestBlocks:
    @pytest.mark.parametrize("mode", list(InfluenceMode))
    def test_influences_by_block_sum_to_the_influences(self, layer_wise: Build, mode: InfluenceMode):
        model = layer_wise().fit(batches())
        parts = model.influences_by_block(X_TEST, Y_TEST, X, Y, mode)
        assert list(parts) == model.block_names == ["0", "2", "4"]
        whole = model.influences(X_TEST, Y_TEST, X, Y, mode)
        assert torch.allclose(torch.stack(list(parts.values())).sum(0), whole)
        assert all(part.shape == whole.shape for part in parts.values())

    def test_factors_by_block_give_influences_by_block(self, layer_wise: Build):
        model = layer_wise().fit(batches())
        factors = model.influence_factors_by_block(X_TEST, Y_TEST)
        found = model.influences_from_factors_by_block(factors, X, Y)
        for block, part in model.influences_by_block(X_TEST, Y_TEST, X, Y).items():
            assert torch.allclose(found[block], part)

    def test_the_full_structure_is_one_block_without_a_name(self):
        model = direct().fit(batches())
        (part,) = model.influences_by_block(X_TEST, Y_TEST).values()
        assert model.block_names == [""]
        assert torch.allclose(part, model.influences(X_TEST, Y_TEST))

    def test_flat_factors_stand_in_the_order_of_the_parameters_whatever_the_blocks(self):
        backwards = {"b": ["4.weight", "0.weight"], "a": ["2.weight", "0.bias", "4.bias"]}
        full = direct(regularization=1e6).fit(batches()).influence_factors(X_TEST, Y_TEST)
        custom = direct(regularization=1e6, block_structure=backwards).fit(batches())
        # At this λ the blocks hardly matter: factors are g / λ.
        assert torch.allclose(custom.influence_factors(X_TEST, Y_TEST), full, rtol=1e-4, atol=1e-12)

    def test_factors_of_other_blocks_are_refused(self, layer_wise: Build):
        model = layer_wise().fit(batches())
        with pytest.raises(ValueError, match="each of the blocks"):
            model.influences_from_factors_by_block({"0": torch.ones(2, 25)}, X, Y)


class TestCg:
    def test_the_defaults_are_pydvls(self):
        method = CgInfluence(CASE.model(), CASE.loss).method
        assert (method.rtol, method.atol, method.maxiter) == (1e-4, 1e-6, None)
        assert (method.simultaneous, method.preconditioner, method.regularization) == (False, None, 0.0)

    def test_the_old_names_are_accepted(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = CgInfluence(
                CASE.model(), CASE.loss, use_block_cg=True, pre_conditioner=NystroemPreconditioner(rank=2)
            )
        assert [str(warning.message) for warning in caught] == [
            "use_block_cg is called solve_simultaneously now",
            "pre_conditioner is called preconditioner now",
        ]
        assert model.method.simultaneous
        assert model.method.preconditioner == NystroemPreconditioner(rank=2)

    @pytest.mark.parametrize("preconditioner", [JacobiPreconditioner(5), NystroemPreconditioner(rank=10)])
    def test_a_preconditioner_changes_no_number(self, preconditioner):
        expected = direct().fit(batches()).influences(X_TEST, Y_TEST, X, Y)
        model = conjugate(preconditioner=preconditioner).fit(batches())
        assert torch.allclose(model.influences(X_TEST, Y_TEST, X, Y), expected, rtol=1e-7)

    def test_how_each_solve_ended_reaches_the_caller(self):
        model = conjugate(maxiter=2).fit(batches())
        with pytest.warns(SolverWarning, match=f"{len(X_TEST)} of {len(X_TEST)} right-hand sides did not"):
            solved = model.solve(X_TEST, Y_TEST)
        report = solved.report
        assert report.status.tolist() == [SolverStatus.MAX_ITERATIONS] * len(X_TEST)
        assert report.iterations.tolist() == [2] * len(X_TEST)
        assert (report.residual > 0).all()
        assert model.solver_report is report

    def test_every_way_a_solve_can_end_reaches_the_caller_and_the_cluster(self):
        """Right-hand sides that are chosen for it: with θ = 0 the gradient of an example is its label."""
        curvature = torch.tensor([1.0, 2.0, 4.0, -3.0], dtype=torch.float64)

        class Theta(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.theta = nn.Parameter(torch.zeros(4, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                return self.theta + 0 * x

        def loss(outputs: Tensor, y: Tensor) -> Tensor:
            return (0.5 * curvature * outputs**2 + y * outputs).sum()

        x, y = torch.zeros(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
        y[1], y[2], y[3] = torch.tensor([1.0, 1, 1, 0]), torch.tensor([0.0, 0, 0, 1]), torch.inf
        model = CgInfluence(Theta(), loss, 0.01, maxiter=1, warn_on_max_iteration=False)
        model.fit([(torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64))])
        expected = [
            SolverStatus.CONVERGED,
            SolverStatus.MAX_ITERATIONS,
            SolverStatus.INDEFINITE,
            SolverStatus.NOT_FINITE,
        ]
        assert model.solve(x, y).report.status.tolist() == expected
        calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), DisableClientSingleThreadCheck)
        chunked = (da.from_array(part.numpy(), chunks=(3, -1)) for part in (x, y))
        factors, report = dask.compute(
            *calculator.influence_factors_and_report(*chunked), scheduler="synchronous"
        )
        assert report["status"].tolist() == expected
        assert np.isfinite(factors).all(axis=1).tolist() == [True, True, True, False]

    def test_solves_that_converge_are_reported_without_a_warning(self):
        model = conjugate().fit(batches())
        with warnings.catch_warnings():
            warnings.simplefilter("error", SolverWarning)
            model.influence_factors(X_TEST, Y_TEST)
        assert model.solver_report is not None
        assert model.solver_report.status.tolist() == [SolverStatus.CONVERGED] * len(X_TEST)

    def test_the_warning_can_be_turned_off_and_the_report_stays(self):
        model = conjugate(maxiter=1, warn_on_max_iteration=False).fit(batches())
        with warnings.catch_warnings():
            warnings.simplefilter("error", SolverWarning)
            model.influence_factors(X_TEST, Y_TEST)
        assert model.solver_report is not None
        assert model.solver_report.status.tolist() == [SolverStatus.MAX_ITERATIONS] * len(X_TEST)


class TestEkfac:
    def test_the_defaults_are_pydvls(self):
        model = EkfacInfluence(CASE.model())
        assert model.loss is nn.functional.cross_entropy
        assert (model.method.update_diagonal, model.method.regularization) == (False, 0.0)
        assert (model.method.expectation, model.method.samples) == ("sampled", 1)

    def test_both_names_of_the_regularization_mean_the_same(self):
        one, other = (
            EkfacInfluence(CASE.model(), False, 0.5),
            EkfacInfluence(CASE.model(), regularization=0.5),
        )
        assert one.method == other.method
        with pytest.raises(TypeError, match="got both"):
            EkfacInfluence(CASE.model(), hessian_regularization=0.5, regularization=0.5)

    def test_layers_are_its_blocks(self):
        model = ekfac(update_diagonal=True).fit(batches())
        factors = model.influence_factors_by_layer(X_TEST, Y_TEST)
        assert list(factors) == ["0", "2", "4"]
        by_layer = model.influences_by_layer(X_TEST, Y_TEST, X, Y)
        from_factors = model.influences_from_factors_by_layer(factors, X, Y)
        assert all(torch.allclose(by_layer[layer], from_factors[layer]) for layer in factors)
        assert torch.allclose(sum(by_layer.values()), model.influences(X_TEST, Y_TEST, X, Y))

    def test_exploring_regularizations_leaves_the_models_own(self):
        model = ekfac().fit(batches())
        explored = model.explore_hessian_regularization(X_TEST, Y_TEST, [0.01, 1.0])
        assert model.method.regularization == λ
        for number, by_layer in explored.items():
            there = ekfac(regularization=number).fit(batches()).influences_by_layer(X_TEST, Y_TEST)
            assert list(there) == list(by_layer)
            assert all(torch.allclose(by_layer[layer], there[layer]) for layer in there)

    def test_layers_it_cannot_treat_are_refused_by_name_unless_told_otherwise(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double().eval()
        with pytest.raises(NotImplementedLayerRepresentationException, match=r"layer 1: .*unsupported="):
            EkfacInfluence(model)
        assert EkfacInfluence(model, unsupported="exclude").n_parameters == 35
        assert EkfacInfluence(model, unsupported="diagonal").n_parameters == 43

    def test_the_refusal_names_all_layers_that_it_can_treat(self):
        with pytest.raises(ValueError, match="Conv3d, Embedding or the Conv1D of transformers"):
            EkfacInfluence(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


class TestArguments:
    """What cannot be a model or a loss is refused where it is given, not where it is first used."""

    def test_a_model_that_is_no_module_is_refused(self):
        with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got NoneType"):
            DirectInfluence(None, F.cross_entropy, 0.1)

    def test_a_loss_that_is_no_function_is_refused(self):
        with pytest.raises(TypeError, match=r"^loss: expected a function, .*, got NoneType"):
            DirectInfluence(nn.Linear(2, 2), None, 0.1)


class TestSecondOrderMode:
    def test_pydvls_gauss_newton_is_the_empirical_fisher_with_a_warning(self):
        with pytest.warns(DeprecationWarning, match="EMPIRICAL_FISHER"):
            old = direct(second_order_mode=SecondOrderMode.GAUSS_NEWTON)
        new = direct(second_order_mode=SecondOrderMode.EMPIRICAL_FISHER)
        assert old.method == new.method

    def test_another_word_is_refused(self):
        with pytest.raises(ValueError, match=r"second_order_mode: expected one of 'hessian'.*got 'newton'"):
            direct(second_order_mode="newton")


class TestConverters:
    def test_tensors_that_require_grad_are_converted(self):
        """Mistake 9."""
        tensor = torch.ones(2, requires_grad=True)
        assert TorchNumpyConverter().to_numpy(tensor).tolist() == [1, 1]

    def test_bfloat16_becomes_float32(self):
        """Mistake 9."""
        array = TorchNumpyConverter().to_numpy(torch.tensor([1.5], dtype=torch.bfloat16))
        assert array.dtype == np.float32
        assert array.tolist() == [1.5]

    def test_read_only_arrays_become_tensors_without_a_warning(self):
        array = np.arange(3.0)
        array.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tensor = TorchNumpyConverter(torch.device("cpu")).from_numpy(array)
        assert tensor.tolist() == [0, 1, 2]

    def test_a_dataset_becomes_arrays_of_its_entries_in_chunks(self):
        x, y = torch_dataset_to_dask_array(TensorDataset(X, Y), chunk_size=4)
        assert x.chunks[0] == y.chunks[0] == (4, 4, 4, 4, 4, 3)
        assert (x.dtype, y.dtype) == (np.float64, np.int64)
        assert np.array_equal(x.compute(scheduler="synchronous"), X.numpy())
        assert np.array_equal(y.compute(scheduler="synchronous"), Y.numpy())

    def test_the_resulting_dtype_is_that_of_the_floats(self):
        x, y = torch_dataset_to_dask_array(TensorDataset(X, Y), 10, resulting_dtype=np.float32)
        assert (x.dtype, y.dtype) == (np.float32, np.int64)
        assert x.compute(scheduler="synchronous").dtype == np.float32

    def test_a_dataset_without_a_length_is_counted_or_told(self):
        class Endless:
            def __getitem__(self, index: int) -> tuple[float, int]:
                if index >= 7:
                    raise IndexError(index)
                return float(index), index

        for total in (None, 7):
            x, y = torch_dataset_to_dask_array(Endless(), 3, total_size=total)  # type: ignore[arg-type]
            assert x.compute(scheduler="synchronous").tolist() == list(range(7))
            assert y.chunks == ((3, 3, 1),)

    def test_a_total_size_that_contradicts_the_length_is_refused(self):
        with pytest.raises(ValueError, match="total_size: expected 23"):
            torch_dataset_to_dask_array(TensorDataset(X, Y), 3, total_size=22)

    def test_chunks_of_no_examples_are_refused(self):
        with pytest.raises(ValueError, match="chunk_size: expected at least 1"):
            torch_dataset_to_dask_array(TensorDataset(X, Y), 0)


@pytest.mark.parametrize(
    ("build", "argument"), [(conjugate, "progress"), (conjugate, "precompute_grad"), (lissa, "progress")]
)
def test_an_argument_without_effect_says_so_where_the_model_is_made(build: Build, argument: str) -> None:
    with pytest.warns(UserWarning, match=f"{argument} has no effect: see solver_report") as told:
        build(**{argument: True})
    assert [warning.filename for warning in told] == [__file__]


class TestWarnings:
    """Python shows a warning once per line and text: each is told at the line that called the library."""

    @pytest.mark.parametrize(
        "call",
        [
            lambda influence: influence.influences(X, Y),
            lambda influence: influence.influences(X, Y, X, Y),
            lambda influence: influence.influence_factors(X, Y),
            lambda influence: influence.self_influences(X, Y),
        ],
    )
    def test_solves_that_end_early_are_told_where_they_were_asked_for(
        self, call: Callable[[CgInfluence], Any]
    ) -> None:
        influence = conjugate(maxiter=1).fit([(X, Y)])
        with pytest.warns(SolverWarning, match="did not converge") as told:
            call(influence)
        assert {warning.filename for warning in told} == {__file__}

    @pytest.mark.parametrize("build", [arnoldi, nystroem])
    def test_a_test_example_that_is_not_finite_is_told_by_all(self, build: Build) -> None:
        influence = build().fit([(X, Y)])
        spoiled = X.clone()
        spoiled[1] = torch.nan
        with pytest.warns(SolverWarning, match=rf"1 of {len(X)} right-hand sides .*1 not_finite") as told:
            influence.influences(spoiled, Y, X, Y)
        assert {warning.filename for warning in told} == {__file__}


class TestExamplesScoredAtOnce:
    """On a processor, with a layer of a million parameters whose gradients leave its cache."""

    N = 100

    @pytest.mark.parametrize(
        ("method", "captured", "longest"),
        [(EkfacInfluence, 2**30, 100), (EkfacInfluence, 1, 25), (GradDotInfluence, 2**30, 25)],
        ids=["in pieces", "in pieces that capture too much", "whole"],
    )
    def test_are_more_where_their_gradients_are_formed_in_pieces(
        self,
        method: type[TorchInfluenceFunctionModel],
        captured: int,
        longest: int,
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.setattr(base, "CAPTURED_BYTES", captured)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 3))
        x, y = torch.randn(self.N, 1000), torch.randint(3, (self.N,))
        λ = {} if method is GradDotInfluence else {"hessian_regularization": 0.1}
        influence = method(model, loss=F.cross_entropy, **λ).fit([(x[:8], y[:8])])
        factors = influence.influence_factors(x[:2], y[:2])
        lengths: list[int] = []
        model.register_forward_hook(lambda _module, given, _output: lengths.append(len(given[0])))
        found = influence.influences_from_factors(factors, x, y)
        assert max(lengths) == longest
        one_by_one = [
            influence.influences_from_factors(factors, x[i : i + 1], y[i : i + 1]) for i in range(5)
        ]
        torch.testing.assert_close(found[:, :5], torch.cat(one_by_one, dim=1), rtol=1e-4, atol=1e-5)
