"""The two-level step against dense algebra: coarse solve, Galerkin identity, full-rank spaces, the 2020 form."""

from __future__ import annotations

from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, LOSSES, Case, Problem, mlp
from torch import Tensor, nn

from kfac import GKFAC, KFAC, coarse

DAMPING = 0.03
NAMES = ["mlp-mse-mean", "mlp-mse-sum", "mlp-bce-mean", "mlp-ce-mean", "mlp-ce-sum", "mlp-ce-weighted",
         "convnet-stride", "convnet-dilation", "tokens-mse", "tokens-mixed", "pixelwise-mixing"]  # fmt: skip
EVERY = pytest.mark.parametrize("name", NAMES)
SPACES = pytest.mark.parametrize("space", ["constant", "krylov", "residual", "spectral"])
COMBINATIONS = pytest.mark.parametrize("combination", ["deflated", "additive"])
EVERY_SPACE = pytest.mark.parametrize("space", ["constant", "krylov", "residual", "spectral", "history"])
EVERY_COMBINATION = pytest.mark.parametrize("combination", ["deflated", "additive", "balanced"])


class Dense:
    """Full curvature over all layers at once, the K-FAC inverse, and the coarse algebra, as matrices."""

    def __init__(self, problem: Problem, damping: float) -> None:
        self.layers = truth.layers(problem.model)
        weights = [weight for layer in self.layers.values() for weight in truth.parameters(layer)]
        self.gradient = truth.gradient(problem, weights)
        self.fisher = truth.ggn(problem, weights)
        self.damped = self.fisher + damping * torch.eye(len(self.fisher), dtype=torch.float64)
        self.sizes = [sum(w.numel() for w in truth.parameters(layer)) for layer in self.layers.values()]
        self.factors = truth.factors(problem)
        self.damping = damping
        self.x = self.kfac(self.gradient)
        self.exact = torch.linalg.solve(self.damped, self.gradient)

    def kfac(self, value: Tensor) -> Tensor:
        """The factored-Tikhonov K-FAC inverse applied to one vector over all layers."""
        parts = []
        for (name, layer), part in zip(self.layers.items(), value.split(self.sizes), strict=True):
            shaped = [part[: layer.weight.numel()].reshape(layer.weight.shape)]
            if layer.bias is not None:
                shaped.append(part[layer.weight.numel() :])
            solved = truth.factored_solve(*self.factors[name], truth.matrix(layer, shaped), self.damping)
            parts.append(truth.flat(layer, solved))
        return torch.cat(parts)

    def by_layer(self, value: Tensor) -> Tensor:
        """One row a layer, zero elsewhere: [L, D]."""
        return torch.block_diag(*value.split(self.sizes))

    def space(self, name: str) -> Tensor:
        if name == "constant":
            return self.by_layer(torch.cat([torch.ones(n, dtype=torch.float64) / n**0.5 for n in self.sizes]))
        if name == "residual":
            return self.by_layer(self.kfac(self.residual()))
        if name == "spectral":  # eigenvalues may coincide: the choice is proved in test_coarse_spaces.py
            found = [coarse.leading_eigenvectors(a, g).flatten(2) for a, g in self.factors.values()]
            return torch.cat([self.by_layer(self.as_vector([vectors[i] for vectors in found])) for i in range(2)])
        return torch.cat([self.by_layer(self.x), self.by_layer(self.kfac(self.fisher @ self.x))])

    def as_vector(self, matrices: list[Tensor]) -> Tensor:
        """One matrix a layer, in any shape of [K, d_out, d_in], as one vector."""
        parts = []
        for (a, g), matrix, layer in zip(self.factors.values(), matrices, self.layers.values(), strict=True):
            parts.append(truth.flat(layer, matrix.reshape(a.shape[0], g.shape[-1], a.shape[-1])))
        return torch.cat(parts)

    def coarse(self, rows: Tensor, value: Tensor) -> Tensor:
        """Q value = R^T (R (F + damping) R^T)^-1 R value, in a basis of the row space."""
        basis = torch.linalg.qr(rows.T).Q
        return basis @ torch.linalg.solve(basis.T @ self.damped @ basis, basis.T @ value)

    def residual(self) -> Tensor:
        return self.gradient - self.damped @ self.x

    def square(self, value: Tensor) -> Tensor:
        return value @ self.damped @ value

    def solution(self, rows: Tensor, combination: str) -> Tensor:
        """The two-level solve with the given coarse space."""
        if combination == "deflated":
            return self.x + self.coarse(rows, self.residual())
        if combination == "additive":
            return self.x + self.coarse(rows, self.gradient)
        deflated = self.gradient - self.damped @ self.coarse(rows, self.gradient)
        z = self.kfac(deflated)
        return self.coarse(rows, self.gradient) + z - self.coarse(rows, self.damped @ z)

    def model(self, value: Tensor) -> Tensor:
        """The quadratic model of a step -value."""
        return 0.5 * self.square(value) - value @ self.gradient


def moved(moves: dict[str, Tensor], dense: Dense) -> Tensor:
    return torch.cat([truth.block_move(moves, name) for name in dense.layers])


@EVERY
@SPACES
@EVERY_COMBINATION
def test_step_is_that_of_dense_algebra_and_its_gain_is_told(name: str, space: str, combination: str) -> None:
    problem = BY_NAME[name].make()
    dense = Dense(problem, DAMPING)
    optimizer = truth.start(GKFAC, problem, damping=DAMPING, coarse_space=space, combination=combination)
    move = -moved(truth.step(optimizer, problem), dense)
    expected = dense.solution(dense.space(space), combination)
    assert truth.relative_error(move, expected) < 1e-7
    # A largest eigenvector of a layer is what K-FAC itself solves well: little is left for the coarse step there.
    assert truth.relative_error(dense.x, expected) > (1e-8 if space == "spectral" else 1e-4), "no coarse step: no test"
    gain = float(dense.model(dense.x) - dense.model(move))
    assert float(optimizer.stats["coarse_gain"]) == pytest.approx(gain, rel=1e-5, abs=1e-10 * abs(gain))


@EVERY_COMBINATION
@pytest.mark.parametrize("name", ["mlp-ce-mean", "convnet-stride", "tokens-mixed"])
def test_history_is_the_last_direction_and_no_harm_before_there_is_one(name: str, combination: str) -> None:
    problem = BY_NAME[name].make()
    dense = Dense(problem, DAMPING)
    optimizer = truth.start(
        GKFAC, problem, damping=DAMPING, stat_decay=0.0, coarse_space="history", combination=combination, lr=0.1
    )
    first = -moved(truth.step(optimizer, problem), dense) / 0.1
    assert truth.relative_error(first, dense.x) < 1e-8
    dense = Dense(problem, DAMPING)
    second = -moved(truth.step(optimizer, problem), dense) / 0.1
    expected = dense.solution(dense.by_layer(first), combination)
    assert truth.relative_error(second, expected) < 1e-7
    assert truth.relative_error(dense.x, expected) > 1e-4


@pytest.mark.parametrize("space", ["constant", "spectral"])
def test_balanced_is_symmetric_and_positive_definite(space: str) -> None:
    """The operator, column by column, from gradients that are unit vectors."""
    problem = BY_NAME["mlp-ce-mean"].make()
    dense = Dense(problem, DAMPING)
    columns = []
    for unit in torch.eye(len(dense.gradient), dtype=torch.float64):
        gradients = {}
        for (name, layer), part in zip(dense.layers.items(), unit.split(dense.sizes), strict=True):
            gradients[f"{name}.weight"] = part[: layer.weight.numel()].reshape(layer.weight.shape)
            if layer.bias is not None:
                gradients[f"{name}.bias"] = part[layer.weight.numel() :].reshape(layer.bias.shape)
        options: dict[str, Any] = {"coarse_space": space, "combination": "balanced", "damping": DAMPING}
        columns.append(-moved(truth.first_step(GKFAC, problem.copy(), gradients, **options), dense))
    operator = torch.stack(columns, dim=1)
    assert truth.relative_error(operator.mT, operator) < 1e-9
    assert torch.linalg.eigvalsh(0.5 * (operator + operator.mT))[0] > 0


@EVERY_SPACE
@EVERY_COMBINATION
@pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
def test_every_space_and_combination_trains(space: str, combination: str, tuned: bool) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    options: dict[str, Any] = {"coarse_space": space, "combination": combination}
    optimizer = GKFAC(problem.model, loss=problem.criterion, **options, **({} if tuned else {"lr": 0.1}))
    start = problem.loss().item()
    for _ in range(30):
        truth.step(optimizer, problem)
        assert problem.loss().item() < 1.5 * start
    assert problem.loss().item() < 0.8 * start


@EVERY_SPACE
def test_two_level_training_resumes_bit_for_bit(space: str) -> None:
    def run(interrupted: bool) -> Tensor:
        problem = BY_NAME["mlp-ce-mean"].make()
        options: dict[str, Any] = {"coarse_space": space, "combination": "balanced", "lr": 0.1, "factor_interval": 3}
        optimizer = GKFAC(problem.model, loss=problem.criterion, **options)
        for count in range(8):
            if interrupted and count == 4:
                saved = optimizer.state_dict()
                optimizer = GKFAC(problem.model, loss=problem.criterion, **options)
                optimizer.load_state_dict(saved)
            truth.step(optimizer, problem)
        return truth.vector(problem.model.parameters()).detach()

    assert torch.equal(run(False), run(True))


@EVERY
@SPACES
def test_galerkin_identity_and_the_reported_gain(name: str, space: str) -> None:
    """||x + Qr - x*||^2 = ||x - x*||^2 - r^T Q r, with x and x + Qr as two optimizers make them."""
    problem = BY_NAME[name].make()
    dense = Dense(problem, DAMPING)
    one_level = -moved(truth.first_step(KFAC, problem.copy(), damping=DAMPING), dense)
    optimizer = truth.start(GKFAC, used := problem.copy(), damping=DAMPING, coarse_space=space)
    two_level = -moved(truth.step(optimizer, used), dense)
    residual = dense.gradient - dense.damped @ one_level
    energy = residual @ (two_level - one_level)
    before, after = dense.square(one_level - dense.exact), dense.square(two_level - dense.exact)
    assert float(energy) > 0
    assert float(before - after) == pytest.approx(float(energy), rel=1e-6)
    assert float(optimizer.stats["coarse_gain"]) == pytest.approx(0.5 * float(energy), rel=1e-6)


@EVERY
@SPACES
def test_coarse_residual_vanishes(name: str, space: str) -> None:
    problem = BY_NAME[name].make()
    dense = Dense(problem, DAMPING)
    optimizer = truth.start(GKFAC, problem, damping=DAMPING, coarse_space=space)
    move = -moved(truth.step(optimizer, problem), dense)
    rows = torch.linalg.qr(dense.space(space).T).Q.T
    size = (rows @ dense.gradient).norm()
    assert (rows @ (dense.gradient - dense.damped @ move)).norm() < 1e-7 * size
    assert float(optimizer.stats["coarse_residual"]) < 1e-6 * float(size)


@pytest.mark.parametrize("name", NAMES)
def test_krylov_contains_the_step_length_so_it_never_loses_to_the_best_multiple_of_kfac(name: str) -> None:
    problem = BY_NAME[name].make()
    dense = Dense(problem, DAMPING)
    move = -moved(truth.first_step(GKFAC, problem, damping=DAMPING), dense)
    best = dense.x * (dense.x @ dense.gradient) / dense.square(dense.x)
    assert dense.square(move - dense.exact) <= dense.square(best - dense.exact) * (1 + 1e-9)


@pytest.mark.parametrize("loss", list(LOSSES)[:4])
def test_space_of_full_rank_gives_the_exact_solve_across_layers(loss: str) -> None:
    """Three weights, three layers: one constant row a layer spans everything."""
    problem = Case("chain", lambda: mlp(1, 1, 1, 1, bias=False), LOSSES[loss], (9, 1)).make()
    with torch.no_grad():
        for weight, value in zip(problem.model.parameters(), (0.8, -1.3, 0.6), strict=True):
            weight.fill_(value)
    dense = Dense(problem, DAMPING)
    off_diagonal = dense.fisher - torch.diag(dense.fisher.diagonal())
    assert off_diagonal.norm() > 0.05 * dense.fisher.norm(), "no curvature between layers: the test shows nothing"
    for space in ("constant", "krylov"):
        moves = truth.first_step(GKFAC, problem.copy(), damping=DAMPING, coarse_space=space)
        assert truth.relative_error(-moved(moves, dense), dense.exact) < 1e-8, space


def test_l2_weight_decay_enters_the_coarse_solve_as_damping_does() -> None:
    problem = Case("chain", lambda: mlp(1, 1, 1, 1, bias=False), LOSSES["mse-mean"], (9, 1)).make()
    dense = Dense(problem, DAMPING + 0.2)
    weights = truth.vector(problem.model.parameters()).detach()
    moves = truth.first_step(GKFAC, problem, damping=DAMPING, weight_decay=0.2, decoupled_weight_decay=False)
    expected = torch.linalg.solve(dense.damped, dense.gradient + 0.2 * weights)
    assert truth.relative_error(-moved(moves, dense), expected) < 1e-8


def test_krylov_with_one_number_in_each_of_two_layers_is_exact_with_biases_too() -> None:
    """Two layers of (weight, bias) = four numbers; two Krylov rows a layer span them."""
    problem = Case("pair", lambda: mlp(1, 1, 1), LOSSES["bce-mean"], (9, 1)).make()
    dense = Dense(problem, DAMPING)
    assert torch.linalg.matrix_rank(dense.space("krylov")) == 4
    moves = truth.first_step(GKFAC, problem, damping=DAMPING, coarse_space="krylov")
    assert truth.relative_error(-moved(moves, dense), dense.exact) < 1e-6


def kronecker_coarse(problem: Problem) -> Tensor:
    """F0_ij = sum(A_ij) sum(G_ij) / sqrt(n_i n_j) with cross-layer factors (2011.00573), T = 1, exact vectors."""
    output, inputs, taps = truth.capture(problem)
    hessian = truth.loss_hessian(problem, output)
    found = truth.layers(problem.model)
    sums_a = torch.stack([truth.input_rows(layer, inputs[name])[0, :, 0].sum(-1) for name, layer in found.items()])
    slopes = [
        truth.output_rows(layer, derivative, lead=1)[:, 0, :, 0].sum(-1)
        for layer, derivative in zip(
            found.values(), truth.jacobian(output, [taps[name] for name in found]), strict=True
        )
    ]
    backward = torch.stack([torch.stack([torch.einsum("on,op,pn->", g, hessian, h) for h in slopes]) for g in slopes])
    sizes = torch.tensor([sum(w.numel() for w in truth.parameters(layer)) for layer in found.values()])
    return (sums_a @ sums_a.T / sums_a.shape[1]) * backward / (sizes.outer(sizes)).double().sqrt()


@pytest.mark.parametrize("name", ["mlp-mse-mean", "mlp-bce-mean", "mlp-ce-mean", "mlp-ce-sum"])
@COMBINATIONS
def test_kronecker_coarse_fisher_on_the_constant_space(name: str, combination: str) -> None:
    problem = BY_NAME[name].make()
    dense = Dense(problem, DAMPING)
    rows = dense.space("constant")
    small = kronecker_coarse(problem) + DAMPING * rows @ rows.T
    right = dense.gradient if combination == "additive" else dense.residual()
    correction = rows.T @ torch.linalg.solve(small, rows @ right)
    moves = truth.first_step(
        GKFAC, problem, damping=DAMPING, coarse_space="constant", combination=combination, coarse_fisher="kronecker"
    )
    tested = -moved(moves, dense) - dense.x
    if combination == "additive":
        assert truth.relative_error(tested, correction) < 1e-7
    else:  # which curvature makes the residual is the method's choice; its place, the constant space, is not
        coarse = rows.T @ (rows @ tested)
        assert truth.relative_error(coarse, tested) < 1e-7


def test_kronecker_and_exact_coarse_fisher_agree_on_one_example_and_differ_on_many() -> None:
    options: dict[str, Any] = {"damping": DAMPING, "coarse_space": "constant", "combination": "additive"}
    for name, same in (("tanh-bce-mean", True), ("mlp-bce-mean", False)):
        exact = truth.vector(truth.first_step(GKFAC, BY_NAME[name].make(), coarse_fisher="exact", **options).values())
        other = truth.vector(
            truth.first_step(GKFAC, BY_NAME[name].make(), coarse_fisher="kronecker", **options).values()
        )
        error = truth.relative_error(other, exact)
        assert error < 1e-8 if same else error > 1e-5


def test_kronecker_coarse_fisher_does_not_grow_by_itself() -> None:
    """The same batch again and again, nothing moving: every step must ask for the same."""
    problem = BY_NAME["mlp-bce-mean"].make()
    optimizer = truth.start(
        GKFAC, problem, damping=DAMPING, lr=1e-9, coarse_space="constant", combination="additive",
        coarse_fisher="kronecker",
    )  # fmt: skip
    first = truth.vector(truth.step(optimizer, problem).values())
    for _ in range(8):
        last = truth.vector(truth.step(optimizer, problem).values())
    assert truth.relative_error(last, first) < 1e-4


def test_layers_without_statistics_have_no_part_in_the_coarse_space() -> None:
    """A layer that the forward never calls leaves the step of the others as it is."""
    problem = BY_NAME["mlp-bce-mean"].make()
    lonely = problem.copy()
    lonely.model.add_module("3", nn.Identity())
    lonely.model.get_submodule("3").add_module("unused", nn.Linear(2, 2).double())
    moves = truth.first_step(GKFAC, problem, damping=DAMPING)
    others: dict[str, Any] = truth.first_step(GKFAC, lonely, damping=DAMPING)
    for name, move in moves.items():
        assert truth.relative_error(others[name], move) < 1e-10
