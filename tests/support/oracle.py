"""Slow, explicit definitions in float64 that the calculator's fast code is checked against.

Nothing here imports the calculator, batches a forward pass or approximates: gradients come from one
example at a time, second-order matrices from one example and one parameter or output at a time.

Shapes: n, t, N examples, P parameters that require grad, in `named_parameters()` order, d elements
of the model's outputs for one example, F... the input's feature dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Tensor, Tensor], Tensor]


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of the model in double precision."""
    return copy.deepcopy(model).double()


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def columns(model: nn.Module) -> dict[str, slice]:
    """Where each parameter that requires grad lies in the flat order."""
    slices, start = {}, 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            slices[name] = slice(start, start + p.numel())
            start += p.numel()
    return slices


def columns_of(model: nn.Module, names: tuple[str, ...]) -> Tensor:
    """The flat columns of some parameters, in flat order."""
    places = columns(model)
    return torch.cat([torch.arange(places[k].start, places[k].stop) for k in places if k in names])


def _flat(gradients: tuple[Tensor | None, ...], parameters: list[nn.Parameter]) -> Tensor:
    pieces = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([piece.reshape(-1) for piece in pieces])


def _gradient(scalar: Tensor, parameters: list[nn.Parameter], **options: Any) -> Tensor:
    if not scalar.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    return _flat(torch.autograd.grad(scalar, parameters, allow_unused=True, **options), parameters)


def _examples(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(x.shape[0]):
        yield _wide(x[i : i + 1]), _wide(y[i : i + 1])


def example_gradients(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """`[n, P]`: the gradient of `loss(model(x[i:i+1]), y[i:i+1])`, one example after another."""
    model = in_float64(model)
    parameters = _parameters(model)
    return torch.stack([_gradient(loss(model(a), b).sum(), parameters) for a, b in _examples(x, y)])


def token_gradients(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, tokens: int) -> Tensor:
    """`[n, S, P]`: each token's part of `example_gradients`.

    Every module that tracks parameters of its own computes each token with copies of them, of which the
    gradient is then the token's.
    """
    model = in_float64(model)
    owners = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    copies = {id(p): [p.detach().clone().requires_grad_() for _ in range(tokens)] for p in _parameters(model)}
    # Modules without the hook, which would call itself.
    bare = {id(module): copy.deepcopy(module) for module in owners}

    def by_token(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        axis = 2 if isinstance(module, nn.Conv1d) else 1
        own = dict(module.named_parameters(recurse=False))
        columns = []
        for s in range(tokens):
            values = {name: copies[id(p)][s] if id(p) in copies else p for name, p in own.items()}
            computed = torch.func.functional_call(bare[id(module)], values, args)
            columns.append(computed.select(axis, s))
        return torch.stack(columns, axis)

    for module in owners:
        module.register_forward_hook(by_token)
    leaves = [value for p in _parameters(model) for value in copies[id(p)]]
    rows = []
    for a, b in _examples(x, y):
        found = torch.autograd.grad(
            loss(model(a), b).sum(), leaves, allow_unused=True, materialize_grads=True
        )
        of_tokens = [found[s::tokens] for s in range(tokens)]
        rows.append(torch.stack([torch.cat([g.reshape(-1) for g in own]) for own in of_tokens]))
    return torch.stack(rows)


def hessian(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """`[P, P]`: the mean over examples of `∇²θ ℓ_i`, row by row by double backward."""
    model = in_float64(model)
    parameters = _parameters(model)
    width = sum(p.numel() for p in parameters)
    total = torch.zeros(width, width, dtype=torch.float64)
    for a, b in _examples(x, y):
        # Other kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            gradient = _gradient(loss(model(a), b).sum(), parameters, create_graph=True)
        for row in range(width):
            total[row] += _gradient(gradient[row], parameters, retain_graph=True)
    return total / x.shape[0]


def empirical_fisher(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """`[P, P]`: the mean over examples of `g_i g_iᵀ` at the labels given."""
    gradients = example_gradients(model, loss, x, y)
    return sum((torch.outer(g, g) for g in gradients), torch.zeros(())) / x.shape[0]


def generalized_gauss_newton(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """`[P, P]`: the mean over examples of `J_iᵀ clip(∇²_f ℓ_i) J_i`, negative eigenvalues clipped to 0."""
    model = in_float64(model)
    parameters = _parameters(model)
    width = sum(p.numel() for p in parameters)
    total = torch.zeros(width, width, dtype=torch.float64)
    for a, b in _examples(x, y):
        outputs = model(a)
        jacobian = torch.stack([_gradient(f, parameters, retain_graph=True) for f in outputs.reshape(-1)])
        eigenvalues, vectors = torch.linalg.eigh(output_hessian(loss, outputs.detach(), b))
        clipped = vectors @ torch.diag(eigenvalues.clamp(min=0)) @ vectors.T
        total += jacobian.T @ clipped @ jacobian
    return total / x.shape[0]


def output_hessian(loss: Loss, outputs: Tensor, y: Tensor) -> Tensor:
    """`[d, d]`: the second derivative of one example's loss by the model's outputs."""
    second = torch.func.hessian(lambda f: loss(f, y).sum())(outputs)
    return second.reshape(outputs.numel(), outputs.numel())


CURVATURES = {
    "hessian": hessian,
    "empirical_fisher": empirical_fisher,
    "generalized_gauss_newton": generalized_gauss_newton,
}
"""Second-order mode -> its matrix `[P, P]`."""


def factors(curvature: Tensor, regularization: float, gradients: Tensor) -> Tensor:
    """`[n, P]`: `(H + λI)^-1 g` of every row, by one dense solve."""
    identity = torch.eye(curvature.shape[0], dtype=torch.float64)
    return torch.linalg.solve(curvature.double() + regularization * identity, gradients.double().T).T


def block_diagonal(curvature: Tensor, blocks: list[Tensor]) -> Tensor:
    """The curvature with every entry between different blocks (lists of columns) set to 0."""
    result = torch.zeros_like(curvature)
    for indices in blocks:
        result[indices[:, None], indices] = curvature[indices[:, None], indices]
    return result


def mean_inverse(gradients: Tensor, regularization: float) -> Tensor:
    """`[P, P]`: `(1/N) Σ_i (g_i g_iᵀ + λI)^-1`, every inverse formed."""
    g = gradients.double()
    identity = torch.eye(g.shape[1], dtype=torch.float64)
    total = torch.zeros_like(identity)
    for row in g:
        total += torch.linalg.inv(torch.outer(row, row) + regularization * identity)
    return total / g.shape[0]


def influences(curvature: Tensor, regularization: float, test: Tensor, train: Tensor) -> Tensor:
    """`[T, N]`: `z_test · g_train` from both sides' gradients."""
    return factors(curvature, regularization, test) @ train.double().T


def perturbations(model: nn.Module, loss: Loss, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`[t, n, F...]`: `∇x (z_t · g(x))`, one pair after another."""
    model = in_float64(model)
    parameters = _parameters(model)
    rows = []
    for direction in z.double():
        for a, b in _examples(x, y):
            a = a.clone().requires_grad_()
            # As in `hessian`.
            with sdpa_kernel(SDPBackend.MATH):
                gradient = _gradient(loss(model(a), b).sum(), parameters, create_graph=True)
            (moved,) = torch.autograd.grad(gradient @ direction, a)
            rows.append(moved[0])
    return torch.stack(rows).reshape(z.shape[0], x.shape[0], *x.shape[1:])


def condition_number(curvature: Tensor, regularization: float) -> float:
    """κ(H + λI), from the eigenvalues' magnitudes."""
    magnitudes = (torch.linalg.eigvalsh(curvature.double()) + regularization).abs()
    return float(magnitudes.max() / magnitudes.min())


def smallest_eigenvalue(curvature: Tensor) -> float:
    """λ_min(H)."""
    return float(torch.linalg.eigvalsh(curvature.double())[0])


def bound(curvature: Tensor, regularization: float, dtype: torch.dtype = torch.float64) -> float:
    """The relative error allowed: float64 `max(1e-6, 100 κ ε)`, narrower types `100 κ ε`."""
    limit = 100 * condition_number(curvature, regularization) * torch.finfo(dtype).eps
    return max(1e-6, limit) if dtype is torch.float64 else limit


def relative_error(result: Tensor, expected: Tensor) -> float:
    """`‖result − expected‖ / ‖expected‖` over all entries; not finite if the result is not."""
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def assert_close(result: Tensor, expected: Tensor, relative: float) -> None:
    """Fails with the relative error that was seen."""
    assert result.shape == expected.shape, f"shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(result, expected)
    assert error <= relative, f"relative error {error:.3g}, allowed {relative:.3g}"
