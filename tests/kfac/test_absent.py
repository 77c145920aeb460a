"""Layers and parameters that take no part in some steps: frozen meanwhile, seen late, or without an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ground_truth as truth
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, Problem
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC, Preconditioner, parts

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
RULES = pytest.mark.parametrize("options", [{}, {"lr": 0.05, "damping": 0.1}], ids=["self-tuning", "fixed"])
JOINED = pytest.mark.parametrize("joined", [False, True], ids=["one by one", "joined"])
EVERY: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1}


def problem_of(make: Callable[[], nn.Module], name: str = "mlp-ce-mean") -> Problem:
    problem = BY_NAME[name].make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        problem.model = make().double()
    return problem


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def moved(used: Any, problem: Problem) -> set[str]:
    return {name for name, move in truth.step(used, problem).items() if move.any()}


# A parameter that is frozen while its layer is trained


@OPTIMIZERS
@RULES
@JOINED
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": False}])
@pytest.mark.parametrize("names", [("0.bias", "1.bias"), ("0.weight", "1.weight"), ("0.bias", "1.weight", "3.weight")])
def test_a_parameter_that_is_frozen_rests_and_the_others_of_its_layer_go_on(
    optimizer: Any, options: Any, joined: bool, decay: Any, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if joined:
        monkeypatch.setattr(parts, "ONE_BY_ONE", set())
    problem = problem_of(normed)
    every = {name for name, _ in problem.model.named_parameters()}
    used = optimizer(problem.model, loss=problem.criterion, **EVERY, **options, **decay)
    for trained in (every, every - set(names), every - set(names), every):
        for name, parameter in problem.model.named_parameters():
            parameter.requires_grad_(name in trained)
        assert moved(used, problem) == trained


@pytest.mark.parametrize("method", ["kfac", "ekfac", "gkfac"])
def test_a_bias_has_a_natural_gradient_while_its_weight_is_frozen(method: str) -> None:
    problem = problem_of(normed)
    used = Preconditioner(problem.model, loss=problem.criterion, method=method, damping=0.1)
    bias = problem.model.get_parameter("0.bias")
    problem.model.get_parameter("0.weight").requires_grad_(False)
    problem.loss().backward()
    assert bias.grad is not None
    raw = bias.grad.clone()
    used.step()
    assert truth.relative_error(bias.grad, raw) > 0.05


# A layer that is first seen late, or is absent when inverses are renewed


class Skipping(nn.Module):
    """A layer in the middle that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.whole = True

    def forward(self, value: Tensor) -> Tensor:
        value = torch.tanh(self.first(value))
        return self.last(value + torch.tanh(self.middle(value)) if self.whole else value)


@OPTIMIZERS
@pytest.mark.parametrize("options", [{}, {"lr": 0.05, "factor_interval": 3, "inverse_interval": 100}])
@pytest.mark.filterwarnings("ignore:.*no statistics arrived")
def test_a_layer_that_is_first_seen_between_renewals_is_trained_at_once(optimizer: Any, options: Any) -> None:
    problem = problem_of(Skipping)
    used = optimizer(problem.model, loss=problem.criterion, **options)
    every = {name for name, _ in problem.model.named_parameters()}
    for count in range(20):
        problem.model.whole = count >= 13
        expected = every if count >= 13 else every - {"middle.weight", "middle.bias"}
        assert moved(used, problem) == expected, count
    assert "middle" in used.curvature() and not used.curvature()["first"].A.isnan().any()


@pytest.mark.parametrize("absent", [False, True])
def test_a_layer_that_is_absent_at_a_renewal_keeps_the_damping_of_its_group(absent: bool) -> None:
    problem = problem_of(Skipping)
    middle = list(problem.model.get_submodule("middle").parameters())
    used = KFAC(
        problem.model,
        loss=problem.criterion,
        **{"lr": 0.05, "damping": 0.1, "solver": "eigh", "decoupled_weight_decay": False, **EVERY},
        groups=[{"params": middle, "damping": 3.0, "weight_decay": 0.25}],
    )
    truth.step(used, problem)
    problem.model.whole = not absent
    truth.step(used, problem)
    dampings = {name: float(layer.damping_a) for name, layer in used.curvature().items()}
    assert dampings == pytest.approx({"first": 0.1, "middle": 3.25, "last": 0.1})


# A layer without statistics, which AdamW trains until they arrive


class Uncalled(nn.Module):
    """Two layers whose weights are used without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, value: Tensor) -> Tensor:
        hidden = F.linear(torch.tanh(self.first(value)), self.one.weight, self.one.bias)
        return F.linear(torch.tanh(hidden), self.two.weight, self.two.bias)


def uncalled(optimizer: Any, lr: float | None, one: dict[str, Any], two: dict[str, Any]) -> tuple[Any, Problem]:
    problem = problem_of(Uncalled)
    groups = [
        {"params": list(problem.model.get_submodule("one").parameters()), **one},
        {"params": list(problem.model.get_submodule("two").parameters()), **two},
    ]
    return optimizer(problem.model, loss=problem.criterion, lr=lr, kl_clip=None, groups=groups), problem


@OPTIMIZERS
@pytest.mark.parametrize("lr", [None, 0.05, 0.0])
@pytest.mark.filterwarnings("ignore:.*no statistics arrived")
def test_a_layer_without_statistics_moves_at_the_rate_of_its_group(optimizer: Any, lr: float | None) -> None:
    base = 1.0 if lr is None else lr
    used, problem = uncalled(optimizer, lr, {"lr": 0.0}, {"lr": base / 2})
    moves = truth.step(used, problem)
    assert not moves["one.weight"].any() and not moves["one.bias"].any()
    assert float(moves["two.weight"].abs().max()) == pytest.approx(5e-4 if base else 0.0, rel=1e-3)
    used.param_groups[1]["lr"], used.param_groups[2]["lr"] = 0.1, 0.0  # `lr` may begin at 0
    moves = truth.step(used, problem)
    assert moves["one.weight"].any() and not moves["two.weight"].any()


@OPTIMIZERS
@pytest.mark.parametrize("lr", [None, 0.05])
@pytest.mark.filterwarnings("ignore:.*no statistics arrived")
def test_a_layer_without_statistics_decays_as_its_group_does(optimizer: Any, lr: float | None) -> None:
    moves, before = {}, {}
    for decay in (0.0, 10.0):
        used, problem = uncalled(optimizer, lr, {"weight_decay": decay}, {})
        before = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
        moves[decay] = truth.step(used, problem)
    assert torch.allclose(moves[10.0]["one.weight"] - moves[0.0]["one.weight"], -1e-3 * 10 * before["one.weight"])
    assert torch.equal(moves[10.0]["two.weight"], moves[0.0]["two.weight"])


class Late(Uncalled):
    """Its layers are called, once they may be."""

    called = False

    def forward(self, value: Tensor) -> Tensor:
        if not self.called:
            return super().forward(value)
        return self.two(torch.tanh(self.one(torch.tanh(self.first(value)))))


@OPTIMIZERS
@RULES
@pytest.mark.filterwarnings("ignore:.*no statistics arrived")
def test_a_layer_that_has_statistics_at_last_keeps_nothing_of_adamw(optimizer: Any, options: Any) -> None:
    problem = problem_of(Late)
    used = optimizer(problem.model, loss=problem.criterion, **EVERY, **options)
    weight, bias = problem.model.get_submodule("one").parameters()
    truth.step(used, problem)
    assert "exp_avg" in used.state[weight] and "exp_avg" in used.state[bias]
    problem.model.called = True
    truth.step(used, problem)
    assert set(used.state[weight]) == {"momentum_buffer"} and not used.state[bias]


@pytest.mark.filterwarnings("ignore:.*no statistics arrived")
def test_the_summary_says_which_layers_have_no_statistics() -> None:
    problem = problem_of(Uncalled)
    used = KFAC(problem.model, loss=problem.criterion)
    assert "no statistics" not in used.summary()
    truth.step(used, problem)
    lines = {line.split()[0]: line for line in used.summary().splitlines()}
    assert {name for name, line in lines.items() if line.endswith("no statistics")} == {"one", "two"}


# A layer whose input is empty


class Mixture(nn.Module):
    """Each row of the batch goes to one of three experts, as `route` says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.gate = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.route = torch.tensor([0, 1, 2, 0, 1, 0])

    def forward(self, value: Tensor) -> Tensor:
        hidden, shares = torch.tanh(self.first(value)), self.gate(value).softmax(1)
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            own = (self.route == number).nonzero()[:, 0]
            out = out.index_add(0, own, expert(hidden[own]) * shares[own, number, None])
        return self.last(hidden + out)


ROUTES = [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 1, 1], [2, 2, 2, 2, 2, 2], [0, 1, 2, 2, 2, 1]]


@OPTIMIZERS
@pytest.mark.parametrize("options", [{}, {"lr": 0.05}, {"fisher": "sampled", "adapt_damping": True}])
@pytest.mark.parametrize("first", range(4))
@pytest.mark.filterwarnings("ignore:.*no statistics arrived")
def test_experts_without_a_token_do_no_harm(optimizer: Any, options: Any, first: int) -> None:
    problem = problem_of(Mixture)
    used = optimizer(problem.model, loss=problem.criterion, **options)
    start = problem.loss().item()

    def closure() -> Tensor:
        used.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    for count in range(20):
        problem.model.route = torch.tensor(ROUTES[(first + count) % len(ROUTES)])
        used.step(closure)
        assert all(p.isfinite().all() for p in problem.model.parameters())
    problem.model.route = torch.tensor(ROUTES[0])
    assert problem.loss().item() < start
    assert {f"experts.{i}.1" for i in range(3)} <= used.curvature().keys()


EMPTY: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (lambda: nn.Linear(4, 3), torch.zeros(0, 4)),
    (lambda: nn.Linear(4, 3), torch.zeros(2, 0, 4)),
    (lambda: nn.Conv1d(4, 3, 1), torch.zeros(0, 4, 5)),
    (lambda: nn.Embedding(4, 3), torch.zeros(6, 0)),
    (lambda: nn.LayerNorm(4), torch.zeros(0, 4)),
]  # fmt: skip


class Beside(nn.Module):
    """A layer with an empty input beside a net."""

    def __init__(self, side: nn.Module, empty: Tensor) -> None:
        super().__init__()
        self.net, self.side, self.empty = nn.Linear(4, 3), side, empty

    def forward(self, value: Tensor) -> Tensor:
        return self.net(value) + self.side(self.empty).sum()


@pytest.mark.parametrize("number", range(len(EMPTY)))
@RULES
@pytest.mark.filterwarnings("ignore:.*no statistics arrived")
def test_a_call_with_an_empty_input_is_no_call(number: int, options: Any) -> None:
    side, empty = EMPTY[number][0](), EMPTY[number][1]
    empty = empty.long() if isinstance(side, nn.Embedding) else empty.double()
    problem = problem_of(lambda: Beside(side, empty))
    plain = problem.copy()
    plain.model = plain.model.get_submodule("net")
    used, other = (KFAC(p.model, loss=p.criterion, **EVERY, **options) for p in (problem, plain))
    for _ in range(3):
        moves, expected = truth.step(used, problem), truth.step(other, plain)
        assert not any(moves[name].any() for name in moves if name.startswith("side."))
        assert all(torch.equal(moves[f"net.{name}"], move) for name, move in expected.items())
