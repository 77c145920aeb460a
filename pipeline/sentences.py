"""The words of a verdict: one function a kind of sentence, from the figures that stand beside it.

The one idea: a sentence names its figures (what, where, interval, seeds, misses, p and the number of tests that it was
corrected for) and claims a difference only where the corrected p is at most 5 %.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.statistics import ONE_BENCHMARK, POOLED, Interval

SIGNIFICANT = 0.05
_NAMES = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon",
    "soap": "SOAP",
    "shampoo": "Shampoo",
    "kfac": "K-FAC",
    "ekfac": "E-KFAC",
    "gkfac": "GKFAC",
}


def no_verdict(seeds: int) -> str:
    return (
        f"No verdict: {_counted(seeds, 'seed')}. One over several benchmarks needs {POOLED} paired seeds on each, one "
        f"on a single benchmark {ONE_BENCHMARK}."
    )


def comparison(
    *,
    optimizer: str,
    reference: str,
    target: str,
    clock: str,
    benchmarks: Sequence[str],
    seeds: int,
    misses: tuple[int, int],
    alone: tuple[int, int],
    undecided: int,
    pairs: int,
    ratio: Interval | None,
    p_holm: float | None,
    tests: int,
) -> str:
    """How an optimizer compares with a reference on one clock.

    Arguments:
        seeds: pairs on each benchmark (the fewest).
        misses: of the optimizer and of the reference, of all ``pairs``.
        alone: pairs in which the optimizer, and in which the reference, is the only one to miss and known to be later.
            What such a pair comes to is a bound.
        undecided: pairs in which one missed, but was given up before the other arrived. Such a pair is as good as a
            tie, of which the ratio is no bound.
        ratio: time of the reference over time of the optimizer.
        p_holm: corrected over so many ``tests``; None without a verdict.
    """
    mine, other = _name(optimizer), _name(reference)
    one = len(benchmarks) == 1
    where = f"the {target} target of {benchmarks[0] if one else f'{len(benchmarks)} benchmarks'}"
    count = _counted(seeds, "seed") + ("" if one else " each")
    if misses == (pairs, pairs):
        return f"Neither {mine} nor {other} reaches {where} within the budget ({count})."
    if ratio is None:
        return f"No verdict: {count} of {mine} and {other} on {where}."
    facts = [f"{ratio.level:.0%} interval {_figure(1 / ratio.high)} to {_figure(1 / ratio.low)}", count]
    facts += [
        f"{name} misses it in {missed} of {_counted(pairs, 'run')}"
        for name, missed in zip((mine, other), misses, strict=True)
        if missed
    ]
    if p_holm is not None:
        facts.append(f"p {_p(p_holm)} after Holm over {_counted(tests, 'test')}")
    if undecided:
        facts.insert(-1 if p_holm is not None else len(facts), f"{_counted(undecided, 'pair')} undecided")
    late, ahead = alone
    bound = "at least " if late and not ahead else "at most " if ahead and not late else ""
    amount = f"{'' if undecided else bound}{_times(1 / ratio.estimate)} {other}'s {clock}"
    does = f"reaches {where} in" if misses[0] < pairs else f"does not reach {where} within the budget:"
    claim = f"{mine} {does} {amount}{'' if one else ', in geometric mean'} ({', '.join(facts)})"
    if p_holm is not None:
        # Who is ahead may be behind by any amount in the pairs in which it alone misses.
        open_ended = ahead if ratio.estimate < 1 else late
        shown = p_holm <= SIGNIFICANT and not open_ended
        return f"{claim}." if shown else f"{claim}: no difference shown."
    if seeds < POOLED:
        return f"No verdict: {_counted(seeds, 'seed')}. {claim}."
    return f"{claim}: no verdict on one benchmark below {ONE_BENCHMARK} seeds."


def areas(clock: str, found: Sequence[tuple[str, Interval]]) -> str:
    """Areas below the performance profiles, the largest first."""
    (first, area), *others = found
    after = ", ".join(f"{_name(name)} {_figure(each.estimate)}" for name, each in others)
    return (
        f"In {clock}, {_name(first)} has the largest area under its performance profile: {_figure(area.estimate)} of 1 "
        f"({area.level:.0%} interval {_figure(area.low)} to {_figure(area.high)}, {_counted(area.n, 'seed')})"
        f"{f', before {after}' if after else ''}."
    )


def none_first(benchmark: str, target: str, clock: str) -> str:
    return f"No optimizer gets to the {target} target of {benchmark} with more than half of its seeds ({clock})."


def first(
    optimizers: Sequence[str],
    benchmark: str,
    target: str,
    clock: str,
    median: float,
    reached: Sequence[int],
    seeds: int,
) -> str:
    """Who has the least median time on a benchmark, several where it is the same; ``reached`` is of each."""
    names, there = _listed([_name(optimizer) for optimizer in optimizers]), _listed([str(count) for count in reached])
    return (
        f"First to the {target} target of {benchmark} in {clock} {'is' if len(optimizers) == 1 else 'are'} {names}: a "
        f"median of {_figure(median)} {clock}, {there} of {_counted(seeds, 'seed')} there."
    )


def _name(optimizer: str) -> str:
    return _NAMES.get(optimizer, optimizer)


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _figure(value: float) -> str:
    """Two decimals from 0.1 to 1, else two significant digits below and three above."""
    if 0.1 <= value < 1:
        return f"{value:.2f}"
    return f"{float(f'{value:.{2 if value < 1 else 3}g}'):g}"


def _times(share: float) -> str:
    return f"{_figure(share)} of" if share < 1 else f"{_figure(share)} times"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"
