"""From a method as the spec names it to the method of the calculator."""

from __future__ import annotations

import re
from functools import singledispatch

from influence_calculator.maths.arnoldi import Arnoldi
from influence_calculator.maths.blocks import BlockMode, BlockStructure, Regularization, Relative
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.grad_dot import GradDot
from influence_calculator.maths.inverse_harmonic_mean import InverseHarmonicMean
from influence_calculator.maths.lissa import Lissa
from influence_calculator.maths.logra import Logra
from influence_calculator.maths.method import Method
from influence_calculator.maths.nystroem_sketch import NystroemSketch
from influence_calculator.maths.preconditioners import (
    JacobiPreconditioner,
    NystroemPreconditioner,
    Preconditioner,
)
from influence_calculator.maths.tracin import TracIn
from influence_calculator.maths.trak import Trak
from influence_job.spec import (
    ArnoldiSpec,
    BlocksSpec,
    CgSpec,
    DirectSpec,
    EkfacSpec,
    GradDotSpec,
    InfluenceJobSpec,
    InverseHarmonicMeanSpec,
    JacobiSpec,
    LissaSpec,
    LograSpec,
    Mode,
    NystroemSketchSpec,
    NystroemSpec,
    Operation,
    PreconditionerSpec,
    Products,
    TracInSpec,
    TrakSpec,
)

_NARROW = (
    Operation.INFLUENCES,
    Operation.INFLUENCES_BY_BLOCK,
    Operation.SELF_INFLUENCE,
    Operation.TRAINING_GRADIENTS,
    Operation.INFLUENCES_FROM_GRADIENTS,
)
SolverSpec = DirectSpec | CgSpec | ArnoldiSpec | NystroemSketchSpec | LissaSpec


def method_of(spec: InfluenceJobSpec) -> Method:
    """The method of a job, with representations as narrow as its operation allows.

    Perturbations, and factors that somebody reads, need columns that are parameters.
    """
    method = build(spec.method)
    narrow = spec.operation in _NARROW and spec.mode is Mode.UP
    if isinstance(method, Arnoldi | Logra | Trak) and narrow:
        return method.narrow()
    return method


@singledispatch
def build(spec: object) -> Method:
    """The calculator's method with the spec's values."""
    raise TypeError(f"expected a method's spec, got {type(spec).__name__}")


@build.register
def _direct(spec: DirectSpec) -> Method:
    return Direct(
        regularization=_regularization(spec), blocks=_blocks(spec), second_order=_second_order(spec)
    )


@build.register
def _cg(spec: CgSpec) -> Method:
    return Cg(
        regularization=_regularization(spec),
        blocks=_blocks(spec),
        second_order=_second_order(spec),
        rtol=spec.rtol,
        atol=spec.atol,
        maxiter=spec.maxiter,
        simultaneous=spec.simultaneous,
        preconditioner=_preconditioner(spec.preconditioner),
        solves_by_passes=spec.products is Products.DISTRIBUTED,
    )


@build.register
def _arnoldi(spec: ArnoldiSpec) -> Method:
    return Arnoldi(
        regularization=_regularization(spec),
        rank=spec.rank,
        krylov_dimension=spec.krylov_dimension,
        tol=spec.tol,
        max_iter=spec.max_iter,
        complement=spec.complement,
        blocks=_blocks(spec),
        second_order=_second_order(spec),
        seed=spec.seed,
    )


@build.register
def _nystroem_sketch(spec: NystroemSketchSpec) -> Method:
    return NystroemSketch(
        regularization=_regularization(spec),
        rank=spec.rank,
        blocks=_blocks(spec),
        second_order=_second_order(spec),
        seed=spec.seed,
    )


@build.register
def _lissa(spec: LissaSpec) -> Method:
    return Lissa(
        regularization=_regularization(spec),
        blocks=_blocks(spec),
        second_order=_second_order(spec),
        maxiter=spec.maxiter,
        dampen=spec.dampen,
        scale=spec.scale,
        rtol=spec.rtol,
        atol=spec.atol,
        batch_size=spec.batch_size,
        seed=spec.seed,
    )


@build.register
def _inverse_harmonic_mean(spec: InverseHarmonicMeanSpec) -> Method:
    return InverseHarmonicMean(regularization=_regularization(spec), blocks=_blocks(spec))


@build.register
def _ekfac(spec: EkfacSpec) -> Method:
    return Ekfac(
        regularization=spec.regularization,
        update_diagonal=spec.update_diagonal,
        expectation=_snake(spec.expectation),
        samples=spec.samples,
        seed=spec.seed,
        unsupported=_snake(spec.unsupported),
    )


@build.register
def _grad_dot(spec: GradDotSpec) -> Method:
    return GradDot(_blocks(spec))


@build.register
def _tracin(_: TracInSpec) -> Method:
    return TracIn()


@build.register
def _trak(spec: TrakSpec) -> Method:
    return Trak(spec.regularization, spec.rank, spec.seed)


@build.register
def _logra(spec: LograSpec) -> Method:
    λ = Relative(spec.regularization) if spec.relative else spec.regularization
    return Logra(λ, spec.rank, spec.seed)


def _regularization(spec: SolverSpec | InverseHarmonicMeanSpec) -> Regularization:
    if spec.regularization_by_block is not None:
        return dict(spec.regularization_by_block)
    return Relative(spec.regularization) if spec.relative else spec.regularization


def _blocks(spec: BlocksSpec) -> BlockStructure:
    if spec.custom_blocks is not None:
        return {block: tuple(names) for block, names in spec.custom_blocks.items()}
    return BlockMode(_snake(spec.blocks))


def _second_order(spec: SolverSpec) -> SecondOrderMode:
    return SecondOrderMode(_snake(spec.second_order))


def _preconditioner(spec: PreconditionerSpec | None) -> Preconditioner | None:
    if isinstance(spec, JacobiSpec):
        return JacobiPreconditioner(spec.samples)
    return NystroemPreconditioner(spec.rank) if isinstance(spec, NystroemSpec) else None


def _snake(word: str) -> str:
    """The calculator's spelling of a spec's word: `LayerWise` is `layer_wise`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(word)).lower()
