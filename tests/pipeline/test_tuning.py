"""Claims about tuning: the right trial is chosen, and what is kept and written follows from it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ruamel.yaml import YAML
from synthetic_records import write_study

from pipeline import (
    checkpoint,
    evidence,
    imagefiles,
    metrics,
    ray_engine,
    records,
    selection,
    settings,
    tracking,
    trials,
    tune,
    tuning_evidence,
)
from pipeline.checks import ConfigError
from pipeline.composition import compose
from pipeline.config import load, resolve
from pipeline.search import Dimension
from pipeline.selection import Judged
from pipeline.store import place
from pipeline.trials import Choice, all_trials
from pipeline.validation import available

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


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[trials.Pair, list[trials.Trial]], Path]:
    """Two trials of SGD, which miss the targets, and of K-FAC, whose second is the quicker, and their records."""
    folder = tmp_path_factory.mktemp("recorded")
    asked = all_trials(Choice(("toy_linear",), ("sgd", "kfac"), 2, (1000,)), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "FOLDER", folder / "trials")
        for trial in [trial for of in asked.values() for trial in of]:
            compose(folder / "params.yaml", list(trial.overrides))
            write_study(folder / "results", load(folder / "params.yaml"))
            if trial.number == 2:
                summary = folder / "results" / "toy_linear" / trial.optimizer / "seed-1000" / "summary.json"
                found = json.loads(summary.read_text())
                summary.write_text(json.dumps(found | {"hard_seconds": 0.5 * (found["hard_seconds"] or 0.0)}))
            trial.keep(folder / "results")
    return asked, folder / "trials"


@pytest.fixture
def tuned(
    recorded: tuple[dict[trials.Pair, list[trials.Trial]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[trials.Pair, list[trials.Trial]]:
    """The same, for the test to change."""
    shutil.copytree(recorded[1], tmp_path / "trials")
    monkeypatch.setattr(trials, "FOLDER", tmp_path / "trials")
    return recorded[0]


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


class FakeRay:
    """Ray as far as the engine calls it: a task brings `files`, but for the first times that `lost` has of it."""

    class exceptions:
        RayError, RayTaskError = OSError, RuntimeError

    def __init__(self, files: dict[str, dict[str, bytes]], lost: dict[str, int]) -> None:
        self.files, self.lost, self.given = files, lost, itertools.count()

    def remote(self, **options: Any) -> Any:
        return lambda function: SimpleNamespace(
            options=lambda name: SimpleNamespace(remote=lambda *_: self._give(name))
        )

    def _give(self, name: str) -> tuple[str, int]:
        return name, next(self.given)

    def wait(self, tasks: list[Any]) -> Any:
        return tasks[:1], tasks[1:]

    def get(self, task: tuple[str, int]) -> dict[str, bytes]:
        if self.lost[task[0]]:
            self.lost[task[0]] -= 1
            raise OSError("the worker died")
        return self.files[task[0]]

    def cluster_resources(self) -> dict[str, float]:
        return {}

    def shutdown(self) -> None: ...


def taken(of: list[trials.Trial]) -> dict[str, dict[str, bytes]]:
    """Take the records of these trials away: what their tasks bring, by name."""
    files = {}
    for trial in of:
        folder = trial.folder / "seed-1000"
        pair = f"{trial.benchmark}/{trial.optimizer}"
        files[trial.name] = {f"{pair}/seed-1000/{path.name}": path.read_bytes() for path in folder.iterdir()}
        shutil.rmtree(trial.folder)
    return files


def test_with_ray_a_trial_without_records_is_asked_for_again_three_times_at_most(
    tuned: dict[trials.Pair, list[trials.Trial]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of = [*tuned["toy_linear", "sgd"], tuned["toy_linear", "kfac"][0]]
    files = taken(of)
    ray = FakeRay(files, dict(zip(files, (0, 1, 9), strict=True)))
    monkeypatch.setattr(ray_engine, "_connect", lambda workers: ray)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")  # the nodes' runs are there already
    over: list[trials.Trial] = []
    asked = ray_engine.train(of, 1, over.append)
    assert [asked[trial.name] for trial in of] == [1, 2, 3] and over == of[:2]
    assert [trial.records() is not None for trial in of] == [True, True, False]
    assert capsys.readouterr().err.count("the worker died") == 1 + 3


def test_records_that_cannot_be_kept_end_a_tuning_in_one_line(
    tuned: dict[trials.Pair, list[trials.Trial]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = taken(tuned["toy_linear", "sgd"])
    monkeypatch.setattr(ray_engine, "_connect", lambda workers: FakeRay(files, dict.fromkeys(files, 0)))
    monkeypatch.setattr("pipeline.recover.Recovery.needed", lambda self: False)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    no_folder = tmp_path / "no folder"
    no_folder.touch()
    monkeypatch.setattr(trials, "FOLDER", no_folder)
    words = "--benchmarks toy_linear --optimizers sgd --trials 2 --seeds 1000 --engine ray"
    with pytest.raises(SystemExit) as end:
        tune.main(words.split())
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"error: {no_folder}/toy_linear/sgd/")
    assert line.endswith("/seed-1000: Not a directory; the same command goes on")


@pytest.mark.parametrize("address", [None, "sqlite:///mlflow.db"])
def test_with_ray_a_store_that_is_a_file_gets_its_runs_on_this_machine(
    address: str | None, root: Path, tuned: dict[trials.Pair, list[trials.Trial]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    [trial, _] = tuned["toy_linear", "sgd"]
    ray = FakeRay(taken([trial]), {trial.name: 0})
    monkeypatch.setattr(ray_engine, "_connect", lambda workers: ray)
    ray_engine.train([trial], 1, lambda _: None)
    store = tracking.Store()
    runs = [run for experiment in store.experiments() for run in store.runs(experiment.experiment_id)]
    assert [run.data.tags["records"] for run in runs] == [metrics.records_hash(trial.folder / "seed-1000")]


@pytest.mark.parametrize("settings", [(), ("image_folder=images",)], ids=["IMAGE_FOLDER", "image_folder"])
def test_relative_paths_are_the_same_on_a_node_of_ray(
    settings: tuple[str, ...], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [[trial]] = all_trials(Choice(("toy_linear",), ("sgd",), 1, (1000,), settings=settings), {}).values()
    for name in ("images", "node"):
        (root / name).mkdir()
    monkeypatch.setenv("IMAGE_FOLDER", "" if settings else "images")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    params = ray_engine._params(trial)
    assert ray_engine._variables(trial, params)["MLFLOW_TRACKING_URI"] == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    variables = {**ray_engine._variables(trial, params), "DVC_ROOT": str(root / "node")}
    (root / "node" / "params.yaml").write_text(params)
    monkeypatch.chdir(root / "node")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert imagefiles.image_folder() == root / "images"
    assert place().database == root / "node" / "mlflow.db"  # from where its runs come here as records


# ---------------------------------------------------------------- settings


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "pipeline" / "conf", tmp_path / "conf")
    return tmp_path / "conf"


@pytest.mark.parametrize("optimizer", available("optimizer"))
def test_a_written_setting_holds_for_its_benchmark_alone_and_comments_stay(conf: Path, optimizer: str) -> None:
    file, yaml = conf / "optimizer" / f"{optimizer}.yaml", YAML(typ="safe", pure=True)
    before, text = yaml.load(file), file.read_text()
    name = "relative_damping" if "kfac" in optimizer else "lr"
    fields = {
        (optimizer, name): (0.0123, None),
        (optimizer, "training", "schedule"): ("cosine", None),
        (optimizer, "eps"): (1e-6, 1e-8),
    }
    assert settings.write(file, "toy_mlp", fields)
    after = yaml.load(file)
    old = before[optimizer][name]
    others = {k: v for k, v in old.items() if k != "toy_mlp"} if isinstance(old, dict) else {"default": old}
    assert after[optimizer][name] == others | {"toy_mlp": 0.0123}
    assert after[optimizer]["training"]["schedule"] == {"default": None, "toy_mlp": "cosine"}
    old = before[optimizer].get("eps", 1e-8)
    others = {k: v for k, v in old.items() if k != "toy_mlp"} if isinstance(old, dict) else {"default": old}
    assert after[optimizer]["eps"] == others | {"toy_mlp": 1e-6}
    touched = (name, "eps", "training")
    assert {k: v for k, v in after[optimizer].items() if k not in touched} == {
        k: v for k, v in before[optimizer].items() if k not in touched
    }
    comments = [line.partition("#")[2].strip() for line in text.splitlines() if "#" in line]
    assert all(comment in file.read_text() for comment in comments)
    assert max(map(len, file.read_text().splitlines())) <= 130
    assert not settings.write(file, "toy_mlp", fields)


def test_what_was_written_is_what_a_run_resolves_to(conf: Path, tmp_path: Path) -> None:
    file = conf / "optimizer" / "adam.yaml"
    settings.write(file, "digits_cnn", {("adam", "betas"): ([0.95, 0.98], None), ("adam", "lr"): (0.02, None)})
    values = YAML(typ="safe", pure=True).load(file)["adam"]
    compose(tmp_path / "before.yaml", ["optimizer=adam"])
    params = load(tmp_path / "before.yaml")
    after = type(params)(**{**vars(params), "optimizers": {"adam": values}})
    assert resolve(after, "digits_cnn", "adam").options["betas"] == [0.95, 0.98]
    for name in ("toy_linear", "digits_autoencoder"):
        assert resolve(after, name, "adam") == resolve(params, name, "adam")


@pytest.mark.parametrize(
    ("dimension", "side", "ends"),
    [
        (LR, "high", (0.001, 31.6)),
        (LR, "low", (3.16e-05, 1.0)),
        (Dimension("max_decrease", "log", (0.1, 0.9)), "high", (0.1, 1.0)),
        (Dimension("max_decrease", "log", (0.1, 1.0)), "high", (0.1, 1.0)),
        (Dimension("momentum", "linear", (0.8, 0.98)), "high", (0.8, 0.99)),
        (Dimension("momentum", "linear", (0.2, 0.8)), "low", (0.0, 0.8)),
        (Dimension("rest.lr", "log", (0.001, 0.1)), "high", (0.001, 1.0)),
    ],
)
def test_a_range_widens_by_half_of_itself_as_far_as_its_values_are_allowed(
    dimension: Dimension, side: str, ends: tuple[float, float]
) -> None:
    assert tune._allowed(dimension.field, dimension.ends, dimension.widened(side)) == pytest.approx(ends, rel=0.01)


def test_ranges_widen_where_the_last_tuning_ended_at_an_edge_and_only_once(
    conf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "CONF", conf)
    monkeypatch.setattr(trials, "SEARCH", conf / "search")
    choice = Choice(("toy_linear", "toy_mlp"), ("sgd",), 2, (1000,))
    best = {"values": {"lr": 2.9}, "edge": ["lr: high"]}
    before = {("toy_linear", "sgd"): {"ranges": {"lr": [0.003, 3.0]}, "trials": [best], "chosen": best["values"]}}
    assert tune.widen(all_trials(choice, {}), before, dry=True)
    assert all_trials(choice, {})["toy_linear", "sgd"][0].space[0].ends == (0.003, 3.0)
    assert tune.widen(all_trials(choice, {}), before, dry=False)
    assert "search.sgd.lr of toy_linear: [0.003, 3.0] is now [0.003, 94.9]" in capsys.readouterr().out
    asked = all_trials(choice, {})
    assert asked["toy_linear", "sgd"][0].space[0].ends == (0.003, 94.9)
    assert asked["toy_mlp", "sgd"][0].space[0].ends == (0.003, 3.0)
    assert not tune.widen(asked, before, dry=False)
