"""Do the intervals and tests of the verdicts keep what they promise? Measured on times that are drawn, not trained.

The one idea: the functions under test are those of `pipeline.statistics`, as the report calls them, on times to target
whose truth is known. Times are log-normal with a part that a seed gives to all optimizers alike (which pairing takes
out) and a part of each run. `grid` rounds them up to the next evaluation; `stragglers` makes one run in ten three times
as long; `censored` stops at a budget that one run in five misses.

    python -m benchmarks.coverage                              # all, some 20 minutes of one core
    python -m benchmarks.coverage --only 'tests*' --repetitions 200

Results go to benchmarks/results/coverage.json, a part at a time: what `--only` leaves out stays as it was.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from pipeline import statistics
from pipeline.seeds import number
from pipeline.statistics import Time

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.json"
SEEDS = (3, 5, 8, 10, 20)
TYPICAL = 50.0  # steps of the reference's median run
OF_SEED, OF_RUN = 0.15, 0.2  # standard deviations of the logarithm
EVERY = 5.0  # steps between evaluations, in `grid`
MISSED = 0.2  # of the reference's runs, in `censored`
POOLED = (0.5, 1.0, 1.3, 2.5)  # how many times as fast an optimizer is on each of several benchmarks
OPPONENTS = 6  # of the reference, so tests in a family
FASTER = 1.3  # how many times as fast the better ones are
NEVER = 10**9

BUDGET = TYPICAL * math.exp(0.8416212335729143 * math.hypot(OF_SEED, OF_RUN))  # the quantile 1 - MISSED
CASES: dict[str, Callable[[float, float], Time]] = {  # of a time, and of a number drawn between 0 and 1
    "log-normal": lambda time, _: Time(time, True),
    "grid": lambda time, _: Time(EVERY * math.ceil(time / EVERY), True),
    "stragglers": lambda time, drawn: Time(3 * time if drawn < 0.1 else time, True),
    "censored": lambda time, _: Time(min(time, BUDGET), time <= BUDGET),
}


def draw(generator: np.random.Generator, seeds: int, factors: list[float], case: str) -> list[list[Time]]:
    """Times of optimizers that are so many times as fast as the reference, [optimizer][seed]."""
    of_seed = generator.normal(0.0, OF_SEED, seeds)
    logs = of_seed + generator.normal(0.0, OF_RUN, (len(factors), seeds)) - np.log(factors)[:, None]
    times = TYPICAL * np.exp(logs)
    luck = generator.random(times.shape)
    return [list(map(CASES[case], *rows)) for rows in zip(times.tolist(), luck.tolist(), strict=True)]


def log_ratios(times: list[Time], reference: list[Time]) -> list[float]:
    return [statistics.log_ratio(*pair) for pair in zip(times, reference, strict=True)]


# ---------------------------------------------------------------- intervals


def truth(case: str, size: int = 400_000) -> dict[str, float]:
    """What the intervals should hold, from a sample that is large enough to stand for all."""
    own, reference = draw(np.random.default_rng(number(0, f"truth {case}")), size, [FASTER, 1.0], case)
    median = statistics.kaplan_meier_median(reference)
    assert median is not None
    return {"ratio": math.exp(float(np.mean(log_ratios(own, reference)))), "median": median}


def intervals(case: str, seeds: int, repetitions: int) -> list[dict[str, Any]]:
    """How often the interval of the ratio and that of the median hold the truth, by both methods."""
    generator = np.random.default_rng(number(seeds, f"intervals {case}"))
    true = truth(case)
    counts: dict[tuple[str, str], list[int]] = {}
    for _ in range(repetitions):
        own, reference = draw(generator, seeds, [FASTER, 1.0], case)
        for method, bootstrap_from in (("t", NEVER), ("BCa", 0)):
            found = {
                "ratio": statistics.ratio_interval([log_ratios(own, reference)], bootstrap_from),
                "median": statistics.median_interval(reference, bootstrap_from),
            }
            for quantity, interval in found.items():
                count = counts.setdefault((quantity, method), [0, 0, 0])
                if interval:
                    count[0] += 1
                    count[1] += true[quantity] < interval.low * (1 - 1e-9)
                    count[2] += true[quantity] > interval.high * (1 + 1e-9)
    return [
        {
            "quantity": quantity,
            "case": case,
            "seeds": seeds,
            "method": method,
            "used": (method == "BCa") == (seeds >= statistics.BOOTSTRAP_FROM),
            "truth": true[quantity],
            "repetitions": repetitions,
            "given": given / repetitions,
            "coverage": 1 - (above + below) / given if given else None,
            "above": above / given if given else None,
            "below": below / given if given else None,
        }
        for (quantity, method), (given, above, below) in counts.items()
    ]


def shares(times: list[Time], reference: list[Time]) -> list[float]:
    """What each seed adds to the area of the optimizer's profile, of two optimizers on one benchmark."""
    pairs = zip(times, reference, strict=True)
    return [statistics.profile_area(statistics.slowdowns({"own": a, "reference": b})["own"]) for a, b in pairs]


def pooled(case: str, seeds: int, repetitions: int) -> list[dict[str, Any]]:
    """How often the intervals over several benchmarks, on which the optimizer is ahead and behind by other factors,
    hold the ratio and the area of the profile: by the method that so many seeds get."""
    generator = np.random.default_rng(number(0, f"truth pooled {case}"))
    large = [draw(generator, 400_000, [factor, 1.0], case) for factor in POOLED]
    generator = np.random.default_rng(number(seeds, f"pooled {case}"))
    measured = []
    for quantity, values, interval_of in (
        ("pooled ratio", log_ratios, statistics.ratio_interval),
        ("area of a profile", shares, statistics.mean_interval),
    ):
        true = float(np.mean([np.mean(values(*pair)) for pair in large]))
        true = math.exp(true) if values is log_ratios else true
        method, above, below = "", 0, 0
        for _ in range(repetitions):
            found = interval_of([values(*draw(generator, seeds, [factor, 1.0], case)) for factor in POOLED])
            assert found is not None
            method = found.method
            above += bool(true < found.low * (1 - 1e-9))
            below += bool(true > found.high * (1 + 1e-9))
        measured.append(
            {
                "quantity": quantity,
                "case": case,
                "seeds": seeds,
                "benchmarks": len(POOLED),
                "factors": list(POOLED),
                "method": method,
                "used": True,
                "truth": true,
                "repetitions": repetitions,
                "coverage": 1 - (above + below) / repetitions,
                "above": above / repetitions,
                "below": below / repetitions,
            }
        )
    return measured


# ---------------------------------------------------------------- tests


def tests(case: str, benchmarks: int, seeds: int, repetitions: int) -> list[dict[str, Any]]:
    """Sign-flip tests of six opponents of one reference, pooled over benchmarks, after Holm: how often one that is as
    fast as the reference is called different (in a family of such, and beside three that are faster), and how often
    one of those three is found."""
    measured = []
    for name, factors in (
        ("all alike", [1.0] * OPPONENTS),
        ("three faster", [1.0] * 3 + [FASTER] * (OPPONENTS - 3)),
    ):
        generator = np.random.default_rng(number(seeds, f"tests {case} {benchmarks} {name}"))
        wrong = found = 0
        for _ in range(repetitions):
            strata = [draw(generator, seeds, [1.0, *factors], case) for _ in range(benchmarks)]
            values = [
                statistics.sign_flip([log_ratios(times[place], times[0]) for times in strata])
                for place in range(1, OPPONENTS + 1)
            ]
            significant = [p <= 0.05 for p in statistics.holm(values)]
            wrong += any(each for each, factor in zip(significant, factors, strict=True) if factor == 1.0)
            found += sum(each for each, factor in zip(significant, factors, strict=True) if factor != 1.0)
        faster = sum(factor != 1.0 for factor in factors)
        measured.append(
            {
                "case": case,
                "benchmarks": benchmarks,
                "seeds": seeds,
                "opponents": name,
                "tests": OPPONENTS,
                "factor": FASTER,
                "repetitions": repetitions,
                "family_error": wrong / repetitions,
                "power": found / (faster * repetitions) if faster else None,
            }
        )
    return measured


# ---------------------------------------------------------------- all of it


def rows(parts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The table of the report: what is in use there, what it promises and what was measured."""
    found = []
    measured = [row for of_part in parts.values() for row in of_part]
    for row in measured:
        if row.get("used"):
            line = {"what": f"interval of the {row['quantity']}, {row['method']}", "times": row["case"]}
            line |= {"seeds": row["seeds"], "benchmarks": row.get("benchmarks", 1)}
            found.append({**line, "promised": f"{statistics.LEVEL:g}", "measured": row["coverage"]})
    for row in measured:
        if "family_error" in row:
            line = {"times": row["case"], "seeds": row["seeds"], "benchmarks": row["benchmarks"]}
            name = f"{row['tests']} sign-flip tests, Holm, {row['opponents']}"
            found.append(
                {"what": f"{name}: any wrong", **line, "promised": "at most 0.05", "measured": row["family_error"]}
            )
            if row["power"] is not None:
                found.append({"what": f"{name}: found", **line, "promised": "", "measured": row["power"]})
    return found


def parts() -> Iterator[tuple[str, Callable[[int], list[dict[str, Any]]]]]:
    for case in CASES:
        for seeds in SEEDS:
            yield f"intervals {case} {seeds}", lambda n, case=case, seeds=seeds: intervals(case, seeds, n)
        for seeds in (5, 10):
            yield f"pooled {case} {seeds}", lambda n, case=case, seeds=seeds: pooled(case, seeds, n)
        for benchmarks, seeds in ((1, 8), (1, 10), (1, 20), (4, 5), (2, 5)):
            yield (
                f"tests {case} {benchmarks}x{seeds}",
                lambda n, case=case, benchmarks=benchmarks, seeds=seeds: tests(case, benchmarks, seeds, n),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", metavar="PATTERN", help="parts whose name fits, such as 'tests*'")
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    names = [name for name, _ in parts()]
    if not fnmatch.filter(names, chosen.only):
        parser.error(f"--only {chosen.only!r} fits none of: {', '.join(names)}")
    for name, measure in parts():
        if not fnmatch.fnmatch(name, chosen.only):
            continue
        measured = measure(chosen.repetitions)
        for row in measured:
            print(name, {key: value for key, value in row.items() if isinstance(value, float | str | bool)}, flush=True)
        known = json.loads(chosen.output.read_text(encoding="utf-8")) if chosen.output.exists() else {"parts": {}}
        found = {**known["parts"], name: measured}
        content: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "level": statistics.LEVEL,
            "resamples": statistics.RESAMPLES,
            "deviation_of_seed": OF_SEED,
            "deviation_of_run": OF_RUN,
            "parts": {each: found[each] for each in names if each in found},
        }
        content["rows"] = rows(content["parts"])
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
