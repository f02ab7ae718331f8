"""The two passes of EK-FAC over the training data: sums of products, then of squared projections.

Each batch costs one forward pass and, per pseudo-gradient, one backward pass that forms no weight
gradient; where there are embeddings or diagonal blocks, `torch.func` takes another two per pseudo-gradient.
The sums stay on the model's device, in float32 for half precision.

Shapes: N training examples, n of a batch, S tokens per example, k groups of a convolution, o outputs,
j = i + 1 with a bias.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import names_by_module
from influence_calculator.maths.capture import (
    CapturedLayer,
    LayerCalls,
    Recording,
    float_leaves,
    kernel_taps,
    record,
    supported_layers,
)
from influence_calculator.maths.embeddings import add_frequencies, add_squared_rows, refuse_other_uses
from influence_calculator.maths.errors import NotFiniteError
from influence_calculator.maths.expectation import OutputExpectation, PseudoGradients
from influence_calculator.maths.gradient_methods import fitted_tensor
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.kronecker import (
    Basis,
    add_activations,
    add_products,
    add_squared_gradients,
    eigenbasis,
    mirror,
    scores_by_parameter,
    tapped,
    untapped,
)
from influence_calculator.maths.layers import (
    EmbeddingSpec,
    LayerSpec,
    supported_embeddings,
    uncaptured_parameters,
)
from influence_calculator.maths.method import FitPass, FitState, Sums
from influence_calculator.maths.objective import Batch, IndexedBatch, Objective, version_of
from influence_calculator.maths.traced_gradients import TracedGradients, traced_gradients

COVARIANCE = "covariance"
CORRECTION = "correction"

DiagonalBlocks = Mapping[str, tuple[str, ...]]
"""Block -> its parameters, of those that no Kronecker product describes."""


@dataclass(frozen=True)
class CovariancePass(FitPass):
    """Leaves `Q_A`, `Q_G`, their eigenvalues and what was counted of each layer, of an embedding without
    `Q_A`, which is the identity; and `Λ` of each diagonal block.
    """

    expectation: OutputExpectation
    diagonal: bool
    """Whether parameters outside of supported layers get a diagonal."""
    kept: KeptCaptures | None = field(compare=False)
    """Where to leave for the correction pass what it would compute again."""

    name = COVARIANCE

    def units(self, objective: Objective) -> tuple[str, ...]:
        return treated_modules(objective) + tuple(self._diagonal_blocks(objective))

    def _diagonal_blocks(self, objective: Objective) -> DiagonalBlocks:
        return uncaptured_blocks(objective) if self.diagonal else {}

    @override
    def accumulate(self, objective: Objective, batches: Iterable[IndexedBatch], state: FitState) -> Sums:
        layers = supported_layers(objective)
        blocks = self._diagonal_blocks(objective)
        sums: Sums = {layer.name: _zero_covariances(objective, layer) for layer in layers}
        embeddings = supported_embeddings(objective)
        sums |= {spec.name: _zero_frequencies(objective, spec) for spec in embeddings}
        sums |= {block: {"squares": _zero_diagonal(objective, names)} for block, names in blocks.items()}
        names = tuple(name for own in blocks.values() for name in own)
        checked = False
        for backward in backward_passes(objective, layers, batches, self.expectation, ahead=self.kept):
            for layer in backward.captured():
                _add_covariances(sums[layer.spec.name], layer, first=backward.number == 0)
            if embeddings and not checked:
                refuse_other_uses(objective, backward.indexed.batch, embeddings)
                checked = True
            traced = _along_pseudo_gradients(objective, backward, names, embeddings)
            _add_squares(sums, blocks, traced)
            for name, seen in traced.lookups.items():
                add_products(sums[name]["gradients"], seen.gradients.to(sums[name]["gradients"].dtype))
                if backward.number == 0:
                    add_frequencies(sums[name]["frequencies"], seen)
        _complete(sums, objective, layers)
        return sums

    @override
    def finish(
        self, unit: str, sums: Mapping[str, Tensor], length: int, state: FitState
    ) -> dict[str, Tensor]:
        if "squares" in sums:
            return {"diagonal": sums["squares"] / length}
        if "frequencies" in sums:
            G = sums["gradients"] / length
            frequencies = (sums["frequencies"] / sums["frequencies"].sum().clamp(min=1)).to(G.dtype)
            λ_G, Q_G = eigenbasis(G, f"embedding {unit!r}, output gradients")
            return {"input_values": frequencies, "output_values": λ_G, "output_vectors": Q_G}
        # No training example may reach it.
        A = sums["activations"] / sums["tokens"].clamp(min=1).to(sums["activations"].dtype)
        G = sums["gradients"] / length
        λ_A, Q_A = eigenbasis(A, f"layer {unit!r}, inputs")
        λ_G, Q_G = eigenbasis(G, f"layer {unit!r}, output gradients")
        return {
            "input_values": λ_A,
            "input_vectors": Q_A,
            "output_values": λ_G,
            "output_vectors": Q_G,
            "tokens": sums["tokens"],
            "examples": sums["tokens"].new_tensor(length),
        }


@dataclass(frozen=True)
class CorrectionPass(FitPass):
    """Leaves `Λ` of each layer in the basis of the covariance pass."""

    expectation: OutputExpectation
    """Of other draws than the covariances': in the basis of a draw its own squares are too large along the
    first eigenvectors and too small along the last."""
    kept: KeptCaptures = field(compare=False)

    name = CORRECTION

    def units(self, objective: Objective) -> tuple[str, ...]:
        return treated_modules(objective)

    def accumulate(self, objective: Objective, batches: Iterable[IndexedBatch], state: FitState) -> Sums:
        layers = supported_layers(objective)
        bases = {layer.name: basis_of(objective, layer, state) for layer in layers}
        sums = {name: {"squares": _zero_squares(basis)} for name, basis in bases.items()}
        embeddings = supported_embeddings(objective)
        turns = {spec.name: output_basis_of(objective, spec, state) for spec in embeddings}
        sums |= {
            spec.name: {"squares": turns[spec.name].new_zeros(spec.rows, spec.columns)} for spec in embeddings
        }
        for backward in backward_passes(objective, layers, batches, self.expectation, kept=self.kept):
            for layer in backward.captured():
                name = layer.spec.name
                add_squared_gradients(sums[name]["squares"], layer, bases[name])
            for name, seen in _along_pseudo_gradients(objective, backward, (), embeddings).lookups.items():
                add_squared_rows(sums[name]["squares"], seen, turns[name])
        return sums

    @override
    def finish(
        self, unit: str, sums: Mapping[str, Tensor], length: int, state: FitState
    ) -> dict[str, Tensor]:
        return {"eigenvalues": sums["squares"] / length}


def treated_modules(objective: Objective) -> tuple[str, ...]:
    """Layers and embeddings that have a Kronecker product."""
    layers = tuple(layer.name for layer in supported_layers(objective))
    return layers + tuple(spec.name for spec in supported_embeddings(objective))


def uncaptured_blocks(objective: Objective) -> dict[str, tuple[str, ...]]:
    """Module -> its tracked parameters that have no Kronecker product."""
    looked_up = {spec.weight for spec in supported_embeddings(objective)}
    return names_by_module(name for name in uncaptured_parameters(objective) if name not in looked_up)


def matrix_shape(objective: Objective, layer: LayerSpec) -> tuple[int, int]:
    """`(o, j)` of a layer's tracked part."""
    o, i = layer.weight_shape(objective.model.get_submodule(layer.name))
    return o, (i if layer.weight is not None else 0) + (1 if layer.bias is not None else 0)


def side_shapes(objective: Objective, layer: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A's and G's eigenvalues: `(j,)` and `(o,)`, or `(k, j)` and `(k, o/k)` with k groups."""
    o, j = matrix_shape(objective, layer)
    k = layer.groups
    return ((j,), (o,)) if k == 1 else ((k, j), (k, o // k))


def scored_by_parameter(objective: Objective, layer: LayerSpec, state: FitState) -> bool:
    """Whether that costs less, by what the covariance pass counted."""
    tokens, examples = (
        float(fitted_tensor(state, COVARIANCE, layer.name, name, ())) for name in ("tokens", "examples")
    )
    o, j = matrix_shape(objective, layer)
    return scores_by_parameter(int(examples), tokens / examples, o, j, layer.groups)


def basis_of(objective: Objective, layer: LayerSpec, state: FitState) -> Basis:
    """A layer's eigenvectors, from the state of the covariance pass."""
    A, G = side_shapes(objective, layer)
    inputs = fitted_tensor(state, COVARIANCE, layer.name, "input_vectors", (*A, A[-1]))
    outputs = fitted_tensor(state, COVARIANCE, layer.name, "output_vectors", (*G, G[-1]))
    taps = kernel_taps(objective, layer) or 1
    return Basis(tapped(layer, inputs.to(objective.device), taps), outputs.to(objective.device), taps)


def output_basis_of(objective: Objective, spec: EmbeddingSpec, state: FitState) -> Tensor:
    """An embedding's `Q_G`, from the state of the covariance pass."""
    shape = (spec.columns, spec.columns)
    return fitted_tensor(state, COVARIANCE, spec.name, "output_vectors", shape).to(objective.device)


@dataclass(frozen=True)
class BackwardPass:
    """One backward pass from one pseudo-gradient of one batch."""

    indexed: IndexedBatch
    number: int
    """Among the batch's own: what depends on the forward pass alone is added at 0."""
    pseudo_gradients: list[Tensor]
    layers: Iterable[LayerCalls]
    """To be read through before the next backward pass."""

    def captured(self) -> Iterator[CapturedLayer]:
        """The layers' tensors, of one at a time."""
        return map(LayerCalls.captured, self.layers)


class KeptCaptures:
    """What a pass over the same batches in the same process captured for a later one, while it fits."""

    def __init__(self, expectation: OutputExpectation, limit: int) -> None:
        """`expectation` of the later pass; `limit` in bytes, 0 keeps nothing."""
        self.expectation = expectation
        self._room = limit
        self._kept: dict[int, list[_Kept]] = {}
        self._counted: set[int] = set()

    @property
    def has_room(self) -> bool:
        """Whether the next batch may be kept."""
        return self._room > 0

    def keep(self, backward: BackwardPass) -> Iterator[LayerCalls]:
        """The layers of a backward pass; a batch is kept if those of all its passes fit."""
        self._take_room(backward.pseudo_gradients)
        layers: list[LayerCalls] = []
        for layer in backward.layers:
            self._take_room(chain.from_iterable(layer.pieces))
            if self._room >= 0:
                layers.append(layer)
            yield layer
        start = backward.indexed.start
        if self._room >= 0:
            own = replace(backward, layers=tuple(layers))
            self._kept.setdefault(start, []).append(_Kept(own, _versions(layers)))
        else:
            self._kept.pop(start, None)

    def taken(self, indexed: IndexedBatch) -> list[BackwardPass]:
        """A batch's backward passes, given away; none if it was not kept, or is no more what it was, as
        where a model writes every batch into the same buffer.
        """
        kept = self._kept.pop(indexed.start, [])
        if any(_versions(one.backward.layers) != one.versions for one in kept):
            return []
        return [one.backward for one in kept]

    def _take_room(self, tensors: Iterable[Tensor]) -> None:
        """Memory that tensors share is counted once: while there is room, all of it is kept."""
        for storage in map(Tensor.untyped_storage, tensors):
            if storage.data_ptr() not in self._counted:
                self._counted.add(storage.data_ptr())
                self._room -= storage.nbytes()


class _Kept(NamedTuple):
    """A backward pass, and which versions of its layers' inputs it is of."""

    backward: BackwardPass
    versions: list[int]


def _versions(layers: Iterable[LayerCalls]) -> list[int]:
    """How often each input was changed in place."""
    return [version_of(inputs) for layer in layers for inputs, _ in layer.pieces]


def backward_passes(
    objective: Objective,
    layers: tuple[LayerSpec, ...],
    batches: Iterable[IndexedBatch],
    expectation: OutputExpectation,
    *,
    kept: KeptCaptures | None = None,
    ahead: KeptCaptures | None = None,
) -> Iterator[BackwardPass]:
    """Backward passes over batches in order.

    Those that were `kept` are not computed again. `ahead` keeps what a later pass needs while the forward
    pass is there: these, if that pass expects the same, else backward passes of its own.

    Raises:
        NotFiniteError: naming the first training example whose outputs or loss are not finite; after
            the last batch, so that the device is waited for once.
    """
    seen: list[tuple[int, Tensor]] = []
    keeps_these = ahead is not None and ahead.expectation == expectation
    for indexed in batches:
        if kept is not None and (taken := kept.taken(indexed)):
            yield from taken
            continue
        recording = record(objective, indexed.batch, layers)
        room = ahead if ahead is not None and ahead.has_room else None
        others = None if keeps_these else room
        pseudo = expectation.pseudo_gradients(objective, recording.outputs, indexed)
        for backward in _of_recording(recording, indexed, pseudo, keep=others is not None):
            if backward.number == 0:
                v = backward.pseudo_gradients
                finite = torch.stack([piece.reshape(len(piece), -1).isfinite().all(1) for piece in v]).all(0)
                seen.append((indexed.start, finite))
            yield replace(backward, layers=room.keep(backward)) if room and keeps_these else backward
        if others is not None:
            pseudo = others.expectation.pseudo_gradients(objective, recording.outputs, indexed)
            for backward in _of_recording(recording, indexed, pseudo):
                deque(others.keep(backward), maxlen=0)
    _refuse_not_finite(seen)


def _of_recording(
    recording: Recording, indexed: IndexedBatch, pseudo: PseudoGradients, keep: bool = False
) -> Iterator[BackwardPass]:
    """A backward pass per pseudo-gradient; with `keep` more may follow."""
    leaves = float_leaves(recording.outputs)
    for k in range(pseudo.count):
        v = pseudo.at(k)
        layers = recording.backward(leaves, v, keep=keep or k + 1 < pseudo.count)
        yield BackwardPass(indexed, k, v, layers)


def _refuse_not_finite(seen: list[tuple[int, Tensor]]) -> None:
    if not seen or bool(torch.stack([finite.all() for _, finite in seen]).all()):
        return
    start, finite = next((start, finite) for start, finite in seen if not finite.all())
    index = start + int((~finite).nonzero()[0])
    raise NotFiniteError(
        f"training example {index}: expected finite outputs and a finite loss, got NaN or infinity; "
        "correct or remove the example"
    )


def _zero_covariances(objective: Objective, layer: LayerSpec) -> dict[str, Tensor]:
    A, G = side_shapes(objective, layer)
    return {
        "activations": _zeros(objective, *A, A[-1]),
        "gradients": _zeros(objective, *G, G[-1]),
        "tokens": torch.zeros((), dtype=torch.float64),
    }


def _zero_frequencies(objective: Objective, spec: EmbeddingSpec) -> dict[str, Tensor]:
    # Counts in float32 would stand still at 2^24 of one token.
    counts = torch.zeros(spec.rows, dtype=torch.float64, device=objective.device)
    return {"frequencies": counts, "gradients": _zeros(objective, spec.columns, spec.columns)}


def _zero_diagonal(objective: Objective, names: tuple[str, ...]) -> Tensor:
    parameters = objective.parameters()
    return _zeros(objective, sum(parameters[name].numel() for name in names))


def _zeros(objective: Objective, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=accumulation_dtype(objective.dtype), device=objective.device)


def _zero_squares(basis: Basis) -> Tensor:
    return basis.inputs.new_zeros(basis.matrix_shape)


def _add_covariances(sums: dict[str, Tensor], layer: CapturedLayer, first: bool) -> None:
    dtype = sums["gradients"].dtype
    add_products(sums["gradients"], layer.gradients.to(dtype))
    if first:
        add_activations(sums["activations"], layer)
        examples, tokens = layer.activations.shape[:2]
        sums["tokens"] += examples // layer.spec.groups * tokens


def _complete(sums: Sums, objective: Objective, layers: tuple[LayerSpec, ...]) -> None:
    """Covariances as whole matrices, in the order of the weights' columns."""
    for own in sums.values():
        for what in own.keys() & {"activations", "gradients"}:
            mirror(own[what])
    for layer in layers:
        if taps := kernel_taps(objective, layer):
            sums[layer.name]["activations"] = untapped(layer, sums[layer.name]["activations"], taps)


def _along_pseudo_gradients(
    objective: Objective,
    backward: BackwardPass,
    names: tuple[str, ...],
    embeddings: tuple[EmbeddingSpec, ...],
) -> TracedGradients:
    """`Jᵀ v` of each example by parameters and by what embeddings look up."""
    tracked = names + tuple(spec.weight for spec in embeddings)
    linear = Objective(objective.model, _inner_product, _ForwardFirst(objective), tracked)
    batch = (backward.indexed.batch, tuple(backward.pseudo_gradients))
    return traced_gradients(linear, batch, names, embeddings)


def _add_squares(sums: Sums, blocks: DiagonalBlocks, traced: TracedGradients) -> None:
    for block, own in blocks.items():
        squares = torch.cat([traced.rows.pop(name).square().sum(0) for name in own])
        sums[block]["squares"].add_(squares)


@dataclass(frozen=True)
class _ForwardFirst:
    """The outputs for batches that carry pseudo-gradients behind the examples."""

    objective: Objective

    def __call__(self, model: Any, batch: Batch) -> Any:
        return self.objective.forward(model, batch[0])


def _inner_product(outputs: Any, batch: Batch) -> Tensor:
    """`⟨v, f⟩`, whose gradient is `Jᵀ v`."""
    products = [(v * f).sum() for v, f in zip(batch[1], float_leaves(outputs), strict=True)]
    return torch.stack(products).sum()
