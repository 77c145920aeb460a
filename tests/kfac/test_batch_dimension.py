"""Layers that do not see the batch in dimension 0: tables looked up once for all examples, nets on [T, N, d]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ground_truth as truth
import layer_truth as layers
import pytest
import torch
from cases import LOSSES
from layer_cases import LayerCase, numbers
from test_sharing import DAMPING, EXACT, SOLVERS
from torch import Tensor, nn

from kfac import KFAC


class Positioned(nn.Module):
    """Positions from a table that is looked up once, without a batch, and added to every example."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.once, self.positions = once, nn.Embedding(3, 4)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(12, 3)

    def forward(self, value: Tensor) -> Tensor:
        index = torch.arange(3)
        if not self.once:
            index = index.expand(value.shape[0], 3)
        return self.head(torch.tanh(self.mix(value + self.positions(index))).flatten(1))


@EXACT
@pytest.mark.parametrize("once", [False, True], ids=["for-each-example", "once-for-all"])
def test_a_table_of_positions_trains_its_neighbours_alike(once: bool, optimizer: Any, options: Any) -> None:
    """What all examples share does not disturb the steps of the layers beside it."""
    problem = LayerCase("positioned", lambda: Positioned(once), numbers(6, 3, 4), LOSSES["ce-mean"]).make()
    plain = LayerCase("positioned", lambda: Positioned(False), numbers(6, 3, 4), LOSSES["ce-mean"]).make()
    moves = truth.first_step(optimizer, problem, damping=DAMPING, **options)
    expected = truth.first_step(optimizer, plain, damping=DAMPING, **options)
    for name in ("mix.weight", "mix.bias", "head.weight", "head.bias"):
        assert truth.relative_error(moves[name], expected[name]) < 1e-9, name
    assert moves["positions.weight"].any()


@pytest.mark.parametrize(("fisher", "samples", "draws"), [("exact", 1, 150), ("sampled", 1000, 1)])
@pytest.mark.parametrize("loss", ["ce-mean", "mse-mean"])
def test_the_block_of_a_table_of_positions_has_the_exact_trace(
    fisher: str, samples: int, draws: int, loss: str
) -> None:
    """One vector for all examples would add up in what they share: N times too much. Random signs keep them apart."""
    case = LayerCase("positioned", lambda: Positioned(True), numbers(24, 3, 4), LOSSES[loss])
    problem = case.make()
    exact = truth.ggn(problem, [problem.model.get_parameter("positions.weight")]).trace()
    generator = torch.Generator().manual_seed(0)
    traces = []
    for _ in range(draws):
        other = problem.copy()
        used = truth.start(KFAC, other, damping=1.0, lr=0.0, fisher=fisher, fisher_samples=samples, generator=generator)
        truth.step(used, other)
        traces.append(truth.block_trace(used.curvature()["positions"]))
    assert sum(traces) / draws == pytest.approx(float(exact), rel=0.2)


class BatchSecond(nn.Module):
    """Layers on [T, N, d], as recurrent nets have it: dimension 0 is not the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(value.transpose(0, 1))).mean(0))


@SOLVERS
def test_factors_under_expand_do_not_ask_which_dimension_is_the_batch(
    solver: str, expected_step: Callable[..., Tensor]
) -> None:
    problem = LayerCase("batch-second", BatchSecond, numbers(6, 4, 4), LOSSES["ce-mean"]).make()
    moves = truth.first_step(KFAC, problem.copy(), damping=DAMPING, solver=solver)
    for name, (a, g) in layers.factors(problem).items():
        expected = expected_step(problem, name, a, g, DAMPING)
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < 1e-8, name
