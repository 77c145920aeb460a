"""The first step against dense curvature by autograd: exactly the damped Newton step wherever theory says so."""

from __future__ import annotations

from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, CONV, CONVOLUTIONS, DEEP_LINEAR, EXACT, GENERAL, ONE_EXAMPLE, Case, Problem, Unfolded, mlp
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC

TOLERANCE = 1e-8
DAMPING = 0.03


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


def kronecker_step(problem: Problem, damping: float) -> dict[str, Tensor]:
    """The factored-Tikhonov step of each layer, as vectors, from the formulas in ground_truth."""
    factors = truth.factors(problem)
    moves = {}
    for name, layer in truth.layers(problem.model).items():
        weights = truth.parameters(layer)
        slope = truth.matrix(layer, list(torch.autograd.grad(problem.loss(), weights)))
        moves[name] = -truth.flat(layer, truth.factored_solve(*factors[name], slope, damping))
    return moves


@named(EXACT)
def test_ground_truth_kronecker_form_is_the_ggn_block(case: Case) -> None:
    problem = case.make()
    factors = truth.factors(problem)
    for name, layer in truth.layers(problem.model).items():
        block = truth.ggn(problem, truth.parameters(layer))
        assert truth.relative_error(truth.kronecker(layer, *factors[name]), block) < 1e-12


@pytest.mark.parametrize(
    ("optimizer", "options"), [(KFAC, {"solver": "eigh"}), (EKFAC, {})], ids=["kfac-eigh", "ekfac"]
)
@named(EXACT)
def test_first_step_is_the_damped_newton_step_of_each_block(case: Case, optimizer: Any, options: Any) -> None:
    problem = case.make()
    moves = truth.first_step(optimizer, problem.copy(), damping=DAMPING, **options)
    for name, layer in truth.layers(problem.model).items():
        weights = truth.parameters(layer)
        block = truth.ggn(problem, weights)
        newton = -torch.linalg.solve(
            block + DAMPING * torch.eye(len(block), dtype=block.dtype), truth.gradient(problem, weights)
        )
        assert truth.relative_error(truth.block_move(moves, name), newton) < TOLERANCE, name


@pytest.mark.parametrize("damping", [1e-3, 0.3, 20.0])
@pytest.mark.parametrize("optimizer", [KFAC, EKFAC])
def test_damping_is_added_exactly_at_every_size(optimizer: Any, damping: float) -> None:
    problem = BY_NAME["deep-mse-mean"].make()
    options: dict[str, Any] = {"solver": "eigh"} if optimizer is KFAC else {}
    moves = truth.first_step(optimizer, problem.copy(), damping=damping, **options)
    for name, layer in truth.layers(problem.model).items():
        weights = truth.parameters(layer)
        block = truth.ggn(problem, weights)
        block.diagonal().add_(damping)
        newton = -torch.linalg.solve(block, truth.gradient(problem, weights))
        assert truth.relative_error(truth.block_move(moves, name), newton) < TOLERANCE, name


@named(GENERAL + CONV)
def test_factors_are_those_of_the_formulas(case: Case) -> None:
    problem = case.make()
    optimizer = truth.start(KFAC, used := problem.copy(), damping=DAMPING)
    truth.step(optimizer, used)
    measured = optimizer.curvature()
    expected = truth.factors(problem)
    assert measured.keys() == expected.keys()
    for name, (a, g) in expected.items():
        assert truth.relative_error(measured[name].A.reshape(a.shape), a) < TOLERANCE, name
        assert truth.relative_error(measured[name].G.reshape(g.shape), g) < TOLERANCE, name


@named(GENERAL + EXACT)
def test_cholesky_makes_the_factored_tikhonov_step(case: Case) -> None:
    problem = case.make()
    moves = truth.first_step(KFAC, problem.copy(), damping=DAMPING, solver="cholesky")
    for name, expected in kronecker_step(problem, DAMPING).items():
        assert truth.relative_error(truth.block_move(moves, name), expected) < TOLERANCE, name


@named(GENERAL)
def test_eigenbasis_makes_the_kronecker_step_with_exact_damping(case: Case) -> None:
    problem = case.make()
    moves = truth.first_step(KFAC, problem.copy(), damping=DAMPING, solver="eigh")
    factors = truth.factors(problem)
    for name, layer in truth.layers(problem.model).items():
        block = truth.kronecker(layer, *factors[name])
        block.diagonal().add_(DAMPING)
        expected = -torch.linalg.solve(block, truth.gradient(problem, truth.parameters(layer)))
        assert truth.relative_error(truth.block_move(moves, name), expected) < TOLERANCE, name


def eigenbasis(layer: nn.Linear | nn.Conv2d, a: Tensor, g: Tensor) -> Tensor:
    """Eigenvectors of G (x) A as columns, rows ordered like the vector (weight, bias)."""
    q_a, q_g = torch.linalg.eigh(a).eigenvectors, torch.linalg.eigh(g).eigenvectors
    return truth.kronecker(layer, q_a, q_g)


@named(GENERAL)
def test_ekfac_step_scales_each_eigendirection_by_its_exact_curvature(case: Case) -> None:
    problem = case.make()
    moves = truth.first_step(EKFAC, problem.copy(), damping=DAMPING)
    factors = truth.factors(problem)
    compared = 0
    for name, layer in truth.layers(problem.model).items():
        weights = truth.parameters(layer)
        basis = eigenbasis(layer, *factors[name])
        scales = (basis * (truth.ggn(problem, weights) @ basis)).sum(0)
        slope = truth.gradient(problem, weights)
        expected = -basis @ ((basis.T @ slope) / (scales + DAMPING))
        if basis_is_unique(*factors[name]):
            assert truth.relative_error(truth.block_move(moves, name), expected) < 1e-7, name
            compared += 1
    assert compared, "no layer has a unique basis: nothing was compared"


def basis_is_unique(*factors: Tensor) -> bool:
    """Whether eigenvalues repeat only at zero, where the rows have no component and any basis gives the same step."""

    def distinct(values: Tensor) -> bool:
        kept = values[values > 1e-9 * values.max()]
        return len(kept) < 2 or bool(kept.diff().min() > 1e-6 * kept.max())

    return all(distinct(values) for factor in factors for values in torch.linalg.eigvalsh(factor))


@named(
    [BY_NAME[name] for name in ("mlp-ce-mean", "mlp-bce-mean", "convnet-stride", "tokens-mixed", "pixelwise-mixing")]
)
def test_ekfac_is_no_worse_than_kfac_in_the_same_basis_and_its_trace_and_diagonal_are_exact(case: Case) -> None:
    """The scales are read off the step itself: with a known gradient, step = -basis (basis^T g / (S + damping))."""
    problem = case.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        slopes = {name: torch.randn_like(parameter) for name, parameter in problem.model.named_parameters()}
    optimizer = truth.start(EKFAC, used := problem.copy(), damping=DAMPING)
    moves = truth.step(optimizer, used, slopes)
    measured = optimizer.curvature()
    compared = 0
    for name, layer in truth.layers(problem.model).items():
        a, g = measured[name].A.unsqueeze(0), measured[name].G.unsqueeze(0)
        basis = eigenbasis(layer, a, g)
        exact = truth.ggn(problem, truth.parameters(layer))
        scales = -(basis.T @ truth.block_move(slopes, name)) / (basis.T @ truth.block_move(moves, name)) - DAMPING
        eigen = (basis * scales) @ basis.T
        kronecker = truth.kronecker(layer, a, g)
        if not basis_is_unique(a, g):
            continue
        compared += 1
        diagonal = (basis * (exact @ basis)).sum(0)
        assert (scales - diagonal).abs().max() < 1e-7 * diagonal.max(), name
        assert truth.relative_error(scales.sum(), exact.trace()) < TOLERANCE, name
        assert (eigen - exact).norm() <= (kronecker - exact).norm() * (1 + 1e-9), name
    assert compared
    first = next(iter(truth.layers(problem.model)))
    assert (kronecker_error(problem, measured, first)) > 0.05, "K-FAC is exact here: the inequality shows nothing"


def kronecker_error(problem: Problem, measured: Any, name: str) -> float:
    layer = truth.layers(problem.model)[name]
    block = truth.ggn(problem, truth.parameters(layer))
    return truth.relative_error(
        truth.kronecker(layer, measured[name].A.unsqueeze(0), measured[name].G.unsqueeze(0)), block
    )


@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
@pytest.mark.parametrize(
    ("geometry", "unfold"),
    [
        ("plain", {}),
        ("no-bias", {}),
        ("padding", {"padding": 1}),
        ("stride", {"stride": 2}),
        ("uneven", {"stride": (1, 2), "padding": (2, 1)}),
        ("dilation", {"padding": 1, "dilation": 2}),
        ("dilation-stride", {"stride": 2, "padding": 2, "dilation": (2, 1)}),
    ],
)
def test_convolution_steps_like_the_linear_layer_on_its_patches(geometry: str, unfold: Any, solver: str) -> None:
    problem = BY_NAME[f"conv-{geometry}"].make()
    assert isinstance(problem.model, nn.Conv2d)
    patches = Problem(
        Unfolded(problem.model, **unfold).double(),
        problem.criterion,
        problem.inputs,
        problem.targets.flatten(2).mT,
    )
    moves = truth.first_step(KFAC, problem, damping=DAMPING, solver=solver)
    expected = truth.first_step(KFAC, patches, damping=DAMPING, solver=solver)
    assert truth.relative_error(moves["weight"].flatten(1), expected["linear.weight"]) < TOLERANCE
    if "bias" in moves:
        assert truth.relative_error(moves["bias"], expected["linear.bias"]) < TOLERANCE


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
def test_one_by_one_convolution_on_a_one_by_one_map_is_a_linear_layer(optimizer: Any) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    convolutions = nn.Sequential(nn.Conv2d(4, 5, 1), nn.Tanh(), nn.Conv2d(5, 3, 1), nn.Flatten()).double()
    for name, layer in truth.layers(problem.model).items():
        with torch.no_grad():
            for target, weight in zip(convolutions.get_submodule(name).parameters(), layer.parameters(), strict=True):
                target.copy_(weight.reshape(target.shape))
    other = Problem(convolutions, problem.criterion, problem.inputs[:, :, None, None], problem.targets)
    moves = truth.first_step(optimizer, problem, damping=DAMPING)
    expected = truth.first_step(optimizer, other, damping=DAMPING)
    for name, move in moves.items():
        assert truth.relative_error(expected[name].reshape(move.shape), move) < TOLERANCE, name


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
def test_shared_dimension_of_size_one_changes_nothing(optimizer: Any) -> None:
    problem = BY_NAME["mlp-mse-mean"].make()
    shared = problem.copy()
    shared.inputs, shared.targets = shared.inputs.unsqueeze(1), shared.targets.unsqueeze(1)
    moves = truth.first_step(optimizer, problem, damping=DAMPING)
    for name, move in truth.first_step(optimizer, shared, damping=DAMPING).items():
        assert truth.relative_error(move, moves[name]) < TOLERANCE, name


@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
def test_groups_of_a_convolution_step_like_separate_convolutions(solver: str) -> None:
    problem = BY_NAME["conv-groups"].make()
    moves = truth.first_step(KFAC, problem.copy(), damping=DAMPING, solver=solver)
    for half in range(2):
        conv = nn.Conv2d(2, 3, 3, padding=1).double()
        with torch.no_grad():
            conv.weight.copy_(problem.model.weight[3 * half : 3 * half + 3])  # type: ignore[index, union-attr]
            conv.bias.copy_(problem.model.bias[3 * half : 3 * half + 3])  # type: ignore[index, union-attr, arg-type]
        # The mean over half the outputs is twice the weight of each: the sum divided by the whole count is the same.
        loss = _ScaledSum(problem.targets.numel())
        single = Problem(
            conv, loss, problem.inputs[:, 2 * half : 2 * half + 2], problem.targets[:, 3 * half : 3 * half + 3]
        )
        expected = kronecker_step(single, DAMPING)[""] if solver == "cholesky" else _newton(single)
        move = torch.cat([moves[part][3 * half : 3 * half + 3].reshape(-1) for part in ("weight", "bias")])
        assert truth.relative_error(move, expected) < TOLERANCE


class _ScaledSum(nn.Module):
    """Squared error summed and divided by a count of our own: for ground truth only."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum() / self.count


def _newton(problem: Problem) -> Tensor:
    weights = list(problem.model.parameters())
    block = truth.ggn(problem, weights)
    block.diagonal().add_(DAMPING)
    return -torch.linalg.solve(block, truth.gradient(problem, weights))


@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
def test_relative_damping_is_a_fraction_of_the_mean_curvature_per_parameter(solver: str) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    factors = truth.factors(problem)
    total = sum(
        float(a.diagonal(dim1=1, dim2=2).sum(1) @ g.diagonal(dim1=1, dim2=2).sum(1)) for a, g in factors.values()
    )
    mean = total / sum(parameter.numel() for parameter in problem.model.parameters())
    relative = truth.start(KFAC, used := problem.copy(), damping=None, relative_damping=0.7, solver=solver)
    moves = truth.step(relative, used)
    expected = truth.first_step(KFAC, problem, damping=0.7 * mean, solver=solver)
    for name, move in moves.items():
        assert truth.relative_error(move, expected[name]) < TOLERANCE, name
    assert float(relative.stats["mean_curvature"]) == pytest.approx(mean, rel=1e-9)
    assert float(relative.stats["damping"]) == pytest.approx(0.7 * mean, rel=1e-9)


def test_reported_damping_of_the_factors_is_the_one_in_use() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    expected = truth.factors(problem)
    optimizer = truth.start(KFAC, problem, damping=DAMPING, solver="cholesky")
    truth.step(optimizer, problem)
    for name, (a, g) in expected.items():
        layer = optimizer.curvature()[name]
        pi = float((truth.mean_eigenvalue(a) / truth.mean_eigenvalue(g)).sqrt())
        assert float(layer.pi) == pytest.approx(pi, rel=1e-9)
        assert float(layer.damping_a) == pytest.approx(pi * DAMPING**0.5, rel=1e-9)
        assert float(layer.damping_g) == pytest.approx(DAMPING**0.5 / pi, rel=1e-9)


def test_each_list_of_cases_covers_what_it_is_for() -> None:
    assert {case.make().inputs.shape[0] for case in ONE_EXAMPLE} == {1}
    assert all(case.make().inputs.shape[0] > 1 for case in DEEP_LINEAR)
    settings = [build() for build in CONVOLUTIONS.values()]
    assert {mode for conv in settings for mode in [conv.padding_mode]} == {"zeros", "circular", "reflect", "replicate"}
    assert {conv.groups for conv in settings} == {1, 2, 4}
    assert {conv.bias is None for conv in settings} == {True, False}
    assert any(conv.dilation != (1, 1) and conv.stride != (1, 1) for conv in settings)
    assert isinstance(mlp(2, 2)[0], nn.Linear)
