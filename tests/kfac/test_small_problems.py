"""The self-tuning step with its defaults untouched, on ten small problems, against Adam at its best of three rates.

All optimizers see the same batches from the same first weights, 200 steps; loss is that of all the data, of the raw
weights, in evaluation mode. Two claims: a training never diverges, and it ends behind Adam on no problem by more than
`MARGIN`, the largest allowed ratio of its last loss to the lowest last loss of Adam. A margin of 1 means: Adam has to
be beaten. It says nothing about seconds, a step costs more than Adam's, nor about how well the nets generalise.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from small_problems import PROBLEMS, STEPS, train

from kfac import EKFAC, GKFAC, KFAC

RATES = (1e-3, 3e-3, 1e-2)
MARGIN = {KFAC: 1.0, EKFAC: 1.1, GKFAC: 2.0}
QUICK = ["linear regression", "planted regression", "noisy digits", "convolutions", "recurrent"]


@functools.cache
def adam(name: str, steps: int) -> float:
    """The lowest last loss over the three rates."""
    ends = []
    for rate in RATES:
        task = PROBLEMS[name](0)
        ends.append(train(task, torch.optim.Adam(task.model.parameters(), lr=rate), steps)[-1])
    return min(ends)


def check(name: str, optimizer: Any, steps: int, margin: float) -> None:
    task = PROBLEMS[name](0)
    curve = train(task, optimizer(task.model, loss=task.criterion), steps)
    lowest = curve[0]
    for loss in curve:
        assert loss < 1.2 * curve[0], "above its beginning"  # fails for one that is not a number, too
        assert loss < max(10 * lowest, 0.1 * curve[0]), "a jump by an order of magnitude"
        lowest = min(lowest, loss)
    assert curve[-1] < margin * adam(name, steps)


@pytest.mark.parametrize("name", QUICK)
def test_kfac_trains_better_than_the_best_adam(name: str) -> None:
    check(name, KFAC, STEPS, MARGIN[KFAC])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_no_default_is_behind_the_best_adam_by_more_than_its_margin(name: str, optimizer: Any) -> None:
    check(name, optimizer, STEPS, MARGIN[optimizer])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rare labels", "saturated", "convolutions", "transformer"])
def test_a_run_five_times_as_long_holds_too(name: str) -> None:
    """By then the nets fit nearly all data, and single batches have losses hundreds of times the usual one."""
    check(name, KFAC, 5 * STEPS, 1.0)


def test_ten_problems_differ_in_what_makes_them_hard() -> None:
    tasks = {name: build(0) for name, build in PROBLEMS.items()}
    assert len(tasks) == 10
    assert len({type(task.criterion) for task in tasks.values()}) == 3
    again = PROBLEMS["transformer"](0)
    for mine, theirs in zip(tasks["transformer"].model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
