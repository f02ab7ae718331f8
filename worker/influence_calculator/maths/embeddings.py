"""EK-FAC's algebra of `nn.Embedding`: a Linear layer whose inputs are one-hot, of which none is ever formed.

The gradient of the weight, `[V, o]`, is `Σ_s e_s g_sᵀ`, e_s the unit vector of position s's token. So A is
diagonal, the frequency of each token, and Q_A the identity: rows are told by token ids, and Q_G alone turns.
A position that holds `padding_idx` is no token: it has no gradient and counts in neither A nor G.

Shapes: n, t examples, S positions per example (over all calls), V rows of the weight, o its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from influence_calculator.maths.errors import CaptureMismatchError
from influence_calculator.maths.kronecker import PRODUCT_ELEMENTS
from influence_calculator.maths.layers import EmbeddingSpec
from influence_calculator.maths.method import Part
from influence_calculator.maths.objective import Batch, Objective
from influence_calculator.maths.traced_gradients import Lookups, used_by_hand


def add_frequencies(total: Tensor, seen: Lookups) -> None:
    """`total += Σ_n Σ_s e_s`, `[V]`."""
    total.index_add_(0, seen.ids.flatten(), seen.valid.flatten().to(total.dtype))


def add_squared_rows(total: Tensor, seen: Lookups, Q_G: Tensor) -> None:
    """`total += Σ_n (Σ_s e_s (Q_Gᵀ g_s)ᵀ)²`, `[V, o]`: an example's positions of a token are summed first."""
    ids, g = _each_token_once(seen.ids, seen.gradients.to(Q_G.dtype) @ Q_G)
    total.index_add_(0, ids.flatten(), g.square_().flatten(0, 1))


def _each_token_once(ids: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """`[n, S]` and `[n, S, o]`: the sum over an example's equal ids at one of its S places, 0 at others."""
    ordered, order = ids.sort(dim=1, stable=True)
    place = torch.zeros_like(ids)
    place[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    in_order = g.gather(1, order.unsqueeze(2).expand_as(g))
    summed = torch.zeros_like(g).scatter_add_(1, place.unsqueeze(2).expand_as(g), in_order)
    return torch.zeros_like(ids).scatter_(1, place, ordered), summed


class EmbeddingRows:
    """Rows `[t, V·o]` of one embedding, by parameter and turned by Q_G."""

    def __init__(self, spec: EmbeddingSpec, outputs: Tensor) -> None:
        """`outputs`: Q_G, `[o, o]`."""
        self.spec = spec
        self._outputs = outputs

    def turned(self, columns: Tensor) -> Tensor:
        """Rows by parameter in the basis."""
        return self._times(columns, self._outputs)

    def turned_back(self, rows: Tensor) -> Tensor:
        """The inverse of `turned`."""
        return self._times(rows, self._outputs.T)

    def _times(self, rows: Tensor, Q: Tensor) -> Tensor:
        return (rows.to(Q.dtype).unflatten(1, (-1, Q.shape[0])) @ Q).flatten(1)

    def gradients(self, seen: Lookups) -> Tensor:
        """Turned gradients of each example, `[n, V·o]`."""
        g = self._turned(seen)
        whole = g.new_zeros(g.shape[0], self.spec.rows, self.spec.columns)
        return whole.scatter_add_(1, seen.ids.unsqueeze(2).expand_as(g), g).flatten(1)

    def parts(self, seen: Lookups) -> Iterator[Part]:
        """The same of a few examples at a time, without the columns of tokens that none of them holds."""
        g = self._turned(seen)
        n, S, o = g.shape
        for start in range(0, n, examples_at_once(S, o)):
            piece = slice(start, start + examples_at_once(S, o))
            held, places = seen.ids[piece].unique(return_inverse=True)
            values = g.new_zeros(places.shape[0], len(held), o)
            values.scatter_add_(1, places.unsqueeze(2).expand_as(g[piece]), g[piece])
            yield Part(self.spec.name, 0, values.flatten(1), start, held)

    def _turned(self, seen: Lookups) -> Tensor:
        return seen.gradients.to(self._outputs.dtype) @ self._outputs


def examples_at_once(S: int, o: int) -> int:
    """How many are scored together: their rows `[p, p·S·o]` hold at most `PRODUCT_ELEMENTS`, if one does."""
    return max(1, int((PRODUCT_ELEMENTS / max(1, S * o)) ** 0.5))


def refuse_other_uses(objective: Objective, batch: Batch, embeddings: Sequence[EmbeddingSpec]) -> None:
    """What lookups describe must be all there is.

    Raises:
        CaptureMismatchError: naming weights that the first example uses by hand, where nobody had seen it.
    """
    if wrong := used_by_hand(objective, batch, embeddings):
        raise CaptureMismatchError(
            f"{', '.join(wrong)}: expected a weight that is used by calling its embedding alone, got one "
            "that some examples use by hand too, the first training example not. Give what multiplies by it "
            "a parameter of its own, or leave these parameters out (requires_grad_(False))"
        )
