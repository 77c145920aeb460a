"""The MLflow store says what the records say: read back through MLflow's own interface."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import metrics, records, tracking, views
from pipeline.config import TARGETS, ConfigError, resolve
from pipeline.tracker import CLOCK_ZERO, POINTS
from tests.pipeline import synthetic_records as study

BENCHMARK = "digits_autoencoder"


def client(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root}/mlflow.db")


def runs(root: Path, benchmark: str = BENCHMARK) -> dict[str, Any]:
    experiment = client(root).get_experiment_by_name(benchmark)
    found = client(root).search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    named = {run.info.run_name: run for run in found}
    assert len(named) == len(found), "two runs of one name"
    return named


def chosen(*optimizers: str, seeds: tuple[int, ...] = (0,), **options: Any) -> Any:
    params = study.params(benchmarks=(BENCHMARK,), optimizers=optimizers, seeds=seeds)
    for optimizer in params.optimizers.values():
        optimizer.update(options)
    return params


def train(root: Path, params: Any, optimizer: str, seed: int = 0, **changes: Any) -> Path:
    """What the stage does: start, log at every evaluation, write the records, finish."""
    folder = study.write_record(root / "results", params, BENCHMARK, optimizer, seed, **changes)
    run = records.read_run(folder)
    tracker = tracking.start(resolve(params, BENCHMARK, optimizer), seed, run.environment)
    for row in run.history:
        tracker.log(row, [entry for entry in run.curvature if entry["step"] == row["step"]])
    tracker.finish(run.summary, folder)
    assert not tracker.lost
    return folder


def series(root: Path, run: Any, metric: str) -> list[tuple[int, float, float]]:
    """(step, training seconds, value) of every point."""
    points = client(root).get_metric_history(run.info.run_id, metric)
    return [(p.step, p.timestamp / 1000 - CLOCK_ZERO, p.value) for p in points]


def test_a_run_carries_every_evaluation_on_both_clocks(root: Path) -> None:
    folder = train(root, chosen("kfac"), "kfac")
    history = records.read_history(folder)
    run = runs(root)["kfac seed 0"]
    for column, metric in (
        ("train_loss", "loss/train"),
        ("lr", "optimizer/lr"),
        ("update_seconds", "time/update_seconds"),
    ):
        found = series(root, run, metric)
        assert [(step, value) for step, _, value in found] == [(row["step"], row[column]) for row in history]
        assert [seconds for _, seconds, _ in found] == pytest.approx(
            [row["training_seconds"] for row in history], abs=2e-3
        )


def test_a_run_says_how_it_computed_and_runs_that_differ_in_it_are_two_groups(root: Path) -> None:
    params = chosen("kfac", seeds=(0, 1))
    train(root, params, "kfac", 0)
    train(root, replace(params, precision="bf16"), "kfac", 1)
    single, half = (runs(root)[f"kfac seed {seed}"].data for seed in (0, 1))
    assert (single.params["precision"], half.params["precision"]) == ("fp32", "bf16")
    assert single.tags["comparability"] == half.tags["comparability"].replace("bf16", "fp32")
    assert "torch: 2.14.1" in half.tags["comparability"] and "threads: 2" in half.tags["comparability"]
    assert half.tags[views.GROUP_TAG] == "kfac precision=bf16"


def test_a_run_says_by_tags_and_in_words_where_it_belongs(root: Path) -> None:
    folder = study.write_record(root / "results", chosen("kfac"), BENCHMARK, "kfac", 0)
    environment = json.loads((folder / "environment.json").read_text())
    environment.update(study="tiny", dvc_exp_name="bumpy-pup", device="cpu")
    (folder / "environment.json").write_text(json.dumps(environment))
    tracking.rebuild(root / "results")
    tags = runs(root)["kfac seed 0"].data.tags
    found = {name: tags[name] for name in ("study", "seed", views.GROUP_TAG, "DVC_EXP_NAME", "device", "record")}
    assert found == {
        "study": "tiny",
        "seed": "0",
        views.GROUP_TAG: "kfac",
        "DVC_EXP_NAME": "bumpy-pup",
        "device": "cpu",
        "record": f"results/{BENCHMARK}/kfac/seed-0",
    }
    assert tags["configuration"] == metrics.configuration_hash(records.read_run(folder).config)
    words = tags["mlflow.note.content"]
    assert found["record"] in words and "dvc exp apply bumpy-pup" in words and "report/index.html" in words


def test_the_trials_of_a_tuning_are_an_experiment_of_their_own(root: Path) -> None:
    train(root, chosen("kfac"), "kfac")
    folder = a_trial(root, chosen("kfac", lr=0.3), "0123456789abcdef")
    assert tracking.rebuild(root / "results") == (1, 1) and tracking.rebuild(root / "results") == (0, 2)
    assert set(runs(root)) == {"kfac seed 0"}
    [trial] = runs(root, f"{BENCHMARK} tuning").values()
    found = {name: trial.data.tags[name] for name in ("records", "record", "DVC_EXP_NAME")}
    assert found == {
        "records": metrics.records_hash(folder),
        "record": f"trials/{BENCHMARK}/kfac",
        "DVC_EXP_NAME": "tune-kfac-01234567",
    }
    assert "dvc exp apply" not in trial.data.tags["mlflow.note.content"]
    comparison, tuning = (client(root).get_experiment_by_name(f"{BENCHMARK}{end}").tags for end in ("", " tuning"))
    words = tuning["mlflow.note.content"]
    assert words.startswith("Trials of a tuning") and "0.3 (hard)" in words and "docs/tuning.md" in words
    assert words != comparison["mlflow.note.content"]
    assert tuning[views.VIEW_TAG] == comparison[views.VIEW_TAG]
    means = runs(root, f"{BENCHMARK} mean").values()
    assert [run.data.params["optimizer.lr"] for run in means] == ["0.1"]  # none of trials


def test_a_trial_lands_there_live_too(root: Path) -> None:
    run = resolve(chosen("kfac"), BENCHMARK, "kfac")
    for name in ("tune-kfac-01234567", "bumpy-pup"):
        tracking.start(run, 0, {"dvc_exp_name": name})
    found = {
        end: {r.data.tags["DVC_EXP_NAME"] for r in runs(root, BENCHMARK + end).values()} for end in ("", " tuning")
    }
    assert found == {"": {"bumpy-pup"}, " tuning": {"tune-kfac-01234567"}}


def a_trial(root: Path, params: Any, key: str) -> Path:
    """The record of a trial where a tuning keeps it."""
    written = study.write_record(root / key, params, BENCHMARK, "kfac", 0)
    environment = json.loads((written / "environment.json").read_text())
    environment["dvc_exp_name"] = f"tune-kfac-{key[:8]}"
    (written / "environment.json").write_text(json.dumps(environment))
    folder = root / "trials" / BENCHMARK / "kfac" / key / "seed-0"
    records.copy_run(written, folder)
    return folder


def test_an_experiment_says_the_question_the_targets_and_the_protocol(root: Path) -> None:
    train(root, chosen("kfac"), "kfac")
    words = client(root).get_experiment_by_name(BENCHMARK).tags["mlflow.note.content"]
    assert f"Which optimizer brings the training loss of {BENCHMARK} to the target first" in words
    assert "0.3 (hard), 0.4 (easy)" in words and "**Protocol" in words and "400 steps" in words


def test_curvature_of_the_model_has_no_section_and_of_a_layer_its_own(root: Path) -> None:
    train(root, chosen("kfac"), "kfac")
    names = runs(root)["kfac seed 0"].data.metrics
    assert {"curvature_top_eigenvalue", "curvature_cosine_natural", "weights/0/gradient_norm"} <= set(names)


def test_sections_of_the_charts_sort_with_the_losses_first(root: Path) -> None:
    train(root, chosen("kfac"), "kfac")
    sections = sorted({name.rpartition("/")[0] for name in runs(root)["kfac seed 0"].data.metrics} - {""})
    assert sections == ["loss", "optimizer", "result", "score", "target", "time", "weights/0"]


def test_the_summary_is_in_result_and_target_metrics_and_the_files_are_artifacts(root: Path) -> None:
    folder = train(root, chosen("kfac"), "kfac")
    summary = json.loads((folder / "summary.json").read_text())
    run = runs(root)["kfac seed 0"]
    found = run.data.metrics
    assert found["result/test_loss"] == summary["test_loss"]
    for target in TARGETS:
        assert (found[f"target/{target}_reached"], found[f"target/{target}_steps"]) == (1, summary[f"{target}_step"])
        assert found[f"target/{target}_seconds"] == summary[f"{target}_seconds"]
    assert found["time/tracking_seconds"] > 0
    assert (run.info.status, run.data.tags["status"]) == ("FINISHED", "finished")
    listed = {artifact.path for artifact in client(root).list_artifacts(run.info.run_id)}
    assert listed == set(records.FILES)
    kept = root / "mlartifacts" / BENCHMARK / run.info.run_id / "artifacts" / "history.csv"
    assert run.info.artifact_uri == kept.parent.as_uri() and kept.read_bytes() == (folder / "history.csv").read_bytes()


def test_the_reconstructions_of_an_autoencoder_are_an_artifact_live_and_rebuilt(root: Path) -> None:
    params = chosen("sgd", "kfac")
    for optimizer in ("sgd", "kfac"):
        folder = study.write_record(root / "results", params, BENCHMARK, optimizer, 0)
        (folder / "reconstructions.png").write_bytes(optimizer.encode())
    run = records.read_run(folder)
    tracking.start(resolve(params, BENCHMARK, "kfac"), 0, run.environment).finish(run.summary, folder)
    assert tracking.rebuild(root / "results") == (1, 1)
    for name, run in runs(root).items():
        kept = root / "mlartifacts" / BENCHMARK / run.info.run_id / "artifacts" / "reconstructions.png"
        assert kept.read_text() == name.split()[0]


def test_parameters_are_the_resolved_configuration_flat(root: Path) -> None:
    train(root, chosen("kfac", momentum={"default": 0.9, BENCHMARK: 0.5}), "kfac")
    found = runs(root)["kfac seed 0"].data.params
    assert found["optimizer"] == "kfac" and found["benchmark"] == BENCHMARK and found["seed"] == "0"
    assert found["optimizer.momentum"] == "0.5" and found["model.name"] == "mlp" and found["averaging"] == "null"


def test_a_diverged_run_is_finished_and_did_not_reach_the_target(root: Path) -> None:
    train(root, chosen("sgd"), "sgd", diverged=True)
    run = runs(root)["sgd seed 0"]
    assert (run.info.status, run.data.tags["status"]) == ("FINISHED", "diverged")
    assert run.data.metrics["target/hard_reached"] == 0 and "target/hard_steps" not in run.data.metrics
    assert "not finite" in run.data.tags["message"]


def test_training_the_same_again_replaces_the_run_and_another_setting_stands_beside_it(root: Path) -> None:
    train(root, chosen("kfac", "sgd"), "kfac")
    train(root, chosen("kfac", "sgd"), "sgd")
    first = runs(root)["kfac seed 0"].info.run_id
    train(root, chosen("kfac"), "kfac")
    again = runs(root)
    assert set(again) == {"kfac seed 0", "sgd seed 0"} and again["kfac seed 0"].info.run_id != first
    assert client(root).get_run(first).info.lifecycle_stage == "deleted"
    train(root, chosen("kfac", lr=0.3), "kfac")
    experiment = client(root).get_experiment_by_name(BENCHMARK).experiment_id
    groups = {run.data.tags[views.GROUP_TAG] for run in client(root).search_runs([experiment])}
    assert groups == {"kfac lr=0.1", "kfac lr=0.3", "sgd"}


def test_settings_that_older_code_did_not_have_name_no_group(root: Path) -> None:
    folder = train(root, chosen("kfac", lr=0.3), "kfac")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("compile: false\n", ""))
    tracking.rebuild(root / "results")
    train(root, chosen("kfac"), "kfac")
    experiment = client(root).get_experiment_by_name(BENCHMARK).experiment_id
    found = client(root).search_runs([experiment])
    labels = {run.data.tags["configuration"]: run.data.tags[views.GROUP_TAG] for run in found}
    older = {c: label for c, label in labels.items() if label.startswith("kfac lr=0.3 ")}
    assert len(labels) == 3 and sorted(set(labels.values()) - set(older.values())) == ["kfac lr=0.1"]
    assert older == {c: f"kfac lr=0.3 {c}" for c in older} and len(older) == 2


def test_seeds_of_an_optimizer_share_a_group_and_its_colour(root: Path) -> None:
    tracking.rebuild(study.write_study(root / "results", chosen("sgd", "kfac", seeds=(0, 1))))
    found = runs(root)
    assert list(found) and {run.data.tags[views.GROUP_TAG] for run in found.values()} == {"sgd", "kfac"}
    colours = {(run.data.params["optimizer"], run.data.tags["mlflow.runColor"]) for run in found.values()}
    assert len(colours) == 2 and len({colour for _, colour in colours}) == 2


def test_rebuilding_makes_what_was_logged_live(root: Path) -> None:
    folder = train(root, chosen("ekfac"), "ekfac")
    live = runs(root)["ekfac seed 0"]
    written = {metric: series(root, live, metric) for metric in live.data.metrics}
    client(root).set_tag(live.info.run_id, "records", "half of them")  # as after a loss in mid-run
    assert tracking.rebuild(root / "results") == (1, 0)
    again = runs(root)["ekfac seed 0"]
    assert again.info.run_id != live.info.run_id
    assert again.data.params == live.data.params
    rebuilt = {metric: series(root, again, metric) for metric in again.data.metrics}
    written.pop("time/tracking_seconds"), rebuilt.pop("time/tracking_seconds")
    assert rebuilt == written
    assert again.data.tags["records"] == metrics.records_hash(folder)
    for tag in ("configuration", "status", views.GROUP_TAG, "mlflow.runColor"):
        assert again.data.tags[tag] == live.data.tags[tag]


def test_rebuilding_twice_and_after_a_live_run_adds_nothing(root: Path) -> None:
    train(root, chosen("kfac"), "kfac")
    study.write_record(root / "results", chosen("sgd"), BENCHMARK, "sgd", 0)
    before = runs(root)["kfac seed 0"].info.run_id
    assert tracking.rebuild(root / "results") == (1, 1)
    assert tracking.rebuild(root / "results") == (0, 2)
    assert set(runs(root)) == {"kfac seed 0", "sgd seed 0"} and runs(root)["kfac seed 0"].info.run_id == before


def test_a_deleted_run_comes_back_by_rebuild_alone(root: Path) -> None:
    train(root, chosen("kfac"), "kfac")
    client(root).delete_run(runs(root)["kfac seed 0"].info.run_id)
    assert tracking.rebuild(root / "results", bring_back=False) == (0, 1) and not runs(root)
    assert tracking.rebuild(root / "results") == (1, 0) and set(runs(root)) == {"kfac seed 0"}


def test_long_runs_keep_300_points_and_the_last(root: Path) -> None:
    params = chosen("sgd")
    params.benchmarks[BENCHMARK].update(steps=1000, evaluate_every=1)
    run = resolve(params, BENCHMARK, "sgd")
    tracker = tracking.start(run, 0, {})
    for step in range(1001 - 2):
        tracker.log({"step": step, "training_seconds": step / 100, "train_loss": 1.0})
    folder = study.write_record(root / "results", params, BENCHMARK, "sgd", 0)
    tracker.finish(records.read_run(folder).summary, folder)
    found = series(root, runs(root)["sgd seed 0"], "loss/train")
    assert len(found) <= POINTS + 1 and found[0][0] == 0 and found[-1][0] == 998


def test_the_prefilled_view_is_in_the_experiment_and_its_link_is_printed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(root, chosen("kfac"), "kfac")
    tags = client(root).get_experiment_by_name(BENCHMARK).tags
    view = views.read(tags[views.VIEW_TAG])
    first, second = view["compareRunCharts"][:2]
    assert (first["metricKey"], first["xAxisKey"], first["scaleType"]) == ("loss/train", "step", "log")
    assert (second["metricKey"], second["xAxisKey"], second["scaleType"]) == ("loss/train", "time-relative", "log")
    bars = {card["metricKey"] for card in view["compareRunCharts"] if card["type"] == "BAR"}
    assert {f"target/{target}_{clock}" for target in TARGETS for clock in ("steps", "seconds")} <= bars
    assert view["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": views.GROUP_TAG}]
    tracking.main(["views", "--port", "5123"])
    line = capsys.readouterr().out
    assert line.startswith(f"{BENCHMARK}  http://mlflow.localhost:5123/#/experiments/") and line.count("\n") == 1
    assert "workflowType=machine_learning&viewStateShareKey=comparison&compareRunsMode=CHART" in line


@pytest.mark.parametrize(
    ("target", "shown"), [("excess_loss", "loss/excess"), ("validation_error", "score/validation_error")]
)
def test_a_benchmark_opens_with_the_metric_of_its_targets(target: str, shown: str) -> None:
    assert views.read(views.comparison(target))["compareRunCharts"][0]["metricKey"] == shown


@pytest.mark.parametrize("names", [("sgd", "adam", "kfac", "ekfac", "gkfac")])
def test_the_default_optimizers_have_colours_of_their_own(names: tuple[str, ...]) -> None:
    assert len({views.colour(name) for name in names}) == len(names)


def test_results_without_records_are_refused_in_one_line(root: Path) -> None:
    (root / "results").mkdir()
    with pytest.raises(ConfigError, match=r"results: no run records \(.*\); run `dvc repro`"):
        tracking.rebuild(root / "results")


def test_importing_the_tracker_imports_no_mlflow() -> None:
    code = "import sys, pipeline.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
