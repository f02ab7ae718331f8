"""The plan as a document: sizes in, grid out, and the arithmetic of its indices.

A region, one group of test chunks × one training chunk, is one chunk of the result, of all blocks or tokens
where these are told apart. For SelfInfluence and TrainingGradients a training chunk is: the training examples
stand in the place of test examples too, in the same chunks.

Symbols: T test examples, N training examples, R fit ranges, G groups.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field

from influence_calculator.maths.shapes import ModelShapes
from influence_job.plan.memory import MIB, StageMemory
from influence_job.spec import Mode, Operation, SpecModel

FACTOR_CHUNK_BYTES = 32 * MIB


class Sizes(SpecModel):
    """What a worker measured of model and data."""

    test: int = Field(ge=1, description="T, test examples; without any the training examples again.")
    train: int = Field(ge=1, description="N, training examples.")
    shapes: ModelShapes = Field(description="Sizes of the tracked part of the model.")
    feature_shape: tuple[int, ...] = Field(
        (), description="One training input's shape; (S,) tokens for InfluencesByToken; () for Up otherwise."
    )
    dtype: str = Field("float32", description="Of the result: float32 or float64.")
    blocks: dict[str, int] = Field(description="Block name -> parameters.")
    test_example_bytes: int = Field(0, ge=0, description="One test example as a batch entry.")
    stored_chunk: int | None = Field(
        None, ge=1, description="Training examples per chunk of the gradients that an earlier job stored."
    )

    @property
    def itemsize(self) -> int:
        return 8 if self.dtype == "float64" else 4


class ResultArray(SpecModel):
    """One array of the result, as the store holds it."""

    path: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    block: str | None = None
    """The block of parameters, of factors and gradients."""


class Plan(SpecModel):
    """The plan. Indices of regions run over training chunks first, then over groups."""

    operation: Operation
    mode: Mode
    test: int = Field(description="T")
    train: int = Field(description="N")
    test_chunk: int = Field(description="Test examples per chunk.")
    train_chunk: int = Field(description="Training examples per chunk.")
    group_chunks: int = Field(description="Test chunks per group.")
    fit_ranges: int = Field(
        description="R, contiguous ranges of whole chunks that a fit pass is divided into."
    )
    micro_batch: int = Field(description="Examples per forward pass, at most.")
    dtype: str = Field(description="Of the result.")
    feature_shape: tuple[int, ...] = ()
    blocks: dict[str, int] = Field(description="Block name -> columns of its factors.")
    dense: bool = True
    top_k: int = 100
    fit_passes: int = Field(description="Passes over the training set that fit the method, at most.")
    solves_with_data: bool = Field(
        description="Whether solving reads the training set: a pass per test chunk and iteration (epoch, "
        "where steps take parts)."
    )
    solves_by_passes: bool = Field(
        False, description="Whether all workers share each of these passes, in the ranges of a fit."
    )
    memory: dict[str, StageMemory] = Field(description="Stage -> bytes per worker.")

    def to_json(self) -> dict[str, Any]:
        """The document that the store keeps."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        return cls.model_validate(document)

    @property
    def has_scores(self) -> bool:
        return self.operation.has_scores

    @property
    def on_itself(self) -> bool:
        """Whether each training example meets itself alone."""
        return self.operation is Operation.SELF_INFLUENCE

    @property
    def gradients_only(self) -> bool:
        """Whether gradients of the training examples are the result."""
        return self.operation is Operation.TRAINING_GRADIENTS

    @property
    def by_block(self) -> bool:
        """Whether each pair of examples has a score per block of parameters."""
        return self.operation is Operation.INFLUENCES_BY_BLOCK

    @property
    def by_token(self) -> bool:
        """Whether each pair of examples has a score per token of the training example."""
        return self.operation is Operation.INFLUENCES_BY_TOKEN

    @property
    def parts_axis(self) -> int | None:
        """The axis of the matrix over which scores sum to the influences, if there is one."""
        return 0 if self.by_block else 2 if self.by_token else None

    @property
    def test_chunk_length(self) -> int:
        """Test examples of a chunk; the last one may have fewer."""
        return min(self.test_chunk, self.test)

    @property
    def train_chunk_length(self) -> int:
        """Training examples of a chunk; the last one may have fewer."""
        return min(self.train_chunk, self.train)

    @property
    def test_chunks(self) -> int:
        return -(-self.test // self.test_chunk)

    @property
    def train_chunks(self) -> int:
        return -(-self.train // self.train_chunk)

    @property
    def solved_chunks(self) -> int:
        """Chunks that are solved: test chunks, and training chunks for SelfInfluence."""
        return self.train_chunks if self.on_itself else self.test_chunks

    def differentiated_range(self, chunk: int) -> tuple[str, int, int]:
        """Side and examples `start` to `stop` of a chunk whose gradients are solved, or stored."""
        if self.operation.is_of_training:
            return ("train", *self.train_range(chunk))
        return ("test", *self.test_range(chunk))

    @property
    def group_rows(self) -> int:
        """Test examples of a group; the last one may have fewer."""
        return min(self.group_chunks * self.test_chunk, self.test)

    @property
    def groups(self) -> int:
        """G: passes over the training set, or its stored gradients, that scoring takes; 0 without scores."""
        return -(-self.test // self.group_rows) if self.has_scores else 0

    @property
    def regions(self) -> int:
        return self.groups * self.train_chunks

    def region(self, group: int, chunk: int) -> int:
        """Index of the region of a group and a training chunk."""
        _require_inside("group", group, self.groups)
        _require_inside("training chunk", chunk, self.train_chunks)
        return group * self.train_chunks + chunk

    def unravel(self, region: int) -> tuple[int, int]:
        """Group and training chunk of a region: the inverse of `region`."""
        _require_inside("region", region, self.regions)
        return divmod(region, self.train_chunks)

    def group_range(self, group: int) -> tuple[int, int]:
        """Test examples `start` to `stop` of a group."""
        return _cut(group, self.group_rows, self.test, "group")

    def test_range(self, chunk: int) -> tuple[int, int]:
        """Test examples `start` to `stop` of a test chunk."""
        return _cut(chunk, self.test_chunk, self.test, "test chunk")

    def train_range(self, chunk: int) -> tuple[int, int]:
        """Training examples `start` to `stop` of a training chunk."""
        return _cut(chunk, self.train_chunk, self.train, "training chunk")

    def fit_range(self, index: int) -> tuple[int, int]:
        """Training examples `start` to `stop` of a fit range: whole training chunks, as even as they allow.

        The fit thus reads what scoring reads, chunk by chunk, and the digests of both can be compared.
        """
        _require_inside("fit range", index, self.fit_ranges)
        first, last = (i * self.train_chunks // self.fit_ranges for i in (index, index + 1))
        return first * self.train_chunk, min(last * self.train_chunk, self.train)

    @property
    def itemsize(self) -> int:
        return 8 if self.dtype == "float64" else 4

    def factor_columns(self, block: int) -> int:
        """Columns per chunk of the factors of block number `block`."""
        width = list(self.blocks.values())[block]
        return max(1, min(width, FACTOR_CHUNK_BYTES // (self.test_chunk_length * self.itemsize)))

    @property
    def arrays(self) -> tuple[ResultArray, ...]:
        """The arrays that are the result."""
        if self.on_itself:
            return (
                ResultArray(
                    path="self_influences",
                    dims=self.result_dims,
                    shape=self.result_shape,
                    chunks=self.result_chunks,
                ),
            )
        if not self.has_scores:
            return tuple(self._rows_array(i, block) for i, block in enumerate(self.blocks))
        if not self.dense:
            return ()
        return (
            ResultArray(
                path="influences", dims=self.result_dims, shape=self.result_shape, chunks=self.result_chunks
            ),
        )

    def _rows_array(self, number: int, block: str) -> ResultArray:
        return ResultArray(
            path=f"{'gradients' if self.gradients_only else 'factors'}/{number}",
            # Blocks differ in width, so each has a dimension of its own.
            dims=(self.result_dims[0], f"column_{number}"),
            shape=(self.test, self.blocks[block]),
            chunks=(self.test_chunk_length, self.factor_columns(number)),
            block=block,
        )

    @property
    def result_dims(self) -> tuple[str, ...]:
        if self.on_itself:
            return ("train",)
        if not self.has_scores:
            return ("train" if self.gradients_only else "test", "column")
        if self.by_token:
            return ("test", "train", "token")
        features = tuple(f"feature_{i}" for i in range(len(self.feature_shape)))
        return (*(("block",) if self.by_block else ()), "test", "train", *features)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Of the matrix, stored or not; of factors and gradients over all blocks."""
        if self.on_itself:
            return (self.train,)
        if not self.has_scores:
            return (self.test, sum(self.blocks.values()))
        return (*self._parts, self.test, self.train, *self.feature_shape)

    @property
    def result_chunks(self) -> tuple[int, ...]:
        """Of the matrix: one region."""
        if self.on_itself:
            return (self.train_chunk_length,)
        return (*self._parts, self.group_rows, self.train_chunk_length, *self.feature_shape)

    @property
    def _parts(self) -> tuple[int, ...]:
        """The dimension `block`, where there is one."""
        return (len(self.blocks),) if self.by_block else ()

    def result_index(self, group: int, chunk: int) -> tuple[int, ...]:
        """Which chunk of the matrix the region of a group and a training chunk is."""
        return (*(0,) * len(self._parts), group, chunk, *(0,) * len(self.feature_shape))

    @property
    def matrix_bytes(self) -> int:
        """Of the result as an array."""
        return math.prod(self.result_shape) * self.itemsize

    @property
    def factor_bytes(self) -> int:
        """Of the factors of all test examples, in the store; of the gradients, for TrainingGradients."""
        return self.test * sum(self.blocks.values()) * self.itemsize

    @property
    def result_bytes(self) -> int:
        """What stays: the array, or without it the top k (indices and scores of both ends)."""
        if self.dense or not self.has_scores:
            return self.matrix_bytes
        return self.ranked_bytes

    @property
    def ranked_bytes(self) -> int:
        """Of the top k."""
        return self.test * 2 * min(self.top_k, self.train) * (8 + self.itemsize)

    @property
    def training_passes(self) -> int:
        """Passes over the training set, without those of an iterative solver."""
        scored = self.groups if self.operation.reads_training else 0
        return self.fit_passes + scored + self.operation.is_of_training

    @property
    def passes_per_iteration(self) -> int:
        """Further passes for each iteration of an iterative solver."""
        return self.test_chunks if self.solves_with_data else 0


def _require_inside(what: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise IndexError(f"{what} {index}: expected 0 to {count - 1}")


def _cut(index: int, length: int, total: int, what: str) -> tuple[int, int]:
    _require_inside(what, index, -(-total // length))
    return index * length, min((index + 1) * length, total)
