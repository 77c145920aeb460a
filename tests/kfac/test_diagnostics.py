"""Eigenvalues, traces, solves and fidelities equal those of dense float64 matrices; wrong calls are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from dense_curvature import Case, case, close, dense_ggn, gradient
from torch import nn

from kfac import diagnostics
from kfac.diagnostics import GGN, Fisher


@pytest.mark.parametrize("net", ["linear", "tanh mlp", "batch norm"])
@pytest.mark.parametrize("loss", ["cross entropy", "mse"])
def test_extreme_eigenvalues_are_those_of_the_dense_matrix(net: str, loss: str) -> None:
    c = case(net, loss)
    expected = torch.linalg.eigvalsh(dense_ggn(c))
    operator = GGN(*c)
    close(diagnostics.largest_eigenvalues(operator, 3, tolerance=1e-10), expected.flip(0)[:3], 1e-8)
    values, vectors = diagnostics.eigenpairs(operator, 2, which="smallest", tolerance=1e-10)
    close(values, expected[:2], 1e-8)
    for value, vector in zip(values, vectors, strict=True):
        close(diagnostics.norm(vector), torch.ones(()).double())
        close(operator.flatten(operator.matvec(vector)), value * operator.flatten(vector), 1e-8)


def large() -> Case:
    """More parameters than the dense shortcut takes, so that Lanczos is what is tested."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    return Case(model, nn.MSELoss(), torch.randn(60, 6).double(), torch.randn(60, 3).double())


def test_lanczos_finds_the_extreme_eigenpairs_and_repeats_itself() -> None:
    c = large()
    matrix, operator = dense_ggn(c), GGN(*c)
    expected = torch.linalg.eigvalsh(matrix)
    values, vectors = diagnostics.eigenpairs(operator, 4, tolerance=1e-10, seed=3)
    close(values, expected.flip(0)[:4], 1e-8)
    for value, vector in zip(values, vectors, strict=True):
        close(operator.flatten(operator.matvec(vector)), value * operator.flatten(vector), 1e-6)
    assert torch.equal(values, diagnostics.largest_eigenvalues(operator, 4, tolerance=1e-10, seed=3))
    coarse = diagnostics.largest_eigenvalues(operator, 2, tolerance=1e-3)
    close(coarse, expected.flip(0)[:2], 2e-3)
    close(diagnostics.eigenpairs(operator, 2, which="smallest", tolerance=1e-4)[0], expected[:2], 1e-3)


def test_lanczos_on_a_zero_operator_gives_zeros() -> None:
    c = large()
    operator = GGN(c.model, lambda output, _: output.sum(), c.inputs, c.targets)
    assert not diagnostics.largest_eigenvalues(operator, 3).any()
    assert not diagnostics.largest_eigenvalues(operator, 1).any()


def test_trace_and_diagonal_estimates_converge_and_agree_with_each_other() -> None:
    c = large()
    matrix, operator, samples = dense_ggn(c), GGN(*c), 400
    spread = (matrix - matrix.diag().diag()).square()
    estimate = diagnostics.trace(operator, samples, seed=1)
    assert abs(estimate - matrix.trace()) < 4 * (2 * spread.sum() / samples).sqrt()
    entries = operator.flatten(diagnostics.diagonal(operator, samples, seed=1))
    close(entries.sum(), estimate)
    assert ((entries - matrix.diag()).abs() <= 5 * (spread.sum(1) / samples).sqrt()).all()
    assert torch.equal(estimate, diagnostics.trace(operator, samples, seed=1))
    assert not torch.equal(estimate, diagnostics.trace(operator, samples, seed=2))


def test_trace_and_diagonal_are_exact_where_the_matrix_is_diagonal() -> None:
    model = nn.Linear(1, 5).double()
    x = torch.tensor([[-1.0], [1.0]]).double()
    operator = GGN(model, nn.MSELoss(), x, torch.zeros(2, 5).double())
    close(diagnostics.trace(operator, 1), operator.dense().trace())
    close(operator.flatten(diagnostics.diagonal(operator, 1)), operator.dense().diag())


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
@pytest.mark.parametrize("net", ["tanh mlp", "conv", "batch norm"])
def test_conjugate_gradients_solve_the_damped_system(net: str, damping: float) -> None:
    c = case(net)
    operator = GGN(*c)
    g = torch.cat([t.flatten() for t in gradient(c)])
    expected = torch.linalg.solve(dense_ggn(c) + damping * torch.eye(len(g)).double(), g)
    solution = diagnostics.damped_natural_gradient(
        operator, operator.gradient, torch.tensor(damping).double(), tolerance=1e-10, max_iterations=500
    )
    close(operator.flatten(solution.direction), expected, 1e-7)
    assert solution.residual < 1e-9 and 0 < solution.iterations < 500


def test_conjugate_gradients_stop_at_the_cap_and_report_the_residual() -> None:
    c = large()
    operator = GGN(*c)
    solution = diagnostics.damped_natural_gradient(operator, operator.gradient, 1e-6, max_iterations=3)
    x, g = operator.flatten(solution.direction), operator.flatten(operator.gradient)
    assert solution.iterations == 3
    residual = (g - operator.apply(x) - 1e-6 * x).norm() / g.norm()
    assert solution.residual == pytest.approx(float(residual)) and solution.residual > 1e-4


def test_a_zero_gradient_has_a_zero_solution_in_no_iterations() -> None:
    operator = GGN(*case())
    zero = [torch.zeros_like(p) for p in operator.parameters]
    solution = diagnostics.damped_natural_gradient(operator, zero, 0.1)
    assert solution.iterations == 0 and solution.residual == 0 and not any(x.any() for x in solution.direction)


def test_the_quadratic_model_is_exact_for_squared_error_of_a_linear_net() -> None:
    c = case("linear", "mse")
    operator = GGN(*c)
    step = [torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).double() for p in operator.parameters]
    predicted = diagnostics.quadratic_model(operator, operator.gradient, step)
    with torch.no_grad():
        for p, s in zip(c.model.parameters(), step, strict=True):
            p.add_(s)
    close(predicted, (c.criterion(c.model(c.inputs), c.targets) - operator.loss).detach())
    damped = diagnostics.quadratic_model(operator, operator.gradient, step, 0.3)
    close(damped - predicted, 0.15 * diagnostics.norm(step) ** 2)


def test_fidelity_of_the_exact_direction_is_one_and_of_others_as_the_dense_matrices_say() -> None:
    c, damping = large(), 1e-2
    operator = GGN(*c)
    matrix = dense_ggn(c) + damping * torch.eye(operator.size).double()
    g = operator.flatten(operator.gradient)
    best = torch.linalg.solve(matrix, g)
    perfect = diagnostics.fidelity(operator, operator.gradient, operator.unflatten(best), damping, tolerance=1e-10)
    close(torch.stack(perfect[:4]), torch.tensor([1.0, 0.0, 1.0, 1.0]).double(), 1e-6)
    for x in (g, -g, 10 * best, 0.5 * best + g):
        got = diagnostics.fidelity(operator, operator.gradient, operator.unflatten(x), damping, tolerance=1e-10)
        decrease = g @ x - 0.5 * x @ matrix @ x
        scale = max(float(g @ x / (x @ matrix @ x)), 0.0)
        rescaled = scale * g @ x - 0.5 * scale**2 * x @ matrix @ x
        close(got.cosine, x @ best / x.norm() / best.norm(), 1e-6)
        close(got.relative_error, (x - best).norm() / best.norm(), 1e-6)
        close(got.share, decrease / (0.5 * g @ best), 1e-6)
        close(got.best_share, rescaled / (0.5 * g @ best), 1e-6)


def test_fidelity_takes_an_earlier_solution() -> None:
    operator = GGN(*large())
    solution = diagnostics.damped_natural_gradient(operator, operator.gradient, 0.1)
    g = operator.gradient
    assert diagnostics.fidelity(operator, g, g, 0.1, exact=solution) == diagnostics.fidelity(operator, g, g, 0.1)


def test_factor_spectrum_is_that_of_the_symmetric_matrix() -> None:
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    matrix = root @ root.T
    values = torch.linalg.eigvalsh(matrix.double())
    got = diagnostics.factor_spectrum(matrix)
    close(torch.stack(got), torch.stack([values[0], values[-1], values[-1] / values[0]]))
    upper_is_not_read = matrix.tril() + torch.full((6, 6), torch.nan).triu(1)
    assert diagnostics.factor_spectrum(upper_is_not_read) == got
    close(diagnostics.factor_spectrum(matrix, 2.0).condition, (values[-1] + 2) / (values[0] + 2))


def test_factor_spectrum_takes_groups_rank_deficiency_and_nan() -> None:
    groups = torch.stack([torch.diag(torch.tensor([1.0, 8.0])), torch.diag(torch.tensor([2.0, 3.0]))])
    assert [float(x) for x in diagnostics.factor_spectrum(groups)] == [1, 8, 8]
    assert float(diagnostics.factor_spectrum(torch.diag(torch.tensor([0.0, 1.0]))).condition) == torch.inf
    assert diagnostics.factor_spectrum(torch.full((2, 2), torch.nan)).largest.isnan()


def test_float32_nets_are_measured_to_float32_accuracy() -> None:
    c = large()
    single = Case(copy.deepcopy(c.model).float(), c.criterion, c.inputs.float(), c.targets.float())
    operator, exact = GGN(*single), GGN(*c)
    close(operator.dense().double(), exact.dense(), 1e-5)
    close(
        diagnostics.largest_eigenvalues(operator, 2, tolerance=0),
        diagnostics.largest_eigenvalues(exact, 2),
        1e-3,
    )
    solution = diagnostics.damped_natural_gradient(operator, operator.gradient, 1e-3, tolerance=1e-5)
    assert solution.residual < 2e-5 and solution.direction[0].dtype == torch.float32


# ---- errors


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c, o: GGN(c.model, nn.MSELoss(reduction="none"), c.inputs, c.inputs[:, :3]), "scalar"),
        (
            lambda c, o: GGN(c.model, c.criterion, c.inputs, c.targets, [nn.Parameter(torch.ones(2))]),
            "not a parameter of the model",
        ),
        (lambda c, o: GGN(c.model.requires_grad_(False), *c[1:]), "requires a gradient"),
        (lambda c, o: GGN(nn.LazyLinear(3), *c[1:]), "weight has no shape yet"),
        (lambda c, o: Fisher(c.model, lambda z: z, c.inputs), "vectors"),
        (lambda c, o: o.matvec(o.parameters[1:]), "3 tensors given"),
        (lambda c, o: o.matvec([p.T for p in o.parameters]), "tensor 0 has shape"),
        (lambda c, o: diagnostics.largest_eigenvalues(o, 0), "k: 0"),
        (lambda c, o: diagnostics.eigenpairs(o, 1, which="LM"), "'largest' or 'smallest'"),
        (lambda c, o: diagnostics.trace(o, 0), "samples: 0"),
        (lambda c, o: diagnostics.damped_natural_gradient(o, o.gradient, -1.0), "damping: -1.0"),
        (lambda c, o: diagnostics.factor_spectrum(torch.ones(2, 3)), r"\(2, 3\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:The use of `x.T`", "ignore:Lazy modules")
def test_a_wrong_call_is_refused_in_one_line(call: Callable[[Case, GGN], object], words: str) -> None:
    c = case("tanh mlp")
    operator = GGN(*c)
    with pytest.raises(ValueError, match=words) as failure:
        call(c, operator)
    assert "\n" not in str(failure.value)
