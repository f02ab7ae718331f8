"""What the tests of single methods leave: a Hessian by hand, float32 within its bound, padding, tied weights.

Shapes: n, t, N examples, P parameters, C classes (1 of two that are told apart by one output), F features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dense_ekfac
import oracle
from dense_ekfac import DenseLayer, dense_layer
from influence_calculator import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
)
from influence_calculator.maths import region
from influence_calculator.maths.arnoldi import Arnoldi
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.errors import CaptureMismatchError
from influence_calculator.maths.method import Fitted, Method, SolverStatus, fit
from influence_calculator.maths.nystroem_sketch import NystroemSketch
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.perturbation import perturbations
from influence_calculator.torch.base import TorchInfluenceFunctionModel
from model_cases import LOGISTIC, MLP, ModelCase
from references import REGULARIZATIONS, reference
from training_sets import TrainingSet

GAUSS_NEWTON = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
FULL_RANK = 200


def _one_output(outputs: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs.squeeze(1), y.to(outputs.dtype))


BINARY = ModelCase("binary logistic regression", lambda: nn.Linear(4, 1), _one_output, (4,), 2)


@dataclass(frozen=True)
class ByHand:
    """Logistic regression `p = σ(W x + b)` as textbooks derive it: no autograd, no loop over parameters."""

    weight: Tensor
    """`[C, F]`."""
    bias: Tensor
    """`[C]`."""

    @classmethod
    def of(cls, case: ModelCase) -> ByHand:
        weight, bias = (p.detach() for p in case.model().parameters())
        return cls(weight, bias)

    def errors(self, x: Tensor, y: Tensor) -> Tensor:
        """`p − y`, `[n, C]`: the loss's derivative by the outputs."""
        label = y[:, None] if len(self.bias) == 1 else F.one_hot(y, len(self.bias))
        return self._probabilities(x) - label

    def spreads(self, x: Tensor) -> Tensor:
        """`diag p − p pᵀ`, or `p (1 − p)` of one output, `[n, C, C]`: the second derivative by outputs."""
        p = self._probabilities(x)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """`(p − y) x̃ᵀ`, `[n, P]`, the weights before the biases."""
        table = self.errors(x, y)[:, :, None] * _extended(x)[:, None, :]
        return table.flatten(1)[:, self._order()]

    def hessian(self, x: Tensor) -> Tensor:
        """`(1/N) Σ (diag p − p pᵀ) ⊗ x̃ x̃ᵀ`, `[P, P]`."""
        moments = _extended(x)[:, :, None] * _extended(x)[:, None, :]
        products = [torch.kron(s, m) for s, m in zip(self.spreads(x), moments, strict=True)]
        order = self._order()
        return torch.stack(products).mean(0)[order[:, None], order]

    def perturbations(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """`∇x (z · g(x)) = Z_Wᵀ (p − y) + Wᵀ (diag p − p pᵀ) Z x̃`, `[t, n, F]`; Z: z as table `[C, F+1]`."""
        table = torch.empty_like(z)
        table[:, self._order()] = z
        table = table.unflatten(1, (len(self.bias), -1))
        direct = torch.einsum("tcf,nc->tnf", table[:, :, :-1], self.errors(x, y))
        moved = torch.einsum("tcj,nj->tnc", table, _extended(x))
        return direct + torch.einsum("cf,ncd,tnd->tnf", self.weight, self.spreads(x), moved)

    def _probabilities(self, x: Tensor) -> Tensor:
        outputs = x @ self.weight.T + self.bias
        return outputs.sigmoid() if len(self.bias) == 1 else outputs.softmax(1)

    def _order(self) -> Tensor:
        """Where each parameter stands in a table `[C, F+1]` that is read row by row."""
        places = torch.arange(self.weight.numel() + len(self.bias)).reshape(len(self.bias), -1)
        return torch.cat([places[:, :-1].flatten(), places[:, -1]])


def _extended(x: Tensor) -> Tensor:
    """`x̃ = [x, 1]`, `[n, F+1]`."""
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


EVERY_LOGISTIC = pytest.mark.parametrize("case", [LOGISTIC, BINARY], ids=repr)
SOLVERS: dict[str, Callable[[float, SecondOrderMode], Method]] = {
    "direct": lambda λ, mode: Direct(λ, second_order=mode),
    "cg": lambda λ, mode: Cg(λ, rtol=1e-10, second_order=mode),
    "arnoldi": lambda λ, mode: Arnoldi(λ, FULL_RANK, second_order=mode),
    "nystroem": lambda λ, mode: NystroemSketch(λ, FULL_RANK, second_order=mode),
}


@EVERY_LOGISTIC
def test_the_oracle_says_of_logistic_regression_what_its_closed_form_says(case: ModelCase) -> None:
    x, y = case.train()
    known = ByHand.of(case)
    oracle.assert_close(oracle.hessian(case.model(), case.loss, x, y), known.hessian(x), 1e-12)
    oracle.assert_close(oracle.example_gradients(case.model(), case.loss, x, y), known.gradients(x, y), 1e-12)


@EVERY_LOGISTIC
@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("mode", [SecondOrderMode.HESSIAN, GAUSS_NEWTON])
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_logistic_regression_has_the_closed_form(
    case: ModelCase, method: str, mode: SecondOrderMode, λ: float
) -> None:
    """In both modes: the outputs are linear in the parameters, so that the two matrices are one."""
    known, (x, y) = ByHand.of(case), case.train()
    curvature = known.hessian(x)
    limit = oracle.bound(curvature, λ)
    factors = oracle.factors(curvature, λ, known.gradients(*case.test()))

    objective, data = xy_objective(case.model(), case.loss), TrainingSet((x, y), 5)
    solver = SOLVERS[method](λ, mode)
    fitted: Fitted = solver.fitted(objective, fit(solver, objective, data), data)
    solved = fitted.solve(fitted.gradients(objective, case.test()))
    assert (solved.report.status == SolverStatus.CONVERGED).all()
    oracle.assert_close(fitted.layout.flatten(solved.left), factors, limit)
    scores = region.influences(fitted, solved.left, (x, y), micro_batch=6)
    oracle.assert_close(scores, factors @ known.gradients(x, y).T, limit)
    moved = perturbations(fitted, objective, solved.left, (x, y), 6)
    oracle.assert_close(moved, known.perturbations(factors, x, y), limit)


Build = Callable[[nn.Module, float], TorchInfluenceFunctionModel]


def _with(influence: Any, **options: Any) -> Build:
    """A constructor of a network and λ, of a cross-entropy's generalized Gauss-Newton matrix."""
    return lambda network, λ: influence(
        network, F.cross_entropy, regularization=λ, second_order_mode=GAUSS_NEWTON, **options
    )


FLOAT32: dict[str, Build] = {
    # With a tolerance rtol the error may be κ rtol, and 100 κ ε is 1.2e-5 κ.
    "cg": _with(CgInfluence, rtol=1e-5, atol=0.0, solve_simultaneously=True),
    "nystroem": _with(NystroemSketchInfluence, rank=FULL_RANK),
    "lissa": lambda network, λ: _with(LissaInfluence, scale=0.6 * (1 + λ), rtol=1e-5)(network, λ),
    "arnoldi": _with(ArnoldiInfluence, rank=FULL_RANK, use_woodbury=True),
}


def _assert_within_bound(influence: TorchInfluenceFunctionModel, curvature: Tensor, λ: float) -> None:
    """Fits in float32; factors and influences are the matrix's up to `100 κ ε`."""
    explicit = reference(MLP, GAUSS_NEWTON)
    limit = oracle.bound(curvature, λ, torch.float32)
    (x, y), (x_test, y_test) = MLP.train(), MLP.test()
    influence.fit([(x.float(), y)])
    factors = influence.influence_factors(x_test.float(), y_test)
    influences = influence.influences_from_factors(factors, x.float(), y)
    assert factors.dtype == influences.dtype == torch.float32
    oracle.assert_close(factors, oracle.factors(curvature, λ, explicit.test), limit)
    expected = oracle.influences(curvature, λ, explicit.test, explicit.train)
    oracle.assert_close(influences, expected, limit)


@pytest.mark.parametrize("method", FLOAT32)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_float32_stays_within_its_bound(method: str, λ: float) -> None:
    influence = FLOAT32[method](MLP.model(torch.float32), λ)
    _assert_within_bound(influence, reference(MLP, GAUSS_NEWTON).curvature, λ)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_ekfac_in_float32_stays_within_the_bound_of_its_definition(λ: float, corrected: bool) -> None:
    """The eigenvectors are not the fit's: the covariances' eigenvalues are apart, or nothing."""
    influence = EkfacInfluence(
        MLP.model(torch.float32), corrected, loss=MLP.loss, regularization=λ, expectation="exact"
    )
    _assert_within_bound(influence, _ekfac_curvature(MLP, corrected), λ)


def _ekfac_curvature(case: ModelCase, corrected: bool) -> Tensor:
    model, layers = case.model(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            dense = dense_layer(model, name, *case.train(), dense_ekfac.exact(case.loss))
            layers[name, 0] = _in_its_basis(dense, corrected)
    return dense_ekfac.curvature(model, layers)


def _in_its_basis(dense: DenseLayer, corrected: bool) -> tuple[DenseLayer, Tensor, Tensor, Tensor]:
    λ_A, Q_A = torch.linalg.eigh(dense.activations)
    λ_G, Q_G = torch.linalg.eigh(dense.gradients)
    for values in (λ_A / λ_A[-1], λ_G / λ_G[-1]):
        apart = (values.diff() > 1e-3) | (values[1:] < 1e-8)
        assert apart.all(), "eigenvectors that differ from the fit's: the definition has several answers"
    eigenvalues = dense.eigenvalues(Q_A, Q_G) if corrected else torch.outer(λ_G, λ_A)
    return dense, Q_A, Q_G, eigenvalues


PAD = 0
LENGTHS = torch.tensor([3, 5, 2, 4, 5, 1, 2, 3, 4, 5, 2])


class _Reader(nn.Module):
    """A layer of attention over sentences that are cut to the longest of their batch, read without a mask or
    with one.
    """

    def __init__(self, *, masks: bool) -> None:
        super().__init__()
        self.masks = masks
        self.embedding = nn.Embedding(6, 4)
        self.query, self.key, self.value = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens[:, : int((tokens != PAD).sum(1).max())]
        read = tokens != PAD if self.masks else torch.ones_like(tokens, dtype=torch.bool)
        own = self.embedding(tokens)
        seen = F.scaled_dot_product_attention(
            self.query(own), self.key(own), self.value(own), attn_mask=read[:, None, :]
        )
        weights = read / read.sum(1, keepdim=True)
        answer: Tensor = self.head(((own + seen) * weights[:, :, None]).sum(1))
        return answer


class _Tied(nn.Module):
    """Reads words and answers with a word, by one table of vectors; two layers share a weight as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        answer: Tensor = self.head(self.second(self.first(self.embedding(tokens)).tanh()).tanh().mean(1))
        return answer


def _built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double().eval()


def _sentences() -> tuple[Tensor, Tensor]:
    """Of LENGTHS words and padding, and a class of three."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 6, (len(LENGTHS), 5), generator=generator)
    words[torch.arange(5) >= LENGTHS[:, None]] = PAD
    return words, torch.randint(3, (len(LENGTHS),), generator=generator)


EXACT: dict[str, Build] = {
    "direct": _with(DirectInfluence),
    "cg": _with(CgInfluence, rtol=1e-10, atol=0.0, solve_simultaneously=True),
    "arnoldi": _with(ArnoldiInfluence, rank=FULL_RANK, use_woodbury=True),
    "nystroem": _with(NystroemSketchInfluence, rank=FULL_RANK),
    "lissa": _with(LissaInfluence, scale=1.2, rtol=1e-8),
}
"""Methods that solve with the matrix itself."""
APPROXIMATE: dict[str, Build] = {
    "inverse harmonic mean": lambda network, λ: InverseHarmonicMeanInfluence(network, F.cross_entropy, λ),
    "ekfac": lambda network, λ: EkfacInfluence(network, True, λ, loss=F.cross_entropy),
}
EVERY_METHOD = EXACT | APPROXIMATE


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("order", ["as drawn", "shortest first", "longest first"])
def test_padding_that_answers_depend_on_is_refused_by_fit(method: str, order: str) -> None:
    """Mistake 11: an example's gradients depend on the longest of its batch."""
    tokens, y = _sentences()
    if order != "as drawn":
        at = LENGTHS.argsort(stable=True, descending=order == "longest first")
        tokens, y = tokens[at], y[at]
    influence = EVERY_METHOD[method](_built(lambda: _Reader(masks=False)), 0.1)
    with pytest.raises(CaptureMismatchError, match=r"query\.weight.*Usual causes.*padding to the longest"):
        influence.fit([(tokens[:6], y[:6]), (tokens[6:], y[6:])])
    assert not influence.is_fitted


def _assert_exact(
    influence: TorchInfluenceFunctionModel, network: nn.Module, tokens: Tensor, y: Tensor
) -> None:
    """Fitted to batches of another length each, it answers as the explicit matrix does at λ = 0.1."""
    curvature = oracle.generalized_gauss_newton(network, F.cross_entropy, tokens, y)
    gradients = oracle.example_gradients(network, F.cross_entropy, tokens, y)
    influence.fit([(tokens[:6], y[:6]), (tokens[6:], y[6:])])
    expected = oracle.influences(curvature, 0.1, gradients, gradients)
    oracle.assert_close(influence.influences(tokens, y, tokens, y), expected, oracle.bound(curvature, 0.1))


@pytest.mark.parametrize("method", EXACT)
def test_padding_behind_a_mask_passes(method: str) -> None:
    network = _built(lambda: _Reader(masks=True))
    _assert_exact(EXACT[method](copy.deepcopy(network), 0.1), network, *_sentences())


@pytest.mark.parametrize("method", EXACT)
def test_tied_weights_pass_and_count_once(method: str) -> None:
    """Each use of a weight adds to its gradient: a hook on one module would miss the other's part."""
    network = _built(_Tied)
    influence = EXACT[method](copy.deepcopy(network), 0.1)
    assert influence.n_parameters == 6 * 4 + 4 * 4 + 4 + 4
    tokens = _sentences()[0]
    _assert_exact(influence, network, tokens, tokens[:, 0])
