"""The plan: a grid that covers every pair once, chosen from the spec alone, within its memory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, find, given
from hypothesis import strategies as st

from influence_calculator.maths.by_token import product_bytes
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.logra import Logra
from influence_calculator.maths.method import FitPass, FitState, Fitted, Footprint, Method, Sums
from influence_calculator.maths.objective import IndexedBatch, Objective, TrainingData
from influence_calculator.maths.probe import probe_footprint
from influence_calculator.maths.shapes import LayerShape, ModelShapes
from influence_job.errors import PermanentError, Reason
from influence_job.plan import Plan, Sizes, StageMemory, cost, device_budget, make_plan
from influence_job.spec import InfluenceJobSpec, Operation
from influence_job.storage.sink_arrays import merging_bytes
from influence_job.storage.sinks import Partial, making_bytes
from manifests import spec

MIB = 2**20
GIB = 2**30


class OnePass(FitPass):
    """A pass that is never run: plans only count passes."""

    name = "pass"

    def units(self, objective: Objective) -> tuple[str, ...]:
        raise NotImplementedError

    def accumulate(self, objective: Objective, batches: Iterable[IndexedBatch], state: FitState) -> Sums:
        raise NotImplementedError

    def finish(self, unit: str, sums: Mapping[str, Any], length: int, state: FitState) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Method):
    """A method whose memory is linear in everything, so that tests can say what a plan must hold."""

    needs_data: bool = False
    state: int = 0
    """Bytes of the fit."""
    row: int = 0
    """Bytes of one test example's factors; 0: four per parameter."""
    turned: int = 0
    """Bytes of turning a chunk of factors."""

    def layout(self, objective: Objective) -> Layout:
        raise NotImplementedError

    def passes(self) -> tuple[FitPass, ...]:
        return (OnePass(), OnePass())

    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None) -> Fitted:
        raise NotImplementedError

    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        row = self.row or shapes.width * max(4, shapes.itemsize)
        capture = micro_batch * (shapes.activation_bytes + shapes.example_bytes)
        return Footprint(
            fit=self.state + capture,
            factors=self.state + rows * row,
            capture=capture,
            factor_row=row,
            resident=self.state,
            stored=self.state,
            by_parameter=self.turned,
        )


def sizes(test: int = 300, train: int = 1400, parameters: int = 1000, **changes: Any) -> Sizes:
    """Sizes of a model that is one Linear layer without bias, as far as plans can see."""
    shapes = ModelShapes(
        parameters={"weight": (parameters,)},
        layers=(LayerShape("linear", inputs=parameters, outputs=1, tokens=1, bias=False),),
        itemsize=4,
        model_bytes=4 * parameters,
        activation_bytes=4,
        example_bytes=256,
        outputs=1,
    )
    fields = {"test": test, "train": train, "shapes": shapes, "blocks": {"": parameters}, **changes}
    return Sizes(**fields)


def with_memory(limit: str, **changes: Any) -> InfluenceJobSpec:
    """A spec on cpu with a memory limit for workers; the budget is half of it."""
    return spec(workers={"resources": {"limits": {"memory": limit}}}, **changes)


lengths = st.integers(1, 60)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of small grids, with chunks given or not, and room for few or for many factors."""
    test, train = draw(lengths, label="T"), draw(lengths, label="N")
    rows = draw(st.integers(4, 100), label="rows that fit")
    chunks = {
        "test": draw(st.none() | st.integers(1, rows // 2), label="test chunk"),
        "train": draw(st.none() | st.integers(1, 70), label="train chunk"),
    }
    # Half of 64 MiB is the budget, an eighth of it the region's, and factors take two copies.
    return make_plan(with_memory("64Mi", chunks=chunks), Linear(row=13 * MIB // rows), sizes(test, train))


@given(plans())
def test_every_pair_lies_in_exactly_one_region(plan: Plan) -> None:
    seen = np.zeros((plan.test, plan.train), dtype=int)
    for index in range(plan.regions):
        group, column = plan.unravel(index)
        assert plan.region(group, column) == index
        rows, columns = plan.group_range(group), plan.train_range(column)
        seen[slice(*rows), slice(*columns)] += 1
        assert 0 < rows[1] - rows[0] <= plan.group_rows
        assert 0 < columns[1] - columns[0] <= plan.train_chunk
    assert (seen == 1).all()


def test_small_grids_have_one_group_or_several() -> None:
    """Otherwise the properties here would say less than they seem to."""
    found = {
        find(plans(), condition).groups for condition in (lambda p: p.groups == 1, lambda p: p.groups > 3)
    }
    assert len(found) == 2


@given(plans())
def test_a_region_is_one_chunk_of_the_result(plan: Plan) -> None:
    grid = [
        -(-extent // length) for extent, length in zip(plan.result_shape, plan.result_chunks, strict=True)
    ]
    assert grid == [plan.groups, plan.train_chunks]
    assert plan.arrays[0].shape == (plan.test, plan.train)
    assert plan.arrays[0].chunks == plan.result_chunks


@given(plans())
def test_groups_are_made_of_whole_test_chunks(plan: Plan) -> None:
    starts = {plan.test_range(index)[0] for index in range(plan.test_chunks)}
    assert {plan.group_range(group)[0] for group in range(plan.groups)} <= starts


@given(plans())
def test_fit_ranges_are_contiguous_and_as_even_as_possible(plan: Plan) -> None:
    ranges = [plan.fit_range(index) for index in range(plan.fit_ranges)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == plan.train
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    extents = {stop - start for start, stop in ranges}
    assert min(extents) > 0
    assert max(extents) - min(extents) <= 1


@given(plans())
def test_a_stored_plan_is_read_back_exactly(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_sizes_are_read_back_exactly() -> None:
    measured = sizes(feature_shape=(1, 8, 8), dtype="float64", test_example_bytes=7)
    assert Sizes.model_validate_json(measured.model_dump_json(by_alias=True)) == measured


def test_indices_outside_of_the_grid_are_errors() -> None:
    plan = make_plan(spec(), Linear(), sizes())
    for call in (plan.unravel, plan.train_range, plan.group_range, plan.test_range, plan.fit_range):
        for index in (-1, 10**6):
            with pytest.raises(IndexError, match=f"{index}: expected 0 to"):
                call(index)


@pytest.mark.parametrize(("test", "train"), [(1, 32), (300, 1400), (10_000, 50_000), (64, 10**6), (7, 33)])
def test_there_are_at_least_32_regions_when_the_training_set_allows(test: int, train: int) -> None:
    assert make_plan(spec(), Linear(), sizes(test, train)).regions >= 32


def test_fewer_training_examples_than_32_give_one_region_each() -> None:
    assert make_plan(spec(), Linear(), sizes(5, 10)).regions == 10


@pytest.mark.parametrize(
    ("test", "train", "changes"),
    [
        (10_000, 10**7, {}),
        (200, 10**8, {}),
        (300_000, 10**6, {}),
        (1000, 10**6, {"feature_shape": (64,)}),
    ],
)
def test_regions_of_a_large_result_have_8_to_64_megabytes(
    test: int, train: int, changes: dict[str, Any]
) -> None:
    mode = "Perturbation" if changes else "Up"
    plan = make_plan(
        with_memory("16Gi", mode=mode, output={"maxBytes": "1Pi"}),
        Linear(),
        sizes(test, train, parameters=100, **changes),
    )
    bytes_ = int(np.prod(plan.result_chunks)) * 4
    assert 8e6 <= bytes_ <= 64 * MIB


def test_explicit_chunks_win_and_one_alone_leaves_the_other_to_the_plan() -> None:
    both = make_plan(spec(chunks={"test": 7, "train": 1000}), Linear(), sizes())
    assert (both.test_chunk, both.train_chunk, both.train_chunks) == (7, 1000, 2)
    one = make_plan(spec(chunks={"train": 1000}), Linear(), sizes())
    free = make_plan(spec(), Linear(), sizes())
    assert (one.test_chunk, one.train_chunk) == (free.test_chunk, 1000)


def test_chunks_longer_than_the_data_are_kept_and_the_arrays_are_not_padded() -> None:
    plan = make_plan(spec(chunks={"test": 10**6, "train": 10**6}), Linear(), sizes(3, 5))
    assert (plan.test_chunk, plan.train_chunk) == (10**6, 10**6)
    assert plan.result_chunks == (3, 5)


def test_groups_follow_from_the_budget() -> None:
    """G = ceil(T · row / (budget − model, fit, capture, region)), two copies of a row on cpu."""
    method = Linear(state=100 * MIB, row=1 * MIB)
    plan = make_plan(with_memory("2Gi", chunks={"test": 10}), method, sizes(test=2000, train=10_000))
    budget = GIB
    resident = 4000 + method.footprint(sizes().shapes, 1, 1).factors
    free = budget - resident - 256 * 260
    rows = (free - min(32 * MIB, free // 8)) // (2 * MIB)
    groups = -(-200 // (rows // 10))
    assert plan.groups == groups == 5
    assert plan.group_rows == 10 * -(-200 // groups)


def test_factors_of_a_half_precision_model_are_planned_as_float32() -> None:
    half = sizes(test=4000, shapes=ModelShapes(**{**vars(sizes().shapes), "itemsize": 2}))
    method = Linear(row=1 * MIB)
    single = make_plan(with_memory("2Gi"), method, sizes(test=4000))
    assert make_plan(with_memory("2Gi"), method, half).groups == single.groups > 1


def test_a_bfloat16_factor_halves_the_groups() -> None:
    method = Linear(row=1 * MIB)
    full, half = (
        make_plan(with_memory("2Gi", factorDtype=dtype), method, sizes(test=4000, train=1000)).groups
        for dtype in ("Float32", "BFloat16")
    )
    assert half == pytest.approx(full / 2, abs=1)


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({"device": "cuda", "workers": {"deviceMemory": "16Gi"}}, 16 * GIB),
        ({"device": "cuda"}, 12 * GIB),
        ({"workers": {"deviceMemory": "16Gi", "resources": {"limits": {"memory": "6Gi"}}}}, 3 * GIB),
        ({}, 2 * GIB),
    ],
)
def test_the_budget_is_in_the_spec_and_never_that_of_the_machine(
    changes: dict[str, Any], budget: int
) -> None:
    assert device_budget(spec(**changes)) == budget


@given(
    test=st.integers(1, 10**6),
    train=st.integers(1, 10**8),
    parameters=st.integers(1, 10**7),
    memory=st.sampled_from(["256Mi", "2Gi", "64Gi"]),
    device=st.sampled_from(["cpu", "cuda"]),
)
@example(test=528, train=217_344, parameters=742_926, memory="256Mi", device="cpu")
def test_every_stage_stays_within_the_budget_or_the_job_is_refused(
    test: int, train: int, parameters: int, memory: str, device: str
) -> None:
    made = with_memory(memory, device=device, output={"dense": False})
    plan, refusal = None, None
    try:
        plan = make_plan(made, Linear(state=3 * 4 * parameters), sizes(test, train, parameters))
    except PermanentError as error:
        refusal = error
    if plan is not None:
        assert max(stage.device for stage in plan.memory.values()) <= device_budget(made)
    else:
        assert refusal is not None
        assert refusal.reason is Reason.PLAN_IMPOSSIBLE
        # Model, fit and two copies of one row: below half the budget there is always a plan.
        assert parameters * 4 * 7 > device_budget(made) // 2


def test_the_plan_does_not_depend_on_the_number_of_workers() -> None:
    few, many = (make_plan(spec(workers={"replicas": n}), Linear(), sizes()) for n in (1, 100))
    assert few == many


def test_fit_ranges_depend_on_the_training_set_alone() -> None:
    one = make_plan(spec(chunks={"train": 3}), Linear(), sizes(test=5, train=5000))
    other = make_plan(with_memory("64Gi"), Linear(state=MIB), sizes(test=500, train=5000, parameters=9))
    assert one.fit_ranges == other.fit_ranges == 32


@pytest.mark.parametrize(("train", "ranges"), [(1, 1), (128, 1), (129, 2), (1400, 11), (10**8, 32)])
def test_ranges_hold_enough_examples_to_be_worth_their_partial_sums(train: int, ranges: int) -> None:
    assert make_plan(spec(), Linear(), sizes(train=train)).fit_ranges == ranges


def test_micro_batches_shrink_until_capturing_them_takes_a_quarter_of_the_budget() -> None:
    shapes = sizes().shapes
    heavy = ModelShapes(**{**vars(shapes), "activation_bytes": 10 * MIB})
    plan = make_plan(with_memory("1Gi"), Linear(), sizes(shapes=heavy))
    assert plan.micro_batch == 8  # 8 · 10 MiB ≤ 512 MiB / 4 < 16 · 10 MiB


def test_a_result_above_max_bytes_is_refused_with_numbers_and_cure() -> None:
    exact = 300 * 1400 * 4
    assert make_plan(spec(output={"maxBytes": str(exact)}), Linear(), sizes()).result_bytes == exact
    with pytest.raises(PermanentError) as caught:
        make_plan(spec(output={"maxBytes": str(exact - 1)}), Linear(), sizes())
    assert caught.value.reason is Reason.PLAN_IMPOSSIBLE
    message = caught.value.message
    assert "spec.output.maxBytes" in message
    assert "300 × 1400 of float32 = 1.6 MiB (1680000 bytes)" in message
    assert "output.dense: false" in message


def test_without_the_matrix_only_the_top_lists_count() -> None:
    sparse = spec(output={"dense": False, "topK": 10, "maxBytes": "72k"})
    plan = make_plan(sparse, Linear(), sizes())
    assert plan.result_bytes == 300 * 2 * 10 * 12
    assert plan.arrays == ()


def test_perturbations_have_the_input_s_dimensions_after_test_and_train() -> None:
    plan = make_plan(spec(mode="Perturbation"), Linear(), sizes(feature_shape=(1, 8, 8)))
    assert plan.result_dims == ("test", "train", "feature_0", "feature_1", "feature_2")
    assert plan.result_shape == (300, 1400, 1, 8, 8)
    assert plan.result_chunks[2:] == (1, 8, 8)
    with pytest.raises(PermanentError, match="fewer test examples"):
        make_plan(
            spec(mode="Perturbation", output={"maxBytes": "1Mi"}), Linear(), sizes(feature_shape=(1, 8, 8))
        )


def test_a_region_by_block_is_as_large_as_another_and_holds_all_blocks() -> None:
    blocks = {"0": 600, "2": 300, "4": 100}
    given = with_memory("16Gi", operation="InfluencesByBlock", output={"maxBytes": "1Pi"})
    plan = make_plan(given, Linear(), sizes(10_000, 10**7, blocks=blocks))
    [array] = plan.arrays
    assert (array.path, array.dims) == ("influences", ("block", "test", "train"))
    assert (array.shape, array.chunks) == ((3, 10_000, 10**7), (3, plan.group_rows, plan.train_chunk))
    assert plan.result_bytes == 3 * 10_000 * 10**7 * 4
    assert 8e6 <= int(np.prod(array.chunks)) * 4 <= 64 * MIB
    assert plan.result_index(2, 5) == (0, 2, 5)
    assert {"Loading", "Fitting", "Factors", "Scores"} == set(plan.memory)


def test_parts_of_perturbations_have_blocks_first_and_features_last() -> None:
    given = spec(operation="InfluencesByBlock", mode="Perturbation")
    blocks = {"0": 600, "2": 400}
    plan = make_plan(given, Linear(), sizes(blocks=blocks, feature_shape=(8, 4)))
    assert plan.result_dims == ("block", "test", "train", "feature_0", "feature_1")
    assert plan.result_shape == (2, 300, 1400, 8, 4)
    assert plan.result_chunks == (2, plan.group_rows, plan.train_chunk, 8, 4)
    assert plan.result_index(2, 5) == (0, 2, 5, 0, 0)
    assert plan.parts_axis == 0
    one = make_plan(spec(mode="Perturbation"), Linear(), sizes(blocks=blocks, feature_shape=(8, 4)))
    assert plan.group_rows * plan.train_chunk <= one.group_rows * one.train_chunk
    pair = ((given, plan), (spec(mode="Perturbation"), one))
    costs = [cost.gflop(asked, sizes(), planned)["Scores"] for asked, planned in pair]
    assert costs[0] - costs[1] == pytest.approx(3 * 4 * 1000 * 300 * 1400 / 1e9)


def test_all_blocks_count_for_what_a_result_and_a_stage_need() -> None:
    blocks, exact = {"0": 600, "2": 400}, 2 * 300 * 1400 * 4
    given = {"operation": "InfluencesByBlock", "chunks": {"test": 300, "train": 1400}}
    plain = make_plan(spec(chunks=given["chunks"]), Linear(), sizes(blocks=blocks))
    plan = make_plan(spec(**given, output={"maxBytes": str(exact)}), Linear(), sizes(blocks=blocks))
    assert plan.memory["Scores"].device == plain.memory["Scores"].device + exact // 2
    with pytest.raises(
        PermanentError, match=r"2 × 300 × 1400 of float32 .* or blocks, operation: Influences"
    ):
        make_plan(spec(**given, output={"maxBytes": str(exact - 1)}), Linear(), sizes(blocks=blocks))
    huge = {**given, "chunks": {"test": 300, "train": 10**6}}
    with pytest.raises(
        PermanentError, match=r"stage Scores needs .* regions of 300 × 1000000 .* smaller chunks"
    ):
        make_plan(with_memory("64Mi", **huge), Linear(), sizes(train=10**6, blocks=blocks))


def test_a_region_by_token_holds_all_tokens_and_every_pair_costs_all_of_them() -> None:
    given = {"operation": "InfluencesByToken", "chunks": {"test": 300, "train": 1400}}
    exact = 300 * 1400 * 7 * 4
    tokens = sizes(feature_shape=(7,))
    plan = make_plan(spec(**given, output={"maxBytes": str(exact)}), Linear(), tokens)
    [array] = plan.arrays
    assert (array.path, array.dims) == ("influences", ("test", "train", "token"))
    assert (array.shape, array.chunks) == ((300, 1400, 7), (300, 1400, 7))
    assert plan.result_index(2, 5) == (2, 5, 0)
    plain = make_plan(spec(chunks=given["chunks"]), Linear(), sizes())
    more = plan.memory["Scores"].device - plain.memory["Scores"].device
    assert more == exact * 6 // 7 + product_bytes(tokens.shapes, plan.micro_batch)
    with pytest.raises(PermanentError, match=r"300 × 1400 × 7 of float32 .* shorter texts, operation: Influ"):
        make_plan(spec(**given, output={"maxBytes": str(exact - 1)}), Linear(), tokens)


def test_factors_are_one_array_per_block_chunked_on_both_axes() -> None:
    blocks = {"0": 90 * MIB, "2": 10}
    plan = make_plan(
        spec(operation="InfluenceFactors", chunks={"test": 2}, device="cuda"),
        Linear(),
        sizes(test=5, parameters=90 * MIB + 10, blocks=blocks),
    )
    assert [(a.path, a.block, a.dims) for a in plan.arrays] == [
        ("factors/0", "0", ("test", "column_0")),
        ("factors/1", "2", ("test", "column_1")),
    ]
    assert [(a.shape, a.chunks) for a in plan.arrays] == [
        ((5, 90 * MIB), (2, 4 * MIB)),
        ((5, 10), (2, 10)),
    ]
    assert (plan.groups, plan.regions) == (0, 0)
    assert plan.training_passes == 2
    assert "Scores" not in plan.memory


def test_examples_meet_themselves_in_chunks_that_can_be_solved() -> None:
    given = spec(operation="SelfInfluence", device="cuda")
    plan = make_plan(given, Linear(), sizes(test=5000, train=5000))
    [array] = plan.arrays
    assert (array.path, array.dims, array.shape) == ("self_influences", ("train",), (5000,))
    assert array.chunks == (plan.train_chunk,) == (plan.test_chunk,) == (256,)
    assert (plan.train_chunks, plan.groups, plan.regions, plan.training_passes) == (20, 0, 0, 3)
    assert plan.result_bytes == 5000 * 4
    assert set(plan.memory) == {"Loading", "Fitting", "Scores"}

    tight = with_memory("1Gi", operation="SelfInfluence")
    large = sizes(test=5000, train=5000, parameters=8 * MIB)
    plan = make_plan(tight, Linear(), large)
    assert plan.train_chunk * 32 * MIB <= device_budget(tight)
    with pytest.raises(PermanentError, match=r"chunks.train: solving 64 train examples at once does not fit"):
        make_plan(with_memory("1Gi", operation="SelfInfluence", chunks={"train": 64}), Linear(), large)


def test_influences_from_factors_run_no_fit() -> None:
    plan = make_plan(
        spec(operation="InfluencesFromFactors", factors={"url": "x"}), Linear(needs_data=True), sizes()
    )
    assert (plan.fit_passes, plan.passes_per_iteration, plan.training_passes) == (0, 0, plan.groups)
    assert list(plan.memory) == ["Loading", "Scores"]


def test_gradients_are_one_array_per_block_of_chunks_that_can_be_read_again() -> None:
    blocks = {"0": 600, "2": 400}
    plan = make_plan(
        spec(operation="TrainingGradients", device="cuda"), Linear(), sizes(5000, 5000, blocks=blocks)
    )
    assert [(a.path, a.block, a.dims, a.shape, a.chunks) for a in plan.arrays] == [
        ("gradients/0", "0", ("train", "column_0"), (5000, 600), (256, 600)),
        ("gradients/1", "2", ("train", "column_1"), (5000, 400), (256, 400)),
    ]
    assert (plan.train_chunk, plan.train_chunks, plan.groups, plan.regions) == (256, 20, 0, 0)
    assert (plan.result_dims, plan.result_shape) == (("train", "column"), (5000, 1000))
    assert (plan.result_bytes, plan.training_passes) == (5000 * 1000 * 4, 3)
    assert list(plan.memory) == ["Loading", "Fitting", "Gradients"]
    # The model, the gradients of a chunk and what it is differentiated with; where that takes several
    # micro-batches, the gradients once more.
    rows, capture = 256 * 4000, Linear().footprint(sizes().shapes, 256, 1).capture
    assert plan.memory["Gradients"].device == 4000 + rows + capture
    chunks = {"train": 2048}
    longer = make_plan(
        spec(operation="TrainingGradients", device="cuda", chunks=chunks), Linear(), sizes(5000, 5000)
    )
    assert longer.micro_batch < 2048
    assert longer.memory["Gradients"].device == 4000 + 2 * 2048 * 4000
    wide = sizes(5000, 5000, parameters=4 * MIB, blocks={"": 4 * MIB})
    assert make_plan(spec(operation="TrainingGradients", device="cuda"), Linear(), wide).train_chunk == 4
    with pytest.raises(PermanentError, match=r"5000 × 1000 of float32 .* Trak or Logra with a smaller rank"):
        make_plan(
            spec(operation="TrainingGradients", output={"maxBytes": "19M"}), Linear(), sizes(5000, 5000)
        )
    tight = with_memory("1Gi", operation="TrainingGradients", chunks={"train": 64})
    with pytest.raises(PermanentError, match=r"chunks.train: differentiating 64 train examples at once"):
        make_plan(tight, Linear(), sizes(5000, 5000, parameters=8 * MIB))


@pytest.mark.parametrize(
    ("changes", "stage", "turned"),
    [
        ({}, "Factors", False),
        ({"mode": "Perturbation"}, "Factors", True),
        ({"operation": "InfluenceFactors"}, "Factors", True),
        ({"operation": "SelfInfluence"}, "Scores", False),
    ],
    ids=str,
)
def test_factors_by_parameter_are_counted_where_they_are_made(
    changes: dict[str, Any], stage: str, turned: bool
) -> None:
    plan = make_plan(spec(**changes), Linear(turned=300 * MIB), sizes())
    seen = plan.memory[stage].device
    assert seen == 4000 + 300 * MIB if turned else seen < 10 * MIB


def test_what_is_written_is_counted_beside_what_stays_of_solving() -> None:
    """On a processor the model, the fit, the factors, and of a chunk in the store two copies."""
    plan = make_plan(spec(chunks={"test": 32}), Linear(state=5 * MIB), sizes())
    stage = plan.memory["Factors"]
    assert stage.device == 4000 + 5 * MIB + 32 * 4000
    assert stage.host == stage.device + 2 * 32 * 4000 + 32 * sizes().test_example_bytes


def scores_of(k: int, device: str, chunk: int) -> StageMemory:
    given = spec(device=device, output={"topK": k}, chunks={"test": 300, "train": chunk})
    return make_plan(given, Linear(), sizes()).memory["Scores"]


def test_top_lists_count_while_they_are_made_or_merged() -> None:
    merging = merging_bytes(300, 100, 1400, 1400, 4)
    assert scores_of(1400, "cuda", 100).host == merging
    assert scores_of(1400, "cpu", 100).host == 4000 + 300 * 4000 + merging  # the model and the factors stay
    making, others = making_bytes(300, 1400, 1400, 4), 2 * 1400 * (256 + 300 * 4)
    assert scores_of(1400, "cuda", 1400).host == others + making
    assert scores_of(1400, "cpu", 1400).host == scores_of(1, "cpu", 1400).device + others + making


@pytest.mark.parametrize(("test", "train", "k"), [(20, 70, 5), (20, 70, 40), (7, 32, 1000)])
def test_top_lists_of_all_regions_are_in_the_store_beside_the_result(test: int, train: int, k: int) -> None:
    """And those of all examples, where the matrix is the result."""
    dense, without = (
        make_plan(
            with_memory("64Mi", output={"topK": k, "dense": dense}, chunks={"test": 3, "train": 32}),
            Linear(row=2 * MIB),
            sizes(test, train),
        )
        for dense in (True, False)
    )
    real = 0
    for group, chunk in itertools.product(range(dense.groups), range(dense.train_chunks)):
        rows, columns = dense.group_range(group), dense.train_range(chunk)
        block = np.zeros((rows[1] - rows[0], columns[1] - columns[0]), np.float32)
        real += len(Partial.of(block, columns[0], k).pack())
    scratch = without.memory["Scores"].scratch - without.memory["Factors"].scratch
    assert 0 <= scratch - real < 512 * dense.regions
    assert dense.memory["Scores"].scratch == without.memory["Scores"].scratch + without.result_bytes


def test_groups_are_as_small_as_top_lists_need_them() -> None:
    """Four copies of them take a quarter of the memory limit on a processor, half of it beside a GPU."""
    large = sizes(test=20_000, train=10**5, parameters=10)
    row = 2 * 10_000 * 12 + 48
    for device, share in (("cpu", 4), ("cuda", 2)):
        long = with_memory("2Gi", device=device, output={"topK": 10_000})
        plan = make_plan(long, Linear(), large)
        assert plan.groups == pytest.approx(20_000 * 4 * row / (2 * GIB // share), rel=0.2)
        assert make_plan(with_memory("2Gi", device=device), Linear(), large).groups == 1
        host = plan.memory["Scores"].host - plan.memory["Scores"].device
        assert host <= 2 * GIB // share + 2 * 64 * MIB + 3 * 32 * MIB


def test_top_lists_too_long_for_the_chunks_that_are_given_are_refused_with_what_would_fit() -> None:
    def asked(k: int, rows: int, **changes: Any) -> InfluenceJobSpec:
        return with_memory("1Gi", chunks={"test": rows}, output={"topK": k}, **changes)

    measured = sizes(test=5000, train=10**5)
    make_plan(asked(10_000, 3000, operation="InfluenceFactors"), Linear(), measured)  # has no such lists
    with pytest.raises(PermanentError) as caught:
        make_plan(asked(10_000, 3000), Linear(), measured)
    assert caught.value.reason is Reason.PLAN_IMPOSSIBLE
    assert caught.value.message == (
        "spec.output.topK: expected at most 1240 for 3000 test examples (chunks.test), got 10000: to make "
        "and merge top lists takes 2.01 GiB of a worker's memory, but 256 MiB are for it; lower it, set "
        "chunks.test to 372 or less, or raise workers.resources.limits.memory"
    )
    make_plan(with_memory("128Mi", output={"topK": 10_000}, chunks={"test": 60}), Linear(row=10), measured)
    for fitting in (asked(1240, 3000), asked(10_000, 372)):
        make_plan(fitting, Linear(), measured)
    for too_much in (asked(1241, 3000), asked(10_000, 373)):
        with pytest.raises(PermanentError, match=r"output\.topK"):
            make_plan(too_much, Linear(), measured)


def from_gradients(sizes_given: Sizes, **changes: Any) -> Plan:
    given = {"operation": "InfluencesFromGradients", "gradients": {"url": "x"}, **changes}
    return make_plan(spec(**given), Linear(), sizes_given)


def test_influences_from_gradients_run_no_fit_and_read_no_training_example() -> None:
    plan = from_gradients(sizes(stored_chunk=100))
    assert (plan.fit_passes, plan.training_passes, plan.groups) == (0, 0, 1)
    assert list(plan.memory) == ["Loading", "Factors", "Scores"]
    assert plan.result_shape == (300, 1400)
    region, chunk, group = 300 * plan.train_chunk * 4, plan.train_chunk * 4000, 300 * 4000
    assert plan.memory["Scores"].device == 4000 + group + region
    few = from_gradients(sizes(stored_chunk=100), output={"topK": 1}).memory["Scores"]
    rows = plan.test_chunk * 4000
    assert few.host == few.device + 2 * chunk + 2 * region + max(rows, making_bytes(300, 100, 1, 4))
    on_gpu = from_gradients(sizes(stored_chunk=100), device="cuda").memory["Scores"]
    assert on_gpu.device == 4000 + 64 * MIB + group + region


@pytest.mark.parametrize(
    ("train", "stored", "parameters", "chunk"),
    [
        (1400, 100, 1000, 100),  # 44 would make regions enough
        (100_000, 256, 1000, 3072),  # 3 125 make as many as there should be
        (10_000_000, 256, 1000, 16_640),  # 64 MiB of gradients are read at once
        (1000, 256, 10**6, 16),  # 16 are 64 MiB: 16 times a sixteenth of a chunk
        (50, 50, 1000, 50),
    ],
)
def test_a_training_chunk_is_of_whole_chunks_of_stored_gradients_where_these_are_small(
    train: int, stored: int, parameters: int, chunk: int
) -> None:
    given = sizes(300, train, parameters, stored_chunk=stored)
    plan = from_gradients(given, device="cuda", workers={"deviceMemory": "40Gi"})
    assert plan.train_chunk == chunk
    assert from_gradients(given, chunks={"train": 7}).train_chunk == 7


def test_a_gpu_holds_more_factors_than_the_host_which_reads_those_of_one_test_chunk_at_a_time() -> None:
    large = sizes(test=2000, train=5000, parameters=10**6)
    plan = make_plan(with_memory("2Gi", device="cuda"), Linear(), large)
    assert (plan.groups, plan.test_chunk) == (1, 64)
    scores = plan.memory["Scores"]
    assert scores.device > 2000 * 4 * 10**6
    assert scores.host < 64 * 4 * 10**6 + 2 * 64 * MIB + 3 * 32 * MIB
    small = make_plan(with_memory("384Mi", device="cuda"), Linear(), large)
    assert small.test_chunk == 32
    assert max(stage.host for stage in small.memory.values()) <= 384 * MIB
    # Those of another job may be in chunks of any length.
    other = make_plan(
        with_memory("64Gi", device="cuda", operation="InfluencesFromFactors", factors={"url": "x"}),
        Linear(),
        large,
    )
    assert other.memory["Scores"].host > 2000 * 4 * 10**6


@pytest.mark.parametrize(("device", "need"), [("cpu", "2.86"), ("cuda", "2.73")])
def test_what_does_not_fit_beside_the_device_is_refused_by_the_memory_limit(device: str, need: str) -> None:
    images = sizes(shapes=ModelShapes(**{**vars(sizes().shapes), "example_bytes": MIB}))

    def with_limit(memory: str, train: int) -> InfluenceJobSpec:
        return with_memory(memory, device=device, chunks={"test": 10, "train": train})

    with pytest.raises(PermanentError) as caught:
        make_plan(with_limit("2Gi", 1400), Linear(), images)
    assert caught.value.reason is Reason.PLAN_IMPOSSIBLE
    assert caught.value.message == (
        f"spec.workers.resources.limits.memory: expected more than {need} GiB, which stage Fitting needs "
        "beside what an idle worker takes, got 2Gi; raise it, or set smaller chunks (of 10 test and 1400 "
        "training examples)"
    )
    make_plan(with_limit("2Gi", 700), Linear(), images)
    make_plan(spec(device=device, chunks={"train": 1400}), Linear(), images)  # nothing says how much there is


def test_passes_of_an_iterative_solver_are_told_apart() -> None:
    plan = make_plan(spec(chunks={"test": 100}), Linear(needs_data=True), sizes())
    assert (plan.training_passes, plan.passes_per_iteration) == (2 + plan.groups, 3)


def test_workers_that_share_passes_need_few_chunks_and_leave_sums_and_states_in_the_store() -> None:
    given = spec(method={"name": "Cg", "regularization": 0.1, "products": "Distributed"})
    made = make_plan(given, Cg(0.1, solves_by_passes=True), sizes(test=24))
    alone = make_plan(given, Cg(0.1), sizes(test=24))
    assert (made.test_chunk, made.solves_by_passes, made.passes_per_iteration) == (24, True, 1)
    assert (alone.test_chunk, alone.solves_by_passes, alone.passes_per_iteration) == (8, False, 3)
    row = 4 * 1000
    scores = 24 * row
    assert made.memory["Factors"].scratch == scores + 24 * row * (made.fit_ranges + 2 * 4)
    assert alone.memory["Factors"].scratch == scores
    stored = {**made.to_json()}
    del stored["solvesByPasses"]
    assert not Plan.from_json(stored).solves_by_passes, "a plan that was stored before there were such"


@pytest.mark.parametrize(
    ("method", "part"),
    [
        (Linear(state=8 * GIB), "fitting with method Ekfac needs 8 GiB for 1000 parameters"),
        (Linear(row=3 * GIB), "the factors of one test example 6 GiB"),
    ],
)
def test_work_that_cannot_fit_is_refused_with_numbers_and_cure(method: Method, part: str) -> None:
    with pytest.raises(PermanentError) as caught:
        make_plan(with_memory("4Gi"), method, sizes())
    assert caught.value.reason is Reason.PLAN_IMPOSSIBLE
    assert part in caught.value.message
    assert "the budget on cpu is 2 GiB; raise workers.resources.limits.memory" in caught.value.message


def test_explicit_chunks_that_do_not_fit_are_refused_with_a_size_that_would() -> None:
    method = Linear(row=4 * MIB)
    with pytest.raises(PermanentError, match=r"chunks\.test: solving 300 .* set 64 or less"):
        make_plan(with_memory("2Gi", chunks={"test": 300}), method, sizes())
    with pytest.raises(PermanentError, match=r"stage Scores needs .* smaller chunks"):
        make_plan(with_memory("64Mi", chunks={"train": 10**6}), Linear(), sizes(train=10**6))


def test_the_cost_is_counted_from_the_formulas_and_shared_by_the_workers() -> None:
    one, two = spec(), spec(workers={"replicas": 2})
    measured = sizes()
    plan = make_plan(one, Linear(), measured)
    gflop = cost.gflop(one, measured, plan)
    products = 1000
    # 1000 inputs of one output are scored by parameter: turning them would take 2 million.
    assert gflop["Scores"] == pytest.approx((1400 * 6 * products + 2 * 1000 * 300 * 1400) / 1e9)
    assert list(gflop) == ["Fitting", "Factors", "Scores"]
    by_token = cost.gflop(one, measured, plan.model_copy(update={"operation": Operation.INFLUENCES_BY_TOKEN}))
    assert by_token["Scores"] == pytest.approx((1400 * 4 + 2 * 300 * 1400) * products / 1e9)
    slow, fast = cost.seconds(one, gflop), cost.seconds(two, gflop)
    assert all(slow[name] == 2 * fast[name] > 0 for name in gflop)


def test_stored_gradients_cost_a_product_per_pair_and_are_formed_once() -> None:
    measured = sizes(stored_chunk=100)
    storing = spec(operation="TrainingGradients")
    gflop = cost.gflop(storing, measured, make_plan(storing, Linear(), sizes(1400)))
    assert list(gflop) == ["Fitting", "Gradients"]
    assert gflop["Gradients"] == pytest.approx(1400 * (6 * 1000 + 2 * (1000**2 + 1)) / 1e9)
    asking = spec(operation="InfluencesFromGradients", gradients={"url": "x"})
    gflop = cost.gflop(asking, measured, make_plan(asking, Linear(), measured))
    assert list(gflop) == ["Factors", "Scores"]
    assert gflop["Scores"] == pytest.approx(2 * 1000 * 300 * 1400 / 1e9)


def test_logra_pays_for_projected_tokens_and_for_no_gradient() -> None:
    given = spec(method={"name": "Logra", "regularization": 0.1, "rank": 4})
    measured = sizes(blocks={"linear": 4})
    shapes = replace(measured.shapes, parameters={"linear.weight": (1, 1000), "norm.weight": (50,)})
    measured = measured.model_copy(update={"shapes": shapes})
    plan = make_plan(given, Logra(0.1, 4).narrow(), measured)
    gflop = cost.gflop(given, measured, plan)
    # A forward pass and activation gradients; a token by 4 columns and by 1, their product; 50 numbers by 16.
    capture, turned = 4 * (1000 + 50), 2 * (1000 * 4 + 1 + 4) + 2 * 50 * 16
    assert gflop["Scores"] == pytest.approx((1400 * (capture + turned) + 2 * 4 * 300 * 1400) / 1e9)
    matrices, cubes = 2 * (4**2 + 16**2), (4**3 + 16**3) / 3
    assert gflop["Fitting"] == pytest.approx((1400 * (capture + turned + matrices) + cubes) / 1e9)


def test_no_fit_range_is_empty_where_chunks_are_few() -> None:
    """1400 examples would make 11 ranges."""
    plan = make_plan(spec(chunks={"train": 700}), Linear(), sizes(train=1400))
    assert [plan.fit_range(index) for index in range(plan.fit_ranges)] == [(0, 700), (700, 1400)]


def test_a_long_chunk_of_stored_gradients_counts_whole_on_the_gpu() -> None:
    long = from_gradients(sizes(train=20_000, stored_chunk=100), device="cuda", chunks={"train": 20_000})
    gradients, group, region = 20_000 * 4000, 300 * 4000, 300 * 20_000 * 4
    assert gradients > 64 * MIB
    assert long.memory["Scores"].device == 4000 + gradients + group + region


def test_rows_that_loading_tries_the_curvature_on_are_counted() -> None:
    parameters = {f"weight_{i}": (10_000,) for i in range(100)}
    shapes = ModelShapes(**{**vars(sizes().shapes), "parameters": parameters, "model_bytes": 4 * 10**6})
    method = Cg(0.1)
    tried = method.tried_rows * 4 * 10**6
    assert tried > probe_footprint(shapes)
    plan = make_plan(spec(), method, sizes(shapes=shapes, blocks={"": 10**6}))
    assert plan.memory["Loading"].device == 4 * 10**6 + tried
