"""What a handful of seeds can carry: medians, extremes, counts and ratios of medians; pure functions on numbers.

A run that does not reach its target within the budget, diverges or fails is no missing value but a bad one: it
counts as infinity, the worst outcome, so that a median over seeds can only be finite when most of them got there.
There are no intervals and no tests here: three seeds do not support them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.config import TARGETS

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
    reached."""
    value = summary.get(f"{target}_{quantity}")
    return float(value) if summary[f"{target}_reached"] and value is not None else math.inf


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
        row[f"reached_{target}"] = sum(bool(summary[f"{target}_reached"]) for summary in summaries)
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
