"""Means over the seeds of a pair, with intervals, as metrics: what stands in MLflow beside the single runs.

The one idea: a mean speaks of all seeds or not at all; a step that one of them did not see, or a figure that one lacks,
has none. Losses are averaged on the logarithmic scale, on which they are drawn, with the interval of the t distribution
there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

from pipeline.metrics import history_metrics, records_hash, summary_metrics, with_limits
from pipeline.records import Run

LEVEL = 0.95
SECTIONS = ("loss/", "score/")  # of the metrics that have a mean curve


def curves(runs: Sequence[Run]) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(step, mean training seconds, metrics with their limits) at every evaluation that all seeds have."""
    by_seed = [{int(row["step"] or 0): row for row in run.history} for run in runs]
    for step in sorted(set.intersection(*(set(rows) for rows in by_seed))):
        rows = [rows[step] for rows in by_seed]
        seconds = sum(float(row["training_seconds"] or 0) for row in rows) / len(rows)
        metrics = _of_all([history_metrics(row) for row in rows])
        yield step, seconds, {name: value for name, value in metrics.items() if name.startswith(SECTIONS)}


def summary(runs: Sequence[Run]) -> dict[str, float]:
    """Figures of the whole runs with their limits; those of a target only where every seed reached it."""
    seconds = {"time/training_seconds": [run.summary["training_seconds"] for run in runs]}
    return {**_of_all([summary_metrics(run.summary) for run in runs]), **_of_each(seconds)}


def checksum(runs: Sequence[Run]) -> str:
    """Changes when a record does, or a seed joins."""
    return hashlib.sha256("".join(sorted(records_hash(run.folder) for run in runs)).encode()).hexdigest()[:16]


def _of_all(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    shared = set.intersection(*(set(metrics) for metrics in of_seeds))
    return _of_each({name: [metrics[name] for metrics in of_seeds] for name in sorted(shared)})


def _of_each(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    named: dict[str, float] = {}
    for name, of_seeds in values.items():
        logarithmic = "loss" in name and min(of_seeds) > 0
        found = interval([math.log(value) for value in of_seeds] if logarithmic else of_seeds)
        shown = (name,) if name.endswith("_reached") else with_limits(name)  # a share has no limits, nor has one seed
        named.update(zip(shown, (math.exp(x) if logarithmic else x for x in found), strict=False))
    return named


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, ...]:
    """Mean, and from two values on the limits of its interval by Student's t."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return (mean,)
    from scipy.stats import t

    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    half = float(t.ppf((1 + level) / 2, count - 1)) * error
    return mean, mean - half, mean + half
