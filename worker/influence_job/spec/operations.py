"""What a job's result is, and which of its other fields go with that.

Every rule stands twice: as CEL for the API server, and in Python for a file.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

from influence_job.spec.ekfac import EkfacSpec
from influence_job.spec.fields import refuse
from influence_job.spec.gradient_methods import GradDotSpec, LograSpec, TracInSpec, TrakSpec
from influence_job.spec.methods import BlockStructure, MethodSpec
from influence_job.spec.rules import Refusal, rule

if TYPE_CHECKING:
    from influence_job.spec.job import InfluenceJobSpec


class Operation(StrEnum):
    """What the result is."""

    INFLUENCES = "Influences"
    """Every training example on every test example."""
    INFLUENCES_BY_BLOCK = "InfluencesByBlock"
    """The same, as the part of each block of parameters: layers, mostly."""
    INFLUENCES_BY_TOKEN = "InfluencesByToken"
    """The same, as the part of each token of the training examples."""
    INFLUENCE_FACTORS = "InfluenceFactors"
    """(H + λI)^-1 g of the test examples alone."""
    INFLUENCES_FROM_FACTORS = "InfluencesFromFactors"
    """Influences, from factors that an earlier job stored."""
    SELF_INFLUENCE = "SelfInfluence"
    """Every training example on itself: outliers and wrong labels have large ones."""


class Mode(StrEnum):
    """Which derivative of the training side."""

    UP = "Up"
    """Up-weighting a training example: one number per pair."""
    PERTURBATION = "Perturbation"
    """Moving a training example's input: one number per pair and input feature."""


_WITHOUT_PERTURBATION = {
    Operation.INFLUENCE_FACTORS: "expected Up: factors are the same in both modes; Perturbation is for "
    "Influences and InfluencesFromFactors",
    Operation.SELF_INFLUENCE: "expected Up: an example's influence on itself has no perturbation",
    Operation.INFLUENCES_BY_BLOCK: "expected Up: the parts of blocks are stored of up-weighting alone",
    Operation.INFLUENCES_BY_TOKEN: "expected Up: the parts of tokens are stored of up-weighting alone",
}
_NO_TEST_CHUNKS = "not for SelfInfluence, which has no test examples; set chunks.train or remove it"
_ONE_BLOCK = (
    "expected Ekfac, Logra or TracIn, or blocks other than Full, for InfluencesByBlock: one block of all "
    "parameters has one part, the whole; set method.blocks: LayerWise, or operation: Influences"
)
_DENSE = {
    Operation.INFLUENCE_FACTORS: "factors",
    Operation.SELF_INFLUENCE: "self-influences",
    Operation.INFLUENCES_BY_BLOCK: "the parts of blocks",
    Operation.INFLUENCES_BY_TOKEN: "the parts of tokens",
}
"""What has no top k of its own."""

OPERATION_RULES = (
    rule(
        "self.operation != 'InfluencesFromFactors' || has(self.factors)",
        "expected {url: store of an InfluenceFactors job} for InfluencesFromFactors",
        "factors",
        Refusal.REQUIRED,
    ),
    rule(
        "self.operation == 'InfluencesFromFactors' || !has(self.factors)",
        "only for operation InfluencesFromFactors; remove it or change operation",
        "factors",
        Refusal.FORBIDDEN,
    ),
    *(
        rule(f"self.operation != '{operation}' || self.mode == 'Up'", message, "mode")
        for operation, message in _WITHOUT_PERTURBATION.items()
    ),
    rule(
        "self.operation != 'SelfInfluence' || !has(self.chunks) || !has(self.chunks.test)",
        _NO_TEST_CHUNKS,
        "chunks.test",
        Refusal.FORBIDDEN,
    ),
    rule(
        "self.operation != 'InfluencesByBlock' || self.method.name in ['Ekfac', 'Logra', 'TracIn'] || "
        "(has(self.method.blocks) && self.method.blocks != 'Full')",
        _ONE_BLOCK,
        "method",
    ),
    rule(
        "self.output.dense || (self.mode == 'Up' && "
        f"!(self.operation in [{', '.join(repr(str(operation)) for operation in _DENSE)}]))",
        "expected true: factors, self-influences, perturbations and the parts of blocks and tokens have no "
        "top k, so nothing would be stored",
        "output.dense",
    ),
)


def check_operation(spec: InfluenceJobSpec) -> None:
    """Refuses fields that do not go with the operation.

    Raises:
        ValueError: naming the field, as pydantic tells it.
    """
    for check in _CHECKS:
        check(spec)


def _check_factors(spec: InfluenceJobSpec) -> None:
    reads_factors = spec.operation is Operation.INFLUENCES_FROM_FACTORS
    if reads_factors and spec.factors is None:
        raise refuse("factors", "expected {url: store of an InfluenceFactors job} for InfluencesFromFactors")
    if not reads_factors and spec.factors is not None:
        raise refuse(
            "factors",
            f"only for operation InfluencesFromFactors, got {spec.operation}; remove it or change it",
        )


def _check_mode(spec: InfluenceJobSpec) -> None:
    if spec.mode is Mode.PERTURBATION and spec.operation in _WITHOUT_PERTURBATION:
        raise refuse("mode", _WITHOUT_PERTURBATION[spec.operation])


def _check_chunks(spec: InfluenceJobSpec) -> None:
    on_itself = spec.operation is Operation.SELF_INFLUENCE
    if on_itself and spec.chunks is not None and spec.chunks.test is not None:
        raise refuse("chunks.test", _NO_TEST_CHUNKS)


def _check_blocks(spec: InfluenceJobSpec) -> None:
    if spec.operation is Operation.INFLUENCES_BY_BLOCK and not _divides(spec.method):
        raise refuse("method", _ONE_BLOCK)


def _divides(method: MethodSpec) -> bool:
    """Whether a method may have several blocks: of parameters, or of checkpoints."""
    match method:
        case EkfacSpec() | LograSpec() | TracInSpec():
            return True
        case GradDotSpec() | TrakSpec():
            return False
        case _:
            return method.blocks is not BlockStructure.FULL


def _check_dense(spec: InfluenceJobSpec) -> None:
    what = _DENSE.get(spec.operation, "perturbations" if spec.mode is Mode.PERTURBATION else None)
    if not spec.output.dense and what is not None:
        raise refuse("output.dense", f"expected true: {what} have no top k, so nothing would be stored")


_CHECKS: tuple[Callable[[InfluenceJobSpec], None], ...] = (
    _check_factors,
    _check_mode,
    _check_chunks,
    _check_blocks,
    _check_dense,
)
