"""Models that a user composes of the public pieces, held to the oracle; gradient providers and forms."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from influence_calculator import (
    BlockMode,
    DaskInfluenceCalculator,
    DisableClientSingleThreadCheck,
    InfluenceMode,
    NestedTorchCatAggregator,
    NotFittedException,
    Relative,
    SequentialInfluenceCalculator,
    SolverStatus,
    TorchNumpyConverter,
    TrainingModeError,
    UnsupportedInfluenceModeException,
    UnsupportedInputError,
    torch_dataset_to_dask_array,
)
from influence_calculator.chunk_tasks import WorkerSide
from influence_calculator.torch.base import (
    TorchBatch,
    TorchBlockMapper,
    TorchComposableInfluence,
    TorchGradientProvider,
    TorchOperatorGradientComposition,
)
from influence_calculator.torch.batch_operation import GaussNewtonBatchOperation
from influence_calculator.torch.functional import LowRankProductRepresentation
from influence_calculator.torch.operator import (
    CgOperator,
    GaussNewtonOperator,
    HessianOperator,
    LissaOperator,
    LowRankOperator,
    MatrixOperator,
)
from influence_calculator.types import GradientProvider
from model_cases import CONV2D, MLP, TRANSFORMER, ModelCase
from references import REGULARIZATIONS, reference

X, Y = MLP.train()
X_TEST, Y_TEST = MLP.test()
BLOCKS = {"ends": ["4.weight", "0.bias"], "middle": ["2.weight", "0.weight", "4.bias"]}
"""Neither block's columns stand together in the flat order."""


def data() -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(11), Y.split(11), strict=True))


class Mixture(TorchComposableInfluence):
    """Conjugate gradients on the block "ends", all eigenpairs on the others."""

    is_thread_safe = False
    rtol = 1e-12

    def _create_block(
        self, block_params: dict[str, Tensor], data: Iterable[Any], regularization: float | None
    ) -> TorchOperatorGradientComposition[Any]:
        curvature = GaussNewtonOperator(self.model, MLP.loss, data, restrict_to=block_params)
        provider = TorchGradientProvider(self.model, MLP.loss, restrict_to=block_params)
        if "4.weight" in block_params:
            solved = CgOperator(curvature, regularization, rtol=self.rtol, atol=0.0, use_block_cg=True)
            return TorchOperatorGradientComposition(solved, provider)
        matrix = curvature.apply(torch.eye(curvature.input_size, dtype=torch.float64))
        known = LowRankProductRepresentation(*torch.linalg.eigh(matrix))
        return TorchOperatorGradientComposition(LowRankOperator(known, regularization), provider)


def columns() -> list[Tensor]:
    places = oracle.columns(MLP.model())
    return [
        torch.cat([torch.arange(60)[places[n]] for n in sorted(names, key=list(places).index)])
        for names in BLOCKS.values()
    ]


def expected_factors(λ: float | dict[str, float]) -> Tensor:
    explicit = reference(MLP, "empirical_fisher")
    factors = torch.zeros_like(explicit.test)
    for (block, _), own in zip(BLOCKS.items(), columns(), strict=True):
        part = explicit.curvature[own[:, None], own]
        factors[:, own] = oracle.factors(part, λ[block] if isinstance(λ, dict) else λ, explicit.test[:, own])
    return factors


def expected_influences(λ: float | dict[str, float]) -> Tensor:
    return expected_factors(λ) @ reference(MLP, "empirical_fisher").train.T


@pytest.fixture
def model() -> Mixture:
    return Mixture(MLP.model(), BLOCKS, 0.1).fit(data())


class TestAModelComposedOfPieces:
    @pytest.mark.parametrize("λ", REGULARIZATIONS)
    def test_factors_and_influences_are_those_of_the_block_diagonal_matrix(self, λ: float) -> None:
        mixture = Mixture(MLP.model(), BLOCKS, λ).fit(data())
        bound = reference(MLP, "empirical_fisher").bound(λ)
        factors = mixture.influence_factors(X_TEST, Y_TEST)
        oracle.assert_close(factors, expected_factors(λ), bound)
        oracle.assert_close(mixture.influences(X_TEST, Y_TEST, X, Y), expected_influences(λ), bound)
        oracle.assert_close(mixture.influences_from_factors(factors, X, Y), expected_influences(λ), bound)
        on_each_other = mixture.influences(X_TEST, Y_TEST)
        oracle.assert_close(
            on_each_other, expected_factors(λ) @ reference(MLP, "empirical_fisher").test.T, bound
        )

    @pytest.mark.parametrize("n", [2, 9])
    def test_perturbations_are_the_inputs_gradients_of_the_influences(self, model: Mixture, n: int) -> None:
        expected = oracle.perturbations(MLP.model(), MLP.loss, expected_factors(0.1), X[:n], Y[:n])
        mode = InfluenceMode.Perturbation
        oracle.assert_close(model.influences(X_TEST, Y_TEST, X[:n], Y[:n], mode), expected, 1e-6)
        factors = model.influence_factors(X_TEST, Y_TEST)
        oracle.assert_close(model.influences_from_factors(factors, X[:n], Y[:n], mode), expected, 1e-6)

    @pytest.mark.parametrize("mode", list(InfluenceMode))
    def test_over_the_blocks_they_sum_to_the_whole(self, model: Mixture, mode: InfluenceMode) -> None:
        whole = model.influences(X_TEST, Y_TEST, X, Y, mode)
        by_block = model.influences_by_block(X_TEST, Y_TEST, X, Y, mode)
        assert list(by_block) == model.block_names == list(BLOCKS)
        oracle.assert_close(by_block["ends"] + by_block["middle"], whole, 1e-12)
        factors = model.influence_factors_by_block(X_TEST, Y_TEST)
        again = model.influences_from_factors_by_block(factors, X, Y, mode)
        for block, part in by_block.items():
            oracle.assert_close(again[block], part, 1e-8)
        own = columns()[0]
        if mode is InfluenceMode.Up:
            oracle.assert_close(
                by_block["ends"],
                expected_factors(0.1)[:, own] @ reference(MLP, "empirical_fisher").train[:, own].T,
                1e-6,
            )

    def test_another_regularization_needs_no_new_fit(self, model: Mixture) -> None:
        revision = model.revision
        λ = {"ends": 0.5, "middle": 0.02}
        assert model.with_regularization(λ) is model
        assert model.revision > revision
        oracle.assert_close(model.influences(X_TEST, Y_TEST, X, Y), expected_influences(λ), 1e-6)
        given = Mixture(MLP.model(), BLOCKS, λ).fit(data())
        oracle.assert_close(given.influences(X_TEST, Y_TEST, X, Y), expected_influences(λ), 1e-6)

    def test_a_mapping_that_misses_a_block_or_names_another_is_refused(self, model: Mixture) -> None:
        for wrong in ({"ends": 0.1}, {"ends": 0.1, "middle": 0.1, "head": 1.0}):
            with pytest.raises(ValueError, match="expected one number for each of the blocks"):
                model.with_regularization(wrong)
            with pytest.raises(ValueError, match="expected one number for each of the blocks"):
                Mixture(MLP.model(), BLOCKS, wrong)
        with pytest.raises(ValueError, match="not negative"):
            model.with_regularization(-1.0)
        with pytest.raises(ValueError, match="numbers above 0, got 0"):
            model.with_regularization({"ends": 0.5, "middle": 0.0})
        oracle.assert_close(model.influences(X_TEST, Y_TEST, X, Y), expected_influences(0.1), 1e-6)

    def test_a_refused_regularization_leaves_operators_the_one_that_they_had(self) -> None:
        """Which `_create_block` may have chosen itself."""

        class Chosen(Mixture):
            def _create_block(self, block_params: Any, data: Any, regularization: Any) -> Any:
                return super()._create_block(block_params, data, 0.1)

        chosen = Chosen(MLP.model(), BLOCKS).fit(data())
        expected = chosen.influences(X_TEST, Y_TEST, X, Y)
        with pytest.raises(ValueError, match="numbers above 0, got 0"):
            chosen.with_regularization({"ends": 0.5, "middle": 0.0})
        assert chosen.block_mapper is not None
        assert [block.op.regularization for _, block in chosen.block_mapper.items()] == [0.1, 0.1]
        assert torch.equal(chosen.influences(X_TEST, Y_TEST, X, Y), expected)

    def test_a_regularization_relative_to_a_curvature_is_refused_with_the_cure(self, model: Mixture) -> None:
        for relative in (Relative(0.1), {"ends": 0.1, "middle": Relative(0.1)}):
            with pytest.raises(
                ValueError, match=r"regularization: expected numbers.*got Relative.*_create_block"
            ):
                Mixture(MLP.model(), BLOCKS, relative)  # type: ignore[arg-type]
            with pytest.raises(
                ValueError, match=r"regularization: expected numbers.*got Relative.*_create_block"
            ):
                model.with_regularization(relative)  # type: ignore[arg-type]

    @pytest.mark.parametrize("mode", list(InfluenceMode))
    def test_no_example_has_no_row_and_no_column(self, model: Mixture, mode: InfluenceMode) -> None:
        none, test = (X[:0], Y[:0]), (X_TEST, Y_TEST)
        features = MLP.features if mode is InfluenceMode.Perturbation else ()
        for case, shape in (((*none, X, Y), (0, 23)), ((*test, *none), (7, 0)), (none, (0, 0))):
            assert model.influences(*case, mode=mode).shape == (*shape, *features)
            for part in model.influences_by_block(*case, mode=mode).values():
                assert part.shape == (*shape, *features)
        factors = model.influence_factors(*none)
        assert factors.shape == (0, 60)
        assert factors.dtype is torch.float64
        assert model.influences_from_factors(factors, X, Y, mode).shape == (0, 23, *features)
        filled = model.influence_factors(*test)
        assert model.influences_from_factors(filled, *none, mode).shape == (7, 0, *features)
        assert model.self_influences(*none).shape == (0,)

    def test_several_inputs_are_taken_and_moved_in_their_structure(self) -> None:
        class TwoInputs(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = MLP.model()

            def forward(self, x: dict[str, Any]) -> Tensor:
                answer: Tensor = self.net(torch.cat([x["left"], x["right"][0]], 1))
                return answer

        def inputs(x: Tensor) -> dict[str, Any]:
            return {"left": x[:, :1], "right": [x[:, 1:]], "ids": torch.arange(len(x))}

        blocks = {block: [f"net.{name}" for name in names] for block, names in BLOCKS.items()}

        class Renamed(Mixture):
            def _create_block(self, block_params: Any, data: Any, regularization: Any) -> Any:
                curvature = GaussNewtonOperator(self.model, MLP.loss, data, restrict_to=block_params)
                provider = TorchGradientProvider(self.model, MLP.loss, restrict_to=block_params)
                solved = CgOperator(curvature, regularization, rtol=1e-12, atol=0.0)
                return TorchOperatorGradientComposition(solved, provider)

        mixture = Renamed(TwoInputs().eval(), blocks, 0.1).fit([(inputs(x), y) for x, y in data()])
        asked = inputs(X_TEST), Y_TEST, inputs(X), Y
        oracle.assert_close(mixture.influences(*asked), expected_influences(0.1), 1e-6)
        moved = mixture.influences(*asked, mode=InfluenceMode.Perturbation)
        expected = oracle.perturbations(MLP.model(), MLP.loss, expected_factors(0.1), X, Y)
        assert moved["ids"] is None
        oracle.assert_close(torch.cat([moved["left"], moved["right"][0]], -1), expected, 1e-6)
        provider = TorchGradientProvider(mixture.model, MLP.loss, None)
        mixed = provider.mixed_grads(TorchBatch(inputs(X[:2]), Y[:2]))
        assert mixed["net.0.weight"]["right"][0].shape == (2, 3, 5, 4)

    def test_what_is_no_tensor_is_refused_by_its_place(self, model: Mixture) -> None:
        with pytest.raises(
            ValueError, match=r"batch\['x'\]: expected tensors with examples first, got ndarray"
        ):
            model.influences(X_TEST.numpy(), Y_TEST)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"batch\['y'\]: expected tensors.*got a number of shape \[\]"):
            model.influences(X_TEST, Y_TEST.sum())

    def test_factors_of_other_blocks_or_widths_are_refused(self, model: Mixture) -> None:
        factors = model.influence_factors_by_block(X_TEST, Y_TEST)
        for wrong in ({}, {"ends": factors["ends"]}, {**factors, "ends": factors["ends"][:, 1:]}):
            with pytest.raises(
                ValueError, match=r"z_test_factors: expected \[t, width\] for each of the blocks"
            ):
                model.influences_from_factors_by_block(wrong, X, Y)
        with pytest.raises(NotFittedException):
            Mixture(MLP.model(), BLOCKS, 0.1).influences_from_factors_by_block({}, X, Y)

    @pytest.mark.parametrize(
        "cut",
        [
            lambda _: {"batch_size": 5, "shuffle": True, "drop_last": True},
            lambda order: {"batch_sampler": order},
            lambda order: {"batch_size": None, "sampler": order},
        ],
        ids=["batches", "batches of a sampler", "no collation"],
    )
    def test_all_blocks_see_the_examples_that_a_loader_drew_once(self, cut: Any) -> None:
        """Three of 23 are dropped. What a block is given still says what the user's loader says."""
        dataset = torch.utils.data.TensorDataset(X, torch.arange(23))
        order = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(range(23)), 5, drop_last=True)
        loader: Any = torch.utils.data.DataLoader(dataset, **cut(order))
        training, seen = data(), []

        class Recording(Mixture):
            def _create_block(self, block_params: Any, data: Any, regularization: Any) -> Any:
                assert (data.dataset, data.batch_size, len(data)) == (dataset, loader.batch_size, 4)
                seen.extend(torch.cat([numbers for _, numbers in data]).tolist() for _ in range(2))
                return super()._create_block(block_params, training, regularization)

        Recording(MLP.model(), BLOCKS, 0.1).fit(loader)
        assert len(seen) == 4
        assert all(numbers == seen[0] for numbers in seen)
        assert len(set(seen[0])) == 20

    def test_columns_in_another_order_are_refused(self) -> None:
        class Reversed(Mixture):
            turned = ""

            def _create_block(self, block_params: Any, data: Any, regularization: Any) -> Any:
                turned = dict(reversed(block_params.items()))
                by_operator, by_gradients = (
                    turned if self.turned == part else block_params for part in ("operator", "gradients")
                )
                operation = GaussNewtonBatchOperation(self.model, MLP.loss, by_operator)
                operator: Any = LissaOperator(operation, data, regularization)
                if "4.weight" in block_params:
                    curvature = GaussNewtonOperator(self.model, MLP.loss, data, restrict_to=by_operator)
                    operator = CgOperator(curvature, regularization)
                provider = TorchGradientProvider(self.model, MLP.loss, restrict_to=by_gradients)
                return TorchOperatorGradientComposition(operator, provider)

        for blocks, block, names in (
            ({"ends": ["4.weight", "0.bias"]}, "ends", "0.bias, 4.weight, got 4.weight, 0.bias"),
            ({"middle": ["2.weight", "4.bias"]}, "middle", "2.weight, 4.bias, got 4.bias, 2.weight"),
        ):
            for part, told in (("operator", "an operator"), ("gradients", "gradients")):
                Reversed.turned = part
                with pytest.raises(ValueError, match=f"block '{block}': expected {told} by.*order, {names}"):
                    Reversed(MLP.model(), blocks, 0.1).fit(data())
            Reversed.turned = ""
            Reversed(MLP.model(), blocks, 0.1).fit(data())

    def test_how_solves_ended_is_reported_over_the_blocks(self, model: Mixture) -> None:
        model.influence_factors(X_TEST, Y_TEST)
        assert model.solver_report is not None
        assert model.solver_report.status.tolist() == [SolverStatus.CONVERGED] * 7
        assert (model.solver_report.iterations > 0).all()
        model.influences(X_TEST[:3], Y_TEST[:3], X, Y)
        assert len(model.solver_report.status) == 3

    def test_moved_and_pickled_it_is_the_same(self, model: Mixture) -> None:
        expected = model.influences(X_TEST, Y_TEST, X, Y)
        revision = model.revision
        assert model.to("cpu") is model
        assert model.revision > revision
        again = pickle.loads(pickle.dumps(model))
        oracle.assert_close(again.influences(X_TEST, Y_TEST, X, Y), expected, 1e-12)

    def test_it_is_sent_on_as_it_came_also_while_it_computes(self, model: Mixture) -> None:
        """A worker's side is asked for while its modules hold other parameters, and hooks."""
        expected = model.influence_factors(X_TEST, Y_TEST)
        arrived = pickle.loads(pickle.dumps(WorkerSide(model, TorchNumpyConverter(), model.factor_dtype)))
        sent: list[bytes] = []
        hook = arrived.model.model.register_forward_hook(lambda *_: sent.append(pickle.dumps(arrived)))
        arrived.model.influence_factors(X_TEST, Y_TEST)
        hook.remove()
        assert sent
        for again in map(pickle.loads, sent):
            assert not any(module._forward_hooks for module in again.model.model.modules())
            oracle.assert_close(again.model.influence_factors(X_TEST, Y_TEST), expected, 1e-12)

    def test_both_calculators_take_it(self, model: Mixture) -> None:
        model.model.float()
        mixture = Mixture(model.model, BLOCKS, 0.1)
        mixture.rtol = 1e-6
        mixture.fit([(x.float(), y) for x, y in data()])
        train = torch.utils.data.TensorDataset(X.float(), Y)
        test = torch.utils.data.TensorDataset(X_TEST.float(), Y_TEST)
        calculator = DaskInfluenceCalculator(mixture, TorchNumpyConverter(), DisableClientSingleThreadCheck)
        sides = *torch_dataset_to_dask_array(test, 3), *torch_dataset_to_dask_array(train, 5)
        computed = calculator.influences(*sides).compute(scheduler="synchronous")
        assert computed.dtype == np.float32
        oracle.assert_close(torch.from_numpy(computed), expected_influences(0.1), 1e-3)
        loaders = [torch.utils.data.DataLoader(part, batch_size=4) for part in (test, train)]
        lazy = SequentialInfluenceCalculator(mixture).influences(*loaders)
        oracle.assert_close(lazy.compute(NestedTorchCatAggregator()), expected_influences(0.1), 1e-3)

    def test_what_it_is_asked_too_early_or_wrongly_is_refused(self) -> None:
        mixture = Mixture(MLP.model(), BLOCKS, 0.1)
        assert not mixture.is_fitted
        assert mixture.n_parameters == 60
        for ask in (mixture.influences, mixture.influences_by_block, mixture.influence_factors):
            with pytest.raises(NotFittedException):
                ask(X_TEST, Y_TEST)
        mixture.fit(data())
        with pytest.raises(ValueError, match="y: expected it beside x"):
            mixture.influences_by_block(X_TEST, Y_TEST, X)
        with pytest.raises(ValueError, match=r"expected shape \[t, 60\]"):
            mixture.influences_from_factors(torch.ones(2, 59), X, Y)
        with pytest.raises(UnsupportedInfluenceModeException):
            mixture.influences_by_block(X_TEST, Y_TEST, X, Y, "sideways")  # type: ignore[arg-type]

    def test_an_operator_of_another_width_or_without_regularization_is_refused_by_its_block(self) -> None:
        class Wrong(Mixture):
            def _create_block(self, block_params: Any, data: Any, regularization: Any) -> Any:
                composed = super()._create_block(block_params, data, regularization)
                return TorchOperatorGradientComposition(MatrixOperator(torch.eye(self.width)), composed.gp)

        Wrong.width = 60  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="block 'ends': expected an operator of 17 columns"):
            Wrong(MLP.model(), BLOCKS, 0.1).fit(data())
        Wrong.width = 60  # type: ignore[attr-defined]
        whole = Wrong(MLP.model(), BlockMode.FULL, 0.1).fit(data())
        with pytest.raises(ValueError, match="block '': expected an operator whose regularization"):
            whole.with_regularization(0.2)

    def test_layers_are_blocks_too(self) -> None:
        mixture = Mixture(MLP.model(), BlockMode.LAYER_WISE, 0.1).fit(data())
        assert mixture.block_names == ["0", "2", "4"]
        assert mixture.influences(X_TEST, Y_TEST, X, Y).shape == (7, 23)

    def test_a_change_of_an_operators_regularization_from_outside_is_noticed(self, model: Mixture) -> None:
        """By calculators, which send a model to their workers again."""
        composed = model
        before = composed.as_of_now()
        assert composed.as_of_now() == before
        block = next(iter(composed.block_mapper.items()))[1]
        block.op.regularization = 5.0
        assert composed.as_of_now() != before
        again = composed.as_of_now()
        with torch.no_grad():
            next(composed.model.parameters()).mul_(2)
        assert composed.as_of_now() != again


class TestGradients:
    @pytest.mark.parametrize("case", [MLP, CONV2D, TRANSFORMER], ids=repr)
    def test_gradients_are_those_of_one_example_at_a_time(self, case: ModelCase) -> None:
        provider = TorchGradientProvider(case.model(), case.loss, None)
        expected = reference(case, "empirical_fisher").test
        batch = TorchBatch(*case.test())
        oracle.assert_close(provider.flat_grads(batch), expected, 1e-10)
        by_name = provider.grads(batch)
        assert {n: tuple(v.shape) for n, v in by_name.items()} == {
            n: (7, *p.shape) for n, p in case.model().named_parameters()
        }
        oracle.assert_close(torch.cat([v.flatten(1) for v in by_name.values()], 1), expected, 1e-10)
        rows = torch.randn(3, expected.shape[1], generator=torch.Generator().manual_seed(3)).double()
        oracle.assert_close(provider.jacobian_prod(batch, rows), rows @ expected.T, 1e-10)

    @pytest.mark.parametrize("case", [MLP, CONV2D], ids=repr)
    def test_mixed_gradients_are_derivatives_of_gradients_by_the_input(self, case: ModelCase) -> None:
        provider = TorchGradientProvider(case.model(), case.loss, None)
        x, y = (part[:2] for part in case.test())
        width = reference(case, "empirical_fisher").test.shape[1]
        identity = torch.eye(width, dtype=torch.float64)
        expected = oracle.perturbations(case.model(), case.loss, identity, x, y)
        flat = provider.flat_mixed_grads(TorchBatch(x, y))
        assert flat.shape == (2, *case.features, width)
        oracle.assert_close(flat.movedim(-1, 0), expected, 1e-10)
        by_name = provider.mixed_grads(TorchBatch(x, y))
        for name, parameter in case.model().named_parameters():
            assert by_name[name].shape == (2, *case.features, *parameter.shape)
        whole = torch.cat([v.reshape(*x.shape, -1) for v in by_name.values()], -1)
        oracle.assert_close(whole, flat, 1e-12)
        rows = identity[:5] + 1
        moved = provider.mixed_grads_prod(TorchBatch(x, y), rows)
        oracle.assert_close(moved, torch.einsum("kp,pn...->kn...", rows, expected), 1e-10)
        oracle.assert_close(GradientProvider.mixed_grads_prod(provider, TorchBatch(x, y), rows), moved, 1e-10)

    def test_restricted_to_some_parameters_they_come_in_their_order(self) -> None:
        model = MLP.model()
        chosen = {name: dict(model.named_parameters())[name] for name in ("4.bias", "0.weight")}
        provider = TorchGradientProvider(model, MLP.loss, chosen)
        places = oracle.columns(model)
        own = torch.cat([torch.arange(60)[places[name]] for name in chosen])
        expected = reference(MLP, "empirical_fisher").test[:, own]
        oracle.assert_close(provider.flat_grads(TorchBatch(X_TEST, Y_TEST)), expected, 1e-10)
        assert list(provider.params_to_restrict_to) == list(chosen)
        assert provider.to("cpu") is provider

    def test_no_example_has_no_row(self) -> None:
        """The model is not asked, for not every one answers for no example."""
        model = MLP.model()
        model.register_forward_hook(lambda *_: pytest.fail("asked for no example"))
        provider, none = TorchGradientProvider(model, MLP.loss, None), TorchBatch(X[:0], Y[:0])
        assert provider.flat_grads(none).shape == (0, 60)
        assert provider.grads(none)["0.weight"].shape == (0, 5, 4)
        rows = torch.ones(3, 60, dtype=torch.float64)
        assert provider.jacobian_prod(none, rows).shape == (3, 0)
        assert provider.mixed_grads_prod(none, rows).shape == (3, 0, 4)
        assert provider.flat_mixed_grads(none).shape == (0, 4, 60)
        assert provider.mixed_grads(none)["0.weight"].shape == (0, 4, 5, 4)

    def test_a_model_that_answers_differently_each_time_is_refused(self) -> None:
        dropping = torch.nn.Sequential(MLP.model(), torch.nn.Dropout()).train()
        with pytest.raises(TrainingModeError, match="dropout"):
            TorchGradientProvider(dropping, MLP.loss, None).flat_grads(TorchBatch(X, Y))

    def test_what_has_no_gradient_is_refused(self) -> None:
        provider = TorchGradientProvider(TRANSFORMER.model(), TRANSFORMER.loss, None)
        with pytest.raises(UnsupportedInputError):
            provider.flat_mixed_grads(TorchBatch(*TRANSFORMER.test()))
        with pytest.raises(ValueError, match=r"rows \[q, 60\]"):
            TorchGradientProvider(MLP.model(), MLP.loss, None).jacobian_prod(TorchBatch(X, Y), torch.ones(60))


class TestForms:
    def test_the_left_side_is_transformed_whichever_is_longer(self) -> None:
        """The operator is not symmetric, so that the other side would give other numbers."""
        provider = TorchGradientProvider(MLP.model(), MLP.loss, None)
        explicit = reference(MLP, "empirical_fisher")
        matrix = torch.randn(60, 60, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        composed = TorchOperatorGradientComposition(MatrixOperator(matrix), provider)
        train, few = TorchBatch(X, Y), TorchBatch(X_TEST[:2], Y_TEST[:2])
        up, moved = InfluenceMode.Up, InfluenceMode.Perturbation
        oracle.assert_close(
            composed.interactions(train, few, up), explicit.train @ matrix.T @ explicit.test[:2].T, 1e-10
        )
        left = explicit.train @ matrix.T
        expected = oracle.perturbations(MLP.model(), MLP.loss, left, X_TEST[:2], Y_TEST[:2])
        oracle.assert_close(composed.interactions(train, few, moved), expected, 1e-10)
        form = composed.op.as_bilinear_form()
        mixed = provider.flat_mixed_grads(few)
        oracle.assert_close(form.inner_prod(explicit.train, mixed), expected, 1e-10)
        oracle.assert_close(form.inner_prod(left[0], None), (left[0] @ matrix.T) @ left[0], 1e-10)

    @pytest.mark.parametrize("right", [None, TorchBatch(X_TEST[:2], Y_TEST[:2])], ids=["itself", "another"])
    def test_forms_by_parameter_and_in_few_dimensions_are_the_flat_ones(
        self, right: TorchBatch | None
    ) -> None:
        provider = TorchGradientProvider(MLP.model(), MLP.loss, None)
        batch = TorchBatch(X[:5], Y[:5])
        left = provider.flat_grads(batch)
        other = left if right is None else provider.flat_grads(right)
        mixed = provider.flat_mixed_grads(batch if right is None else right)
        values, vectors = torch.linalg.eigh(reference(MLP, "empirical_fisher").curvature)
        few = LowRankProductRepresentation(values[-4:], vectors[:, -4:])
        for operator in (
            HessianOperator(MLP.model(), MLP.loss, data()),
            LowRankOperator(few, 0.1),
            LowRankOperator(few, 0.1, exact=False),
        ):
            form = operator.as_bilinear_form()
            transformed = operator.apply(left)
            oracle.assert_close(form.grads_inner_prod(batch, right, provider), transformed @ other.T, 1e-10)
            by_input = torch.einsum("tp,n...p->tn...", transformed, mixed)
            oracle.assert_close(form.mixed_grads_inner_prod(batch, right, provider), by_input, 1e-10)

    def test_a_mapper_takes_factors_side_by_side_in_the_order_of_its_blocks(self) -> None:
        model = MLP.model()
        named = dict(model.named_parameters())
        blocks = OrderedDict(
            (
                block,
                TorchOperatorGradientComposition(
                    MatrixOperator(torch.eye(sum(named[n].numel() for n in names), dtype=torch.float64)),
                    TorchGradientProvider(model, MLP.loss, {n: named[n] for n in names}),
                ),
            )
            for block, names in BLOCKS.items()
        )
        mapper = TorchBlockMapper(blocks)
        batch, mode = TorchBatch(X, Y), InfluenceMode.Up
        factors = mapper.transformed_grads(TorchBatch(X_TEST, Y_TEST))
        expected = mapper.interactions_from_transformed_grads(factors, batch, mode)
        beside = torch.cat(list(factors.values()), 1)
        found = mapper.interactions_from_transformed_grads(beside, batch, mode)
        assert list(found) == list(BLOCKS) == [block for block, _ in mapper.items()]
        for block, part in expected.items():
            assert torch.equal(found[block], part)
        assert mapper.to("cpu") is mapper
        assert mapper["ends"] is mapper.composable_block_dict["ends"]
        with pytest.raises(ValueError, match="expected 60 columns"):
            mapper.interactions_from_transformed_grads(beside[:, 1:], batch, mode)
