"""What a job's result is, and which of its other fields go with that.

Every rule stands twice: as CEL for the API server, and in Python for a file.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

from influence_job.spec.blocks import BlockStructure
from influence_job.spec.ekfac import EkfacSpec
from influence_job.spec.fields import refuse
from influence_job.spec.gradient_methods import LograSpec, TracInSpec, TrakSpec
from influence_job.spec.methods import MethodSpec
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
    TRAINING_GRADIENTS = "TrainingGradients"
    """The gradients of the training examples alone, in the coordinates in which the method scores."""
    INFLUENCES_FROM_GRADIENTS = "InfluencesFromGradients"
    """Influences, from training gradients that an earlier job stored: no training example is read."""
    SELF_INFLUENCE = "SelfInfluence"
    """Every training example on itself: outliers and wrong labels have large ones."""

    @property
    def fits(self) -> bool:
        """Whether the job fits the method; else it takes the fit of the store that it reads from."""
        return self not in (Operation.INFLUENCES_FROM_FACTORS, Operation.INFLUENCES_FROM_GRADIENTS)

    @property
    def reads_training(self) -> bool:
        """Whether training examples are read, to fit or to score."""
        return self is not Operation.INFLUENCES_FROM_GRADIENTS

    @property
    def is_of_training(self) -> bool:
        """Whether there are training examples alone, and no test examples."""
        return self in (Operation.TRAINING_GRADIENTS, Operation.SELF_INFLUENCE)

    @property
    def has_scores(self) -> bool:
        """Whether test examples meet training examples; else factors, gradients or self-influences are the
        result.
        """
        return not self.is_of_training and self is not Operation.INFLUENCE_FACTORS

    @property
    def solves_tests(self) -> bool:
        """Whether test examples are differentiated and solved."""
        return not self.is_of_training and self is not Operation.INFLUENCES_FROM_FACTORS


class Mode(StrEnum):
    """Which derivative of the training side."""

    UP = "Up"
    """Up-weighting a training example: one number per pair."""
    PERTURBATION = "Perturbation"
    """Moving a training example's input: one number per pair and input feature."""


_WITHOUT_PERTURBATION = {
    Operation.INFLUENCE_FACTORS: "expected Up: factors are the same in both modes; Perturbation is for "
    "Influences, InfluencesByBlock and InfluencesFromFactors",
    Operation.SELF_INFLUENCE: "expected Up: an example's influence on itself has no perturbation",
    Operation.TRAINING_GRADIENTS: "expected Up: gradients are stored as up-weighting scores them",
    Operation.INFLUENCES_FROM_GRADIENTS: "expected Up: a perturbation takes the training examples themselves",
    Operation.INFLUENCES_BY_TOKEN: "expected Up: the parts of tokens are stored of up-weighting alone",
}
_NO_TEST_CHUNKS = (
    "not for SelfInfluence and TrainingGradients, which have no test examples; set chunks.train or remove it"
)
_ONE_BLOCK = (
    "expected Ekfac, Logra or TracIn, or blocks other than Full, for InfluencesByBlock: one block of all "
    "parameters has one part, the whole; set method.blocks: LayerWise, or operation: Influences"
)
_SOLVES_WITH_DATA = ("Cg", "Lissa", "InverseHarmonicMean")
_STORED_GRADIENTS = (
    "not Cg, Lissa or InverseHarmonicMean for TrainingGradients and InfluencesFromGradients: they solve by "
    "going over the training examples, which stored gradients are to spare; take another method (Trak and "
    "Logra have the shortest gradients), or operation: Influences"
)
_DENSE = {
    Operation.INFLUENCE_FACTORS: "factors",
    Operation.TRAINING_GRADIENTS: "gradients",
    Operation.SELF_INFLUENCE: "self-influences",
    Operation.INFLUENCES_BY_BLOCK: "the parts of blocks",
    Operation.INFLUENCES_BY_TOKEN: "the parts of tokens",
}
"""What has no top k of its own."""

_SOURCES = (
    ("factors", Operation.INFLUENCES_FROM_FACTORS, "an InfluenceFactors job"),
    ("gradients", Operation.INFLUENCES_FROM_GRADIENTS, "a TrainingGradients job"),
)
"""Field that names the store of an earlier job, the operation that needs it, and whose store it is."""


def _own_output(field: str) -> str:
    return (
        f"expected another store than {field}.url, which the job reads and Overwrite would delete; give the "
        "result a url of its own"
    )


OPERATION_RULES = (
    *(
        made
        for field, operation, maker in _SOURCES
        for made in (
            rule(
                f"self.operation != '{operation}' || has(self.{field})",
                f"expected {{url: store of {maker}}} for {operation}",
                field,
                Refusal.REQUIRED,
            ),
            rule(
                f"self.operation == '{operation}' || !has(self.{field})",
                f"only for operation {operation}; remove it or change operation",
                field,
                Refusal.FORBIDDEN,
            ),
            rule(
                f"!has(self.{field}) || self.{field}.url != self.output.url",
                _own_output(field),
                "output.url",
            ),
        )
    ),
    *(
        rule(f"self.operation != '{operation}' || self.mode == 'Up'", message, "mode")
        for operation, message in _WITHOUT_PERTURBATION.items()
    ),
    rule(
        "!(self.operation in ['SelfInfluence', 'TrainingGradients']) || !has(self.chunks) || "
        "!has(self.chunks.test)",
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
        "!(self.operation in ['TrainingGradients', 'InfluencesFromGradients']) || "
        f"!(self.method.name in [{', '.join(map(repr, _SOLVES_WITH_DATA))}])",
        _STORED_GRADIENTS,
        "method",
    ),
    rule(
        "self.output.dense || (self.mode == 'Up' && "
        f"!(self.operation in [{', '.join(repr(str(operation)) for operation in _DENSE)}]))",
        "expected true: factors, gradients, self-influences, perturbations and the parts of blocks and "
        "tokens have no top k, so nothing would be stored",
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


def _check_sources(spec: InfluenceJobSpec) -> None:
    for field, operation, maker in _SOURCES:
        source = getattr(spec, field)
        given = source is not None
        if spec.operation is operation and not given:
            raise refuse(field, f"expected {{url: store of {maker}}} for {operation}")
        if spec.operation is not operation and given:
            raise refuse(
                field, f"only for operation {operation}, got {spec.operation}; remove it or change it"
            )
        if given and source.url == spec.output.url:
            raise refuse("output.url", f"{_own_output(field)}, got {spec.output.url} for both")


def _check_mode(spec: InfluenceJobSpec) -> None:
    if spec.mode is Mode.PERTURBATION and spec.operation in _WITHOUT_PERTURBATION:
        raise refuse("mode", _WITHOUT_PERTURBATION[spec.operation])


def _check_chunks(spec: InfluenceJobSpec) -> None:
    if spec.operation.is_of_training and spec.chunks is not None and spec.chunks.test is not None:
        raise refuse("chunks.test", _NO_TEST_CHUNKS)


def _check_blocks(spec: InfluenceJobSpec) -> None:
    if spec.operation is Operation.INFLUENCES_BY_BLOCK and not _divides(spec.method):
        raise refuse("method", _ONE_BLOCK)


def _divides(method: MethodSpec) -> bool:
    """Whether a method may have several blocks: of parameters, or of checkpoints."""
    match method:
        case EkfacSpec() | LograSpec() | TracInSpec():
            return True
        case TrakSpec():
            return False
        case _:
            return method.blocks is not BlockStructure.FULL


def _check_gradients(spec: InfluenceJobSpec) -> None:
    stored = spec.operation in (Operation.TRAINING_GRADIENTS, Operation.INFLUENCES_FROM_GRADIENTS)
    if stored and spec.method.name in _SOLVES_WITH_DATA:
        raise refuse("method", _STORED_GRADIENTS)


def _check_dense(spec: InfluenceJobSpec) -> None:
    what = _DENSE.get(spec.operation, "perturbations" if spec.mode is Mode.PERTURBATION else None)
    if not spec.output.dense and what is not None:
        raise refuse("output.dense", f"expected true: {what} have no top k, so nothing would be stored")


_CHECKS: tuple[Callable[[InfluenceJobSpec], None], ...] = (
    _check_sources,
    _check_mode,
    _check_chunks,
    _check_blocks,
    _check_gradients,
    _check_dense,
)
