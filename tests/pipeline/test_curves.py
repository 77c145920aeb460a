"""The curves over seeds: what the band holds, what a diverged run does to it, and how seconds are lined up."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline import curves
from pipeline.records import Run


def run(losses: list[float], times: list[float] | None = None, status: str = "finished") -> Run:
    """A run with an evaluation every ten steps, at these seconds (one a step as a rule)."""
    history: list[dict[str, Any]] = [
        {"step": 10 * place, "training_seconds": times[place] if times else 10.0 * place, "train_loss": loss}
        for place, loss in enumerate(losses)
    ]
    return Run(Path("nowhere"), {}, {}, history, [], {"status": status, "target_metric": "train_loss"})


@pytest.mark.parametrize(("seeds", "held"), [(3, 0.75), (5, 0.9375), (6, 0.96875), (10, 0.978515625)])
def test_the_confidence_of_the_band_is_that_of_the_binomial(seeds: int, held: float) -> None:
    assert curves.confidence(seeds) == held


def test_the_band_holds_the_median_as_often_as_it_says() -> None:
    generator = random.Random(0)
    draws, hits = 2000, 0
    for _ in range(draws):
        curve = curves.over_seeds([run([generator.expovariate(1.0)]) for _ in range(10)], "train_loss", "steps")
        hits += curve.low[0] <= math.log(2) <= curve.high[0]
    assert hits / draws == pytest.approx(curves.confidence(10), abs=0.015)


def test_ten_seeds_have_the_second_and_the_ninth_five_their_range() -> None:
    for seeds, low, high in ((10, 2.0, 9.0), (5, 1.0, 5.0)):
        curve = curves.over_seeds([run([float(place + 1)]) for place in range(seeds)], "train_loss", "steps")
        assert (curve.low, curve.middle, curve.high) == ([low], [(seeds + 1) / 2], [high])


def test_a_run_that_diverged_counts_as_infinite_from_there_on() -> None:
    runs = [run([4.0, 2.0, 1.0]), run([4.0, 3.0, 2.0]), run([4.0, math.nan], status="diverged")]
    for clock in ("steps", "seconds"):
        curve = curves.over_seeds(runs, "train_loss", clock)
        assert curve.x == [0.0, 10.0, 20.0]
        assert curve.middle == [4.0, 3.0, 2.0]
        assert curve.low == [4.0, 2.0, 1.0]
        assert curve.high == [4.0, math.inf, math.inf]
        assert curve.band() == ([0.0, 10.0, 20.0], [4.0, 2.0, 1.0], [4.0, 3.0, 2.0])  # open above


def test_on_the_clock_of_seconds_seeds_are_compared_at_the_same_time() -> None:
    fast, slow = run([8.0, 4.0, 2.0], [0.0, 1.0, 2.0]), run([8.0, 4.0, 2.0], [0.0, 2.0, 4.0])
    curve = curves.over_seeds([fast, slow], "train_loss", "seconds")
    assert curve.x == [0.0, 1.5]  # medians of 0, 1 and 2 and of 0, 2 and 4; at 3.0 the fast one has ended
    assert (curve.low[1], curve.high[1]) == (3.0, 5.0)


def test_what_was_not_measured_has_no_curve() -> None:
    unmeasured = run([1.0])
    unmeasured.history[0]["train_loss"] = None
    for clock in ("steps", "seconds"):
        assert curves.over_seeds([unmeasured], "train_loss", clock).x == []
