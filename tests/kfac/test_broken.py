"""A step that breaks, where the host learns of it later: what a GPU does, tried on a CPU."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, Problem
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC, Preconditioner, later, linalg, parts
from kfac.curvature import Curvature

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
RULES = pytest.mark.parametrize("options", [{}, {"lr": 0.05}], ids=["self-tuning", "fixed"])


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers reach the host two queries after they were asked for, as from a device that is behind."""

    class Delayed(later.Later):
        def __init__(self, values: Tensor, step: int, device: torch.device | None = None) -> None:
            super().__init__(values, step, device)
            self.queries = 0

        def known(self, step: int, together: bool = False) -> bool:
            self.queries += 1
            return self.queries > 2

    monkeypatch.setattr(later, "ON_HOST", set())
    monkeypatch.setattr(parts, "ONE_BY_ONE", set())
    monkeypatch.setattr("kfac.curvature.Later", Delayed)


def weights(problem: Problem) -> Tensor:
    return truth.vector(p.detach().clone() for p in problem.model.parameters())


def gradients(problem: Problem) -> Tensor:
    return truth.vector(p.grad.clone() for p in problem.model.parameters() if p.grad is not None)


def spoil(problem: Problem) -> Tensor:
    """Breaks the input; returns the good one."""
    good, problem.inputs = problem.inputs, problem.inputs.clone()
    problem.inputs[1, 1] = math.nan
    return good


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, partial(EKFAC, scale_interval=8), GKFAC])
@RULES
@pytest.mark.parametrize("at", [0, 8])
def test_what_was_due_in_a_broken_step_is_due_again_once_the_host_knows(
    optimizer: Any, options: Any, at: int, delayed: None
) -> None:
    """Long before the interval is over; the steps until then are made, with what was there before."""
    problem = BY_NAME["mlp-ce-mean"].make()
    used = optimizer(problem.model, loss=problem.criterion, factor_interval=8, inverse_interval=8, **options)
    used._curvature.early_steps = 0
    for count in range(at + 6):
        good = spoil(problem) if count == at else problem.inputs
        moves = truth.step(used, problem)
        problem.inputs = good
        assert float(used.stats["skipped"]) == (count == at), count
        assert all(move.any() == (count != at) for move in moves.values()), count
        assert weights(problem).isfinite().all()
    states = used._curvature.states.values()
    assert {int(state.count) for state in states} == {1 + (at > 0)}, "the statistics were not made up for"
    assert {state.age for state in states} == {3}, "the inverses are not of them"
    assert all(state.A.any() and state.G.any() for state in states)
    assert all(state.solver["scales"].any() for state in states if "scales" in state.solver)


# Several processes, which learn of it so many steps later


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later, "ON_HOST", set())
    monkeypatch.setattr(parts, "ONE_BY_ONE", set())
    monkeypatch.setattr(Curvature, "distributed", True)


@pytest.mark.parametrize("interval", [3, 100])
def test_failed_inverses_are_learnt_however_often_they_are_renewed(
    interval: int, together: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    used = KFAC(problem.model, loss=problem.criterion, lr=1e-3, damping=0.1, inverse_interval=interval)
    damped_inverse = linalg.damped_inverse

    def failing(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        inverse, good = damped_inverse(matrix, damping)
        return inverse, torch.zeros_like(good)

    monkeypatch.setattr(linalg, "damped_inverse", failing)
    with pytest.warns(UserWarning, match="no damped inverse"):
        for _ in range(2 * later.TOGETHER_AFTER):
            truth.step(used, problem)
    assert all(state.rung for state in used._curvature.states.values())


@OPTIMIZERS
@RULES
def test_what_the_host_does_not_know_yet_is_saved(optimizer: Any, options: Any, together: None) -> None:
    """A state of just after a broken step goes on as the training that it was taken from."""

    def make() -> tuple[Any, Problem]:
        problem = BY_NAME["mlp-ce-mean"].make()
        used = optimizer(problem.model, loss=problem.criterion, factor_interval=8, inverse_interval=8, **options)
        used._curvature.early_steps = 0
        return used, problem

    (used, problem), (other, resumed) = make(), make()
    for _ in range(8):
        truth.step(used, problem)
    good = spoil(problem)
    truth.step(used, problem)
    problem.inputs = good
    resumed.model.load_state_dict(problem.model.state_dict())
    other.load_state_dict(copy.deepcopy(used.state_dict()))
    for count in range(2 * later.TOGETHER_AFTER):
        truth.step(used, problem)
        truth.step(other, resumed)
        assert torch.equal(weights(problem), weights(resumed)), count
    counts = [[int(state.count) for state in each._curvature.states.values()] for each in (used, other)]
    assert counts[0] == counts[1]


# A direction that is not finite, of a gradient that is


class Scaled(nn.Module):
    """Two layers, and a parameter of AdamW's between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.second = nn.Linear(4, 5), nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(value)) * self.scale)


def scaled(dtype: torch.dtype = torch.float64) -> Problem:
    problem = BY_NAME["mlp-ce-mean"].make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        problem.model = Scaled().to(dtype)
    problem.inputs = problem.inputs.to(dtype)
    return problem


def break_solves(used: Any, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The solve of the last layer gives one number that is not finite."""
    method = used._curvature.method
    solve = method.solve

    def broken(block: Any, state: Any, matrix: Tensor) -> Tensor:
        solved = solve(block, state, matrix).clone()
        if block.name == "second":
            solved[0, 1, 1] = value
        return solved

    monkeypatch.setattr(method, "solve", broken)


@OPTIMIZERS
@pytest.mark.parametrize("options", [{}, {"lr": 0.05}, {"lr": 0.05, "kl_clip": None}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("host", ["at once", "later"])
@pytest.mark.filterwarnings("ignore:.*without a curvature block")
def test_a_direction_that_is_not_finite_is_a_skipped_step_as_a_whole(
    optimizer: Any, options: Any, value: float, host: str, request: pytest.FixtureRequest
) -> None:
    if host == "later":
        request.getfixturevalue("delayed")
    problem = scaled()
    used = optimizer(problem.model, loss=problem.criterion, weight_decay=0.1, **options)
    for _ in range(2):
        truth.step(used, problem)
    kept = {(i, k): v.clone() for i, state in enumerate(used.state.values()) for k, v in state.items()}
    with pytest.MonkeyPatch.context() as patch:
        break_solves(used, value, patch)
        moves = truth.step(used, problem)
    assert float(used.stats["skipped"]) == 1
    assert not any(move.any() for move in moves.values())
    now = {(i, k): v for i, state in enumerate(used.state.values()) for k, v in state.items()}
    assert kept.keys() == now.keys() and all(torch.equal(now[key], old) for key, old in kept.items())
    moves = truth.step(used, problem)
    assert float(used.stats["skipped"]) == 0 and all(move.any() for move in moves.values())


@pytest.mark.parametrize("options", [{"kl_clip": None}, {}], ids=["no clip", "clip"])
@pytest.mark.filterwarnings("ignore:.*without a curvature block")
def test_half_precision_that_overflows_is_counted_and_reaches_no_parameter(options: dict[str, Any]) -> None:
    problem = scaled(torch.float32)
    half: dict[str, Any] = {"damping": 1e-12, "preconditioning_dtype": torch.float16}
    used = KFAC(problem.model, loss=problem.criterion, lr=0.05, **half, **options)
    slopes = {name: torch.ones_like(p) for name, p in problem.model.named_parameters()}
    before = weights(problem)
    truth.step(used, problem, slopes)
    assert float(used.stats["skipped"]) == 1 and torch.equal(weights(problem), before)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "gkfac"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:.*without a curvature block")
def test_a_direction_that_is_not_finite_leaves_all_gradients_as_they_are(
    method: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = scaled()
    used = Preconditioner(problem.model, loss=problem.criterion, method=method, damping=0.1)
    break_solves(used, value, monkeypatch)
    problem.loss().backward()
    raw = gradients(problem)
    used.step()
    assert float(used.stats["skipped"]) == 1
    assert torch.equal(gradients(problem), raw)
