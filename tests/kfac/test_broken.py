"""A step that breaks, where the host learns of it later: what a GPU does, tried on a CPU."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, Problem
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC, Preconditioner, later, parts

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
RULES = pytest.mark.parametrize("options", [{}, {"lr": 0.05}], ids=["self-tuning", "fixed"])


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers reach the host two queries after they were asked for, as from a device that is behind."""

    class Delayed(later.Later):
        def __init__(self, values: Tensor) -> None:
            super().__init__(values)
            self.queries = 0

        def known(self) -> bool:
            self.queries += 1
            return self.queries > 2

    monkeypatch.setattr(later, "AT_ONCE", set())
    monkeypatch.setattr(parts, "ONE_BY_ONE", set())
    monkeypatch.setattr("kfac.curvature.Later", Delayed)


def weights(problem: Problem) -> Tensor:
    return truth.vector(p.detach().clone() for p in problem.model.parameters())


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
