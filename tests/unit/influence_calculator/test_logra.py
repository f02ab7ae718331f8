"""LoGra: every score against explicit Kronecker products of projections, and that no gradient is formed."""

from __future__ import annotations

import pickle
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import oracle
from explicit_projections import explicit_layer, explicit_projection, explicit_side, seed_of
from influence_calculator import LograInfluence, SingularCurvatureError, SolverStatus
from influence_calculator.maths import region
from influence_calculator.maths.blocks import Relative
from influence_calculator.maths.logra import Logra
from influence_calculator.maths.method import Fitted, add_sums, fit
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.perturbation import perturbations
from model_cases import ATTENTION, CASES, MLP, TRANSFORMER, ModelCase
from references import REGULARIZATIONS, reference
from training_sets import TrainingSet

RANK, SEED = 2, 7


def _grouped() -> nn.Module:
    """Groups of a convolution; a weight that is frozen; a weight that is transposed."""
    model = nn.Sequential(
        nn.Conv1d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), Conv1D(5, 12), nn.Tanh(), nn.Linear(5, 3)
    )
    model[5].weight.requires_grad_(False)
    return model


GROUPED = ModelCase("groups, a transposed weight, a bias alone", _grouped, F.cross_entropy, (4, 4), 3)
SOLVED = [*CASES, TRANSFORMER, ATTENTION, GROUPED]


def modules_of(case: ModelCase) -> dict[str, list[str]]:
    """Module -> its own parameters that require grad, the first name of each."""
    found: dict[str, list[str]] = {}
    for name, parameter in case.model().named_parameters():
        if parameter.requires_grad:
            found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def explicit_blocks(case: ModelCase, rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> its columns of the flat parameters, and S."""
    model, made = case.model(), {}
    owners = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    for module, names in modules_of(case).items():
        own = model.get_submodule(module)
        columns = oracle.columns_of(model, tuple(names))
        shared = any(owners.count(id(p)) > 1 for p in own.parameters(recurse=False))
        layer = isinstance(own, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Conv1D)
        if layer and not shared and not module.endswith("out_proj"):
            transposed = isinstance(own, Conv1D)
            rows, inputs = own.weight.flatten(1).shape
            o, i = (inputs, rows) if transposed else (rows, inputs)
            tracked = own.weight.requires_grad
            S = explicit_layer(
                o,
                i if tracked else 0,
                own.bias is not None,
                rank,
                seed,
                module,
                groups=getattr(own, "groups", 1),
                transposed=transposed,
            )
        elif len(columns) <= rank**2:
            S = torch.eye(len(columns), dtype=torch.float64)
        else:
            S = explicit_projection(len(columns), rank**2, seed_of(seed, module))
        made[module] = columns, S
    return made


def expected_factors(case: ModelCase, λ: float, rank: int = RANK, seed: int = SEED) -> Tensor:
    """`S_b ((1/N) Σ φ φᵀ + λI)^-1 S_bᵀ g` of every test example, block by block, `[T, P]`."""
    explicit = reference(case, "empirical_fisher")
    factors = torch.zeros_like(explicit.test)
    for columns, S in explicit_blocks(case, rank, seed).values():
        φ, tests = explicit.train[:, columns] @ S, explicit.test[:, columns] @ S
        factors[:, columns] = oracle.factors(φ.T @ φ / len(φ), λ, tests) @ S.T
    return factors


def fitted(case: ModelCase, method: Logra, size: int = 5) -> Fitted:
    objective = xy_objective(case.model(), case.loss)
    return method.fitted(objective, fit(method, objective, TrainingSet(case.train(), size)))


def solved(own: Fitted, case: ModelCase) -> Any:
    return own.solve(own.gradients(xy_objective(case.model(), case.loss), case.test()))


@pytest.mark.parametrize("case", SOLVED, ids=repr)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_scores_are_those_of_explicit_kronecker_products(case: ModelCase, λ: float) -> None:
    expected = expected_factors(case, λ)
    train = reference(case, "empirical_fisher").train
    wide = Logra(λ, RANK, SEED)
    for method in (wide, wide.narrow()):
        own = fitted(case, method)
        answer = solved(own, case)
        factors = own.factors(answer.left)
        oracle.assert_close(own.layout.flatten(factors), expected, 1e-9)
        scores = region.influences(own, answer.left, case.train(), micro_batch=6)
        oracle.assert_close(scores, expected @ train.T, 1e-9)
        again = region.influences(own, own.left(factors), case.train(), micro_batch=23)
        oracle.assert_close(again, expected @ train.T, 1e-8)
        assert (answer.report.status == SolverStatus.CONVERGED).all()
    widths = {module: S.shape[1] for module, (_, S) in explicit_blocks(case, RANK, SEED).items()}
    assert {block: rows.shape[1] for block, rows in answer.left.items()} == widths
    assert own.layout.factor_widths == widths


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_with_enough_columns_it_is_the_empirical_fisher_of_each_module(case: ModelCase, λ: float) -> None:
    explicit, model = reference(case, "empirical_fisher"), case.model()
    blocks = [oracle.columns_of(model, tuple(names)) for names in modules_of(case).values()]
    curvature = oracle.block_diagonal(explicit.curvature, blocks)
    found = (
        LograInfluence(model, case.loss, λ, 100).fit([case.train()]).influences(*case.test(), *case.train())
    )
    oracle.assert_close(
        found, oracle.influences(curvature, λ, explicit.test, explicit.train), explicit.bound(λ)
    )


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


@pytest.mark.parametrize("tokens", [(), (3,)])
def test_no_gradient_is_formed(tokens: tuple[int, ...]) -> None:
    model, n = nn.Linear(60, 50).double().eval(), 8
    x = torch.randn(n, *tokens, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(n, *tokens, 50, dtype=torch.float64)
    objective, method = xy_objective(model, F.mse_loss), Logra(0.1, 4).narrow()
    with _Largest() as seen:
        own = method.fitted(objective, fit(method, objective, TrainingSet((x, y), n)))
        region.influences(own, own.solve(own.gradients(objective, (x, y))).left, (x, y), n)
    assert 0 < seen.elements <= 61 * 50 < n * 60 * 50


def test_a_side_keeps_products_on_average_and_lengths_within_it() -> None:
    """`P Pᵀ` is the identity on average; `Pᵀ P` is a multiple of it."""
    sides = torch.stack([explicit_side(6, 2, seed, "layer", "inputs") for seed in range(2000)])
    identity = torch.eye(6, dtype=torch.float64)
    assert float(((sides @ sides.mT).mean(0) - identity).abs().max()) < 0.1
    oracle.assert_close(sides.mT @ sides, torch.eye(2, dtype=torch.float64).mul(3).expand(2000, 2, 2), 1e-12)


def test_a_perturbation_is_the_inputs_gradient_of_the_influence() -> None:
    model = LograInfluence(MLP.model(), MLP.loss, 0.1, RANK, SEED).fit([MLP.train()])
    x, y = (part[:5] for part in MLP.train())
    expected = oracle.perturbations(MLP.model(), MLP.loss, expected_factors(MLP, 0.1), x, y)
    oracle.assert_close(model.influences(*MLP.test(), x, y, mode="perturbation"), expected, 1e-9)
    own, objective = fitted(MLP, Logra(0.1, RANK, SEED)), xy_objective(MLP.model(), MLP.loss)
    oracle.assert_close(perturbations(own, objective, solved(own, MLP).left, (x, y), 3), expected, 1e-9)


@pytest.mark.parametrize("size", [1, 4, 22, 23])
@pytest.mark.parametrize("ranges", [1, 3])
def test_batches_and_ranges_do_not_matter(size: int, ranges: int) -> None:
    """Mistake 1: averages over batches that are not weighted by their size."""
    objective, method = xy_objective(MLP.model(), MLP.loss), Logra(0.01, RANK, SEED)
    x, y = MLP.train()
    cuts = [0, 9, 13, 23] if ranges == 3 else [0, 23]
    (step,) = method.passes()
    total = None
    for a, b in pairwise(cuts):
        piece = TrainingSet((x[a:b], y[a:b]), size)
        total = add_sums(total, step.accumulate(objective, piece.batches(), {}))
    assert total is not None
    state = {step.name: {unit: step.finish(unit, total[unit], 23, {}) for unit in step.units(objective)}}
    own = method.fitted(objective, state)
    oracle.assert_close(own.layout.flatten(solved(own, MLP).left), expected_factors(MLP, 0.01), 1e-9)


def test_another_seed_is_another_projection() -> None:
    one, other = (fitted(MLP, Logra(0.1, RANK, seed)) for seed in (0, 1))
    flat = [own.layout.flatten(solved(own, MLP).left) for own in (one, other)]
    assert oracle.relative_error(*flat) > 0.1


def test_a_regularization_is_one_number_one_per_module_or_relative() -> None:
    model = LograInfluence(MLP.model(), MLP.loss, 1.0, RANK, SEED).fit([MLP.train()])
    factors_of = partial(model.influence_factors, *MLP.test())
    blocks, explicit = explicit_blocks(MLP, RANK, SEED), reference(MLP, "empirical_fisher")
    model.with_regularization(0.01)
    oracle.assert_close(factors_of(), expected_factors(MLP, 0.01), 1e-9)
    λs = dict(zip(blocks, (0.01, 0.1, 1.0), strict=True))
    relative = {
        module: 0.1 * float((explicit.train[:, columns] @ S).square().sum(1).mean()) / S.shape[1]
        for module, (columns, S) in blocks.items()
    }
    for given, expected in ((λs, λs), (Relative(0.1), relative)):
        found = model.with_regularization(given).influence_factors(*MLP.test())
        for module, (columns, _) in blocks.items():
            wanted = expected_factors(MLP, expected[module])[:, columns]
            oracle.assert_close(found[:, columns], wanted, 1e-9)
    with pytest.raises(ValueError, match="name every block or give one number"):
        model.with_regularization({"0": 0.1})


def test_parts_of_blocks_sum_to_the_influences_and_factors_score_as_examples_do() -> None:
    model = LograInfluence(TRANSFORMER.model(), TRANSFORMER.loss, 0.1, RANK).fit([TRANSFORMER.train()])
    sides = (*TRANSFORMER.test(), *TRANSFORMER.train())
    whole = model.influences(*sides)
    parts = model.influences_by_block(*sides)
    oracle.assert_close(torch.stack(list(parts.values())).sum(0), whole, 1e-9)
    factors = model.influence_factors(*TRANSFORMER.test())
    assert factors.shape == (7, model.n_parameters)
    oracle.assert_close(model.influences_from_factors(factors, *TRANSFORMER.train()), whole, 1e-9)
    on_itself = model.influences(*TRANSFORMER.test())
    oracle.assert_close(model.self_influences(*TRANSFORMER.test()), on_itself.diagonal(), 1e-9)


def test_float32_stays_near_float64() -> None:
    (x, y), (a, b) = MLP.train(), MLP.test()
    model = LograInfluence(MLP.model(torch.float32), MLP.loss, 0.01, RANK, SEED).fit([(x.float(), y)])
    found = model.influence_factors(a.float(), b)
    assert found.dtype is torch.float32
    oracle.assert_close(found, expected_factors(MLP, 0.01), 1e-4)


def test_without_a_regularization_a_singular_matrix_is_refused() -> None:
    x = MLP.train()[0][:1]
    y = MLP.model()(x).detach()  # no gradient at all
    with pytest.raises(SingularCurvatureError, match=r"block '0'.*give a larger regularization"):
        LograInfluence(MLP.model(), F.mse_loss, None, RANK).fit([(x, y)])


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "3", None])
def test_a_rank_that_is_no_whole_number_above_zero_is_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match=f"rank: expected a whole number of at least 1, got {rank!r}"):
        Logra(0.1, rank)


@pytest.mark.parametrize("seed", [1.5, False, "a", None])
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=f"seed: expected a whole number, got {seed!r}"):
        Logra(0.1, 3, seed)


def test_a_method_travels_by_pickle() -> None:
    method = Logra(Relative(0.1), RANK, 3).narrow()
    assert pickle.loads(pickle.dumps(method)) == method
