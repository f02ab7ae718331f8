"""The methods a job may name, with their parameters: a union that `name` decides.

The values become those of `influence_calculator.maths` unchanged; this module knows no torch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from influence_job.spec.blocks import BLOCK_RULES, BlocksSpec
from influence_job.spec.ekfac import EkfacSpec
from influence_job.spec.fields import Flag, Integer, Number, SpecModel, refuse
from influence_job.spec.gradient_methods import GradDotSpec, LograSpec, TracInSpec, TrakSpec
from influence_job.spec.rules import POSITIVE_REGULARIZATION, Refusal, rule, rules


class SecondOrder(StrEnum):
    """The curvature H."""

    HESSIAN = "Hessian"
    EMPIRICAL_FISHER = "EmpiricalFisher"
    """Mean of g gᵀ at the true labels."""
    GENERALIZED_GAUSS_NEWTON = "GeneralizedGaussNewton"
    """Mean of Jᵀ (∇²_f loss) J: positive semi-definite, the true Fisher for cross-entropy."""


class Products(StrEnum):
    """Who makes the products with H that conjugate gradients take."""

    LOCAL = "Local"
    """The worker that solves a chunk of test examples, over all training examples."""
    DISTRIBUTED = "Distributed"
    """All workers, each over ranges of the training examples."""


RegularizationByBlock = Annotated[
    dict[Annotated[str, Field(max_length=253)], Annotated[Number, Field(ge=0)]],
    Field(min_length=1, max_length=1024),
]


class JacobiSpec(SpecModel):
    """The diagonal of H + λI, estimated from random products."""

    name: Literal["Jacobi"]
    samples: Annotated[Integer, Field(ge=1, le=10_000)] = Field(
        1, description="Random vectors that estimate the diagonal; default 1."
    )


class NystroemSpec(SpecModel):
    """A low-rank approximation of H."""

    name: Literal["Nystroem"]
    rank: Annotated[Integer, Field(ge=1, le=100_000)] = Field(description="Rank of the approximation.")


PreconditionerSpec = Annotated[JacobiSpec | NystroemSpec, Field(discriminator="name")]


_SOLVER_RULES = (
    *BLOCK_RULES,
    rule(
        "!(has(self.relative) && self.relative) || !has(self.regularizationByBlock)",
        "not together with regularizationByBlock; remove one of them",
        "relative",
        Refusal.FORBIDDEN,
    ),
)


class _BlockwiseSpec(BlocksSpec):
    """What methods that solve block by block share."""

    model_config = ConfigDict(json_schema_extra=rules(*_SOLVER_RULES))

    regularization: Annotated[Number, Field(ge=0)] = Field(
        description="λ, added to the diagonal of H. No default: 0.01 is a start; 0 needs an invertible H."
    )
    relative: Flag = Field(
        False, description="λ of block b becomes regularization · tr(H_b)/dim_b. Default false."
    )
    regularization_by_block: RegularizationByBlock | None = Field(
        None, description="λ per block name; must cover every block and then replaces `regularization`."
    )

    @model_validator(mode="after")
    def _one_regularization(self) -> _BlockwiseSpec:
        if self.relative and self.regularization_by_block is not None:
            raise refuse("relative", "not together with regularizationByBlock; remove one of them")
        return self


class _SolverSpec(_BlockwiseSpec):
    """What methods that solve with H itself share."""

    second_order: SecondOrder = Field(
        SecondOrder.HESSIAN,
        description="Hessian | EmpiricalFisher | GeneralizedGaussNewton. Default Hessian; a network that is "
        "not at a minimum has an indefinite one: GeneralizedGaussNewton never is.",
    )


class DirectSpec(_SolverSpec):
    """Forms H, P × P numbers, and factorizes it: exact, for up to some ten thousand parameters."""

    name: Literal["Direct"]


TOGETHER = "expected true with products: Distributed; lower chunks.test to solve fewer at once"


class CgSpec(_SolverSpec):
    """Conjugate gradients with products by H: exact up to `rtol`, reads the training set per iteration."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *_SOLVER_RULES,
            rule(
                "!(has(self.products) && self.products == 'Distributed') || "
                "!has(self.simultaneous) || self.simultaneous",
                TOGETHER,
                "simultaneous",
            ),
        )
    )

    name: Literal["Cg"]
    rtol: Annotated[Number, Field(gt=0, lt=1)] = Field(
        1e-4, description="A right-hand side b has converged at ‖r‖ ≤ max(rtol·‖b‖, atol). Default 1e-4."
    )
    atol: Annotated[Number, Field(ge=0)] = Field(
        0.0,
        description="Absolute part of that bound. Default 0: larger ones answer 0 for confident examples.",
    )
    maxiter: Annotated[Integer, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Iterations at most; default 10 times the number of parameters, at most 5000."
    )
    simultaneous: Flag = Field(
        True, description="Solve all test examples of a chunk at once, sharing each pass. Default true."
    )
    preconditioner: PreconditionerSpec | None = Field(
        None, description="{name: Jacobi, samples: 1} or {name: Nystroem, rank: 10}; default none."
    )
    products: Products = Field(
        Products.LOCAL,
        description="Local | Distributed. Default Local: one worker solves a chunk of test examples. "
        "Distributed: all workers share each iteration, whose state is stored; when chunks are few.",
    )

    @model_validator(mode="after")
    def _can_be_shared(self) -> CgSpec:
        if self.products is Products.DISTRIBUTED and not self.simultaneous:
            raise refuse("simultaneous", TOGETHER)
        return self


class LissaSpec(_SolverSpec):
    """A Neumann series of H, which must be positive; reads the training set per step, or parts of it."""

    name: Literal["Lissa"]
    rtol: Annotated[Number, Field(gt=0, lt=1)] = Field(
        1e-4, description="A right-hand side b has converged at ‖r‖ ≤ max(rtol·‖b‖, atol). Default 1e-4."
    )
    atol: Annotated[Number, Field(ge=0)] = Field(
        0.0,
        description="Absolute part of that bound. Default 0: larger ones answer 0 for confident examples.",
    )
    maxiter: Annotated[Integer, Field(ge=1, le=1_000_000)] = Field(
        1000, description="Steps at most. Default 1000."
    )
    scale: Annotated[Number, Field(gt=0)] = Field(
        10.0,
        description="Divides each step: above half of the largest eigenvalue of H + λI, else it grows and "
        "ends not_finite. The smaller, the faster. Default 10.",
    )
    dampen: Annotated[Number, Field(ge=0)] = Field(
        0.0, description="Adds dampen·scale to the diagonal of H. Default 0."
    )
    batch_size: Annotated[Integer, Field(ge=1, le=2**31 - 1)] | None = Field(
        None, description="Training examples per step, drawn by `seed`; default all: exact steps, no noise."
    )
    seed: Annotated[Integer, Field(ge=0, le=2**53)] = Field(0, description="Keys the draws. Default 0.")


_COMPLEMENT = "self.name == 'Arnoldi' && !(has(self.complement) && !self.complement)"
_NO_ZERO = "self.regularizationByBlock.all(block, self.regularizationByBlock[block] > 0.0)"
ABOVE_ZERO = "expected more than 0"


class ArnoldiSpec(_SolverSpec):
    """The eigenpairs of H of largest modulus, found by products with it: some ten passes or more."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *_SOLVER_RULES,
            rule(
                f"!({_COMPLEMENT}) || {POSITIVE_REGULARIZATION}",
                ABOVE_ZERO,
                "regularization",
            ),
            rule(
                f"!({_COMPLEMENT}) || !has(self.regularizationByBlock) || {_NO_ZERO}",
                ABOVE_ZERO,
                "regularizationByBlock",
            ),
            rule(
                "!has(self.krylovDimension) || self.krylovDimension > (has(self.rank) ? self.rank : 10)",
                "expected more than rank",
                "krylovDimension",
            ),
        )
    )

    name: Literal["Arnoldi"]
    rank: Annotated[Integer, Field(ge=1, le=100_000)] = Field(10, description="Eigenpairs. Default 10.")
    krylov_dimension: Annotated[Integer, Field(ge=2, le=1_000_000)] | None = Field(
        None,
        description="Rows that the search keeps, more than rank; default 2·rank + 1, at least 20.",
    )
    tol: Annotated[Number, Field(gt=0, lt=1)] = Field(
        1e-6, description="An eigenpair has converged at ‖Hv − θv‖ ≤ tol·|θ|. Default 1e-6."
    )
    max_iter: Annotated[Integer, Field(ge=0, le=100)] | None = Field(
        None, description="Restarts of the search at most; default 30."
    )
    complement: Flag = Field(
        True,
        description="Whether what is outside of the eigenvectors counts, with curvature λ; needs λ above 0. "
        "Default true; false makes factors as narrow as rank.",
    )
    seed: Annotated[Integer, Field(ge=0, le=2**53)] = Field(0, description="Starts the search. Default 0.")

    @model_validator(mode="after")
    def _can_be_solved(self) -> ArnoldiSpec:
        if self.krylov_dimension is not None and self.krylov_dimension <= self.rank:
            raise refuse("krylovDimension", f"expected more than rank = {self.rank}")
        if self.complement:
            _require_positive(self)
        return self


class NystroemSketchSpec(_SolverSpec):
    """A random sketch of H, which must be positive: one pass, and some more that probe a Hessian for that."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *_SOLVER_RULES,
            rule(
                f"self.name != 'NystroemSketch' || {POSITIVE_REGULARIZATION}",
                ABOVE_ZERO,
                "regularization",
            ),
            rule(
                f"self.name != 'NystroemSketch' || !has(self.regularizationByBlock) || {_NO_ZERO}",
                ABOVE_ZERO,
                "regularizationByBlock",
            ),
        )
    )

    name: Literal["NystroemSketch"]
    rank: Annotated[Integer, Field(ge=1, le=100_000)] = Field(description="Rank of the sketch.")
    seed: Annotated[Integer, Field(ge=0, le=2**53)] = Field(0, description="Draws the sketch. Default 0.")

    @model_validator(mode="after")
    def _can_be_solved(self) -> NystroemSketchSpec:
        _require_positive(self)
        return self


class InverseHarmonicMeanSpec(_BlockwiseSpec):
    """DataInf: the mean of (g gᵀ + λI)^-1 over the training examples; reads them once per test chunk."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *_SOLVER_RULES,
            rule(
                f"self.name != 'InverseHarmonicMean' || {POSITIVE_REGULARIZATION}",
                ABOVE_ZERO,
                "regularization",
            ),
            rule(
                f"self.name != 'InverseHarmonicMean' || !has(self.regularizationByBlock) || {_NO_ZERO}",
                ABOVE_ZERO,
                "regularizationByBlock",
            ),
        )
    )

    name: Literal["InverseHarmonicMean"]

    @model_validator(mode="after")
    def _can_be_solved(self) -> InverseHarmonicMeanSpec:
        _require_positive(self)
        return self


def _require_positive(spec: _BlockwiseSpec) -> None:
    if spec.regularization <= 0:
        raise refuse("regularization", ABOVE_ZERO)
    if min((spec.regularization_by_block or {"": 1.0}).values()) <= 0:
        raise refuse("regularizationByBlock", ABOVE_ZERO)


MethodSpec = Annotated[
    DirectSpec
    | CgSpec
    | LissaSpec
    | InverseHarmonicMeanSpec
    | ArnoldiSpec
    | NystroemSketchSpec
    | EkfacSpec
    | GradDotSpec
    | TracInSpec
    | TrakSpec
    | LograSpec,
    Field(discriminator="name"),
]
