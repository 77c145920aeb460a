"""Claims about tuning: the right trial is chosen, and what is kept and written follows from it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import (
    checkpoint,
    evidence,
    records,
    selection,
    trials,
    tune,
    tuning_evidence,
)
from pipeline.checks import ConfigError
from pipeline.search import Dimension
from pipeline.selection import Judged
from pipeline.trials import Choice, all_trials

ROOT = Path(__file__).parents[2]
LR = Dimension("lr", "log", (0.001, 1.0))
BETAS = Dimension("betas", "choice", choices=([0.9, 0.99], [0.9, 0.999], [0.95, 0.999]))


# ---------------------------------------------------------------- the choice


def a_trial(
    hard: float = math.inf, easy: float = math.inf, loss: float = 1.0, diverged: bool = False, lr: float = 0.1
) -> Judged:
    seconds = {"easy": easy, "hard": hard}
    return Judged({"lr": lr}, seconds, seconds, loss, diverged, 9.0)


@pytest.mark.parametrize(
    ("of", "won", "target"),
    [
        ([a_trial(3, 1), a_trial(2, 2), a_trial(4, 0.5)], 1, "hard"),
        ([a_trial(easy=1, loss=0.1), a_trial(hard=8, easy=7)], 1, "hard"),
        ([a_trial(easy=3), a_trial(easy=2), a_trial(loss=0.1)], 1, "easy"),
        ([a_trial(loss=0.3), a_trial(loss=0.2), a_trial(loss=math.inf)], 1, None),
        ([a_trial(2, 1), a_trial(2, 1)], 0, "hard"),  # a tie is the shipped setting's
        ([a_trial(2, 1, loss=0.2), a_trial(2, 1, loss=0.1)], 1, "hard"),
        ([a_trial(2, 1, diverged=True), a_trial(5, 4)], 1, "hard"),
        ([a_trial(2, 1, loss=0.1, diverged=True), a_trial(loss=0.5)], 1, None),
        ([a_trial(diverged=True), a_trial(diverged=True)], 0, None),
    ],
)
def test_the_quickest_to_the_hard_target_wins_then_the_easy_one_then_the_loss(
    of: list[Judged], won: int, target: str | None
) -> None:
    assert (selection.ranked(of)[0], selection.target(of)) == (won, target)


def test_a_run_that_diverged_after_the_target_is_a_miss_and_so_is_a_trial_without_a_record() -> None:
    summary = {
        "status": "diverged", "best_validation_loss": None, "training_seconds": 3.0, "easy_reached": True,
        "easy_seconds": 1.0, "easy_step": 10, "hard_reached": True, "hard_seconds": 2.0, "hard_step": 20,
    }  # fmt: skip
    run = records.Run(Path(), {}, {}, [], [], summary)
    found = selection.judged({"lr": 1.0}, [run])
    assert found.diverged and found.seconds == {"easy": math.inf, "hard": math.inf} and found.best_loss == math.inf
    fine = records.Run(Path(), {}, {}, [], [], {**summary, "status": "finished", "best_validation_loss": 0.5})
    assert selection.judged({}, [fine]).seconds == {"easy": 1.0, "hard": 2.0}
    assert selection.judged({}, [fine, fine, run]).steps["hard"] == 20  # the median over seeds
    assert selection.judged({}, [fine, run]).steps["hard"] == math.inf
    nothing = selection.judged({}, [])
    assert nothing.seconds["easy"] == math.inf and nothing.best_loss == math.inf and not nothing.diverged


def a_run(step: int | None, status: str = "finished") -> records.Run:
    """A seed that reached both targets at this step, a second each, or none."""
    summary: dict[str, Any] = {"status": status, "best_validation_loss": 0.5, "training_seconds": 90.0}
    for target in ("easy", "hard"):
        summary |= {f"{target}_reached": step is not None, f"{target}_step": step, f"{target}_seconds": step}
    return records.Run(Path(), {}, {}, [], [], summary)


QUICK, SURE, NONE = ([a_run(step) for step in steps] for steps in ((10, 10, None), (30, 30, 30), (None, None, None)))
BLOWN = [a_run(5), a_run(5), a_run(None, "diverged")]


def test_a_setting_that_some_seeds_do_not_bear_is_behind_a_slower_one_that_all_do() -> None:
    of = [selection.judged({}, runs) for runs in ([], NONE, QUICK, SURE, BLOWN)]
    assert selection.ranked(of) == [3, 2, 1, 0, 4]
    assert selection.ranked(of[:3])[0] == 2


@pytest.mark.parametrize(
    ("value", "edge"),
    [(0.001, "lr: low"), (0.0015, "lr: low"), (0.1, None), (0.9, "lr: high"), (2.5, "lr: high"), (0.0001, "lr: low")],
)
def test_the_outermost_tenth_of_a_range_and_what_lies_beyond_is_its_edge(value: float, edge: str | None) -> None:
    assert LR.edge(value) == edge


def test_choices_have_no_edge() -> None:
    assert BETAS.edge([0.9, 0.99]) is None


@pytest.mark.parametrize(
    "of",
    [
        [a_trial(3.0), a_trial(1.0), a_trial(2.0), a_trial(7.5), a_trial(2.0)],
        [a_trial(3.0), a_trial(), a_trial(2.0), a_trial(1.0, diverged=True)],
        [a_trial(easy=4.0), a_trial(easy=1.5), a_trial()],
        [selection.judged({}, runs) for runs in (QUICK, SURE, NONE, BLOWN)],
    ],
)
def test_the_budget_curve_is_the_mean_of_what_is_chosen_of_all_draws_without_repetition(of: list[Judged]) -> None:
    target, longest = selection.target(of), max(trial.trained for trial in of)
    assert target is not None
    for point in selection.budget_curve(of):
        draws = itertools.combinations(of, point["trials"])
        chosen = [draw[selection.ranked(draw)[0]] for draw in draws]
        hits = [not t.diverged and math.isfinite(t.seconds[target]) for t in chosen]
        times = [t.seconds[target] if hit else longest for t, hit in zip(chosen, hits, strict=True)]
        assert point["expected"] == pytest.approx(statistics.fmean(times))
        assert point["reached"] == pytest.approx(statistics.fmean(hits))


def test_without_a_trial_that_reached_a_target_there_is_nothing_to_expect() -> None:
    curve = selection.budget_curve([a_trial(), a_trial(diverged=True)])
    assert curve == [{"trials": k, "expected": None, "reached": 0.0} for k in (1, 2)]


# ---------------------------------------------------------------- records and evidence


def test_a_record_is_found_if_it_is_whole_and_of_the_very_configuration(
    tuned: dict[trials.Pair, list[trials.Trial]], tmp_path: Path
) -> None:
    first, second = tuned["toy_linear", "sgd"]
    found = first.records()
    assert found is not None and found[0].config["options"]["lr"] == first.values["lr"] == 0.04
    shutil.rmtree(first.folder)
    shutil.copytree(second.folder, first.folder)  # of another learning rate
    assert first.records() is None
    (second.folder / "seed-1000" / "summary.json").write_text("{")
    assert second.records() is None
    again = all_trials(Choice(("toy_linear",), ("kfac",), 2, (1000,)), {})["toy_linear", "kfac"]
    assert all(trial.records() for trial in again)
    other = all_trials(Choice(("toy_linear",), ("kfac",), 2, (1000,), settings=("threads=2",)), {})[
        "toy_linear", "kfac"
    ]
    assert not any(trial.records() for trial in other)


def test_changed_code_finds_no_old_record_that_of_the_data_neither(
    recorded: tuple[dict[trials.Pair, list[trials.Trial]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kfac", "pipeline"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "pipeline" / "checkpoint.py"))
    monkeypatch.setattr(trials, "_code", trials._code.__wrapped__)  # each time anew
    planted = recorded[0]["toy_linear", "sgd"][0]
    digits = replace(planted, run=replace(planted.run, data={"source": "digits"}))
    assert replace(planted).key == planted.key
    for file, changes in (
        ("pipeline/views.py", (False, False)),
        ("pipeline/loop.py", (True, True)),
        ("pipeline/toy.py", (True, False)),
        ("pipeline/imagefiles.py", (False, True)),
    ):
        before = [replace(trial).key for trial in (planted, digits)]
        with (tmp_path / file).open("a") as text:
            text.write("# changed\n")
        after = [replace(trial).key for trial in (planted, digits)]
        assert tuple(one != other for one, other in zip(before, after, strict=True)) == changes, file


def test_records_of_another_configuration_are_not_taken(
    tuned: dict[trials.Pair, list[trials.Trial]], tmp_path: Path
) -> None:
    first, second = tuned["toy_linear", "sgd"]
    shutil.copytree(second.folder, tmp_path / "results" / "toy_linear" / "sgd")
    with pytest.raises(ConfigError, match="is the record of another configuration than toy_linear sgd trial 1"):
        first.keep(tmp_path / "results")


def an_evidence(of: list[trials.Trial], before: dict[str, Any] | None = None) -> dict[str, Any]:
    choice = Choice(("toy_linear",), ("sgd", "kfac"), 2, (1000,))
    return tuning_evidence.evidence(choice, of, [trial.records() or [] for trial in of], before)


def test_evidence_has_what_the_choice_was_made_from(
    tuned: dict[trials.Pair, list[trials.Trial]], tmp_path: Path
) -> None:
    of = tuned["toy_linear", "kfac"]
    found = an_evidence(of)
    assert [trial["values"] for trial in found["trials"]] == [trial.values for trial in of]
    times = [trial["seconds_to_target"] for trial in found["trials"]]
    assert times[1] == 0.5 * times[0]
    assert found["target"] == "hard" and found["chosen"] == of[1].values and not found["won_by_first"]
    assert [point["expected"] for point in found["budget_curve"]] == [0.75 * times[0], times[1]]
    assert found["ranges"] == {"relative_damping": [0.01, 3.0], "max_decrease": [0.1, 1.0]}
    assert found["trials_before_widening"] == 0 and found["seeds"] == [1000]
    tuning_evidence.write(found, tmp_path / "tuning")
    assert tuning_evidence.read(tmp_path / "tuning") == {("toy_linear", "kfac"): found}
    assert an_evidence(of, found) == found  # the same command again
    assert (
        an_evidence(of, {**found, "ranges": {**found["ranges"], "max_decrease": [0.2, 1.0]}})["trials_before_widening"]
        == 2
    )


def followed(found: dict[str, Any]) -> dict[str, Any]:
    """What the rules of docs/tuning.md choose, from the file alone."""

    def order(place: int) -> tuple[float, ...]:
        trial = found["trials"][place]
        late: list[float] = []
        for target in ("hard", "easy"):
            seconds = trial["seconds_to_target"] if target == found["target"] else None
            late += [trial["missed"][target], math.inf if seconds is None else seconds]
        return (trial["diverged"], *late, math.inf if trial["best_loss"] is None else trial["best_loss"], place)

    return found["trials"][min(range(len(found["trials"])), key=order)]["values"]


def test_the_choice_follows_from_the_file_also_where_a_quicker_trial_lost_a_seed(
    tuned: dict[trials.Pair, list[trials.Trial]],
) -> None:
    choice = Choice(("toy_linear",), ("kfac",), 2, (1000, 1001, 1002))
    first, second = tuned["toy_linear", "kfac"]
    for runs, won in (([QUICK, SURE], second), ([QUICK, NONE], first), ([BLOWN, QUICK], second), ([[], BLOWN], first)):
        found = tuning_evidence.evidence(choice, [first, second], runs, None)
        assert found["chosen"] == followed(found) == won.values
        assert found["budget_curve"][-1]["expected"] == evidence.winner(found)["seconds_to_target"]
    found = tuning_evidence.evidence(choice, [first, second], [BLOWN, QUICK], None)
    assert [trial["missed"]["hard"] for trial in found["trials"]] == [1, 1]
    assert evidence.reached(found) == 1 and "| kfac | 2 | 1 | 1 | hard | 10 (10) |" in "\n".join(
        tuning_evidence.tables([found])
    )


@pytest.mark.parametrize("pair", tuning_evidence.read(), ids="-".join)
def test_the_committed_choice_follows_from_its_file(pair: trials.Pair) -> None:
    found = tuning_evidence.read()[pair]
    assert found["chosen"] == followed(found)
    assert found["budget_curve"][-1]["expected"] == evidence.winner(found)["seconds_to_target"]


@pytest.mark.parametrize("declared", [True, False], ids=["searched by a file", "without a file"])
@pytest.mark.parametrize("grid", [False, True], ids=["sobol", "grid"])
@pytest.mark.parametrize("won", range(4))
def test_after_the_choice_was_written_the_same_command_has_the_same_trials(
    declared: bool, grid: bool, won: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not declared:
        monkeypatch.setattr(trials, "SEARCH", tmp_path)
    choice, pair = Choice(("toy_linear",), ("sgd",), 4, (1000,), grid=grid), ("toy_linear", "sgd")
    first = all_trials(choice, {})[pair]
    before = [trial.values for trial in first]
    earlier = {pair: {"chosen": before[won], "trials": [{"values": values} for values in before]}}
    written = replace(choice, settings=(f"optimizer.sgd.lr={before[won]['lr']}",))
    again = all_trials(written, earlier)[pair]
    assert [trial.values for trial in again] == before and again[0].space == first[0].space
    assert all(trial.shipped == before[won] for trial in again)
    assert all_trials(written, {})[pair][0].values == before[won]
    for other in (replace(written, grid=not grid), replace(written, trials=2)):  # what was chosen is never left out
        assert before[won] in [trial.values for trial in all_trials(other, earlier)[pair]]


def test_the_trials_of_the_committed_evidence_are_what_its_command_asks_for_today() -> None:
    found = tuning_evidence.read()
    benchmarks, optimizers = (tuple(dict.fromkeys(names)) for names in zip(*found, strict=True))
    for count, kind in {(len(each["trials"]), each["points"]) for each in found.values()}:
        asked = all_trials(Choice(benchmarks, optimizers, count, (1000,), grid=kind == "grid"), found)
        for pair, each in found.items():
            if (len(each["trials"]), each["points"]) == (count, kind):
                assert [trial.values for trial in asked[pair]] == [trial["values"] for trial in each["trials"]], pair


def test_the_page_has_the_tables_between_its_marks_and_keeps_the_rest(
    tuned: dict[trials.Pair, list[trials.Trial]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "tuning.md"
    monkeypatch.setattr(tuning_evidence, "PAGE", page)
    monkeypatch.setattr(tuning_evidence, "FIGURE", tmp_path / "images" / "tuning.svg")
    original = (ROOT / "docs" / "tuning.md").read_text()
    before, after = original.split(tuning_evidence.BEGIN)[0], original.split(tuning_evidence.END)[1]
    page.write_text(original)
    found = {pair: an_evidence(of) for pair, of in tuned.items()}
    tuning_evidence.publish(found)
    once = page.read_text()
    assert once.startswith(before) and once.endswith(after)
    assert "Trial 1, the shipped setting, won 1 of 2 times." in once
    assert "| sgd | 2 | 0 | 0 | none | - | lr 0.04 | yes |" in once and "| kfac | 2 | 2 | 0 | hard |" in once
    figure = (tmp_path / "images" / "tuning.svg").read_bytes()
    tuning_evidence.publish(found)
    assert page.read_text() == once and (tmp_path / "images" / "tuning.svg").read_bytes() == figure
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="has lost the lines"):
        tuning_evidence.publish(found)


def test_evidence_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "toy_linear").mkdir()
    (tmp_path / "toy_linear" / "sgd.json").write_text(json.dumps({"benchmark": "toy_linear"}))
    with pytest.raises(ConfigError, match=r"toy_linear/sgd\.json: cannot be read"):
        tuning_evidence.read(tmp_path)


@pytest.mark.parametrize(("budget", "seconds"), [(10.0, 30.0), (None, None)])
def test_without_records_a_trial_is_estimated_by_the_budget_of_all_its_seeds(
    budget: float | None, seconds: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [[trial]] = all_trials(Choice(("toy_linear",), ("sgd",), 1, (1000, 1001, 1002)), {}).values()
    monkeypatch.setattr("pipeline.composition.ROOT", tmp_path)
    assert tune._seconds("toy_linear", [replace(trial, run=replace(trial.run, seconds=budget))]) == seconds
