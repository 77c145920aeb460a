"""Curves over seeds: the median of a quantity of the history, with a band, on either clock.

The band needs no assumption on how the values are spread: it lies between two of the ordered seeds, the closest ones
that hold the median with 95 % confidence (ten seeds: the second and the ninth). Fewer than six seeds cannot do that,
and the band is their whole range; `confidence` says what it holds. A run that diverged counts as infinite from there
on, as it does in the tables.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline import statistics
from pipeline.records import Run

LEVEL = 0.95
COLUMNS = {"steps": "step", "seconds": "training_seconds"}  # of the history, for each clock
OUTCOMES = {"steps": "step", "seconds": "seconds"}  # of a summary
Study = Mapping[str, Mapping[str, Sequence[Run]]]
"""Benchmark -> optimizer -> the runs of its seeds."""
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Points along a clock: the median over seeds and the ends of its band (infinite: diverged)."""

    x: list[float]
    middle: list[float]
    low: list[float]
    high: list[float]

    def band(self) -> tuple[list[float], list[float], list[float]]:
        """What of the band can be drawn (x, low, high): where its upper end is infinite it ends at the median."""
        rows = zip(self.x, self.low, self.middle, self.high, strict=True)
        kept = [(x, low, middle if math.isinf(high) else high) for x, low, middle, high in rows]
        x, low, high = ([row[place] for row in kept if math.isfinite(row[2])] for place in range(3))
        return x, low, high


def over_seeds(runs: Sequence[Run], quantity: str, clock: str) -> Curve:
    """The curve of a column of the history on the clock `steps` or `seconds`.

    Steps: at every evaluation. Seconds: at the median times of the evaluations, as far as every seed that finished
    goes; a seed's value there is on the straight line between its own neighbouring evaluations.
    """
    seeds = [_points(run, "step", quantity) for run in runs]
    grid = sorted({step for points in seeds for step, _ in points})
    if clock == "seconds":
        times = [dict(_points(run, "step", COLUMNS[clock])) for run in runs]
        seeds = [_points(run, COLUMNS[clock], quantity) for run in runs]
        whole = [points for run, points in zip(runs, seeds, strict=True) if points and statistics.finished(run.summary)]
        last = min((points[-1][0] for points in whole), default=math.inf)
        known = (median(own[step] for own in times if step in own) for step in grid)
        grid = sorted(time for time in known if time <= last)
    values = [[_at(points, place) for points in seeds] for place in grid]
    return _over(grid, values)


def of_diagnostic(runs: Sequence[Run], quantity: str) -> Curve:
    """The curve of a diagnostic of the whole model over steps, where at least one seed has it."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for row in run.curvature:
            step, value = row["step"], row["value"]
            if row["quantity"] == quantity and row["layer"] == "" and isinstance(value, float) and math.isfinite(value):
                found.setdefault(float(step or 0), []).append(value)
    return _over(sorted(found), [found[step] for step in sorted(found)])


def interesting(runs: Sequence[Run], curve: Curve, clock: str) -> float:
    """Where a curve may leave the picture: some way behind the hard target, or at its end."""
    times = [statistics.to_target(run.summary, "hard", OUTCOMES[clock]) for run in runs]
    return min(1.3 * max(times), curve.x[-1] if curve.x else 0.0)


def confidence(seeds: int) -> float:
    """The probability with which the band over so many seeds holds the median."""
    return 1 - 2 * _tail(_rank(seeds) - 1, seeds)


def rows(study: Study) -> Iterator[dict[str, Any]]:
    """`curves.csv`: the target's metric of every pair on both clocks."""
    for benchmark, pairs in study.items():
        for optimizer, runs in pairs.items():
            quantity = runs[0].summary["target_metric"]
            for clock in COLUMNS:
                curve = over_seeds(runs, quantity, clock)
                for x, middle, low, high in zip(curve.x, curve.middle, curve.low, curve.high, strict=True):
                    yield {
                        "benchmark": benchmark, "optimizer": optimizer, "quantity": quantity, "clock": clock, "at": x,
                        "median": middle, "low": low, "high": high, "seeds": len(runs),
                        "confidence": confidence(len(runs)),
                    }  # fmt: skip


def _points(run: Run, horizontal: str, vertical: str) -> Points:
    """Two columns of the history, where the second was measured; NaN is the infinity of a run that blew up."""
    rows: list[Any] = [row for row in run.history if row[vertical] is not None]
    return [(float(row[horizontal]), math.inf if math.isnan(row[vertical]) else float(row[vertical])) for row in rows]


def _at(points: Points, place: float) -> float:
    """The value at a place between the points, on the straight line; infinite behind the last."""
    after = bisect_left(points, (place,))
    if after == len(points):
        return math.inf
    x, y = points[after]
    if after == 0 or x == place:
        return y
    x_before, y_before = points[after - 1]
    return y if math.isinf(y) else y_before + (y - y_before) * (place - x_before) / (x - x_before)


def _over(x: list[float], values: Sequence[Sequence[float]]) -> Curve:
    ordered = [sorted(seeds) for seeds in values]
    ranks = [_rank(len(seeds)) for seeds in ordered]
    return Curve(
        x=x,
        middle=[median(seeds) for seeds in ordered],
        low=[seeds[rank - 1] for seeds, rank in zip(ordered, ranks, strict=True)],
        high=[seeds[-rank] for seeds, rank in zip(ordered, ranks, strict=True)],
    )


def _rank(seeds: int) -> int:
    """The largest k for which the k-th smallest and k-th largest of the seeds hold the median often enough, or 1."""
    return max((k for k in range(2, seeds // 2 + 1) if 1 - 2 * _tail(k - 1, seeds) >= LEVEL), default=1)


def _tail(successes: int, seeds: int) -> float:
    """The probability of at most so many seeds below the median."""
    return sum(math.comb(seeds, k) for k in range(successes + 1)) / 2**seeds
