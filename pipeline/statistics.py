"""What the seeds of a study can carry: medians and extremes for the table, intervals and tests for the verdicts.

Pure functions on numbers. The one idea: a run that misses its target, diverges or fails is no missing value but a bad
one. In medians and extremes it counts as infinity, the worst outcome; where an average is taken its time to target is
*censored*: known only to be longer than the run lasted. docs/statistics.md has the definitions and what they rest on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from pipeline.config import TARGETS
from pipeline.seeds import number

if TYPE_CHECKING:  # numpy and scipy are slow to import and of no use to the checks of a stage
    import numpy as np

LEVEL = 0.95
"""Of every interval."""
BOOTSTRAP_FROM = 10
"""Seeds from which on intervals are bootstrapped; below, they come from the t distribution."""
RESAMPLES = 9_999
EXACT_FLIPS = 16  # values up to which every choice of signs is tried
ONE_BENCHMARK, POOLED = 10, 5
"""Pairs of seeds that a verdict needs: on one benchmark, and on each of several that are pooled."""
PROFILE_LIMIT = 10.0
"""How many times slower than the fastest a performance profile looks."""

ORDER = ("sgd", "adam", "adamw", "muon", "soap", "shampoo", "kfac", "ekfac", "gkfac")
"""Optimizers in the order in which they are shown; any others follow by name."""

PHASES = ("forward_backward", "statistics", "inverses", "update")
"""The phases of an optimizer step, in the order in which they happen."""

LOSSES = ("train_loss", "validation_loss", "best_validation_loss", "test_loss", "excess_loss")
SCORES = ("train_score", "validation_score", "test_score")


def ordered(optimizers: Iterable[str]) -> list[str]:
    """Names in the order in which they are shown."""
    rank = {name: place for place, name in enumerate(ORDER)}
    return sorted(optimizers, key=lambda name: (rank.get(name, len(rank)), name))


@dataclass(frozen=True)
class Spread:
    """Median and extremes over seeds; infinite where a seed has no finite outcome."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread | None:
    """Median, smallest and largest value; None without values.

    NaN counts as +infinity: it is the outcome of a computation that blew up.
    """
    known = [math.inf if math.isnan(value) else float(value) for value in values]
    return Spread(median(known), min(known), max(known)) if known else None


def ratio(value: float | None, reference: float | None) -> float | None:
    """``value / reference``; None where either is unknown or infinite or the reference is not positive."""
    if value is None or reference is None or not (math.isfinite(value) and math.isfinite(reference)):
        return None
    return value / reference if reference > 0 else None


def finished(summary: Mapping[str, Any]) -> bool:
    """Whether the run came to the end of its budget with finite numbers."""
    return summary["status"] == "finished"


def to_target(summary: Mapping[str, Any], target: str, quantity: str) -> float:
    """``step``, ``examples`` or ``seconds`` of a run at the target ``easy`` or ``hard``; infinity when it was not
    reached, or when the run did not finish."""
    value = summary.get(f"{target}_{quantity}")
    return float(value) if finished(summary) and summary[f"{target}_reached"] and value is not None else math.inf


def final(summary: Mapping[str, Any], quantity: str) -> float | None:
    """A figure of the trained network: infinite loss (or score -inf) unless the run finished; None if not measured."""
    if not finished(summary):
        return -math.inf if quantity.endswith("_score") else math.inf
    value = summary.get(quantity)
    return None if value is None else float(value)


def milliseconds_per_step(summary: Mapping[str, Any], seconds: str = "training_seconds") -> float | None:
    """Mean cost of one optimizer step [ms], of the whole training clock or of one phase; None before the first step."""
    steps, total = summary.get("steps"), summary.get(seconds)
    return 1e3 * float(total) / steps if steps and total is not None else None


def _spread_columns(name: str, values: Iterable[float | None]) -> dict[str, float | None]:
    found = spread(value for value in values if value is not None)
    return {
        f"{name}_median": found.median if found else None,
        f"{name}_min": found.low if found else None,
        f"{name}_max": found.high if found else None,
    }


def _measured(summaries: Sequence[Mapping[str, Any]], quantity: str) -> list[float | None]:
    """Final values over seeds; empty when no seed has one (a quantity that the benchmark does not know)."""
    if all(summary.get(quantity) is None for summary in summaries):
        return []
    return [final(summary, quantity) for summary in summaries]


def notes(summaries: Sequence[Mapping[str, Any]]) -> str:
    """One clause a run that did not finish, as in ``seed 2 diverged after 37 steps: loss is nan``."""
    clauses = []
    for summary in summaries:
        if not finished(summary):
            message = str(summary.get("message") or "").strip().splitlines()
            reason = f": {message[0]}" if message else ""
            clauses.append(f"seed {summary['seed']} {summary['status']} after {summary['steps']} steps{reason}")
    return "; ".join(clauses)


def pair(summaries: Sequence[Mapping[str, Any]], budget: int, budget_seconds: float | None = None) -> dict[str, Any]:
    """One row of the table: all seeds of one optimizer on one benchmark.

    Arguments:
        summaries: the ``summary.json`` of each seed, at least one; ``easy_examples`` and ``hard_examples``, if there,
            are the numbers of training examples seen when the target was reached.
        budget: the optimizer steps that each run was given.
        budget_seconds: the seconds of training that each run was given; None: as many as the steps took.

    Returns:
        Column -> value. Losses, scores and examples have no unit; ``…_seconds…`` are seconds of training (evaluation
        and diagnostics excluded), ``milliseconds_…`` are per optimizer step. Infinity: not within the budget, or the
        run did not finish. None: not measured.
    """
    first = summaries[0]
    row: dict[str, Any] = {
        "benchmark": first["benchmark"],
        "optimizer": first["optimizer"],
        "target_metric": first["target_metric"],
        **{f"{target}_target": first[f"{target}_target"] for target in TARGETS},
        "budget_steps": budget,
        "budget_seconds": budget_seconds,
        "parameters": first.get("parameters"),
        "seeds": len(summaries),
    }
    for status in ("finished", "diverged", "failed"):
        row[status] = sum(summary["status"] == status for summary in summaries)
    row |= _spread_columns("steps", [s["steps"] for s in summaries])
    for target in TARGETS:
        row[f"reached_{target}"] = sum(math.isfinite(to_target(summary, target, "step")) for summary in summaries)
        row[f"reach_rate_{target}"] = row[f"reached_{target}"] / len(summaries)
        row |= _spread_columns(f"steps_to_{target}", [to_target(s, target, "step") for s in summaries])
        row |= _spread_columns(f"examples_to_{target}", [to_target(s, target, "examples") for s in summaries])
        row |= _spread_columns(f"seconds_to_{target}", [to_target(s, target, "seconds") for s in summaries])
    for quantity in LOSSES + SCORES:
        row |= _spread_columns(quantity, _measured(summaries, quantity))
    row |= _spread_columns("training_seconds", [s.get("training_seconds") for s in summaries])
    row |= _spread_columns("milliseconds_per_step", [milliseconds_per_step(s) for s in summaries])
    for phase in PHASES:
        found = spread(value for s in summaries if (value := milliseconds_per_step(s, f"{phase}_seconds")) is not None)
        row[f"milliseconds_per_step_{phase}"] = found.median if found else None
    for quantity in ("evaluation_seconds", "diagnostics_seconds"):
        row |= _spread_columns(quantity, [s.get(quantity) for s in summaries])
    row |= _spread_columns("peak_memory_mib", [s.get("peak_memory_mib") for s in summaries])
    row["notes"] = notes(summaries)
    return row


def relative_step_time(rows: Sequence[Mapping[str, Any]], reference: str = "sgd") -> dict[str, float | None]:
    """Median step cost of every optimizer of one benchmark over that of the reference (None where that did not run)."""
    cost = {row["optimizer"]: row["milliseconds_per_step_median"] for row in rows}
    return {optimizer: ratio(value, cost.get(reference)) for optimizer, value in cost.items()}


def median_curve(curves: Sequence[Mapping[float, float]]) -> list[tuple[float, float]]:
    """Median over seeds of curves given as {step: value}, at every step where it is finite.

    A curve that ends before the others (a run that diverged) counts as infinity from there on, so the median goes on
    only while most seeds do.
    """
    points = []
    for step in sorted({step for curve in curves for step in curve}):
        found = spread(curve.get(step, math.inf) for curve in curves)
        if found and math.isfinite(found.median):
            points.append((step, found.median))
    return points


# ---------------------------------------------------------------- times to target


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval of confidence. ``method`` is ``t``, ``BCa``, ``percentile`` or ``all equal``; ``n``
    the seeds (the fewest that a benchmark has, where several are pooled)."""

    estimate: float
    low: float
    high: float
    level: float
    method: str
    n: int


@dataclass(frozen=True)
class Time:
    """When a run reached a target; or when it was given up without (``reached`` false), so that it is longer."""

    value: float
    reached: bool


def reach_horizon(groups: Iterable[Sequence[Time]], budget: float | None = None) -> float:
    """How far the times of all groups are known: the budget, or the end of the first group to end with a miss."""
    groups = list(groups)
    last = [max(group, key=lambda time: (time.value, not time.reached)) for group in groups]
    ends = [time.value for time in last if not time.reached]
    if budget is not None:
        ends.append(budget)
    return min(ends, default=max(time.value for time in last))


def restricted_mean(times: Sequence[Time], horizon: float) -> float:
    """Mean time to target up to ``horizon``: the area below the survival curve of Kaplan and Meier."""
    left, alive = [0.0], [1.0]
    for moment, survival in _survival(times):
        if moment < horizon:
            left.append(moment)
            alive.append(survival)
    widths = [end - start for start, end in zip(left, [*left[1:], horizon], strict=True)]
    return math.fsum(share * width for share, width in zip(alive, widths, strict=True))


def kaplan_meier_median(times: Sequence[Time]) -> float | None:
    """Where the survival curve crosses one half, midway where it stays there for a while; None: it does not cross."""
    half = None
    for moment, survival in _survival(times):
        if survival < 0.5 - 1e-9:
            return moment if half is None else (half + moment) / 2
        if half is None and survival < 0.5 + 1e-9:
            half = moment
    return None


def _survival(times: Sequence[Time]) -> list[tuple[float, float]]:
    """Kaplan and Meier's share that is still on the way after each time."""
    from scipy import stats

    missed = [not time.reached for time in times]
    curve = stats.ecdf(stats.CensoredData.right_censored([time.value for time in times], missed)).sf
    return list(zip(curve.quantiles.tolist(), curve.probabilities.tolist(), strict=True))


def median_interval(times: Sequence[Time], bootstrap_from: int = BOOTSTRAP_FROM) -> Interval | None:
    """Of the median time: BCa where it exists and the seeds suffice; below, where all of them got there, the t
    interval of log times, whose estimate is the geometric mean. An end at the last time means: there or later."""
    if len(times) < bootstrap_from:
        logs = [math.log(time.value) for time in times if time.reached]
        return ratio_interval([logs], bootstrap_from) if len(logs) == len(times) else None
    middle = kaplan_meier_median(times)
    if middle is None:
        return None
    import numpy as np

    value = np.array([time.value for time in times])
    reached = np.array([time.reached for time in times])
    low, high, method = _bootstrap((value, reached), medians, paired=True)
    return Interval(middle, low, high, LEVEL, method, len(times))


def medians(value: np.ndarray, reached: np.ndarray, axis: int = -1) -> np.ndarray:
    """:func:`kaplan_meier_median` of many samples at once [..., n]; the last time of a sample where there is none."""
    import numpy as np

    value, reached = np.moveaxis(value, axis, -1), np.moveaxis(reached, axis, -1)
    order = np.lexsort((~reached, value), axis=-1)  # at the same time, who got there comes before who did not
    value, reached = np.take_along_axis(value, order, -1), np.take_along_axis(reached, order, -1)
    at_risk = np.arange(value.shape[-1], 0, -1)
    alive = np.cumprod(1 - reached / at_risk, axis=-1)

    crossed = alive < 0.5 - 1e-9
    ends = [
        np.take_along_axis(value, below.argmax(-1)[..., None], -1)[..., 0] for below in (alive < 0.5 + 1e-9, crossed)
    ]
    return np.where(crossed.any(-1), (ends[0] + ends[1]) / 2, value[..., -1])


# ---------------------------------------------------------------- pairs of one seed


def log_ratio(time: Time, reference: Time) -> float:
    """Logarithm of the reference's time over the other; with a miss the nearest to 0 that is sure, 0 if nothing is."""
    ratio = math.log(reference.value / time.value)
    if time.reached and reference.reached:
        return ratio
    if time.reached:
        return max(0.0, ratio)
    return min(0.0, ratio) if reference.reached else 0.0


def undecided(time: Time, reference: Time) -> bool:
    """Whether one of the two is a miss that was given up before the other arrived."""
    missed, reached = (time, reference) if reference.reached else (reference, time)
    return reached.reached and not missed.reached and missed.value < reached.value


def faster(time: Time, reference: Time) -> float:
    """1 where ``time`` is the shorter, 0 where it is the longer, one half for a tie. A miss is longer than any time up
    to its end; beyond that, as between two misses, nothing is known, which counts as a tie."""
    if time.reached and reference.reached:
        return 0.5 if time.value == reference.value else float(time.value < reference.value)
    if time.reached:
        return 1.0 if time.value <= reference.value else 0.5
    return 0.0 if reference.reached and reference.value <= time.value else 0.5


# ---------------------------------------------------------------- means over strata


def mean_interval(strata: Sequence[Sequence[float]], bootstrap_from: int = BOOTSTRAP_FROM) -> Interval | None:
    """Of the mean of the strata's means (a stratum: the seeds of a benchmark); None below two seeds.

    Strata are fixed: the interval speaks of these benchmarks with other seeds, not of other benchmarks.
    """
    fewest = min(map(len, strata), default=0)
    if fewest < 2:
        return None
    import numpy as np

    samples = [np.asarray(stratum, dtype=float) for stratum in strata]
    estimate = fmean(fmean(stratum) for stratum in strata)
    spread_out = any(np.ptp(sample) > 0 for sample in samples)
    find = _bootstrap if fewest >= bootstrap_from else _welch
    low, high, method = find(samples, _mean_of_means) if spread_out else (estimate, estimate, "all equal")
    return Interval(estimate, low, high, LEVEL, method, fewest)


def ratio_interval(strata: Sequence[Sequence[float]], bootstrap_from: int = BOOTSTRAP_FROM) -> Interval | None:
    """Of the geometric mean, from log ratios."""
    return _exponential(mean_interval(strata, bootstrap_from))


def _exponential(found: Interval | None) -> Interval | None:
    if found is None:
        return None
    estimate, low, high = (math.exp(value) for value in (found.estimate, found.low, found.high))
    return replace(found, estimate=estimate, low=low, high=high)


def _mean_of_means(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    total: np.ndarray = sum(sample.mean(axis=axis) for sample in samples[1:]) + samples[0].mean(axis=axis)
    return total / len(samples)


def _welch(samples: Sequence[np.ndarray], statistic: Any) -> tuple[float, float, str]:
    """By the t distribution, with the degrees of freedom of Welch and Satterthwaite; n - 1 for one stratum."""
    from scipy import stats

    parts = [float(sample.var(ddof=1)) / len(sample) for sample in samples]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, samples, strict=True))
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(sum(parts)) / len(samples)
    estimate = float(statistic(*samples))
    return estimate - half, estimate + half, "t"


def _bootstrap(samples: Sequence[np.ndarray], statistic: Any, *, paired: bool = False) -> tuple[float, float, str]:
    """Bias-corrected and accelerated (Efron 1987); strata are resampled apart, columns of pairs together. Percentiles
    where the acceleration is 0 / 0, as for a median with many equal times around it."""
    import numpy as np
    from scipy import stats

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's and numpy's, of the 0 / 0
            found = stats.bootstrap(
                samples,
                statistic,
                paired=paired,
                vectorized=True,
                n_resamples=RESAMPLES,
                confidence_level=LEVEL,
                method=method,
                random_state=np.random.default_rng(number(0, "bootstrap")),
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return float(found.low), float(found.high), method


# ---------------------------------------------------------------- tests


def sign_flip(strata: Sequence[Sequence[float]]) -> float:
    """Two-sided p of the mean of the strata's means, had each value had either sign alike.

    Every choice of signs is tried up to ``EXACT_FLIPS`` values, else as many at random, the one observed among them.
    """
    import numpy as np

    weighted = np.concatenate([np.asarray(stratum, dtype=float) / len(stratum) for stratum in strata])
    means = np.abs(_signs(len(weighted)) @ weighted)
    observed = abs(weighted.sum())
    return float(np.mean(means >= observed - 1e-9 * np.abs(weighted).sum()))


@lru_cache(maxsize=4)
def _signs(count: int) -> np.ndarray:
    """Rows of -1 and 1 [choices, count]; the first leaves all signs as they are."""
    import numpy as np

    if count <= EXACT_FLIPS:
        flipped = np.arange(2**count)[:, None] >> np.arange(count) & 1
    else:
        flipped = np.random.default_rng(number(0, "signs")).integers(2, size=(2**EXACT_FLIPS, count))
        flipped[0] = 0
    return 1.0 - 2.0 * flipped


def holm(values: Sequence[float]) -> list[float]:
    """The p of a family of tests, adjusted by Holm (1979): at most one false positive in ``1 / level`` families."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


# ---------------------------------------------------------------- performance profiles


def slowdowns(times: Mapping[str, Time]) -> dict[str, float]:
    """Each optimizer's time on one problem over the fastest; infinity for a miss."""
    fastest = min((time.value for time in times.values() if time.reached), default=math.inf)
    return {name: time.value / fastest if time.reached else math.inf for name, time in times.items()}


def profile(strata: Sequence[Sequence[float]], limit: float = PROFILE_LIMIT) -> tuple[list[float], list[float]]:
    """Dolan and Moré's profile: where it steps up from 1 to ``limit``, and the share of the problems whose slowdown is
    at most that (of a stratum's problems, then the mean over strata)."""
    tau = sorted({1.0, limit, *(value for stratum in strata for value in stratum if value <= limit)})
    return tau, [fmean(fmean(value <= at for value in stratum) for stratum in strata) for at in tau]


def profile_area(slowdown: float, limit: float = PROFILE_LIMIT) -> float:
    """What one problem adds to the area below a profile over the logarithm of tau, as a share of the largest: 1 for the
    fastest, 0 from ``limit`` times slower on. The area is the mean over problems, exactly."""
    return 1.0 - min(1.0, math.log(slowdown) / math.log(limit))
