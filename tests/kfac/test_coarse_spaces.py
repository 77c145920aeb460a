"""The coarse level by itself: operators as matrices, full-rank spaces, and what the method keeps between steps."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, LOSSES, Case, Problem, mlp
from test_twolevel import COMBINATIONS, DAMPING, EVERY_COMBINATION, EVERY_SPACE, Dense, moved
from torch import Tensor, nn

from kfac import GKFAC, KFAC, Preconditioner, coarse
from kfac.rows import Rows

FIXED_SPACES = pytest.mark.parametrize("space", ["constant", "spectral", "history"])
NETS = pytest.mark.parametrize("name", ["mlp-ce-mean", "mlp-mse-sum", "tokens-mixed"])


class Operator:
    """A preconditioner that has seen two batches and one move in between, as a matrix; and the dense algebra there."""

    def __init__(self, name: str, space: str, combination: str) -> None:
        problem = BY_NAME[name].make()
        self.preconditioner = Preconditioner(
            problem.model,
            loss=problem.criterion,
            method="gkfac",
            damping=DAMPING,
            fisher="exact",
            stat_decay=0.0,
            factor_interval=lambda step: 1 if step < 2 else 10**6,
            inverse_interval=lambda step: 1 if step < 2 else 10**6,
            coarse_space=space,
            combination=combination,
        )
        before = truth.vector(problem.model.parameters()).detach()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self._backward(problem)
            with torch.no_grad():
                for parameter in problem.model.parameters():
                    parameter += 0.3 * torch.randn_like(parameter)
        move = truth.vector(problem.model.parameters()).detach() - before
        self._backward(problem)
        self.dense = dense = Dense(problem, DAMPING)
        self.rows = dense.by_layer(move) if space == "history" else dense.space(space)
        self.matrix = torch.stack([self._times(problem, unit) for unit in torch.eye(len(move)).double()], dim=1)
        identity = torch.eye(len(move)).double()
        self.one_level = torch.stack([dense.kfac(unit) for unit in identity], dim=1)
        self.coarse = torch.stack([dense.coarse(self.rows, unit) for unit in identity], dim=1)
        self.projector = identity - dense.damped @ self.coarse

    def _backward(self, problem: Problem) -> None:
        problem.model.zero_grad()
        problem.loss().backward()
        self.preconditioner.step()

    def _times(self, problem: Problem, unit: Tensor) -> Tensor:
        start = 0
        for parameter in problem.model.parameters():
            parameter.grad = unit[start : start + parameter.numel()].reshape(parameter.shape).clone()
            start += parameter.numel()
        self.preconditioner.step()
        return truth.vector([p.grad for p in problem.model.parameters() if p.grad is not None])


@NETS
@FIXED_SPACES
def test_deflated_is_the_transposed_projector_times_kfac_and_the_coarse_solve(name: str, space: str) -> None:
    operator = Operator(name, space, "deflated")
    expected = operator.projector.T @ operator.one_level + operator.coarse
    assert truth.relative_error(operator.matrix, expected) < 1e-8
    assert truth.relative_error(operator.matrix, operator.one_level) > 1e-3


@NETS
@FIXED_SPACES
def test_additive_is_the_sum_of_kfac_and_the_coarse_solve(name: str, space: str) -> None:
    operator = Operator(name, space, "additive")
    assert truth.relative_error(operator.matrix, operator.one_level + operator.coarse) < 1e-8


@NETS
@FIXED_SPACES
def test_balanced_projects_on_both_sides_and_is_symmetric_and_positive_definite(name: str, space: str) -> None:
    operator = Operator(name, space, "balanced")
    expected = operator.projector.T @ operator.one_level @ operator.projector + operator.coarse
    assert truth.relative_error(operator.matrix, expected) < 1e-8
    assert truth.relative_error(operator.matrix.T, operator.matrix) < 1e-8
    assert torch.linalg.eigvalsh(0.5 * (operator.matrix + operator.matrix.T))[0] > 0
    deflated = operator.projector.T @ operator.one_level + operator.coarse
    assert truth.relative_error(deflated, deflated.T) > 1e-3, "deflated is symmetric here too: the test shows nothing"


@NETS
@FIXED_SPACES
@EVERY_COMBINATION
def test_galerkin_identity_coarse_residual_and_gain(name: str, space: str, combination: str) -> None:
    """||x + Q r - x*||^2 = ||x - x*||^2 - r^T Q r, R0 (g - C (x + Q r)) = 0, M(x) - M(x + Q r) = 1/2 r^T Q r."""
    operator = Operator(name, space, combination)
    dense, stats = operator.dense, operator.preconditioner.stats
    g = torch.eye(len(dense.gradient)).double()[-1]  # what the operator was applied to last
    x, found, exact = operator.one_level @ g, operator.matrix @ g, torch.linalg.solve(dense.damped, g)
    residual = g - dense.damped @ x
    left = operator.rows @ (g - dense.damped @ found)
    size = (operator.rows @ residual).norm()
    gain = dense.square(x - exact) - dense.square(found - exact)
    assert float(stats["coarse_gain"]) == pytest.approx(0.5 * float(gain), rel=1e-6, abs=1e-9 * float(dense.square(x)))
    if combination == "additive":
        assert float(stats["coarse_residual"]) == pytest.approx(float(left.norm() / size), rel=1e-6)
        assert float(left.norm() / size) > 1e-3
    else:
        assert left.norm() < 1e-8 * size and float(stats["coarse_residual"]) < 1e-8
    if combination == "deflated":
        assert float(gain) == pytest.approx(float(residual @ operator.coarse @ residual), rel=1e-7)
        assert float(gain) > 0


@pytest.mark.parametrize("loss", ["mse-mean", "ce-mean"])
def test_a_coarse_space_of_full_rank_is_the_exact_solve(loss: str) -> None:
    """As many vectors in each layer as it has numbers; the functions of coarse.py alone, on rows made by autograd."""
    problem = Case("pair", lambda: mlp(3, 2, 3), LOSSES[loss], (7, 3)).make()
    dampings = (0.02, 0.05)
    output, inputs, taps = truth.capture(problem)
    found = truth.layers(problem.model)
    values, vectors = torch.linalg.eigh(truth.loss_hessian(problem, output))
    root = (vectors * values.clamp_min(0).sqrt()).T  # H = root^T root
    slopes = truth.jacobian(output, [taps[name] for name in found])
    layers: dict[Any, tuple[Tensor, Tensor]] = {}
    blocks = GKFAC(problem.model, loss=problem.criterion).blocks
    for block, (name, layer), slope in zip(blocks, found.items(), slopes, strict=True):
        g = torch.einsum("vo,ontd->vntd", root, truth.output_rows(layer, slope, lead=1)[:, 0])[None]
        layers[block] = (truth.input_rows(layer, inputs[name]), g)
    kept = [Rows(layers, torch.ones(()))]
    model = coarse.Model(kept, dict(zip(blocks, torch.tensor(dampings).double(), strict=True)), list)
    dense = Dense(problem, 0.0)
    damping = torch.cat([torch.full((n,), d).double() for n, d in zip(dense.sizes, dampings, strict=True)])
    exact = torch.linalg.solve(dense.fisher + damping.diag(), dense.gradient)

    widest = max(dense.sizes)  # smaller layers get some vectors twice, as happens where vectors coincide
    spaces = []
    for block in blocks:
        d_out, d_in = block.shape[1:]
        units = torch.eye(d_out * d_in).double().repeat(2, 1)[:widest]
        spaces.append(list(units.reshape(widest, 1, d_out, d_in)))
    problem.loss().backward()
    gradient = [block.matrix([p.grad for p in block.parameters]) for block in blocks]
    products = model.products(spaces)
    system = coarse.block_gram(coarse.overlaps(spaces), model.dampings) + model.gram(products, products)
    y = coarse.solve(system, coarse.restrict(spaces, gradient))
    prolonged = coarse.prolonged([torch.zeros_like(g) for g in gradient], spaces, y)
    solution = torch.cat([truth.flat(layer, m) for layer, m in zip(found.values(), prolonged, strict=True)])
    assert truth.relative_error(solution, exact) < 1e-7
    image = model.times(prolonged, [s @ y[:, None] for s in products], damped=True)
    for value, right in zip(image, gradient, strict=True):
        assert truth.relative_error(value, right) < 1e-7


@pytest.mark.parametrize("shape", [(4, 3), (1, 5), (1, 1), (2, 1)])
@pytest.mark.parametrize("diagonal_a", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_leading_eigenvectors_are_those_of_the_kronecker_product(
    shape: tuple[int, int], diagonal_a: bool, known: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    d_out, d_in = shape
    roots = [torch.randn(2, d, 2 * d, generator=generator, dtype=torch.float64) for d in (d_in, d_out)]
    a, g = (root @ root.mT for root in roots)
    given = a.diagonal(dim1=-2, dim2=-1) if diagonal_a else a
    a = torch.diag_embed(given) if diagonal_a else a
    bases = [None if diagonal_a else torch.linalg.eigh(a)[1], torch.linalg.eigh(g)[1]] if known else []
    found = coarse.leading_eigenvectors(given, g, *bases)
    assert found.shape == (2, 2, d_out, d_in)
    for k in range(2):
        dense = torch.kron(g[k], a[k])
        values = torch.linalg.eigvalsh(dense).flip(0)
        vectors = found[:, k].flatten(1)
        for value, vector in zip(values, vectors, strict=False):
            assert truth.relative_error(dense @ vector, value * vector) < 1e-10
        count = min(2, d_out * d_in)
        expected = torch.diag(torch.tensor([0.5] * count + [0.0] * (2 - count)).double())
        assert (vectors @ vectors.T - expected).norm() < 1e-12  # of norm 1 over both groups


# What is kept between steps.


def test_history_is_the_movement_of_the_layer_whatever_moved_it() -> None:
    """Weight decay and momentum have a part in it, and a layer that stays keeps its last movement."""
    problem = BY_NAME["mlp-ce-mean"].make()
    options: dict[str, Any] = {"coarse_space": "history", "weight_decay": 0.05, "damping": DAMPING}
    optimizer = GKFAC(problem.model, loss=problem.criterion, **options)
    for count in range(4):
        step = moved(truth.step(optimizer, problem), dense := Dense(problem, DAMPING))
        if count == 2:
            last = step
            optimizer.param_groups[0]["lr"] = 0.0
    assert truth.relative_error(dense.as_vector(list(optimizer._method._moves.values())), last) < 1e-9
    other = problem.copy()
    second = GKFAC(other.model, loss=other.criterion, **options)
    second.load_state_dict(through_a_file(optimizer.state_dict()))
    truth.step(optimizer, problem)
    truth.step(second, other)
    assert float(optimizer.stats["coarse_gain"]) == float(second.stats["coarse_gain"]) > 0


@pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
@EVERY_COMBINATION
def test_history_does_no_harm_before_there_is_one(tuned: bool, combination: str) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    options: dict[str, Any] = {} if tuned else {"lr": 0.1}
    one = KFAC(problem.model, loss=problem.criterion, **options)
    other = problem.copy()
    two = GKFAC(other.model, loss=other.criterion, coarse_space="history", combination=combination, **options)
    first, second = truth.step(one, problem), truth.step(two, other)
    assert all(truth.relative_error(second[name], move) < 1e-12 for name, move in first.items())
    assert float(two.stats["coarse_gain"]) == float(two.stats["coarse_residual"]) == 0


def micro_batches(problem: Problem, sizes: list[int], **options: Any) -> Tensor:
    """What the first step moves, from gradients accumulated over batches of these sizes."""
    optimizer = truth.start(GKFAC, problem, damping=DAMPING, **options)
    before = truth.vector(problem.model.parameters()).detach()
    for inputs, targets in zip(problem.inputs.split(sizes), problem.targets.split(sizes), strict=True):
        loss = problem.criterion(problem.model(inputs), targets)
        (loss * (len(inputs) / len(problem.inputs))).backward()
    optimizer.step()
    return truth.vector(problem.model.parameters()).detach() - before


@pytest.mark.parametrize("sizes", [[6, 1, 13], [257, 1, 6, 300, 638], [1500]])
@pytest.mark.parametrize(
    "options",
    [{"coarse_space": s} for s in ("krylov", "constant", "residual", "spectral")]
    + [{"combination": "balanced"}, {"coarse_space": "constant", "coarse_fisher": "kronecker"}],
    ids=lambda options: "-".join(options.values()),
)
def test_micro_batches_make_the_step_of_one_batch(sizes: list[int], options: dict[str, Any]) -> None:
    """However many examples there are, the same have a part in the coarse curvature."""
    problem = Case("many", lambda: mlp(4, 5, 3), LOSSES["ce-mean"], (sum(sizes), 4)).make()
    whole = micro_batches(problem.copy(), [sum(sizes)], **options)
    assert truth.relative_error(micro_batches(problem.copy(), sizes, **options), whole) < 1e-9
    one_level = truth.vector(truth.first_step(KFAC, problem, damping=DAMPING).values())
    assert truth.relative_error(one_level, whole) > 1e-6


@pytest.mark.parametrize("copies", [1, 2, 8])
@COMBINATIONS
def test_examples_left_out_of_the_coarse_curvature_are_stood_for_by_their_neighbours(
    copies: int, combination: str
) -> None:
    """Every example several times in a row: of the many, each is taken as often as if there were no copies."""
    problem = Case("copies", lambda: mlp(4, 5, 3), LOSSES["bce-mean"], (125, 4)).make()
    dense = Dense(problem, DAMPING)
    problem.inputs, problem.targets = (x.repeat_interleave(copies, 0) for x in (problem.inputs, problem.targets))
    optimizer = truth.start(GKFAC, problem, damping=DAMPING, combination=combination)
    move = -moved(truth.step(optimizer, problem), dense)
    assert truth.relative_error(move, dense.solution(dense.space("krylov"), combination)) < 1e-7
    (kept,) = optimizer._method._kept
    assert all(a.shape[1] == 125 and g.shape[2] == 125 for a, g in kept.layers.values())


@pytest.mark.parametrize("period", [2, 4])
def test_examples_that_come_round_again_are_all_seen(period: int) -> None:
    problem = Case("periodic", lambda: mlp(4, 5, 3), LOSSES["bce-mean"], (period, 4)).make()
    dense = Dense(problem, DAMPING)
    problem.inputs, problem.targets = (x.repeat(1024 // period, 1) for x in (problem.inputs, problem.targets))
    optimizer = truth.start(GKFAC, problem, damping=DAMPING)
    move = -moved(truth.step(optimizer, problem), dense)
    expected = dense.solution(dense.space("krylov"), "deflated")
    assert 0 < truth.relative_error(move, expected) < 0.03 < truth.relative_error(dense.x, expected)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.both = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x).tanh()
        return self.left(hidden) + self.right(hidden) if self.both else self.left(hidden)


@EVERY_SPACE
@EVERY_COMBINATION
def test_a_layer_that_the_last_statistics_did_not_see_gets_the_step_of_kfac(space: str, combination: str) -> None:
    """Its rows are missing, not zero: taken for flat it would be sent far away."""
    problem = Case("heads", TwoHeads, LOSSES["bce-mean"], (6, 4)).make()
    other = problem.copy()

    def directions(problem: Problem, method: str, **options: Any) -> dict[str, Tensor]:
        preconditioner = Preconditioner(
            problem.model, loss=problem.criterion, method=method, damping=DAMPING, inverse_interval=1,
            factor_interval=lambda step: 1 if step < 2 else 10, **options,
        )  # fmt: skip
        assert isinstance(problem.model, TwoHeads)
        for both in (True, False, True):
            problem.model.both = both
            problem.model.zero_grad()
            problem.loss().backward()
            preconditioner.step()
        return {name: p.grad for name, p in problem.model.named_parameters() if p.grad is not None}

    one, two = directions(problem, "kfac"), directions(other, "gkfac", coarse_space=space, combination=combination)
    for name in ("right.weight", "right.bias"):
        assert truth.relative_error(two[name], one[name]) < 1e-12
    if space != "history":
        assert truth.relative_error(two["left.weight"], one["left.weight"]) > 1e-4


def test_rows_are_copies_so_that_an_input_tensor_may_be_written_again() -> None:
    def second_direction(overwrite: bool) -> Tensor:
        problem = Case("plain", lambda: mlp(4, 5, 3, bias=False), LOSSES["ce-mean"], (6, 4)).make()
        preconditioner = Preconditioner(
            problem.model, loss=problem.criterion, method="gkfac", damping=DAMPING, factor_interval=10
        )
        problem.loss().backward()
        gradients = [p.grad.clone() for p in problem.model.parameters() if p.grad is not None]
        preconditioner.step()
        if overwrite:
            problem.inputs.fill_(100.0)
        for parameter, gradient in zip(problem.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        preconditioner.step()
        return truth.vector(gradients)

    assert torch.equal(second_direction(True), second_direction(False))


@pytest.mark.parametrize("name", ["mlp-ce-mean", "convnet-stride", "tokens-mixed"])
@EVERY_SPACE
def test_no_step_decreases_the_model_less_than_kfac_does(name: str, space: str) -> None:
    """Along a training with new statistics at every step; the model by dense algebra at the end."""
    problem = BY_NAME[name].make()
    optimizer = truth.start(GKFAC, problem, lr=0.05, damping=DAMPING, coarse_space=space, stat_decay=0.0)
    gains = []
    for _ in range(8):
        dense = Dense(problem, DAMPING)
        move = -moved(truth.step(optimizer, problem), dense) / 0.05
        gains.append(float(optimizer.stats["coarse_gain"]))
        assert gains[-1] == pytest.approx(float(dense.model(dense.x) - dense.model(move)), rel=1e-4, abs=1e-9)
    assert min(gains[1:]) > 0 and gains[0] >= 0


def through_a_file(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def resumed(make: Callable[[], tuple[Problem, Any]], steps: int) -> tuple[Tensor, Tensor]:
    """Weights after 2 x steps in one go, and after a save and a load in the middle."""
    straight, used = make()
    for count in range(2 * steps):
        if count == steps:
            states = through_a_file([straight.model.state_dict(), used.state_dict()])
        truth.step(used, straight)
    problem, other = make()
    problem.model.load_state_dict(states[0])
    other.load_state_dict(states[1])
    for _ in range(steps):
        truth.step(other, problem)
    assert all(torch.equal(value, other.stats[key]) for key, value in used.stats.items())
    return truth.vector(straight.model.parameters()), truth.vector(problem.model.parameters())


@EVERY_SPACE
@EVERY_COMBINATION
@pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
def test_saved_and_loaded_training_goes_on_bit_for_bit(space: str, combination: str, tuned: bool) -> None:
    def make() -> tuple[Problem, Any]:
        problem = BY_NAME["mlp-ce-mean"].make()
        options: dict[str, Any] = {} if tuned else {"lr": 0.1, "factor_interval": 4, "inverse_interval": 3}
        return problem, GKFAC(
            problem.model, loss=problem.criterion, coarse_space=space, combination=combination, **options
        )

    for steps in (1, 7):  # the preconditioner is renewed in step 6, two steps after the rows
        assert torch.equal(*resumed(make, steps))


def test_the_kronecker_form_goes_on_bit_for_bit() -> None:
    def make() -> tuple[Problem, Any]:
        problem = BY_NAME["mlp-ce-mean"].make()
        options: dict[str, Any] = {"coarse_space": "constant", "coarse_fisher": "kronecker", "lr": 0.1}
        return problem, GKFAC(problem.model, loss=problem.criterion, factor_interval=2, **options)

    assert torch.equal(*resumed(make, 3))


def test_rows_of_a_broken_batch_that_the_host_does_not_see_stay_out_of_use_after_a_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where the host does not look: until new rows come there is no coarse step."""
    monkeypatch.setattr("kfac.optimizer.seen_broken", lambda finite: False)
    problem = BY_NAME["mlp-ce-mean"].make()
    options: dict[str, Any] = {"lr": 0.1, "damping": DAMPING, "factor_interval": 2}
    used = GKFAC(problem.model, loss=problem.criterion, **options)
    for _ in range(2):
        truth.step(used, problem)
    good = problem.inputs
    problem.inputs = good * float("nan")
    truth.step(used, problem)
    problem.inputs = good
    other = problem.copy()
    second = GKFAC(other.model, loss=other.criterion, **options)
    second.load_state_dict(through_a_file(used.state_dict()))
    for optimizer, trained in ((used, problem), (second, other)):
        truth.step(optimizer, trained)
        assert float(optimizer.stats["coarse_gain"]) == 0
    assert torch.equal(truth.vector(problem.model.parameters()), truth.vector(other.model.parameters()))


def test_the_report_measures_the_exact_curvature_where_the_step_uses_the_kronecker_form() -> None:
    problem = BY_NAME["mlp-bce-mean"].make()
    dense = Dense(problem, DAMPING)
    optimizer = truth.start(
        GKFAC, problem, damping=DAMPING, coarse_space="constant", coarse_fisher="kronecker", combination="additive"
    )
    move = -moved(truth.step(optimizer, problem), dense)
    rows = dense.space("constant")
    left = (rows @ (dense.gradient - dense.damped @ move)).norm() / (rows @ dense.residual()).norm()
    assert float(optimizer.stats["coarse_gain"]) == pytest.approx(
        float(dense.model(dense.x) - dense.model(move)), rel=1e-6
    )
    assert float(optimizer.stats["coarse_residual"]) == pytest.approx(float(left), rel=1e-6)
