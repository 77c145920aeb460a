"""What is judged of a study, and that its sentences can be recomputed from the records."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import synthetic_records as synthetic

from pipeline import aggregate, sentences, verdicts
from pipeline.config import ConfigError, Params
from pipeline.records import Run
from pipeline.statistics import Interval
from pipeline.verdicts import Comparison, Outcome, Verdicts

HARD = {  # optimizer -> hard step of each seed; None: missed
    "sgd": [200, 240, 220, 260, 200, 220, 240, 280, 200, 220],
    "adam": [100, 100, 110, 120, 100, 110, 90, 120, 100, 110],
    "kfac": [25, 30, 22, 40, 25, 22, 30, 24, 20, 44],
}


def a_run(benchmark: str, optimizer: str, seed: int, hard: int | None, **others: Any) -> Run:
    """Of 300 steps; a step takes 10 ms, of K-FAC 30 ms; the easy target falls at half of the steps of the hard one."""
    per_step = 0.03 if optimizer == "kfac" else 0.01
    summary = {
        "benchmark": benchmark,
        "optimizer": optimizer,
        "seed": seed,
        "status": "finished",
        "message": "",
        "steps": 300,
        "training_seconds": 300 * per_step,
        "easy_reached": hard is not None,
        "easy_step": hard and hard // 2,
        "easy_seconds": hard and hard // 2 * per_step,
        "hard_reached": hard is not None,
        "hard_step": hard,
        "hard_seconds": hard and hard * per_step,
        **others,
    }
    config = {"steps": 300, "seconds": None, "threads": 1, "protocol": "3"}
    return Run(Path("none"), config, {"device_name": "a CPU"}, [], [], summary)


def a_study(hard: dict[str, list[int | None]], benchmarks: tuple[str, ...] = ("toy_mlp",)) -> Any:
    return {
        benchmark: {
            name: [a_run(benchmark, name, seed, step) for seed, step in enumerate(steps)]
            for name, steps in hard.items()
        }
        for benchmark in benchmarks
    }


def asked(study: Any, seeds: int = 10) -> Params:
    return synthetic.params(tuple(study), tuple(next(iter(study.values()))), tuple(range(seeds)))


def judged(hard: dict[str, list[int | None]], benchmarks: tuple[str, ...] = ("toy_mlp",)) -> Verdicts:
    study = a_study(hard, benchmarks)
    return verdicts.judge(study, asked(study, max(map(len, hard.values()))))


def comparison(found: Verdicts, optimizer: str, reference: str, **others: str) -> Comparison:
    asked_for = {"benchmark": "toy_mlp", "target": "hard", "clock": "steps", **others}
    (only,) = [
        each
        for each in found.comparisons
        if (each.optimizer, each.reference) == (optimizer, reference)
        and all(getattr(each, name) == value for name, value in asked_for.items())
    ]
    return only


def outcome(found: Verdicts, optimizer: str, **others: str) -> Outcome:
    asked_for = {"target": "hard", "clock": "steps", "optimizer": optimizer, **others}
    return next(
        each for each in found.outcomes if all(getattr(each, name) == value for name, value in asked_for.items())
    )


def test_ten_paired_seeds_carry_a_verdict_on_one_benchmark_and_its_sentence_has_the_figures() -> None:
    found = comparison(judged(HARD), "kfac", "adam")
    pairs = list(zip(HARD["kfac"], HARD["adam"], strict=True))
    assert found.ratio is not None and found.ratio.method == "BCa"
    ratio = math.exp(sum(math.log(adam / kfac) for kfac, adam in pairs) / 10)
    assert found.ratio.estimate == pytest.approx(ratio)
    assert (found.pairs, found.faster) == (10, 1.0)
    # All ten signs agree: 2 of 1024 choices; twice that after Holm, for K-FAC and SGD stand against Adam.
    assert (found.p, found.p_holm) == (pytest.approx(2 / 1024), pytest.approx(4 / 1024))
    low, high = 1 / found.ratio.high, 1 / found.ratio.low
    assert found.sentence == (
        f"K-FAC reaches the hard target of toy_mlp in {1 / ratio:.2f} of Adam's steps (95% interval {low:.2f} to "
        f"{high:.2f}, 10 seeds, p = 0.0039 after Holm over 2 tests)."
    )
    assert found.sentence in judged(HARD).sentences


def test_each_clock_has_its_own_verdict() -> None:
    found = judged(HARD)
    steps, seconds = (comparison(found, "kfac", "adam", clock=clock) for clock in ("steps", "seconds"))
    assert steps.ratio is not None and seconds.ratio is not None
    assert seconds.ratio.estimate == pytest.approx(steps.ratio.estimate / 3)  # a step of K-FAC takes thrice as long
    assert "of Adam's seconds" in seconds.sentence


def test_nine_seeds_carry_no_verdict_on_one_benchmark_but_one_on_several() -> None:
    nine = {name: steps[:9] for name, steps in HARD.items()}
    found = judged(nine, ("toy_mlp", "digits_cnn"))
    single, pooled = comparison(found, "kfac", "adam"), comparison(found, "kfac", "adam", benchmark="all")
    assert (single.p, single.p_holm) == (None, None)
    assert single.ratio is not None and single.ratio.method == "t"
    assert single.sentence.endswith("9 seeds): no verdict on one benchmark below 10 seeds.")
    assert pooled.pairs == 18 and pooled.p is not None and pooled.p < 0.001
    assert "of 2 benchmarks in" in pooled.sentence and "9 seeds each" in pooled.sentence
    assert [each.benchmarks for each in found.speedups] == [["toy_mlp", "digits_cnn"]] * len(found.speedups)
    assert pooled.sentence in [each.sentence for each in found.speedups]


def test_three_seeds_carry_no_verdict_at_all_and_the_first_sentence_says_so() -> None:
    found = judged({name: steps[:3] for name, steps in HARD.items()}, ("toy_mlp", "digits_cnn"))
    assert found.sentences[0].startswith("No verdict: 3 seeds. ")
    assert all(each.p is None and each.sentence.startswith("No verdict: 3 seeds. ") for each in found.comparisons)


def test_a_difference_that_the_test_does_not_show_is_not_claimed() -> None:
    alike = {
        "sgd": [100, 110, 90, 120, 100, 95, 105, 115, 85, 100],
        "adam": [110, 100, 95, 110, 105, 100, 95, 120, 80, 105],
    }
    found = comparison(judged(alike), "adam", "sgd")
    assert found.p is not None and found.p > 0.2
    assert found.sentence.endswith(": no difference shown.")


def test_a_miss_counts_as_the_budget_and_makes_the_ratio_a_bound() -> None:
    steps: dict[str, list[int | None]] = {**HARD, "adam": [None, 150, *[100] * 8]}
    found = judged(steps)
    against = comparison(found, "kfac", "adam")
    ratio = math.exp(sum(math.log(a / k) for k, a in zip(HARD["kfac"], [300, 150, *[100] * 8], strict=True)) / 10)
    assert against.ratio is not None and against.ratio.estimate == pytest.approx(ratio)
    assert f"in at most {1 / ratio:.2f} of Adam's steps" in against.sentence
    assert "Adam misses it in 1 of 10 runs" in against.sentence
    assert "in at least" in comparison(found, "adam", "sgd").sentence
    adam = outcome(found, "adam")
    assert (adam.reached, adam.seeds, adam.median, adam.restricted_mean) == (9, 10, 100.0, (300 + 150 + 800) / 10)
    assert adam.horizon == 300


def test_times_beyond_the_seconds_of_a_miss_are_not_claimed_to_be_earlier() -> None:
    # Adam was given up after 3 s, K-FAC needs 6 s: by steps K-FAC wins, by seconds nobody knows.
    found = judged({"adam": [None] * 10, "kfac": [200] * 10})
    assert comparison(found, "kfac", "adam").faster == 1.0
    seconds = comparison(found, "kfac", "adam", clock="seconds")
    assert seconds.faster == 0.5 and seconds.p == 1.0
    assert "in 1 times Adam's seconds" in seconds.sentence and "10 pairs undecided" in seconds.sentence
    assert seconds.sentence.endswith(": no difference shown.")
    assert outcome(found, "kfac", clock="seconds").horizon == pytest.approx(3.0)


def test_a_bound_shows_no_difference_to_its_other_side() -> None:
    # K-FAC is slower in nine pairs; how much faster it is in the tenth, where Adam misses, nobody knows.
    found = judged({"adam": [*[100] * 9, None], "kfac": [*[200] * 9, 290]})
    against = comparison(found, "kfac", "adam")
    assert against.p is not None and against.p_holm is not None and against.p_holm < 0.05
    assert "in at most 1.8" in against.sentence and against.sentence.endswith(": no difference shown.")
    mirrored = comparison(judged({"kfac": [*[100] * 9, None], "adam": [*[200] * 9, 290]}), "kfac", "adam")
    assert "in at least 0.5" in mirrored.sentence and mirrored.sentence.endswith(": no difference shown.")


def test_misses_of_both_sides_bound_nothing_and_who_is_ahead_but_missed_alone_is_not_claimed_to_be() -> None:
    # In nine pairs K-FAC is four times as fast, once Adam misses; how much slower it is where it misses nobody knows.
    hard: dict[str, list[int | None]] = {"adam": [None, *[100] * 9], "kfac": [*[25] * 9, None]}
    found = comparison(judged(hard), "kfac", "adam")
    assert found.p_holm is not None and found.p_holm < 0.05
    assert found.ratio is not None and found.ratio.estimate > 2
    assert "at most" not in found.sentence and "at least" not in found.sentence
    assert "K-FAC misses it in 1 of 10 runs, Adam misses it in 1 of 10 runs" in found.sentence
    assert found.sentence.endswith(": no difference shown.")
    # Where both miss with the same seed neither is ahead there, and the other misses are of one side only.
    hard = {"adam": [None, None, *[100] * 8], "kfac": [None, *[25] * 9]}
    sentence = comparison(judged(hard), "kfac", "adam").sentence
    assert "in at most" in sentence and not sentence.endswith("no difference shown.")


def test_all_who_have_the_least_median_are_named_first() -> None:
    found = judged({"adam": [100] * 10, "kfac": [50] * 10, "ekfac": [50] * 10})
    assert (
        "First to the hard target of toy_mlp in steps are K-FAC and E-KFAC: a median of 50 steps, 10 and 10 of 10 "
        "seeds there." in found.sentences
    )
    against = [each for each in found.sentences if "Adam's steps" in each]
    assert {each.split()[0] for each in against} == {"K-FAC", "E-KFAC"}


def test_a_run_that_diverged_counts_no_longer_than_the_longest_one_where_nobody_spends_the_seconds() -> None:
    study = a_study({"sgd": HARD["sgd"], "adam": HARD["adam"]})
    broken = {"status": "diverged", "steps": 150, "training_seconds": 1.5, "message": "loss is nan"}
    study["toy_mlp"]["adam"][4] = a_run("toy_mlp", "adam", 4, 100, **broken)
    for run in (run for runs in study["toy_mlp"].values() for run in runs):
        run.config["seconds"] = 1000.0
    adam = outcome(verdicts.judge(study, asked(study)), "adam", clock="seconds")
    assert adam.horizon == pytest.approx(3.0)
    assert adam.restricted_mean == pytest.approx((sum(HARD["adam"]) - 100 + 300) * 0.01 / 10)


def test_an_optimizer_that_never_arrives_does_not_reach_it_in_so_many_steps() -> None:
    found = judged({"adam": [100] * 10, "kfac": [None] * 10})
    sentence = comparison(found, "kfac", "adam").sentence
    assert "does not reach the hard target of toy_mlp within the budget: at least 3 times Adam's steps" in sentence


def test_where_both_miss_everywhere_the_sentence_says_neither() -> None:
    found = comparison(judged({"sgd": [None] * 10, "adam": [None] * 10}), "adam", "sgd")
    assert found.faster == 0.5
    assert found.sentence == "Neither Adam nor SGD reaches the hard target of toy_mlp within the budget (10 seeds)."


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_run_that_did_not_finish_is_a_miss_even_after_the_target_and_is_listed(status: str) -> None:
    study = a_study({"sgd": HARD["sgd"], "adam": HARD["adam"]})
    broken = {"status": status, "steps": 150, "training_seconds": 1.5, "message": "loss is nan"}
    study["toy_mlp"]["adam"][4] = a_run("toy_mlp", "adam", 4, 100, **broken)
    found = verdicts.judge(study, asked(study))
    adam = outcome(found, "adam")
    assert (adam.reached, adam.restricted_mean) == (9, (sum(HARD["adam"]) - 100 + 300) / 10)
    assert found.missing == [f"toy_mlp, adam, seed 4: {status} after 150 steps: loss is nan"]


def test_records_that_are_not_there_are_listed_and_only_common_seeds_are_paired() -> None:
    study = a_study({"sgd": HARD["sgd"], "adam": HARD["adam"][:8]})
    found = verdicts.judge(study, asked(study))
    assert found.missing == [f"toy_mlp, adam, seed {seed}: no record" for seed in (8, 9)]
    assert comparison(found, "adam", "sgd").pairs == 8


def test_a_target_that_initial_weights_meet_is_not_judged() -> None:
    study = a_study({"sgd": [200, 240], "adam": [100, 120]})
    study["toy_mlp"]["sgd"][0].summary.update(easy_step=0, easy_seconds=0.0)
    found = verdicts.judge(study, asked(study, 2))
    assert {each.target for each in found.outcomes} == {"hard"}
    assert found.missing == ["toy_mlp: initial weights meet the easy target; it is not judged"]


def test_runs_of_different_machines_are_refused() -> None:
    study = a_study({"sgd": HARD["sgd"], "adam": HARD["adam"]})
    study["toy_mlp"]["adam"][3].environment["device_name"] = "another CPU"
    with pytest.raises(ConfigError, match="toy_mlp: runs that cannot stand in one table: device_name is"):
        verdicts.judge(study, asked(study))


def test_refinements_of_kfac_are_compared_with_it_and_all_with_sgd_and_adam() -> None:
    found = judged({**HARD, "ekfac": HARD["kfac"], "gkfac": HARD["kfac"]})
    against = {
        name: {each.optimizer for each in found.comparisons if each.reference == name} for name in verdicts.REFERENCES
    }
    assert against == {
        "sgd": {"adam", "kfac", "ekfac", "gkfac"},
        "adam": {"sgd", "kfac", "ekfac", "gkfac"},
        "kfac": {"ekfac", "gkfac"},
    }
    assert comparison(found, "gkfac", "kfac").sentence.endswith("p = 1 after Holm over 2 tests): no difference shown.")


def test_profiles_are_over_benchmarks_targets_and_seeds_with_their_area() -> None:
    found = judged({"sgd": [100] * 10, "adam": [50] * 9 + [None]}, ("toy_mlp", "digits_cnn"))
    sgd, adam = (next(each for each in found.profiles if each.optimizer == name) for name in ("sgd", "adam"))
    assert adam.area is not None and sgd.area is not None
    assert adam.area.estimate == pytest.approx(0.9) and adam.tau == [1.0, 10.0]
    assert (sgd.tau, sgd.share) == ([1.0, 2.0, 10.0], pytest.approx([0.1, 1.0, 1.0]))
    assert sgd.area.estimate == pytest.approx(0.1 + 0.9 * (1 - math.log10(2)))
    assert adam.area.low < 0.9 < adam.area.high <= 1.0


def test_verdicts_are_strict_json_the_same_each_time_and_name_the_protocol() -> None:
    steps: dict[str, list[int | None]] = {**HARD, "adam": [None] * 6 + [100] * 4}
    texts = [json.dumps(dataclasses.asdict(judged(steps)), allow_nan=False) for _ in range(2)]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["protocol"] == "3"


def test_the_first_sentences_of_a_whole_study_can_be_recomputed_from_its_records(tmp_path: Path) -> None:
    chosen = synthetic.params(("toy_mlp", "digits_autoencoder"), ("sgd", "adam", "kfac"), tuple(range(5)))
    study = aggregate.collect(chosen, synthetic.write_study(tmp_path, chosen))
    found = verdicts.judge(study, chosen)
    sentence = next(each for each in found.sentences if "Adam's steps" in each and "2 benchmarks" in each)
    means = []
    for benchmark in chosen.benchmarks:
        steps = {
            name: [
                json.loads((tmp_path / benchmark / name / f"seed-{seed}" / "summary.json").read_text())["hard_step"]
                for seed in range(5)
            ]
            for name in ("adam", "kfac")
        }
        ratios = [math.log(adam / kfac) for adam, kfac in zip(steps["adam"], steps["kfac"], strict=True)]
        means.append(sum(ratios) / 5)
    share = math.exp(-sum(means) / 2)
    assert float(re.findall(r"in ([\d.]+) of Adam's steps", sentence)[0]) == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(4.35, "in 0.23 of Adam's steps"), (0.5, "in 2 times Adam's steps"), (25.0, "in 0.04 of"), (1.0, "in 1 times")],
)
def test_a_share_below_one_is_a_part_and_above_one_a_multiple(ratio: float, words: str) -> None:
    text = sentences.comparison(
        optimizer="kfac",
        reference="adam",
        target="hard",
        clock="steps",
        benchmarks=["digits_cnn"],
        seeds=10,
        misses=(0, 0),
        alone=(0, 0),
        undecided=0,
        pairs=10,
        ratio=Interval(ratio, ratio / 2, ratio * 2, 0.95, "BCa", 10),
        p_holm=0.0001,
        tests=6,
    )
    assert words in text and "p < 0.001 after Holm over 6 tests" in text
