"""Layers and parameters that take no part in some steps: frozen meanwhile, seen late, or without an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ground_truth as truth
import pytest
import torch
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
