"""Claims about the main job: it runs from nothing, once, and all its numbers are in files, DVC and MLflow alike."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow_store import Tracked, tracked
from repository import BENCHMARKS, OPTIMIZERS, SEEDS, Study, Workspace, stages_run, training_stages
from ruamel.yaml import YAML

from pipeline.config import TARGETS
from pipeline.records import FILES, is_measured, read_runs

PAIRS = [(benchmark, optimizer) for benchmark in BENCHMARKS for optimizer in OPTIMIZERS]


def without_clocks(path: Path) -> Any:
    """A CSV or JSON file as text cells, but for what clocks and memory decide."""
    if path.suffix == ".json":
        return {key: value for key, value in json.loads(path.read_text()).items() if not is_measured(key)}
    with path.open(newline="") as file:
        return [{key: cell for key, cell in row.items() if not is_measured(key)} for row in csv.DictReader(file)]


def of_study(runs: list[Tracked]) -> dict[tuple[str, str], Tracked]:
    """The runs that the main job made, by benchmark and name; no experiment of other settings."""
    return {(run.benchmark, run.name): run for run in runs if "DVC_EXP_NAME" not in run.tags}


def test_one_command_trains_every_pair_and_prints_the_comparison(study: Study) -> None:
    assert stages_run(study.printed) == {
        *("prepare@digits_cnn", "toy@toy_linear", "aggregate"),
        *training_stages("sgd", "kfac"),
    }
    for benchmark, optimizer in PAIRS:
        runs = read_runs(study.workspace.root / "results", benchmark, optimizer, SEEDS)
        assert {run.summary["status"] for run in runs} <= {"finished", "diverged"}
        assert study.printed.count(f"\n{benchmark}: target") == 2  # by the stage, and at the end
    metrics = json.loads((study.workspace.root / "report" / "metrics.json").read_text())
    assert {benchmark: list(row) for benchmark, row in metrics.items()} == {
        benchmark: OPTIMIZERS for benchmark in BENCHMARKS
    }


def test_doing_it_again_runs_nothing(workspace: Workspace) -> None:
    printed = workspace.run("make", "repro")
    assert stages_run(printed) == set() and "Data and pipelines are up to date." in printed
    assert workspace.changes() == ""


def test_the_store_holds_the_study_as_the_files_have_it(study: Study) -> None:
    runs = of_study(tracked(study.workspace.root))
    assert set(runs) == {(b, f"{o} seed {seed}") for b, o in PAIRS for seed in SEEDS}
    for benchmark, optimizer in PAIRS:
        for record in read_runs(study.workspace.root / "results", benchmark, optimizer, SEEDS):
            run = runs[benchmark, f"{optimizer} seed {record.summary['seed']}"]
            assert run.status == "FINISHED" and run.tags["status"] == record.summary["status"]
            assert run.params["optimizer"] == optimizer and run.params["seed"] == str(record.summary["seed"])
            assert run.params["steps"] == "20" and run.files == set(FILES)
            for metric, column in (("loss/train", "train_loss"), ("loss/validation", "validation_loss")):
                logged = [(step, value) for step, value, _ in run.series[metric]]
                assert logged == [(row["step"], row[column]) for row in record.history]
            for target in TARGETS:
                assert run.series[f"target/{target}_reached"][0][1] == float(record.summary[f"{target}_reached"])
            if record.summary["status"] == "finished":
                assert run.series["result/test_loss"][0][1] == record.summary["test_loss"]


def test_the_store_is_made_again_from_the_files(workspace: Workspace) -> None:
    def comparable(run: Tracked) -> Tracked:
        """Without what logging cost, and the process that did it."""
        series = {name: points for name, points in run.series.items() if name != "time/tracking_seconds"}
        tags = {name: value for name, value in run.tags.items() if name != "process"}
        return Tracked(run.benchmark, run.name, run.status, run.params, tags, series, run.files)

    before = of_study(tracked(workspace.root)) | of_study(tracked(workspace.root, means=True))
    for path in workspace.root.glob("mlflow.db*"):
        path.unlink()
    shutil.rmtree(workspace.root / "mlartifacts")
    workspace.run("python", "-m", "pipeline.tracking", "rebuild")
    after = of_study(tracked(workspace.root)) | of_study(tracked(workspace.root, means=True))
    assert len(after) == len(PAIRS) * (len(SEEDS) + 1)
    assert {key: comparable(run) for key, run in after.items()} == {key: comparable(run) for key, run in before.items()}
    assert "every run has its record" in workspace.run("python", "-m", "pipeline.tracking", "check")


def test_training_a_pair_again_gives_the_same_records_to_the_bit(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("kfac", "pipeline", "data", "params.yaml"):
        (tmp_path / name).symlink_to(workspace.root / name)
    shutil.copy(workspace.root / "mlflow.db", tmp_path)
    again = Workspace(tmp_path, {**workspace.environment, "DVC_ROOT": str(tmp_path)})
    again.run("python", "-m", "pipeline.train", "digits_cnn", "kfac")
    for seed in SEEDS:
        for name in ("history.csv", "curvature.csv", "summary.json"):
            file = Path("results", "digits_cnn", "kfac", f"seed-{seed}", name)
            made, first = without_clocks(tmp_path / file), without_clocks(workspace.root / file)
            assert made == first and made, file


def test_a_changed_learning_rate_trains_that_optimizer_alone(workspace: Workspace) -> None:
    yaml = YAML()
    path = workspace.root / "pipeline" / "conf" / "optimizer" / "sgd.yaml"
    content = yaml.load(path)
    content["sgd"]["lr"] = {"default": 0.011, "toy_linear": 0.013}
    yaml.dump(content, path)
    workspace.run("python", "-m", "pipeline.composition")
    others = {benchmark: workspace.files(f"results/{benchmark}/kfac") for benchmark in BENCHMARKS}
    assert stages_run(workspace.run("dvc", "repro")) == {*training_stages("sgd"), "aggregate"}
    assert {benchmark: workspace.files(f"results/{benchmark}/kfac") for benchmark in BENCHMARKS} == others
    for benchmark, rate in (("toy_linear", 0.013), ("digits_cnn", 0.011)):
        for run in read_runs(workspace.root / "results", benchmark, "sgd", SEEDS):
            assert run.config["options"]["lr"] == rate


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("dvc metrics show", ["digits_cnn.kfac", "toy_linear.sgd"]),
        ("dvc metrics diff", []),
        ("dvc exp show", ["workspace", "main"]),
        ("make exp-show", ["workspace", "main"]),
        ("make help", ["make repro", "make test", "make ui", "make lint"]),
        ("python -m pipeline.aggregate --show", ["toy_linear: target", "digits_cnn: target"]),
        (
            "python -m pipeline.tracking views",
            ["toy_linear", "digits_cnn", "digits_cnn mean", "http://mlflow.localhost:5000/#/experiments/"],
        ),
        ("dvc dag", ["aggregate", "train@digits_cnn-kfac"]),
        ("dvc stage list", ["prepare@digits_cnn", "toy@toy_linear"]),
    ],
)
def test_commands_that_only_look_run_and_change_nothing(workspace: Workspace, command: str, words: list[str]) -> None:
    printed = workspace.run(*command.split())
    for word in words:
        assert word in printed
    assert workspace.changes() == ""


def test_plots_are_a_page_of_pictures_that_needs_no_network(workspace: Workspace) -> None:
    workspace.run("dvc", "plots", "show")
    folder = workspace.root / "dvc_plots"
    page = (folder / "index.html").read_text()
    pictures = [path for path in (workspace.root / "report" / "figures").iterdir()]
    for picture in pictures:
        copy = folder / "static" / f"workspace_report_figures_{picture.name}"
        assert f'src="static/{copy.name}"' in page and copy.read_bytes() == picture.read_bytes()
    assert pictures and "<script" not in page and "://" not in page
    assert workspace.changes() == ""
