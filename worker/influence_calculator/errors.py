"""What the calculators refuse, by name. All are ValueErrors, as in pyDVL.

ValueError
├── UnalignedChunksError                  x and y are cut differently
├── InvalidDimensionChunksError           a feature dimension is chunked
├── UnknownChunksError                    chunk sizes that nobody knows before computing
├── UnsupportedInfluenceModeException     a mode that is neither "up" nor "perturbation"
├── NotFittedException                    influences of a model that saw no training data
├── ThreadSafetyViolationError            a model with hooks on workers with several threads
├── OneShotIterableError                  data that can be read once, where it is needed more often
├── RandomOrderError                      a shuffled loader where the order names rows or columns
├── MisalignedChunksError                 Dask chunks that are no storage objects
└── NotImplementedLayerRepresentationException   a layer that a method cannot treat

UserWarning
└── SolverWarning                         right-hand sides that did not converge
"""

from __future__ import annotations

Chunks = tuple[tuple[int, ...], ...]


class UnalignedChunksError(ValueError):
    """x and y are not cut at the same examples, or are not of the same number of examples."""

    def __init__(
        self, chunk_sizes_x: tuple[int, ...], chunk_sizes_y: tuple[int, ...], suffix: str = ""
    ) -> None:
        x, y = f"x{suffix}", f"y{suffix}"
        if sum(chunk_sizes_x) == sum(chunk_sizes_y):
            message = (
                f"expected equal chunks along the first dimension, got {chunk_sizes_x} for {x} and "
                f"{chunk_sizes_y} for {y}; rechunk one of them: {y} = {y}.rechunk({{0: {x}.chunks[0]}})"
            )
        else:
            message = (
                f"expected as many examples in both, got {sum(chunk_sizes_x)} in {x} and "
                f"{sum(chunk_sizes_y)} in {y}; give inputs and labels of the same examples"
            )
        super().__init__(f"{x} and {y}: {message}")


class InvalidDimensionChunksError(ValueError):
    """A dimension other than the first is chunked: an example must lie in one chunk."""

    def __init__(self, chunks: Chunks, field: str = "array") -> None:
        super().__init__(
            f"{field}: expected one chunk in every dimension but the first, got {chunks}; "
            f"use {field}.rechunk({{i: -1 for i in range(1, {field}.ndim)}})"
        )


class UnknownChunksError(ValueError):
    """The length of a chunk is known only after computing."""

    def __init__(self, field: str, chunks: tuple[float, ...]) -> None:
        super().__init__(
            f"{field}: expected chunks of known sizes, got {chunks}; call {field}.compute_chunk_sizes() first"
        )


class UnsupportedInfluenceModeException(ValueError):  # noqa: N818  pyDVL's name
    """A mode that is none of `InfluenceMode`."""

    def __init__(self, mode: object) -> None:
        super().__init__(f"mode: expected InfluenceMode.Up or InfluenceMode.Perturbation, got {mode!r}")


class NotFittedException(ValueError):  # noqa: N818  pyDVL's name
    """The model has seen no training data."""

    def __init__(self, object_type: type) -> None:
        super().__init__(
            f"{object_type.__name__} is not fitted: call model.fit(training_data) before asking for results"
        )


class ThreadSafetyViolationError(ValueError):
    """Several threads of one worker would enter a model that only one may enter."""

    def __init__(self) -> None:
        super().__init__(
            "client: expected workers with one thread each, because the influence function model is not "
            "thread-safe; use Client(threads_per_worker=1)"
        )


class OneShotIterableError(ValueError):
    """Data that can be read only once is needed more often."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(
            f"{field}: expected data that can be iterated over again, got an iterator that ends; {reason}; "
            f"pass a list, a DataLoader or an object whose __iter__ starts anew"
        )


class RandomOrderError(ValueError):
    """A loader in random order, where the position of an example names a row or a column."""

    def __init__(self, field: str, sampler: str) -> None:
        super().__init__(
            f"{field}: expected examples in a fixed order, got a loader with a {sampler}: rows and columns "
            f"of the result would belong to no known example; build the loader with shuffle=False"
        )


class MisalignedChunksError(ValueError):
    """Dask chunks that do not coincide with storage objects, so that two tasks would write one object."""

    def __init__(self, dimension: int, sizes: tuple[int, ...]) -> None:
        super().__init__(
            f"array: expected chunks of one size along dimension {dimension} (only the last may be shorter), "
            f"got {sizes}; use array.rechunk({{{dimension}: {max(sizes, default=1)}}})"
        )


class NotImplementedLayerRepresentationException(ValueError):  # noqa: N818  pyDVL's name
    """A layer that takes gradients and that the method cannot treat."""

    def __init__(self, module_id: str) -> None:
        super().__init__(
            f"layer {module_id}: expected Linear, Conv1d, Conv2d, Conv3d, Embedding or the Conv1D of "
            "transformers, with parameters of its own, got another layer whose parameters require grad; "
            f"freeze it, or choose what is done with it (unsupported='diagonal' or 'exclude')"
        )


class SolverWarning(UserWarning):
    """Right-hand sides of an iterative solver ended without converging; `solver_report` has each one."""
