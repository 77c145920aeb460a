"""Censored times, intervals, tests and profiles: each against a case worked by hand, and by a small simulation.

The full simulation is `python -m benchmarks.coverage`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import coverage
from pipeline import statistics
from pipeline.statistics import Time


def reached(*values: float) -> list[Time]:
    return [Time(value, True) for value in values]


def missed(*values: float) -> list[Time]:
    return [Time(value, False) for value in values]


# ---------------------------------------------------------------- times to target


@pytest.mark.parametrize(
    ("times", "median"),
    [
        # Survival: 5/6 after 1; 5/6 * 4/5 = 2/3 after 2; of three left one gets there at 3: 2/3 * 2/3 = 4/9.
        (reached(1, 2, 3) + missed(2, 3, 5), 3),
        # One half from 2 to 4: midway, as for four numbers.
        (reached(1, 2, 4, 6), 3),
        (reached(5, 1, 3), 3),
        # Half of them, and no more: the curve never crosses.
        (reached(1, 2) + missed(9, 9), None),
        # The one given up at 2 stands for those after it: 3/4 after 1, 3/4 * 1/2 = 3/8 after 3.
        (reached(1, 3, 4) + missed(2), 3),
        (missed(9), None),
    ],
)
def test_the_median_of_kaplan_and_meier(times: list[Time], median: float | None) -> None:
    assert statistics.kaplan_meier_median(times) == median


def test_the_restricted_mean_is_the_area_below_the_survival_curve() -> None:
    times = reached(1, 2, 3) + missed(2, 3, 5)
    # 1 up to 1, then 5/6, 2/3, 4/9, each for one unit of time.
    assert statistics.restricted_mean(times, 4.0) == pytest.approx(1 + 5 / 6 + 2 / 3 + 4 / 9)
    assert statistics.restricted_mean(times, 1.5) == pytest.approx(1 + 0.5 * 5 / 6)
    # Where all are followed to the horizon it is the mean of the times cut off there: (1 + 2 + 10 + 10) / 4.
    assert statistics.restricted_mean(reached(1, 2) + missed(10, 10), 10.0) == pytest.approx(5.75)


def test_times_are_compared_as_far_as_all_of_them_are_known() -> None:
    assert statistics.reach_horizon([reached(3, 7), reached(4) + missed(100)], budget=100) == 100
    # Without a budget: the first group was given up at 5, so of its times beyond nothing is known.
    assert statistics.reach_horizon([reached(3) + missed(5), reached(8, 9)]) == 5
    # A miss among earlier times is no end: the group's last time is a success.
    assert statistics.reach_horizon([reached(6) + missed(5), reached(8, 9)]) == 9


def test_medians_of_many_samples_are_those_of_each() -> None:
    generator = np.random.default_rng(0)
    value = generator.integers(1, 8, (300, 9)).astype(float)  # with many ties
    there = generator.random((300, 9)) < 0.7
    found = statistics.medians(value, there)
    for row, flags, median in zip(value, there, found, strict=True):
        times = [Time(float(each), bool(flag)) for each, flag in zip(row, flags, strict=True)]
        alone = statistics.kaplan_meier_median(times)
        assert median == (row.max() if alone is None else alone)


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    ("own", "reference", "ratio", "wins"),
    [
        (Time(20, True), Time(40, True), 2.0, 1.0),
        (Time(40, True), Time(20, True), 0.5, 0.0),
        (Time(30, True), Time(30, True), 1.0, 0.5),
        # Missed by 100: at least 5 times as long as 20.
        (Time(20, True), Time(100, False), 5.0, 1.0),
        (Time(100, False), Time(20, True), 0.2, 0.0),
        # Given up at 1 second; whether it would have taken longer than 2 nobody knows.
        (Time(2, True), Time(1, False), 1.0, 0.5),
        (Time(1, False), Time(2, True), 1.0, 0.5),
        (Time(100, False), Time(100, False), 1.0, 0.5),
        (Time(80, False), Time(100, False), 1.0, 0.5),
    ],
)
def test_a_pair_says_no_more_than_is_known(own: Time, reference: Time, ratio: float, wins: float) -> None:
    assert statistics.log_ratio(own, reference) == pytest.approx(math.log(ratio))
    assert statistics.faster(own, reference) == wins
    assert statistics.faster(reference, own) == 1 - wins


# ---------------------------------------------------------------- intervals


def test_below_ten_seeds_an_interval_is_that_of_the_t_distribution() -> None:
    found = statistics.mean_interval([[0.0, 0.1, 0.2, 0.3, 0.4]])
    assert found is not None and (found.method, found.n) == ("t", 5)
    # Standard error sqrt(0.025 / 5) = 0.070711; 2.776445 of it at four degrees of freedom.
    assert (found.estimate, found.low, found.high) == pytest.approx((0.2, 0.2 - 0.196324, 0.2 + 0.196324), abs=1e-5)
    ratio = statistics.ratio_interval([[0.0, 0.1, 0.2, 0.3, 0.4]])
    assert ratio is not None
    assert (ratio.estimate, ratio.low) == pytest.approx((math.exp(0.2), math.exp(0.003676)), rel=1e-4)


def test_strata_count_alike_and_vary_each_by_itself() -> None:
    found = statistics.mean_interval([[0.0, 2.0], [11.0, 13.0]])
    # Means 1 and 12; variances 2 over 2 seeds, so the mean of the means has sqrt(1 + 1) / 2 = 0.707107; degrees of
    # freedom (1 + 1)^2 / (1/1 + 1/1) = 2, so 4.302653 of it. That 12 is far from 1 does not matter.
    assert found is not None
    assert (found.estimate, found.high - found.estimate) == pytest.approx((6.5, 3.042436), abs=1e-5)


def test_from_ten_seeds_on_intervals_are_bootstrapped() -> None:
    values = [0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.4, 0.4, 0.5, 0.6]
    found = statistics.mean_interval([values])
    assert found is not None and found.method == "BCa"
    # Standard deviation 0.141774 (of 10), so about 1.96 * 0.141774 / sqrt(10) = 0.0879 on either side of 0.33; a little
    # to the right, for the data lean there. Means are multiples of 0.01.
    assert found.low == pytest.approx(0.33 - 0.0879, abs=0.0125)
    assert found.high == pytest.approx(0.33 + 0.0879, abs=0.0125)
    assert found == statistics.mean_interval([values])


def test_there_is_no_interval_of_one_seed_and_none_of_the_median_that_does_not_exist() -> None:
    assert statistics.mean_interval([[0.3]]) is None
    assert statistics.mean_interval([[0.3, 0.2], [0.1]]) is None
    assert statistics.median_interval(reached(1, 2, 3) + missed(9, 9)) is None  # below ten: every seed must be there
    assert statistics.median_interval(reached(1, 2, 3, 4, 5) + missed(*[9] * 5)) is None


def test_the_interval_of_a_median_ends_at_the_budget_where_it_may_lie_beyond() -> None:
    found = statistics.median_interval(reached(10, 12, 15, 20, 25, 30) + missed(*[100] * 4))
    assert found is not None
    assert found.estimate == 27.5  # between the fifth and the sixth of ten
    assert found.low >= 10 and found.high == 100


def test_values_that_are_all_equal_have_an_interval_without_width() -> None:
    found = statistics.ratio_interval([[math.log(2.0)] * 10])
    assert found is not None
    assert (found.estimate, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert found.method == "all equal"
    steps = statistics.median_interval(reached(*[50] * 8, 55, 60))
    assert steps is not None and (steps.low, steps.estimate) == (50, 50) and steps.high <= 55


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("strata", "p"),
    [
        ([[1.0, 2.0, 3.0]], 2 / 8),  # all plus or all minus, of eight choices of signs
        ([[1.0, 2.0, -3.0]], 1.0),
        ([[3.0, 1.0, -1.0]], 6 / 8),  # |sum| 3 or more: not where 3 stands against 1 and 1
        ([[0.0, 0.0]], 1.0),
        ([[0.1] * 8], 2 / 256),
        ([[1.0], [2.0, 2.0]], 2 / 8),  # pairs of the second count half, so three ones
    ],
)
def test_the_sign_flip_test_counts_the_choices_of_signs(strata: list[list[float]], p: float) -> None:
    assert statistics.sign_flip(strata) == pytest.approx(p)


def test_the_sign_flip_test_is_the_permutation_test_of_scipy() -> None:
    generator = np.random.default_rng(1)
    for count, close in ((9, 1e-12), (20, 0.02)):  # all choices of signs, and many at random
        values = generator.normal(0.2, 0.5, count)
        known = stats.permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=20_000, random_state=generator
        )
        assert statistics.sign_flip([values.tolist()]) == pytest.approx(known.pvalue, abs=close)


def test_eight_seeds_are_the_least_at_which_six_tests_can_reach_five_percent() -> None:
    assert min(statistics.holm([statistics.sign_flip([[1.0] * 8])] * 6)) <= 0.05
    assert min(statistics.holm([statistics.sign_flip([[1.0] * 7])] * 6)) > 0.05


def test_holm_multiplies_the_smallest_by_all_the_next_by_one_less() -> None:
    # 0.01 * 3; 0.03 * 2; then 0.04 * 1, which may not come below the one before it.
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


# ---------------------------------------------------------------- profiles


def test_slowdowns_are_times_over_the_fastest_and_infinite_for_a_miss() -> None:
    times = {"a": Time(20, True), "b": Time(50, True), "c": Time(10, False)}
    assert statistics.slowdowns(times) == {"a": 1.0, "b": 2.5, "c": math.inf}
    assert statistics.slowdowns({"a": Time(9, False), "b": Time(9, False)}) == {"a": math.inf, "b": math.inf}


def test_the_area_is_that_below_the_profile() -> None:
    slow = [1.0, 2.0, math.inf]
    tau, share = statistics.profile([slow], limit=4.0)
    assert (tau, share) == ([1.0, 2.0, 4.0], pytest.approx([1 / 3, 2 / 3, 2 / 3]))
    # In log tau: 1/3 over log 2, then 2/3 over log 2, of log 4 in all.
    areas = [statistics.profile_area(value, limit=4.0) for value in slow]
    assert areas == pytest.approx([1.0, 0.5, 0.0])
    assert sum(areas) / 3 == pytest.approx((1 / 3 * math.log(2) + 2 / 3 * math.log(2)) / math.log(4))


def test_benchmarks_count_alike_in_a_profile_however_many_problems_they_have() -> None:
    tau, share = statistics.profile([[1.0, 1.0, 1.0], [3.0]])
    assert (tau, share) == ([1.0, 3.0, 10.0], [0.5, 1.0, 1.0])


# ---------------------------------------------------------------- simulation


@pytest.mark.parametrize(("case", "seeds"), [("log-normal", 5), ("log-normal", 20), ("censored", 20)])
def test_intervals_of_ratios_cover_what_they_should(case: str, seeds: int) -> None:
    generator, repetitions = np.random.default_rng(seeds), 150
    truth = coverage.truth(case, 40_000)["ratio"]
    covered = 0
    for _ in range(repetitions):
        own, reference = coverage.draw(generator, seeds, [coverage.FASTER, 1.0], case)
        found = statistics.ratio_interval([coverage.log_ratios(own, reference)])
        assert found is not None
        covered += found.low <= truth <= found.high
    # 0.95 promised, BCa a little less; 150 repetitions are within 0.07 of what it is.
    assert 0.85 <= covered / repetitions <= 1.0
    assert covered < repetitions


def test_a_family_of_tests_is_seldom_wrong_and_finds_what_is_there() -> None:
    alike, faster = coverage.tests("log-normal", benchmarks=1, seeds=10, repetitions=150)
    assert alike["family_error"] <= 0.12 and faster["family_error"] <= 0.12
    assert faster["power"] >= 0.3
    pooled = coverage.tests("log-normal", benchmarks=4, seeds=5, repetitions=50)[1]
    assert pooled["power"] > faster["power"]


def test_the_committed_simulation_is_whole_and_its_table_is_made_from_it() -> None:
    found = json.loads((Path(coverage.__file__).parent / "results" / "coverage.json").read_text())
    assert list(found["parts"]) == [name for name, _ in coverage.parts()]
    assert found["rows"] == coverage.rows(found["parts"])
    assert all(row["repetitions"] >= 1000 for part in found["parts"].values() for row in part)
