"""The first step on every kind of layer against dense curvature by autograd: exact wherever theory says so."""

from __future__ import annotations

from typing import Any

import ground_truth as truth
import layer_truth as layers
import pytest
import torch
from cases import Problem
from layer_cases import DEEP, GENERAL_LAYERS, NORMED, ONE, SINGLE, LayerCase
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC

TOLERANCE = 1e-8
DAMPING = 0.03
EXACT_METHODS = pytest.mark.parametrize(
    ("optimizer", "options"), [(KFAC, {"solver": "eigh"}), (EKFAC, {})], ids=["kfac-eigh", "ekfac"]
)
EVERY_METHOD = pytest.mark.parametrize(
    ("optimizer", "options"),
    [(KFAC, {"solver": "cholesky"}), (KFAC, {"solver": "eigh"}), (EKFAC, {})],
    ids=["kfac-cholesky", "kfac-eigh", "ekfac"],
)


def named(cases: list[LayerCase]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


def first_moves(case: LayerCase, optimizer: Any, **options: Any) -> tuple[Problem, dict[str, Tensor]]:
    problem = case.make()
    return problem, truth.first_step(optimizer, problem.copy(), damping=DAMPING, **options)


# The ground truth, without the library


@named(SINGLE + DEEP + ONE)
def test_ground_truth_kronecker_form_is_the_ggn_block(case: LayerCase) -> None:
    """Two ways to the same matrix that share no line: Kronecker products of rows, and J^T H J of the parameters."""
    problem = case.make()
    found = layers.factors(problem)
    assert found
    for name, (a, g) in found.items():
        module = problem.model.get_submodule(name)
        exact = truth.ggn(problem, layers.own(module))
        for index, a_k, g_k in zip(layers.order(module), a, g, strict=True):
            block, form = exact[index][:, index], torch.kron(g_k, a_k)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                kept = torch.arange(a.shape[-1]).repeat(g.shape[-1]) != module.padding_idx  # torch drops that row
                block, form = block[kept][:, kept], form[kept][:, kept]
            assert truth.relative_error(form, block) < 1e-12, name


@named(GENERAL_LAYERS)
def test_ground_truth_rows_give_the_gradient(case: LayerCase) -> None:
    """The gradient is sum_nt g a^T: checks the rows where the Kronecker form is not exact."""
    problem = case.make()
    output = problem.model(problem.inputs)
    slope = torch.autograd.grad(problem.criterion(output, problem.targets), output)[0].reshape(-1)
    for name, (a, g) in layers.captured(problem).items():
        module = problem.model.get_submodule(name)
        expected = layers.matrix(module, list(torch.autograd.grad(problem.loss(), layers.own(module))))
        found = torch.einsum("i,ikntd,knte->kde", slope, g[0], a[0])
        assert truth.relative_error(found, expected) < 1e-12, name


@pytest.mark.parametrize("name", ["conv1d-all", "transpose2d-all", "embedding"])
def test_ground_truth_gauss_newton_matrix_is_the_hessian_of_a_linear_problem_by_finite_differences(name: str) -> None:
    problem = next(case for case in SINGLE if case.name == name).make()
    weight = problem.model.weight
    assert isinstance(weight, nn.Parameter)
    exact = truth.ggn(problem, [weight])
    for entry in range(0, weight.numel(), 5):
        slopes = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.view(-1)[entry] += sign * 1e-3
            slopes.append(truth.gradient(problem, [weight]))
            with torch.no_grad():
                weight.view(-1)[entry] -= sign * 1e-3
        difference = (slopes[0] - slopes[1]) / 2e-3
        assert (difference - exact[entry]).norm() < 1e-9 * exact.norm()


# The library


@EXACT_METHODS
@named(SINGLE + DEEP + ONE)
def test_first_step_is_the_damped_newton_step_of_each_block(case: LayerCase, optimizer: Any, options: Any) -> None:
    problem, moves = first_moves(case, optimizer, **options)
    for name, module in layers.trained(problem.model).items():
        expected = layers.newton(problem, module, DAMPING)
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < TOLERANCE, name


@EVERY_METHOD
@named(NORMED)
def test_affine_parameters_and_lone_biases_move_by_their_exact_blocks(
    case: LayerCase, optimizer: Any, options: Any
) -> None:
    """Also under "cholesky": a block without an input factor is damped exactly."""
    problem, moves = first_moves(case, optimizer, **options)
    units = {name: module for name, module in layers.trained(problem.model).items() if layers.is_unit(module)}
    assert units
    for name, module in units.items():
        expected = layers.newton(problem, module, DAMPING)
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < TOLERANCE, name


@named(NORMED)
def test_two_by_two_blocks_are_no_diagonal(case: LayerCase) -> None:
    """That a diagonal would not do: else the test above could not tell."""
    problem = case.make()
    for module in (m for m in layers.trained(problem.model).values() if isinstance(m, layers.NORMS)):
        if len(layers.own(module)) == 2:
            exact = truth.ggn(problem, layers.own(module))
            slope = truth.gradient(problem, layers.own(module))
            diagonal = -slope / (exact.diagonal() + DAMPING)
            assert truth.relative_error(diagonal, layers.newton(problem, module, DAMPING)) > 1e-3


@named(GENERAL_LAYERS)
def test_cholesky_makes_the_factored_tikhonov_step(case: LayerCase) -> None:
    problem, moves = first_moves(case, KFAC, solver="cholesky")
    for name, (a, g) in layers.factors(problem).items():
        expected = layers.factored_step(problem, name, a, g, DAMPING)
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < TOLERANCE, name


@named(GENERAL_LAYERS)
def test_eigenbasis_makes_the_kronecker_step_with_exact_damping(case: LayerCase) -> None:
    problem, moves = first_moves(case, KFAC, solver="eigh")
    for name, (a, g) in layers.factors(problem).items():
        expected = layers.kronecker_step(problem, name, a, g, DAMPING)
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < TOLERANCE, name


@named(GENERAL_LAYERS)
def test_ekfac_scales_each_eigendirection_by_its_exact_curvature(case: LayerCase) -> None:
    problem, moves = first_moves(case, EKFAC)
    compared = 0
    for name, (a, g) in layers.factors(problem).items():
        module = problem.model.get_submodule(name)
        if not all(basis_is_unique(factor) for factor in (a, g)):
            continue
        exact, slope = truth.ggn(problem, layers.own(module)), truth.gradient(problem, layers.own(module))
        expected = torch.zeros_like(slope)
        for index, a_k, g_k in zip(layers.order(module), a, g, strict=True):
            basis_a = torch.eye(len(a_k), dtype=a_k.dtype) if is_diagonal(a_k) else torch.linalg.eigh(a_k).eigenvectors
            basis = torch.kron(torch.linalg.eigh(g_k).eigenvectors.contiguous(), basis_a.contiguous())
            scales = (basis * (exact[index][:, index] @ basis)).sum(0)
            expected[index] = -basis @ ((basis.T @ slope[index]) / (scales + DAMPING))
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < 1e-7, name
        compared += 1
    assert compared, "no layer has a unique basis: nothing was compared"


def is_diagonal(factor: Tensor) -> bool:
    return bool((factor - layers.diagonal(factor)).norm() == 0)


def basis_is_unique(factors: Tensor) -> bool:
    """Whether eigenvalues repeat only at zero; a diagonal factor's basis is the unit one whatever it holds."""
    for factor in factors:
        values = torch.linalg.eigvalsh(factor)
        kept = values[values > 1e-9 * values.max()]
        if not is_diagonal(factor) and len(kept) > 1 and kept.diff().min() <= 1e-6 * kept.max():
            return False
    return True


@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
@pytest.mark.parametrize("case", ["conv1d", "embedding", "transpose2d", "batchnorm1d", "linear-5d"])
def test_every_layer_shows_its_block_by_name(case: str, solver: str) -> None:
    problem = next(each for each in SINGLE + NORMED if each.name == case).make()
    optimizer = truth.start(KFAC, problem, damping=DAMPING, solver=solver)
    truth.step(optimizer, problem)
    assert set(optimizer.curvature()) == set(layers.trained(problem.model))
    text = str(optimizer.summary())
    for name in layers.trained(problem.model):
        assert (name or "(model)") in text


@named([case for case in SINGLE if case.name in ("embedding", "embedding-padding", "embedding-rare")])
def test_factor_of_an_embedding_is_the_frequency_of_its_tokens_and_never_a_matrix(case: LayerCase) -> None:
    problem = case.make()
    used = problem.copy()
    optimizer = truth.start(KFAC, used, damping=DAMPING)
    truth.step(optimizer, used)
    vocabulary = problem.model.num_embeddings
    assert isinstance(vocabulary, int)
    shown = optimizer.curvature()[""].A.reshape(-1)
    assert shown.numel() == vocabulary, "A of an embedding is kept as its diagonal"
    count = torch.bincount(problem.inputs.reshape(-1), minlength=vocabulary).double()
    if problem.model.padding_idx is not None:  # torch gives that row no gradient, so it is no example
        count[problem.model.padding_idx] = 0
    assert truth.relative_error(shown, count / count.sum()) < 1e-12


def test_a_token_that_never_came_stays_where_it_is() -> None:
    problem = next(case for case in SINGLE if case.name == "embedding-rare").make()
    for optimizer in (KFAC, EKFAC, GKFAC):
        used = problem.copy()
        moves = truth.first_step(optimizer, used, damping=DAMPING)["weight"]
        seen = problem.inputs.reshape(-1).unique()
        absent = [token for token in range(9) if token not in seen]
        assert absent and not moves[absent].any()
        assert moves[seen].abs().sum(1).min() > 0


@pytest.mark.parametrize("limit", [2, 4])
@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
@named([case for case in GENERAL_LAYERS if case.name in ("general-conv1d", "general-tokens", "general-conv1d-all")])
def test_a_side_above_max_factor_size_keeps_its_diagonal(case: LayerCase, solver: str, limit: int) -> None:
    problem, moves = first_moves(case, KFAC, solver=solver, max_factor_size=limit)
    exact = layers.factored_step if solver == "cholesky" else layers.kronecker_step
    cut = 0
    for name, (a, g) in layers.factors(problem).items():
        cut += int(a.shape[-1] > limit) + int(g.shape[-1] > limit)
        full = exact(problem, name, a, g, DAMPING)
        a = layers.diagonal(a) if a.shape[-1] > limit else a
        g = layers.diagonal(g) if g.shape[-1] > limit else g
        expected = exact(problem, name, a, g, DAMPING)
        move = layers.moved(problem, name, moves)
        assert truth.relative_error(move, expected) < TOLERANCE, name
        if truth.relative_error(full, expected) > 1e-6:
            assert truth.relative_error(move, full) > 1e-7, name
    assert cut


@pytest.mark.parametrize("case", ["general-conv1d", "general-tokens"])
def test_ekfac_with_a_diagonal_side_has_the_exact_second_moments_in_that_basis(case: str) -> None:
    limit = 4
    problem, moves = first_moves(next(c for c in GENERAL_LAYERS if c.name == case), EKFAC, max_factor_size=limit)
    compared = 0
    for name, (a, g) in layers.factors(problem).items():
        a = layers.diagonal(a) if a.shape[-1] > limit else a
        g = layers.diagonal(g) if g.shape[-1] > limit else g
        module = problem.model.get_submodule(name)
        if not (basis_is_unique(a) and basis_is_unique(g)):
            continue
        exact, slope = truth.ggn(problem, layers.own(module)), truth.gradient(problem, layers.own(module))
        expected = torch.zeros_like(slope)
        for index, a_k, g_k in zip(layers.order(module), a, g, strict=True):
            bases = [
                torch.eye(len(f), dtype=f.dtype) if is_diagonal(f) else torch.linalg.eigh(f).eigenvectors
                for f in (g_k, a_k)
            ]
            basis = torch.kron(*(each.contiguous() for each in bases))
            scales = (basis * (exact[index][:, index] @ basis)).sum(0)
            expected[index] = -basis @ ((basis.T @ slope[index]) / (scales + DAMPING))
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < 1e-7, name
        compared += 1
    assert compared


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
@pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
@named([GENERAL_LAYERS[-1], NORMED[4], next(c for c in GENERAL_LAYERS if c.name == "general-transpose2d-all")])
def test_every_layer_trains(case: LayerCase, optimizer: Any, tuned: bool) -> None:
    problem = case.make()
    options = {} if tuned else {"lr": 0.3, "damping": 0.1, "factor_interval": 1, "inverse_interval": 1}
    used = optimizer(problem.model, loss=problem.criterion, **options)
    before = {name: parameter.detach().clone() for name, parameter in problem.model.named_parameters()}
    start = problem.loss().item()
    for _ in range(25):
        truth.step(used, problem)
    assert problem.loss().item() < 0.7 * start
    for name, parameter in problem.model.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name


def test_the_cases_cover_every_kind_of_layer() -> None:
    kinds = {type(m) for c in SINGLE + DEEP + ONE + NORMED for m in layers.trained(c.make().model).values()}
    assert {nn.Linear, nn.Embedding, *layers.CONVS, *layers.TRANSPOSED} <= kinds
    assert {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm} <= kinds
    assert {nn.InstanceNorm1d, nn.InstanceNorm2d} <= kinds
