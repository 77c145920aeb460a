"""One test for each mistake that earlier implementations of these methods made."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, Problem
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac import EKFAC, GKFAC, KFAC

ALL = [KFAC, EKFAC, GKFAC]
OPTIMIZERS = pytest.mark.parametrize("optimizer", ALL)
RARE = {"factor_interval": 1000, "inverse_interval": 1000}  # after the first step the preconditioner stays as it is


class Scaled(nn.Module):
    """A net with a parameter that no Kronecker block covers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.second = nn.Linear(5, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(value)) * self.scale)


def scaled_problem() -> Problem:
    problem = BY_NAME["mlp-ce-mean"].make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        problem.model = Scaled().double()
    return problem


def random_slopes(problem: Problem, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: torch.randn_like(parameter) for name, parameter in problem.model.named_parameters()}


def fresh_batch(problem: Problem, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        problem.inputs = torch.randn_like(problem.inputs)


# stat_decay accepted and ignored


@OPTIMIZERS
@pytest.mark.parametrize("decay", [0.0, 0.4, 0.95])
def test_stat_decay_weighs_old_and_new_factors(optimizer: Any, decay: float) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    used = truth.start(optimizer, problem, damping=1.0, lr=0.0, stat_decay=decay)
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    for count in range(1, 6):
        fresh_batch(problem, seed=count)
        kept = min(1 - 1 / count, decay)
        for name, (a, g) in truth.factors(problem).items():
            old_a, old_g = expected.get(name, (a, g))
            expected[name] = (kept * old_a + (1 - kept) * a, kept * old_g + (1 - kept) * g)
        truth.step(used, problem)
    for name, (a, g) in expected.items():
        assert truth.relative_error(used.curvature()[name].A, a[0]) < 1e-8
        assert truth.relative_error(used.curvature()[name].G, g[0]) < 1e-8


@pytest.mark.parametrize("decay", [0.0, 0.4, 0.95])
def test_stat_decay_weighs_old_and_new_scales_of_ekfac(decay: float) -> None:
    """In a basis that stays, at a rate that hardly moves the weights; forced gradients make the scales visible."""
    problem, rate = BY_NAME["mlp-ce-mean"].make(), 1e-9
    used = truth.start(EKFAC, problem, damping=0.1, lr=rate, stat_decay=decay, inverse_interval=1000)
    slopes = random_slopes(problem, seed=9)
    bases: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for count in range(1, 6):
        fresh_batch(problem, seed=count)
        kept = min(1 - 1 / count, decay)
        factors = truth.factors(problem)
        for name, layer in truth.layers(problem.model).items():
            if count == 1:
                a, g = factors[name]
                bases[name] = truth.kronecker(
                    layer, torch.linalg.eigh(a).eigenvectors, torch.linalg.eigh(g).eigenvectors
                )
            basis = bases[name]
            new = (basis * (truth.ggn(problem, truth.parameters(layer)) @ basis)).sum(0)
            scales[name] = kept * scales.get(name, new) + (1 - kept) * new
        moves = truth.step(used, problem, slopes)
        for name, basis in bases.items():
            expected = -rate * basis @ ((basis.T @ truth.block_move(slopes, name)) / (scales[name] + 0.1))
            assert truth.relative_error(truth.block_move(moves, name), expected) < 1e-5, (count, name)


@pytest.mark.parametrize(("options", "decay"), [({"lr": 0.1}, 0.95), ({}, 0.8)], ids=["fixed", "self-tuning"])
def test_default_decay_is_the_documented_one(options: dict[str, float], decay: float) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    optimizer = KFAC(problem.model, loss=problem.criterion, factor_interval=1, **options)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    first = problem.model.get_submodule("0")
    assert isinstance(first, nn.Linear)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for count in range(1, 31):
        fresh_batch(problem, seed=count)
        kept = min(1 - 1 / count, decay)
        expected = kept * expected + (1 - kept) * truth.input_factor(first, problem.inputs)[0]
        truth.step(optimizer, problem)
    assert truth.relative_error(optimizer.curvature()["0"].A, expected) < 1e-8


# intervals


def test_factors_and_inverses_are_renewed_at_their_intervals_and_not_between() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    optimizer = truth.start(KFAC, problem, damping=1.0, lr=0.0, factor_interval=2, inverse_interval=4)
    seen, ages = [], []
    for count in range(8):
        fresh_batch(problem, seed=count)
        truth.step(optimizer, problem)
        seen.append(optimizer.curvature()["0"].A.clone())
        ages.append(optimizer.curvature()["0"].age)
    changed = [not torch.equal(new, old) for old, new in itertools.pairwise(seen)]
    assert changed == [False, True, False, True, False, True, False]
    assert ages[4] < ages[3] and ages[0] < ages[1] < ages[2] < ages[3]


def test_intervals_may_be_functions_of_the_step() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    optimizer = truth.start(
        KFAC, problem, damping=lambda step: 1.0 + step, lr=0.0, factor_interval=lambda step: 1 if step < 2 else 3
    )
    seen = []
    for count in range(6):
        fresh_batch(problem, seed=count)
        truth.step(optimizer, problem)
        seen.append(optimizer.curvature()["0"].A.clone())
        assert float(optimizer.stats["damping"]) == 1.0 + count
    changed = [not torch.equal(new, old) for old, new in itertools.pairwise(seen)]
    assert changed == [True, False, False, True, False]


# weight decay after preconditioning, into momentum


@OPTIMIZERS
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decoupled_weight_decay_shrinks_weights_and_stays_out_of_the_momentum(optimizer: Any, momentum: float) -> None:
    """The same forced gradients with and without decay: the difference is the shrinkage of each step and no more."""
    plain, decayed = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    options = {"damping": 0.1, "lr": 0.05, "momentum": momentum, **RARE}
    optimizers = truth.start(optimizer, plain, **options), truth.start(optimizer, decayed, weight_decay=0.3, **options)
    for count in range(4):
        slopes = random_slopes(plain, seed=count)
        before = {name: parameter.detach().clone() for name, parameter in decayed.model.named_parameters()}
        moves = truth.step(optimizers[0], plain, slopes)
        shrunk = truth.step(optimizers[1], decayed, slopes)
        for name, move in moves.items():
            assert truth.relative_error(shrunk[name] - move, -0.05 * 0.3 * before[name]) < 1e-8


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC])
def test_l2_weight_decay_is_part_of_the_objective_its_gradient_and_its_curvature(optimizer: Any) -> None:
    problem = BY_NAME["deep-mse-mean"].make()
    options: dict[str, Any] = {"solver": "eigh"} if optimizer is KFAC else {}
    moves = truth.first_step(
        optimizer, problem.copy(), damping=0.03, weight_decay=0.2, decoupled_weight_decay=False, **options
    )
    for name, layer in truth.layers(problem.model).items():
        weights = truth.parameters(layer)
        block = truth.ggn(problem, weights)
        block.diagonal().add_(0.03 + 0.2)
        slope = truth.gradient(problem, weights) + 0.2 * truth.vector(weights).detach()
        assert truth.relative_error(truth.block_move(moves, name), -torch.linalg.solve(block, slope)) < 1e-8


# KL clip that leaves out fallback parameters and momentum


@OPTIMIZERS
def test_kl_clip_scales_the_step_onto_the_bound_and_leaves_small_steps_alone(optimizer: Any) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    slopes = dict(zip((n for n, _ in problem.model.named_parameters()),
                      torch.autograd.grad(problem.loss(), list(problem.model.parameters())), strict=True))  # fmt: skip
    free = truth.first_step(optimizer, problem.copy(), damping=0.1, lr=0.5)
    form = -0.5 * sum(float((free[name] * slopes[name]).sum()) for name in free)  # lr^2 <direction, gradient>
    for kl_clip, factor in ((form / 16, 0.25), (form * 1.01, 1.0)):
        used = truth.start(optimizer, bounded := problem.copy(), damping=0.1, lr=0.5, kl_clip=kl_clip)
        moves = truth.step(used, bounded)
        assert float(used.stats["kl_clip"]) == pytest.approx(factor, rel=1e-9)
        for name, move in free.items():
            assert truth.relative_error(moves[name], factor * move) < 1e-8


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC])
def test_kl_clip_bounds_the_step_that_momentum_builds_up(optimizer: Any) -> None:
    """One gradient for ever: momentum would grow the step tenfold, its quadratic form a hundredfold."""
    problem = BY_NAME["mlp-ce-mean"].make()
    slopes = random_slopes(problem, seed=1)
    options = {"damping": 0.1, "lr": 1.0, **RARE}
    unit = truth.vector(truth.first_step(optimizer, problem.copy(), slopes, **options).values())
    form = -float(unit @ truth.vector(slopes.values()))  # quadratic form of the step -K^-1 g
    kl_clip = 0.5 * form
    used = truth.start(optimizer, problem, momentum=0.9, kl_clip=kl_clip, **options)
    for _ in range(25):
        move = truth.vector(truth.step(used, problem, slopes).values())
        length = float(move @ unit / (unit @ unit))
        assert truth.relative_error(move, length * unit) < 1e-6
        assert 0 < length**2 * form <= kl_clip * (1 + 1e-6)


@OPTIMIZERS
def test_kl_clip_bounds_parameters_without_a_block_too(optimizer: Any) -> None:
    problem = scaled_problem()
    free = truth.first_step(optimizer, problem.copy(), damping=0.1)
    tight = truth.first_step(optimizer, problem.copy(), damping=0.1, kl_clip=1e-16)
    for name, move in free.items():
        assert move.norm() > 0
        assert tight[name].norm() < 1e-4 * move.norm(), name


def test_a_large_step_of_a_parameter_without_a_block_counts_in_the_kl_clip() -> None:
    problem = scaled_problem()
    factors = []
    for rate in (1e-6, 10.0):
        optimizer = truth.start(KFAC, used := problem.copy(), damping=0.1, kl_clip=1e-2)
        optimizer.param_groups[-1]["lr"] = rate
        truth.step(optimizer, used)
        factors.append(float(optimizer.stats["kl_clip"]))
    assert factors[1] < 0.7 * factors[0]


# class-name matching misses subclasses


class MyLinear(nn.Linear):
    """A subclass that computes what its class says."""


class LowRank(nn.Linear):
    """A subclass with a forward of its own, as adapters have it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(1, inputs))
        self.up = nn.Parameter(torch.randn(outputs, 1))

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value) + value @ self.down.T @ self.up.T


@OPTIMIZERS
def test_a_subclass_of_linear_is_preconditioned_like_linear(optimizer: Any) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    other = problem.copy()
    for layer in other.model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = MyLinear
    moves = truth.first_step(optimizer, problem, damping=0.1)
    for name, move in truth.first_step(optimizer, other, damping=0.1).items():
        assert torch.equal(move, moves[name])


@OPTIMIZERS
def test_a_subclass_with_its_own_forward_is_trained_by_the_fallback(optimizer: Any) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    with torch.random.fork_rng(devices=[]):
        problem.model = nn.Sequential(LowRank(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    used = truth.start(optimizer, problem, damping=0.1)
    moves = truth.step(used, problem)
    assert set(used.curvature()) == {"2"}
    for name in ("0.weight", "0.bias", "0.down", "0.up"):
        assert moves[name].abs().max() == pytest.approx(1e-3, rel=1e-3), name  # AdamW's first step is its rate


# statistics contaminated by any grad-enabled forward


def wander(problem: Problem) -> None:
    """Everything that a loop may do with a model besides training it."""
    model, other = problem.model, 3 * problem.inputs + 1
    model(other)
    problem.criterion(model(other), problem.targets)
    with torch.no_grad():
        problem.criterion(model(other), problem.targets)
    with torch.inference_mode():
        model(other)
    model.eval()
    problem.criterion(model(other), problem.targets)
    model.train()


@OPTIMIZERS
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_forwards_without_a_backward_leave_no_trace(optimizer: Any, fisher: str) -> None:
    clean, busy = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    options = {"damping": 0.1, "lr": 0.1, "fisher": fisher}
    optimizers = truth.start(optimizer, clean, **options), truth.start(optimizer, busy, **options)
    for count in range(3):
        fresh_batch(clean, seed=count)
        busy.inputs = clean.inputs
        wander(busy)
        moves = truth.step(optimizers[0], clean)
        optimizers[1].zero_grad()
        loss = busy.loss()
        wander_result = busy.copy()  # evaluation of a copy between forward and backward
        wander(wander_result)
        loss.backward()
        before = {name: parameter.detach().clone() for name, parameter in busy.model.named_parameters()}
        optimizers[1].step()
        for name, parameter in busy.model.named_parameters():
            assert torch.equal(parameter.detach() - before[name], moves[name]), (count, name)
    for name, layer in optimizers[0].curvature().items():
        assert torch.equal(layer.A, optimizers[1].curvature()[name].A)
        assert torch.equal(layer.G, optimizers[1].curvature()[name].G)


@OPTIMIZERS
def test_forwards_without_a_backward_leave_no_trace_when_self_tuning(optimizer: Any) -> None:
    clean, busy = (BY_NAME["convnet-stride"].make() for _ in range(2))
    optimizers = [optimizer(problem.model, loss=problem.criterion) for problem in (clean, busy)]
    for _ in range(8):
        wander(busy)
        first, second = truth.step(optimizers[0], clean), truth.step(optimizers[1], busy)
        assert all(torch.equal(first[name], second[name]) for name in first)


# parameters without a block trained by raw gradients at the natural-gradient rate


@OPTIMIZERS
def test_parameters_without_a_block_follow_adamw_at_their_own_rate(optimizer: Any) -> None:
    problem = scaled_problem()
    twin = problem.model.get_parameter("scale").detach().clone().requires_grad_()
    adamw = torch.optim.AdamW([twin], lr=1e-3, weight_decay=0.0)
    used = truth.start(optimizer, problem, damping=0.1, lr=0.7)
    assert used.param_groups[-1]["lr"] == 1e-3
    assert [id(p) for p in used.param_groups[-1]["params"]] == [id(problem.model.get_parameter("scale"))]
    for count in range(5):
        slopes = random_slopes(problem, seed=count)
        twin.grad = slopes["scale"].clone()
        adamw.step()
        truth.step(used, problem, slopes)
        assert truth.relative_error(problem.model.get_parameter("scale").detach(), twin.detach()) < 1e-12


@OPTIMIZERS
def test_a_model_without_any_block_trains_like_adamw(optimizer: Any) -> None:
    model = nn.PReLU(4).double()
    twin = nn.PReLU(4).double()
    criterion = nn.MSELoss()
    with torch.random.fork_rng(devices=[]):
        inputs, targets = torch.randn(2, 8, 4, dtype=torch.float64)
    ours = optimizer(model, loss=criterion, lr=0.1, kl_clip=None)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    for net, trainer in ((model, ours), (twin, theirs)):
        for _ in range(4):
            trainer.zero_grad()
            criterion(net(inputs), targets).backward()
            trainer.step()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert truth.relative_error(own.detach(), other.detach()) < 1e-12


# only param_groups[0] read


@OPTIMIZERS
@pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
def test_every_parameter_group_is_read(optimizer: Any, tuned: bool) -> None:
    """One group's rate at zero stops that group and no other."""
    names = [name for name, _ in scaled_problem().model.named_parameters()]
    stopped: list[set[str]] = []
    for index in range(3):
        problem = scaled_problem()
        used = optimizer(problem.model, loss=problem.criterion, **({} if tuned else {"lr": 0.1, "damping": 0.1}))
        second = list(problem.model.get_submodule("second").parameters())
        kept = [p for p in used.param_groups[0]["params"] if all(p is not q for q in second)]
        assert len(kept) == 2
        used.param_groups[0]["params"] = kept
        used.add_param_group({"params": second, "lr": used.param_groups[0]["lr"]})
        used.param_groups[index]["lr"] = 0.0
        moves = truth.step(used, problem)
        stopped.append({name for name in names if not moves[name].any()})
    assert sorted(map(sorted, stopped)) == [["first.bias", "first.weight"], ["scale"], ["second.bias", "second.weight"]]


@OPTIMIZERS
def test_rate_momentum_and_weight_decay_are_read_at_each_step(optimizer: Any) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    slopes = random_slopes(problem, seed=1)
    used = truth.start(optimizer, problem, damping=0.1, lr=0.1, **RARE)
    first = truth.step(used, problem, slopes)
    for group in used.param_groups:
        group["lr"] = 0.2
    second = truth.step(used, problem, slopes)
    for group in used.param_groups:
        group["weight_decay"] = 0.5
    before = {name: parameter.detach().clone() for name, parameter in problem.model.named_parameters()}
    third = truth.step(used, problem, slopes)
    for group in used.param_groups:
        group["weight_decay"], group["momentum"] = 0.0, 0.9
    truth.step(used, problem, slopes)
    fifth = truth.step(used, problem, slopes)
    for name, move in first.items():
        assert truth.relative_error(second[name], 2 * move) < 1e-8
        assert truth.relative_error(third[name] - second[name], -0.2 * 0.5 * before[name]) < 1e-8
        assert fifth[name].norm() > 1.5 * second[name].norm()


# factors absent from state_dict


@OPTIMIZERS
def test_state_dict_holds_the_factors(optimizer: Any) -> None:
    problem = BY_NAME["convnet-groups"].make()
    used = truth.start(optimizer, problem, damping=0.1)
    truth.step(used, problem)
    other = problem.copy()
    loaded = truth.start(optimizer, other, damping=0.1)
    assert not loaded.curvature() or not loaded.curvature()["0"].A.any()
    loaded.load_state_dict(used.state_dict())
    for name, layer in used.curvature().items():
        assert layer.A.any() and torch.equal(loaded.curvature()[name].A, layer.A)
        assert layer.G.any() and torch.equal(loaded.curvature()[name].G, layer.G)


# asserts and .item() in the step


class NoReading(TorchDispatchMode):
    """Refuses every operation that brings a tensor's value to the host."""

    FORBIDDEN = frozenset({"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.FORBIDDEN, f"{func} brings a tensor's value to the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("read", [float, bool, int, lambda t: t.item(), lambda t: torch.equal(t, t), torch.nonzero])
def test_the_guard_sees_what_it_is_for(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="host"), NoReading():
        read(torch.ones(()))


@pytest.mark.parametrize("name", ["mlp-mse-mean", "mlp-bce-mean", "mlp-ce-mean", "mlp-ce-weighted", "convnet-groups"])
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_no_value_is_read_in_a_fixed_step(name: str, fisher: str) -> None:
    problem = BY_NAME[name].make()
    used = KFAC(
        problem.model,
        loss=problem.criterion,
        lr=0.1,
        fisher=fisher,
        factor_interval=1,
        inverse_interval=2,
        weight_decay=0.1,
    )
    for _ in range(3):
        used.zero_grad()
        with NoReading():
            problem.loss().backward()
            used.step()


@pytest.mark.parametrize("optimizer", [KFAC, GKFAC])
@pytest.mark.parametrize("name", ["mlp-ce-mean", "convnet-stride"])
def test_no_value_is_read_in_a_self_tuned_step(name: str, optimizer: Any) -> None:
    problem = BY_NAME[name].make()
    used = optimizer(problem.model, loss=problem.criterion)
    for _ in range(7):
        used.zero_grad()
        with NoReading():
            problem.loss().backward()
            used.step()


def test_no_value_is_read_between_refreshes_of_an_eigenbasis() -> None:
    for optimizer, options in ((KFAC, {"solver": "eigh"}), (EKFAC, {})):
        problem = BY_NAME["mlp-ce-mean"].make()
        used = truth.start(optimizer, problem, damping=0.1, lr=0.1, inverse_interval=100, **options)
        truth.step(used, problem)
        used.zero_grad()
        with NoReading():
            problem.loss().backward()
            used.step()
