"""Verdicts of a study: who reaches the targets first, by how much, and how sure that is.

The one idea: every sentence is made from figures that stand beside it in ``report/verdicts.json``, and those are made
by :mod:`pipeline.statistics` from the histories of the records, so that a reader can recompute all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import Params
from pipeline.records import Run

CLOCKS = ("steps", "seconds")
"""Optimizer steps, and seconds of training."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval of confidence: ``method`` is ``t`` or ``BCa``, ``n`` the seeds (the fewest that a
    benchmark has, where several are pooled)."""

    estimate: float
    low: float
    high: float
    level: float
    method: str
    n: int


@dataclass(frozen=True)
class Outcome:
    """The seeds of one optimizer on one benchmark: ``reached`` of ``seeds`` got to the target.

    ``restricted_mean`` is the mean time up to ``horizon``, ``median`` that of Kaplan and Meier (None: fewer than half
    of the seeds got there), ``interval`` that of the median."""

    benchmark: str
    optimizer: str
    target: str
    clock: str
    reached: int
    seeds: int
    restricted_mean: float
    median: float | None
    interval: Interval | None
    horizon: float


@dataclass(frozen=True)
class Comparison:
    """``optimizer`` against ``reference`` over ``pairs`` of runs of one seed; ``benchmark`` is ``all`` where the pairs
    of all benchmarks are pooled.

    ``ratio`` is the reference's time over the optimizer's, so above 1 the optimizer is faster; ``faster`` the share of
    pairs that it wins, ties half. ``p`` is None without a verdict."""

    benchmark: str
    target: str
    clock: str
    optimizer: str
    reference: str
    pairs: int
    ratio: Interval | None
    faster: float | None
    p: float | None
    p_holm: float | None
    sentence: str


@dataclass(frozen=True)
class Profile:
    """``share`` of the problems (benchmark, target, seed) that the optimizer solves within ``tau`` times the time of
    the fastest; ``area`` below it, as a share of the largest possible."""

    clock: str
    optimizer: str
    tau: list[float]
    share: list[float]
    area: Interval | None


@dataclass(frozen=True)
class Speedup:
    """Geometric mean over ``benchmarks`` of the reference's time to the hard target over the optimizer's."""

    clock: str
    optimizer: str
    reference: str
    ratio: Interval | None
    benchmarks: list[str]
    sentence: str


@dataclass(frozen=True)
class Verdicts:
    """All of a study. ``sentences`` are the headlines, ``missing`` what diverged, failed or has no record, a line
    each, ``protocol`` the version of docs/protocol.md that the runs followed."""

    sentences: list[str]
    outcomes: list[Outcome]
    comparisons: list[Comparison]
    profiles: list[Profile]
    speedups: list[Speedup]
    missing: list[str]
    protocol: str


def judge(study: Mapping[str, Mapping[str, Sequence[Run]]], params: Params) -> Verdicts:
    """The verdicts on ``study`` (benchmark -> optimizer -> runs, as ``aggregate.collect`` gives it).

    Raises ConfigError where runs of a benchmark cannot stand in one table (:mod:`pipeline.comparability`).
    """
    raise NotImplementedError
