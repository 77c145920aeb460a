"""Medians, extremes and ratios over a few seeds, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline import statistics
from pipeline.statistics import Spread


def seed(number: int, status: str = "finished", at: int | None = None, **others: Any) -> dict[str, Any]:
    """The summary of a run of 100 steps in 2 seconds that reached its hard target at step ``at``, the easy one at 5."""
    return {
        "benchmark": "toy_mlp",
        "optimizer": "kfac",
        "seed": number,
        "status": status,
        "message": "",
        "steps": 100,
        "training_seconds": 2.0,
        "target_metric": "train_loss",
        "easy_target": 0.5,
        "easy_reached": True,
        "easy_step": 5,
        "easy_seconds": 0.1,
        "hard_target": 0.1,
        "hard_reached": at is not None,
        "hard_step": at,
        "hard_seconds": None if at is None else at * 0.02,
        "train_loss": 0.05,
        "test_score": 0.9,
        **others,
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        ([3.0], Spread(3.0, 3.0, 3.0)),
        ([3.0, 1.0, 2.0], Spread(2.0, 1.0, 3.0)),
        ([4.0, 1.0], Spread(2.5, 1.0, 4.0)),
        ([1.0, math.inf, 2.0], Spread(2.0, 1.0, math.inf)),
        ([1.0, math.inf, math.inf], Spread(math.inf, 1.0, math.inf)),
        ([1.0, math.nan, 2.0], Spread(2.0, 1.0, math.inf)),
    ],
)
def test_spread_counts_what_blew_up_as_infinite(values: list[float], expected: Spread | None) -> None:
    assert statistics.spread(values) == expected


def test_the_median_to_the_target_is_finite_when_most_seeds_reach_it() -> None:
    row = statistics.pair([seed(0, at=40), seed(1), seed(2, at=20)], budget=100)
    assert (row["reached_hard"], row["seeds"], row["reach_rate_hard"]) == (2, 3, pytest.approx(2 / 3))
    assert (row["steps_to_hard_median"], row["steps_to_hard_min"], row["steps_to_hard_max"]) == (40, 20, math.inf)
    assert row["seconds_to_hard_median"] == pytest.approx(0.8)


def test_the_median_to_the_target_is_infinite_when_most_seeds_do_not_reach_it() -> None:
    row = statistics.pair([seed(0, at=40), seed(1), seed(2)], budget=100)
    assert row["steps_to_hard_median"] == math.inf
    assert row["steps_to_hard_min"] == 40


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_run_that_did_not_finish_is_the_worst_and_is_named(status: str) -> None:
    lost = seed(2, status, steps=7, train_loss=1e-9, message="loss is nan\nmore")
    row = statistics.pair([seed(0), seed(1), lost], budget=100)
    assert row[status] == 1 and row["finished"] == 2
    assert (row["reached_easy"], row["steps_to_easy_max"]) == (2, math.inf)  # though it met that target before
    assert (row["train_loss_median"], row["train_loss_max"]) == (0.05, math.inf)
    assert (row["test_score_median"], row["test_score_min"]) == (0.9, -math.inf)
    assert row["notes"] == f"seed 2 {status} after 7 steps: loss is nan"


def test_a_quantity_that_no_seed_measured_is_none() -> None:
    row = statistics.pair([seed(0), seed(1, "diverged")], budget=100)
    assert row["excess_loss_median"] is None


def test_a_run_without_a_step_has_no_step_cost() -> None:
    row = statistics.pair([seed(0, "failed", steps=0, training_seconds=0.0)], budget=100)
    assert row["milliseconds_per_step_median"] is None


def test_step_cost_is_relative_to_the_reference_and_unknown_without_it() -> None:
    rows = [
        statistics.pair([seed(0, optimizer="sgd", training_seconds=1.0)], budget=100),
        statistics.pair([seed(0, training_seconds=2.5)], budget=100),
    ]
    assert rows[1]["milliseconds_per_step_median"] == pytest.approx(25.0)
    assert statistics.relative_step_time(rows) == {"sgd": 1.0, "kfac": pytest.approx(2.5)}
    assert statistics.relative_step_time(rows[1:]) == {"kfac": None}


def test_the_median_curve_ends_where_most_seeds_have_ended() -> None:
    curves = [{0: 9.0, 10: 3.0, 20: 1.0}, {0: 8.0, 10: 2.0}, {0: 7.0, 10: 4.0, 20: 2.0}]
    assert statistics.median_curve(curves) == [(0, 8.0), (10, 3.0), (20, 2.0)]
    assert statistics.median_curve([curves[0], curves[1], {0: 7.0}]) == [(0, 8.0), (10, 3.0)]


def test_known_optimizers_come_first_in_a_fixed_order() -> None:
    names = ["zorro", "gkfac", "adamw", "sgd", "ekfac", "nadam", "kfac", "adam"]
    assert statistics.ordered(names) == ["sgd", "adam", "adamw", "kfac", "ekfac", "gkfac", "nadam", "zorro"]
