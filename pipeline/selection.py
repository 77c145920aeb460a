"""Which trial of a tuning wins, and what fewer trials would have found.

The one idea: a trial is judged as the benchmark judges a run, by the hard target. A trial that more of its seeds
brought there is better, however long it took: a setting that some seeds do not bear is no setting. Then the median of
their seconds on the training clock counts. Where no trial got there the easy target decides in the same way, then the
best validation loss, then the order of trials, so that a tie is the shipped setting's. A trial that diverged is a miss,
whatever it had reached. Targets are of the benchmark's own metric; test data are never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import mul
from statistics import fmean, median_high
from typing import Any

from pipeline.config import TARGETS
from pipeline.records import Run
from pipeline.search import Values


@dataclass(frozen=True)
class Judged:
    """A trial and what came of it; a target that it missed is infinitely late."""

    values: Values
    seconds: dict[str, float]
    steps: dict[str, float]
    best_loss: float  # of the validation examples
    diverged: bool
    trained: float  # seconds on the training clock
    edge: tuple[str, ...] = ()
    missed: dict[str, float] = field(default_factory=dict)  # the share of its seeds that did not get to a target


def judged(values: Values, runs: Sequence[Run], edge: Sequence[str] = ()) -> Judged:
    """What the runs of a trial, one a seed, come to; no runs: a trial that has no record, a miss."""
    summaries = [run.summary for run in runs]

    def times(key: str, target: str) -> list[float]:
        return [_until(summary, key, target) for summary in summaries] or [math.inf]

    losses = [_number(summary["best_validation_loss"]) for summary in summaries]
    return Judged(
        values=dict(values),
        seconds={target: median_high(times("seconds", target)) for target in TARGETS},
        steps={target: median_high(times("step", target)) for target in TARGETS},
        best_loss=median_high(losses) if losses else math.inf,
        diverged=any(summary["status"] == "diverged" for summary in summaries),
        trained=max((float(summary["training_seconds"]) for summary in summaries), default=0.0),
        edge=tuple(edge),
        missed={target: fmean(map(math.isinf, times("step", target))) for target in TARGETS},
    )


def _until(summary: dict[str, Any], key: str, target: str) -> float:
    missed = summary["status"] != "finished" or not summary[f"{target}_reached"]
    return math.inf if missed else float(summary[f"{target}_{key}"])


def _number(value: float | None) -> float:
    return math.inf if value is None else float(value)


def ranked(trials: Sequence[Judged]) -> list[int]:
    """The places of the trials, that of the one that wins first."""
    targets = TARGETS[::-1]  # the hard one first

    def order(place: int) -> tuple[float, ...]:
        trial = trials[place]
        late: list[float] = []
        for target in targets:
            late += (math.inf, math.inf) if trial.diverged else (trial.missed.get(target, 0), trial.seconds[target])
        return (*late, math.inf if trial.diverged else trial.best_loss, place)

    return sorted(range(len(trials)), key=order)


def target(trials: Sequence[Judged]) -> str | None:
    """The hardest target that any of them reached."""
    reached = [t for t in TARGETS if any(math.isfinite(trial.seconds[t]) and not trial.diverged for trial in trials)]
    return reached[-1] if reached else None


def budget_curve(trials: Sequence[Judged]) -> list[dict[str, Any]]:
    """What the choice among so many of these trials, drawn without repetition, comes to on average.

    In the order of the choice, the i-th of n trials is chosen of k where the other k - 1 are later: in C(n - i, k - 1)
    of C(n, k) draws. `expected` is in seconds to the target; a miss counts as the longest training of any trial, which
    it lasted at least, so with misses the figure is a lower bound. `reached` is the share of draws whose choice reached
    the target. Without a target that any reached there is nothing to expect: None.
    """
    count, of = len(trials), target(trials)
    longest = max((trial.trained for trial in trials), default=0.0)
    times, hits = [], []
    for trial in [trials[place] for place in ranked(trials)]:
        hits.append(of is not None and not trial.diverged and math.isfinite(trial.seconds[of]))
        times.append(trial.seconds[of] if of and hits[-1] else longest)
    curve = []
    for k in range(1, count + 1):
        draws = [math.comb(count - i, k - 1) for i in range(1, count + 1)]  # of which each is the choice
        curve.append({
            "trials": k,
            "expected": math.fsum(map(mul, times, draws)) / sum(draws) if of else None,
            "reached": sum(map(mul, hits, draws)) / sum(draws),
        })  # fmt: skip
    return curve
