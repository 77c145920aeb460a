"""Verdicts of a study: who reaches the targets first, by how much, and how sure that is.

The one idea: every sentence is made from figures that stand beside it in ``report/verdicts.json``, and those are made
by :mod:`pipeline.statistics` from the histories of the records, so that a reader can recompute all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline import comparability, sentences, statistics
from pipeline.config import TARGETS, ConfigError, Params
from pipeline.records import Run
from pipeline.statistics import ONE_BENCHMARK, POOLED, Interval, Time, ordered

FILE = "verdicts.json"
CLOCKS = ("steps", "seconds")
"""Optimizer steps, and seconds of training."""
HEADLINE = "hard"
INTERVAL = ("estimate", "low", "high", "method")
ALL = "all"
"""In the place of a benchmark: pairs of all benchmarks pooled."""
REFERENCES: dict[str, tuple[str, ...] | None] = {"sgd": None, "adam": None, "kfac": ("ekfac", "gkfac")}
"""What optimizers are compared with: SGD and Adam with all others, K-FAC with those that refine it."""

Study = Mapping[str, Mapping[str, Sequence[Run]]]


@dataclass(frozen=True)
class Outcome:
    """The seeds of one optimizer on one benchmark: ``reached`` of ``seeds`` got to the target.

    ``restricted_mean`` is the mean time up to ``horizon``, ``median`` that of Kaplan and Meier (None: half of the
    seeds or fewer got there), ``interval`` that of the median."""

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

    ``ratio`` is the geometric mean of the reference's time over the optimizer's, so above 1 the optimizer is faster;
    ``faster`` the share of pairs that it wins, ties half. ``p`` is that of the sign-flip test, None where the seeds do
    not carry a verdict; ``p_holm`` is corrected for all optimizers that are tested against this reference here."""

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


COMPARISON_COLUMNS = [
    "benchmark", "target", "clock", "optimizer", "reference", "pairs", "ratio_estimate", "ratio_low", "ratio_high",
    "ratio_method", "faster", "p", "p_holm", "sentence",
]  # fmt: skip
OUTCOME_COLUMNS = [
    "benchmark", "optimizer", "target", "clock", "reached", "seeds", "restricted_mean", "horizon", "median",
    "median_low", "median_high", "median_method",
]  # fmt: skip
PROFILE_COLUMNS = [
    "clock", "optimizer", "area_estimate", "area_low", "area_high", "area_method", "tau", "share",
]  # fmt: skip


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


@dataclass(frozen=True)
class _Race:
    """All runs of a benchmark on one clock to one target: optimizer -> seed -> time; none goes on after ``end``."""

    benchmark: str
    target: str
    clock: str
    end: float
    times: dict[str, dict[int, Time]]


def judge(study: Study, params: Params) -> Verdicts:
    """The verdicts on ``study`` (benchmark -> optimizer -> runs, as ``aggregate.collect`` gives it).

    Raises ConfigError where runs of a benchmark cannot stand in one table (:mod:`pipeline.comparability`).
    """
    for benchmark, pairs in study.items():
        comparability.check(benchmark, pairs)
    versions = {str(run.config.get("protocol", "not recorded")) for run in _runs(study)}
    races = [race for race in _races(study) if not _met_at_once(race)]
    outcomes = [outcome for race in races for outcome in _outcomes(race)]
    comparisons = _comparisons(races)
    profiles = [found for clock in CLOCKS for found in _profiles(clock, races, params)]
    speedups = _speedups(races, comparisons)
    return Verdicts(
        sentences=_headlines(outcomes, comparisons, profiles, speedups),
        outcomes=outcomes,
        comparisons=comparisons,
        profiles=profiles,
        speedups=speedups,
        missing=list(_missing(study, params)),
        protocol=", ".join(sorted(versions)),
    )


def write(found: Verdicts, path: Path) -> None:
    path.write_text(json.dumps(asdict(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def comparison_rows(found: Verdicts) -> Iterator[dict[str, Any]]:
    """``comparisons.csv``: a row a comparison."""
    return (_row(each, "ratio", "ratio", COMPARISON_COLUMNS) for each in found.comparisons)


def outcome_rows(found: Verdicts) -> Iterator[dict[str, Any]]:
    """``outcomes.csv``: a row an optimizer, benchmark, target and clock."""
    return (_row(each, "interval", "median", OUTCOME_COLUMNS) for each in found.outcomes)


def profile_rows(found: Verdicts) -> Iterator[dict[str, Any]]:
    """``profiles.csv``: a row a point of a profile, with the area below the whole of it."""
    for each in found.profiles:
        row = _row(each, "area", "area", PROFILE_COLUMNS)
        yield from (row | {"tau": tau, "share": share} for tau, share in zip(each.tau, each.share, strict=True))


def _row(found: Any, interval: str, name: str, columns: Sequence[str]) -> dict[str, Any]:
    """A row of CSV, in which an interval has columns of its own that begin with ``name``."""
    values = asdict(found)
    ends = values[interval] or {}
    values |= {f"{name}_{part}": ends.get(part) for part in INTERVAL}
    return {column: values[column] for column in columns}


def read_sentences(path: Path) -> list[str]:
    """The headlines that ``write`` wrote; none where it has not yet."""
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["sentences"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no verdicts of a report ({error}); `dvc repro` makes it again") from None


# ---------------------------------------------------------------- times


def _runs(study: Study) -> Iterator[Run]:
    return (run for pairs in study.values() for runs in pairs.values() for run in runs)


def _races(study: Study) -> Iterator[_Race]:
    for benchmark, pairs in study.items():
        runs = [run for of_pair in pairs.values() for run in of_pair]
        if not runs:
            continue
        config = runs[0].config
        longest = max(float(run.summary["training_seconds"]) for run in runs)
        # A budget of seconds that no run spends is nobody's end.
        ends = {"steps": float(config["steps"]), "seconds": min(config["seconds"] or math.inf, longest)}
        for target in TARGETS:
            for clock in CLOCKS:
                times = {
                    name: {run.summary["seed"]: _time(run, target, clock, ends[clock]) for run in pairs[name]}
                    for name in ordered(pairs)
                }
                yield _Race(benchmark, target, clock, ends[clock], times)


def _time(run: Run, target: str, clock: str, end: float) -> Time:
    """To the target; a miss was given up where its run ended, or at the ``end`` of all where it did not finish."""
    summary = run.summary
    value = statistics.to_target(summary, target, {"steps": "step", "seconds": "seconds"}[clock])
    if math.isfinite(value):
        return Time(value, True)
    lasted = summary["steps"] if clock == "steps" else summary["training_seconds"]
    return Time(min(float(lasted), end) if statistics.finished(summary) else end, False)


def _met_at_once(race: _Race) -> bool:
    """Whether initial weights meet the target, so that there is no race to it."""
    return any(time.reached and time.value <= 0 for times in race.times.values() for time in times.values())


def _missing(study: Study, params: Params) -> Iterator[str]:
    for benchmark in params.benchmarks:
        for optimizer in ordered(params.optimizers):
            found = {run.summary["seed"]: run for run in study.get(benchmark, {}).get(optimizer, ())}
            for seed in params.seeds:
                where = f"{benchmark}, {optimizer}, seed {seed}"
                if seed not in found:
                    yield f"{where}: no record"
                elif not statistics.finished(found[seed].summary):
                    yield f"{where}: {statistics.notes([found[seed].summary]).removeprefix(f'seed {seed} ')}"
    for race in _races(study):
        if race.clock == "steps" and _met_at_once(race):
            yield f"{race.benchmark}: initial weights meet the {race.target} target; it is not judged"


def _outcomes(race: _Race) -> Iterator[Outcome]:
    groups = {name: list(times.values()) for name, times in race.times.items() if times}
    horizon = statistics.reach_horizon(groups.values(), race.end)
    for name, times in groups.items():
        yield Outcome(
            benchmark=race.benchmark,
            optimizer=name,
            target=race.target,
            clock=race.clock,
            reached=sum(time.reached for time in times),
            seeds=len(times),
            restricted_mean=statistics.restricted_mean(times, horizon),
            median=statistics.kaplan_meier_median(times),
            interval=statistics.median_interval(times),
            horizon=horizon,
        )


# ---------------------------------------------------------------- comparisons


def _comparisons(races: Sequence[_Race]) -> list[Comparison]:
    """On each benchmark, then on all together; a family of Holm's is what stands against one reference."""
    found = [each for race in races for each in _against_all(race.benchmark, [race])]
    for target in TARGETS:
        for clock in CLOCKS:
            same = [race for race in races if (race.target, race.clock) == (target, clock)]
            if len(same) > 1:
                found += _against_all(ALL, same)
    return found


def _against_all(benchmark: str, races: Sequence[_Race]) -> Iterator[Comparison]:
    for reference, opponents in REFERENCES.items():
        names = ordered({name for race in races for name in race.times})
        chosen = [name for name in names if name != reference and (opponents is None or name in opponents)]
        family = [each for name in chosen if (each := _compare(benchmark, races, name, reference))]
        tested = [(place, each.p) for place, each in enumerate(family) if each.p is not None]
        for (place, _), p_holm in zip(tested, statistics.holm([p for _, p in tested]), strict=True):
            family[place] = replace(family[place], p_holm=p_holm)
        for each in family:
            yield replace(each, sentence=_sentence(each, races, len(tested)))


def _compare(benchmark: str, races: Sequence[_Race], optimizer: str, reference: str) -> Comparison | None:
    strata = [pairs for race in races if (pairs := _pairs(race, optimizer, reference))]
    if not strata:
        return None
    ratios = [[statistics.log_ratio(*pair) for pair in pairs] for pairs in strata]
    needed = ONE_BENCHMARK if len(strata) == 1 else POOLED
    return Comparison(
        benchmark=benchmark,
        target=races[0].target,
        clock=races[0].clock,
        optimizer=optimizer,
        reference=reference,
        pairs=sum(map(len, strata)),
        ratio=statistics.ratio_interval(ratios),
        faster=fmean(fmean(statistics.faster(*pair) for pair in pairs) for pairs in strata),
        p=statistics.sign_flip(ratios) if min(map(len, strata)) >= needed else None,
        p_holm=None,
        sentence="",
    )


def _pairs(race: _Race, optimizer: str, reference: str) -> list[tuple[Time, Time]]:
    """Times of both at the seeds that both have."""
    mine, other = race.times.get(optimizer, {}), race.times.get(reference, {})
    return [(mine[seed], other[seed]) for seed in mine if seed in other]


def _sentence(found: Comparison, races: Sequence[_Race], tests: int) -> str:
    strata = {race.benchmark: pairs for race in races if (pairs := _pairs(race, found.optimizer, found.reference))}
    pairs = [pair for of_benchmark in strata.values() for pair in of_benchmark]
    return sentences.comparison(
        optimizer=found.optimizer,
        reference=found.reference,
        target=found.target,
        clock=found.clock,
        benchmarks=list(strata),
        seeds=min(map(len, strata.values())),
        misses=(sum(not mine.reached for mine, _ in pairs), sum(not other.reached for _, other in pairs)),
        alone=(sum(map(_alone, pairs)), sum(_alone((other, mine)) for mine, other in pairs)),
        undecided=sum(statistics.undecided(*pair) for pair in pairs),
        pairs=len(pairs),
        ratio=found.ratio,
        p_holm=found.p_holm,
        tests=tests,
    )


def _alone(pair: tuple[Time, Time]) -> bool:
    """Whether the first of two alone is a miss, and was not given up before the other arrived."""
    mine, other = pair
    return not mine.reached and other.reached and not statistics.undecided(mine, other)


# ---------------------------------------------------------------- over all benchmarks


def _speedups(races: Sequence[_Race], comparisons: Sequence[Comparison]) -> list[Speedup]:
    """The comparisons at the hard target over all benchmarks, or on the only one."""
    own = [race for race in races if race.target == HEADLINE]
    names = list(dict.fromkeys(race.benchmark for race in own))
    where = ALL if len(names) > 1 else "".join(names)
    found = [each for each in comparisons if (each.benchmark, each.target) == (where, HEADLINE)]
    return [
        Speedup(
            clock=each.clock,
            optimizer=each.optimizer,
            reference=each.reference,
            ratio=each.ratio,
            benchmarks=list(dict.fromkeys(
                race.benchmark for race in own if _pairs(race, each.optimizer, each.reference)
            )),
            sentence=each.sentence,
        )
        for clock in CLOCKS
        for each in found
        if each.clock == clock
    ]  # fmt: skip


def _profiles(clock: str, races: Iterable[_Race], params: Params) -> Iterator[Profile]:
    """Over every problem (benchmark, target, seed) that all optimizers have run; benchmarks count alike."""
    names = ordered(params.optimizers)
    problems: dict[str, dict[int, list[dict[str, float]]]] = {}
    for race in races:
        if race.clock != clock or any(name not in race.times for name in names):
            continue
        for seed in set.intersection(*(set(race.times[name]) for name in names)):
            slowdowns = statistics.slowdowns({name: race.times[name][seed] for name in names})
            problems.setdefault(race.benchmark, {}).setdefault(seed, []).append(slowdowns)
    for name in names if problems else ():
        slow = [[each[name] for own in seeds.values() for each in own] for seeds in problems.values()]
        tau, share = statistics.profile(slow)
        areas = [
            [fmean(statistics.profile_area(each[name]) for each in own) for own in seeds.values()]
            for seeds in problems.values()
        ]
        area = statistics.mean_interval(areas)
        if area:
            area = replace(area, low=max(0.0, area.low), high=min(1.0, area.high))
        yield Profile(clock, name, tau, share, area)


# ---------------------------------------------------------------- headlines


def _headlines(
    outcomes: Sequence[Outcome],
    comparisons: Sequence[Comparison],
    profiles: Sequence[Profile],
    speedups: Sequence[Speedup],
) -> list[str]:
    """On each clock who is ahead over all benchmarks and by how much, K-FAC against Adam and its refinements against
    it; then the first on each benchmark."""
    found = []
    seeds = min((each.seeds for each in outcomes), default=0)
    if seeds < POOLED:
        found.append(sentences.no_verdict(seeds))
    for clock in CLOCKS:
        own = [(each.optimizer, each.area) for each in profiles if each.clock == clock and each.area]
        own.sort(key=lambda each: -each[1].estimate)
        leader = own[0][0] if own else None
        if own:
            found.append(sentences.areas(clock, own))
        found += [
            each.sentence
            for each in speedups
            if each.clock == clock
            and (each.optimizer == leader or each.reference == "kfac" or _kfac_against_adam(each))
        ]
    for benchmark in dict.fromkeys(each.benchmark for each in outcomes):
        for clock in CLOCKS:
            own_outcomes = [each for each in outcomes if (each.benchmark, each.target) == (benchmark, HEADLINE)]
            found += _first([each for each in own_outcomes if each.clock == clock], comparisons)
    return list(dict.fromkeys(found))


def _kfac_against_adam(found: Speedup) -> bool:
    return (found.optimizer, found.reference) == ("kfac", "adam")


def _first(outcomes: Sequence[Outcome], comparisons: Sequence[Comparison]) -> list[str]:
    """The least median time, and how it compares with Adam, or with SGD where it is Adam's."""
    median, best = least(outcomes)
    if median is None:
        return [sentences.none_first(each.benchmark, each.target, each.clock) for each in outcomes[:1]]
    one = best[0]
    names, reached = [each.optimizer for each in best], [each.reached for each in best]
    first = sentences.first(names, one.benchmark, one.target, one.clock, median, reached, one.seeds)
    return [first, *(sentence for each in best if (sentence := _against_first_order(each, comparisons)))]


def least(outcomes: Iterable[Outcome]) -> tuple[float | None, list[Outcome]]:
    """The least median time, and all that have it."""
    there = [each for each in outcomes if each.median is not None]
    median = min((each.median for each in there if each.median is not None), default=None)
    return median, [each for each in there if each.median == median]


def _against_first_order(best: Outcome, comparisons: Sequence[Comparison]) -> str | None:
    """How an optimizer compares with Adam, or with SGD where it is Adam."""
    against = {
        each.reference: each.sentence
        for each in comparisons
        if (each.benchmark, each.target, each.clock, each.optimizer)
        == (best.benchmark, best.target, best.clock, best.optimizer)
    }
    return next((against[name] for name in ("adam", "sgd", *against) if name in against), None)
