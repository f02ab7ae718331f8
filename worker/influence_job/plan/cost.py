"""What a job will cost, roughly: floating-point operations per stage, and seconds at stated rates.

Counts the products that dominate, after the physical bound of the plan of work: a capture is a forward
pass and its activation gradients, `4 S i o` per layer; a per-example gradient `2 S i o`; a pair `2 P`.

Symbols: i inputs, o outputs, S tokens of a layer; P parameters; T, N test and training examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from influence_calculator.maths.ekfac_footprint import rows_scored_at_once
from influence_calculator.maths.kronecker import scores_by_parameter
from influence_calculator.maths.logra_footprint import block_ranks, other_ranks
from influence_calculator.maths.nystroem_sketch import PROBE
from influence_calculator.maths.shapes import LayerShape, ModelShapes
from influence_job.plan.document import Plan, Sizes
from influence_job.spec import (
    ArnoldiSpec,
    CgSpec,
    Device,
    DirectSpec,
    EkfacSpec,
    Expectation,
    GradDotSpec,
    InfluenceJobSpec,
    InverseHarmonicMeanSpec,
    JacobiSpec,
    LissaSpec,
    LograSpec,
    Mode,
    NystroemSketchSpec,
    NystroemSpec,
    SecondOrder,
    TracInSpec,
    TrakSpec,
)

GFLOPS = {Device.CPU: 20.0, Device.CUDA: 10_000.0}
"""Per worker, assumed: one core, and a data-centre GPU in float32. Small models reach a fraction of it."""
CG_ITERATIONS = 30
"""Assumed where the number is known only afterwards."""
KRYLOV_ROUNDS = 2
"""The same for how often a search for eigenpairs multiplies as many rows as it keeps."""
LISSA_STEPS = 300
"""The same for LiSSA, which takes the square of as many."""


def gflop(spec: InfluenceJobSpec, sizes: Sizes, plan: Plan) -> dict[str, float]:
    """Stage -> 10^9 operations over all workers."""
    shapes = _differentiated(spec, sizes.shapes)
    states = max(1, shapes.checkpoints)
    capture = states * _capture(shapes)
    # LoGra projects what a layer captured and forms no gradient of it.
    gradient = 0.0 if isinstance(spec.method, LograSpec) else states * _gradient(shapes)
    turn = _TURNS.get(type(spec.method), _nothing)(spec.method, sizes)
    stages: dict[str, float] = {}
    if plan.fit_passes:
        stages["Fitting"] = _of_method(_FITS, spec, sizes)
    if plan.on_itself:
        each = capture + gradient + 2.0 * sum(plan.blocks.values())
        stages["Scores"] = plan.train * each + _of_method(_SOLVES, spec, sizes)
    elif plan.gradients_only:
        stages["Gradients"] = plan.train * (capture + gradient + turn)
    elif plan.operation.solves_tests:
        stages["Factors"] = plan.test * (capture + gradient) + _of_method(_SOLVES, spec, sizes)
    if plan.has_scores:
        pairs = float(plan.test) * plan.train
        differentiated = plan.groups * plan.train if plan.operation.reads_training else 0
        training = differentiated * (capture + gradient + turn - _unturned(spec, sizes))
        stages["Scores"] = training + 2.0 * _columns(spec, sizes, plan) * pairs
        if plan.by_token:
            stages["Scores"] = plan.groups * plan.train * capture + gradient * pairs  # Z ã of every token
        if spec.mode is Mode.PERTURBATION:
            # A double backward per test row and training example, and per block where these are told apart.
            stages["Scores"] += 3 * capture * pairs * (len(plan.blocks) if plan.by_block else 1)
    return {name: flop / 1e9 for name, flop in stages.items()}


def seconds(spec: InfluenceJobSpec, stages: dict[str, float]) -> dict[str, float]:
    """Stage -> seconds with the spec's workers at the assumed rate."""
    rate = GFLOPS[spec.resolved_device] * spec.workers.replicas
    return {name: amount / rate for name, amount in stages.items()}


def _differentiated(spec: InfluenceJobSpec, shapes: ModelShapes) -> ModelShapes:
    """EK-FAC differentiates by what an embedding looks up, `[S, o]`, in place of its table `[V, o]`."""
    if not isinstance(spec.method, EkfacSpec):
        return shapes
    return _of_lookups(shapes)


def _of_lookups(shapes: ModelShapes) -> ModelShapes:
    looked_up = {e.weight: (e.tokens, e.columns) for e in shapes.embeddings}
    return replace(shapes, parameters={**shapes.parameters, **looked_up})


def _columns(spec: InfluenceJobSpec, sizes: Sizes, plan: Plan) -> float:
    """Columns of a left representation that a training example meets: of a table the rows scored at once."""
    columns = sum(plan.blocks.values())
    if isinstance(spec.method, EkfacSpec):
        together = min(plan.micro_batch, plan.train_chunk_length)
        for e in sizes.shapes.embeddings:
            columns -= (e.rows - rows_scored_at_once(e, together)) * e.columns
    return float(columns)


def _products(shapes: ModelShapes) -> float:
    """Σ S i o over layers; parameters outside of layers count once per example."""
    inside = sum(layer.inputs * layer.outputs for layer in shapes.layers)
    outside = max(0, shapes.width - inside)
    return float(sum(layer.tokens * layer.inputs * layer.outputs for layer in shapes.layers) + outside)


def _capture(shapes: ModelShapes) -> float:
    return 4 * _products(shapes)


def _gradient(shapes: ModelShapes) -> float:
    return 2 * _products(shapes)


def _fit_ekfac(spec: EkfacSpec, sizes: Sizes) -> float:
    shapes = _of_lookups(sizes.shapes)
    drawn = _pseudo_gradients(spec, shapes)
    rotation = sum(2.0 * layer.tokens * _per_group(layer, 2) for layer in shapes.layers)
    rotation += _turn_lookups(spec, sizes)
    capture = (1 + drawn) * _capture(shapes) / 2  # forward once
    example = capture + drawn * rotation
    if spec.update_diagonal:
        example += capture + drawn * (rotation + _gradient(shapes))
    eigenproblems = sum(10 * _per_group(layer, 3) for layer in shapes.layers)
    eigenproblems += sum(10 * e.columns**3 for e in shapes.embeddings)
    return sizes.train * example + eigenproblems


def _pseudo_gradients(spec: EkfacSpec, shapes: ModelShapes) -> int:
    """Backward passes per training example and pass of the fit."""
    match spec.expectation:
        case Expectation.EXACT:
            return shapes.outputs
        case Expectation.SAMPLED:
            return spec.samples
        case Expectation.EMPIRICAL:
            return 1


def _per_group(layer: LayerShape, power: int) -> int:
    """Over the groups of a layer, both sides of each to a power."""
    return layer.groups * (layer.inputs**power + layer.group_outputs**power)


def _fit_direct(spec: DirectSpec, sizes: Sizes) -> float:
    shapes, widths = sizes.shapes, sizes.blocks.values()
    if spec.second_order is SecondOrder.EMPIRICAL_FISHER:
        example = _capture(shapes) + _gradient(shapes) + sum(2.0 * width**2 for width in widths)
    else:
        example = 2 * _capture(shapes) * sum(widths)  # a product with H per parameter
    return sizes.train * example + sum(width**3 / 3 for width in widths)  # Cholesky's


def _multiplied(second_order: SecondOrder, shapes: ModelShapes, rows: int) -> float:
    """The products of one example's curvature with some rows, in one pass."""
    if second_order is SecondOrder.EMPIRICAL_FISHER:
        return _capture(shapes) + _gradient(shapes) + 4.0 * shapes.width * rows
    return 2 * _capture(shapes) * rows


def _trace(spec: Any, sizes: Sizes) -> float:
    """Of a relative λ; exact, so that a Hessian is multiplied with every unit vector. Fisher's is the sum of
    gradients' squares.
    """
    if not spec.relative:
        return 0.0
    fisher = isinstance(spec, InverseHarmonicMeanSpec) or spec.second_order is SecondOrder.EMPIRICAL_FISHER
    if fisher:
        return sizes.train * _multiplied(SecondOrder.EMPIRICAL_FISHER, sizes.shapes, 0)
    return sizes.train * _multiplied(spec.second_order, sizes.shapes, sizes.shapes.width)


def _fit_cg(spec: CgSpec, sizes: Sizes) -> float:
    match spec.preconditioner:
        case None:
            rows = 0
        case JacobiSpec(samples=rows) | NystroemSpec(rank=rows):
            pass
    passed = _multiplied(spec.second_order, sizes.shapes, min(rows, sizes.shapes.width)) if rows else 0.0
    return sizes.train * passed + _trace(spec, sizes)


def _fit_arnoldi(spec: ArnoldiSpec, sizes: Sizes) -> float:
    rows = KRYLOV_ROUNDS * (spec.krylov_dimension or max(2 * spec.rank + 1, 20))
    searched = _multiplied(spec.second_order, sizes.shapes, min(rows, sizes.shapes.width))
    return sizes.train * searched + _trace(spec, sizes)


def _fit_nystroem(spec: NystroemSketchSpec, sizes: Sizes) -> float:
    rows = spec.rank + (PROBE.size if spec.second_order is SecondOrder.HESSIAN else 0)
    sketched = _multiplied(spec.second_order, sizes.shapes, min(rows, sizes.shapes.width))
    return sizes.train * sketched + _trace(spec, sizes)


def _solve_low_rank(spec: ArnoldiSpec | NystroemSketchSpec, sizes: Sizes) -> float:
    return sizes.test * 4.0 * min(spec.rank, sizes.shapes.width) * sizes.shapes.width


def _solve_ekfac(spec: EkfacSpec, sizes: Sizes) -> float:
    layers = sizes.shapes.layers
    rotation = sum(4 * s.inputs * s.outputs * (s.inputs + s.group_outputs) for s in layers)
    return sizes.test * (rotation + _turn_lookups(spec, sizes))


def _turn_lookups(_: EkfacSpec, sizes: Sizes) -> float:
    """Of one example, by the basis of the columns; rows stay what they are."""
    return sum(2.0 * e.tokens * e.columns**2 for e in sizes.shapes.embeddings)


def _turn_ekfac(spec: EkfacSpec, sizes: Sizes) -> float:
    """Of one example."""
    return sum(map(_turn_layer, sizes.shapes.layers)) + _turn_lookups(spec, sizes)


def _turn_layer(layer: LayerShape) -> float:
    """The tokens of an example or the sum of their products, whichever is less."""
    tokens = 2.0 * layer.tokens * _per_group(layer, 2)
    return min(tokens, 2.0 * layer.inputs * layer.outputs * (layer.inputs + layer.group_outputs))


def _unturned(spec: InfluenceJobSpec, sizes: Sizes) -> float:
    """What is not turned of one example because it is scored by parameter."""
    if not isinstance(spec.method, EkfacSpec):
        return 0.0
    return sum(_turn_layer(layer) for layer in sizes.shapes.layers if _is_unturned(layer, sizes.train))


def _is_unturned(layer: LayerShape, train: int) -> bool:
    j = layer.inputs + int(layer.bias)
    return scores_by_parameter(train, layer.tokens, layer.outputs, j, layer.groups)


def _turn_arnoldi(spec: ArnoldiSpec, sizes: Sizes) -> float:
    """Of one training gradient, its part among the eigenvectors, where the complement is left out."""
    return 0.0 if spec.complement else _project(spec, sizes)


def _solve_direct(_: DirectSpec, sizes: Sizes) -> float:
    return sizes.test * sum(2.0 * width**2 for width in sizes.blocks.values())


def _iterated(second_order: SecondOrder, sizes: Sizes, examples: int) -> float:
    """Products of all right-hand sides with one example's curvature, `examples` times."""
    if second_order is SecondOrder.EMPIRICAL_FISHER:
        # Gradients are kept from one iteration to the next.
        once = sizes.train * _multiplied(second_order, sizes.shapes, 0)
        return once + examples * 4.0 * sizes.shapes.width * sizes.test
    return examples * _multiplied(second_order, sizes.shapes, sizes.test)


def _solve_cg(spec: CgSpec, sizes: Sizes) -> float:
    iterations = min(spec.maxiter or CG_ITERATIONS, CG_ITERATIONS)
    return _iterated(spec.second_order, sizes, iterations * sizes.train)


def _solve_lissa(spec: LissaSpec, sizes: Sizes) -> float:
    steps = min(spec.maxiter, LISSA_STEPS)
    examples = min(spec.batch_size or sizes.train, sizes.train)
    return _iterated(spec.second_order, sizes, steps * examples)


def _solve_inverse_harmonic_mean(_: InverseHarmonicMeanSpec, sizes: Sizes) -> float:
    """A product and its transpose with each training gradient; taking these once per test chunk is less."""
    shapes = sizes.shapes
    once = sizes.train * (_capture(shapes) + _gradient(shapes))
    return once + sizes.test * sizes.train * 4.0 * shapes.width


def _project(spec: TrakSpec | ArnoldiSpec, sizes: Sizes) -> float:
    """Of one example's gradient."""
    return 2.0 * min(spec.rank, sizes.shapes.width) * sizes.shapes.width


def _fit_trak(spec: TrakSpec, sizes: Sizes) -> float:
    shapes, k = sizes.shapes, min(spec.rank, sizes.shapes.width)
    example = _capture(shapes) + _gradient(shapes) + _project(spec, sizes) + 2.0 * k**2
    return sizes.train * example + k**3 / 3


def _solve_trak(spec: TrakSpec, sizes: Sizes) -> float:
    return sizes.test * (_project(spec, sizes) + 2.0 * min(spec.rank, sizes.shapes.width) ** 2)


def _project_layers(spec: LograSpec, sizes: Sizes) -> float:
    """Of one example: the tokens of each layer and the sum of their products; all of other gradients."""
    layers = sum(
        2.0 * layer.tokens * layer.groups * _projected(layer, spec.rank) for layer in sizes.shapes.layers
    )
    return layers + sum(2.0 * width * k for width, k in other_ranks(sizes.shapes, spec.rank))


def _projected(layer: LayerShape, rank: int) -> int:
    """Multiplications per token and group."""
    inputs, outputs = layer.inputs + int(layer.bias), layer.group_outputs
    k_in, k_out = min(rank, inputs), min(rank, outputs)
    return inputs * k_in + outputs * k_out + k_in * k_out


def _fit_logra(spec: LograSpec, sizes: Sizes) -> float:
    widths = block_ranks(sizes.shapes, spec.rank)
    example = _capture(sizes.shapes) + _project_layers(spec, sizes) + sum(2.0 * k**2 for k in widths)
    return sizes.train * example + sum(k**3 / 3 for k in widths)


def _solve_logra(spec: LograSpec, sizes: Sizes) -> float:
    solves = sum(2.0 * k**2 for k in block_ranks(sizes.shapes, spec.rank))
    return sizes.test * (_project_layers(spec, sizes) + solves)


def _nothing(_: Any, __: Sizes) -> float:
    return 0.0


Cost = Callable[[Any, Sizes], float]
_FITS: dict[type, Cost] = {
    EkfacSpec: _fit_ekfac,
    DirectSpec: _fit_direct,
    CgSpec: _fit_cg,
    ArnoldiSpec: _fit_arnoldi,
    NystroemSketchSpec: _fit_nystroem,
    LissaSpec: _trace,
    InverseHarmonicMeanSpec: _trace,
    GradDotSpec: _nothing,
    TracInSpec: _nothing,
    TrakSpec: _fit_trak,
    LograSpec: _fit_logra,
}
_SOLVES: dict[type, Cost] = {
    EkfacSpec: _solve_ekfac,
    DirectSpec: _solve_direct,
    CgSpec: _solve_cg,
    ArnoldiSpec: _solve_low_rank,
    NystroemSketchSpec: _solve_low_rank,
    LissaSpec: _solve_lissa,
    InverseHarmonicMeanSpec: _solve_inverse_harmonic_mean,
    GradDotSpec: _nothing,
    TracInSpec: _nothing,
    TrakSpec: _solve_trak,
    LograSpec: _solve_logra,
}
_TURNS: dict[type, Cost] = {
    EkfacSpec: _turn_ekfac,
    ArnoldiSpec: _turn_arnoldi,
    TrakSpec: _project,
    LograSpec: _project_layers,
}
"""Of one training gradient into the coordinates that it is scored in, where that is much of the work."""


def _of_method(costs: dict[type, Cost], spec: InfluenceJobSpec, sizes: Sizes) -> float:
    return costs[type(spec.method)](spec.method, sizes)
