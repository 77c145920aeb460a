"""Claims about `dvc exp run`: each of its forms does what it says, and the study is one plain command away."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

import pytest
from mlflow_store import tracked
from repository import BENCHMARKS, HANGS, SEEDS, Study, Workspace, stages_run, training_stages

from pipeline.records import read_runs


def experiments(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Experiments of the current commit, as `dvc exp show` has them: name -> its parameters and metrics."""
    shown = json.loads(workspace.run("dvc", "exp", "show", "--json"))
    [commit] = [entry for entry in shown if entry["rev"] != "workspace"]
    found = {}
    for experiment in commit["experiments"] or []:
        data = experiment["revs"][0]["data"]
        found[experiment["name"]] = {
            "params": data["params"]["params.yaml"]["data"],
            "metrics": data["metrics"]["report/metrics.json"]["data"],
        }
    return found


def test_one_optimizer_is_trained_alone_and_a_plain_run_returns_to_the_study(workspace: Workspace) -> None:
    committed = workspace.files("results")
    printed = workspace.run("dvc", "exp", "run", "-S", "optimizer=ekfac")
    assert stages_run(printed) == {*training_stages("ekfac"), "aggregate"}
    for benchmark in BENCHMARKS:
        assert [path.name for path in (workspace.root / "results" / benchmark).iterdir()] == ["ekfac"]
        for run in read_runs(workspace.root / "results", benchmark, "ekfac", SEEDS):
            assert run.config["target_class"] == "kfac.EKFAC" and run.summary["steps"] == 20
    metrics = json.loads((workspace.root / "report" / "metrics.json").read_text())
    assert {benchmark: list(row) for benchmark, row in metrics.items()} == {name: ["ekfac"] for name in BENCHMARKS}
    assert "digits_cnn.ekfac" in workspace.run("dvc", "metrics", "diff")

    printed = workspace.run("dvc", "exp", "run")
    assert stages_run(printed) <= {"aggregate"}
    assert workspace.files("results") == committed
    assert workspace.run("git", "diff", "--name-only") in ("", "dvc.lock\n")  # DVC keeps E-KFAC's entries there


def test_queued_points_arrive_in_the_same_store_and_in_exp_show(workspace: Workspace) -> None:
    before, place = set(experiments(workspace)), workspace.position()
    points = [0.3, 1.0]
    workspace.run(
        *("dvc", "exp", "run", "--queue", "-S", "optimizer=ekfac", "-S", "benchmark=digits_cnn"),
        *("-S", "optimizer.ekfac.relative_damping=" + ",".join(map(str, points))),
    )
    # To a pipe, the command would hold on until the workers end.
    subprocess.run(
        ["dvc", "queue", "start", "-j", "2"], cwd=workspace.root, env=workspace.environment, timeout=HANGS, check=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + HANGS
    while len(queue := workspace.run("dvc", "queue", "status").splitlines()) and any(
        word in line for line in queue for word in ("Queued", "Running")
    ):
        assert time.monotonic() < deadline, queue
        time.sleep(3)

    arrived = {name: shown for name, shown in experiments(workspace).items() if name not in before}
    dampings = {name: shown["params"]["optimizer"]["ekfac"]["relative_damping"] for name, shown in arrived.items()}
    assert sorted(dampings.values()) == points
    assert all(list(shown["metrics"]["digits_cnn"]) == ["ekfac"] for shown in arrived.values())
    listed = workspace.run("make", "exp-show")
    for name in arrived:
        assert name in listed
        assert "digits_cnn ekfac seed 1: finished" in workspace.run("dvc", "queue", "logs", name)
    assert workspace.changes() == "" and workspace.position() == place

    runs = [run for run in tracked(workspace.root) if run.tags.get("DVC_EXP_NAME") in arrived]
    assert sorted((run.name, run.params["optimizer.relative_damping"]) for run in runs) == [
        (f"ekfac seed {seed}", str(point)) for seed in SEEDS for point in points
    ]
    assert len({run.tags["mlflow.runColor"] for run in runs}) == len(points)
    for run in runs:
        assert run.benchmark == "digits_cnn" and run.status == "FINISHED" and len(run.series["loss/train"]) == 5
        assert run.params["optimizer.relative_damping"] == str(dampings[run.tags["DVC_EXP_NAME"]])


@pytest.mark.slow
def test_a_temporary_experiment_leaves_workspace_and_branch_alone(workspace: Workspace) -> None:
    before, place = workspace.files("results", "report", "data"), workspace.position()
    workspace.run(
        *("dvc", "exp", "run", "--temp", "-n", "aside", "-S", "optimizer=ekfac", "-S", "benchmark=digits_cnn"),
        *("-S", "optimizer.ekfac.lr=0.05"),
    )
    assert workspace.changes() == "" and workspace.position() == place
    assert workspace.files("results", "report", "data") == before
    shown = experiments(workspace)["aside"]
    assert shown["params"]["optimizer"]["ekfac"]["lr"] == 0.05 and list(shown["metrics"]["digits_cnn"]) == ["ekfac"]
    assert sum(run.tags.get("DVC_EXP_NAME") == "aside" for run in tracked(workspace.root)) == len(SEEDS)
    workspace.run("dvc", "exp", "apply", "aside")
    for run in read_runs(workspace.root / "results", "digits_cnn", "ekfac", SEEDS):
        assert run.config["options"]["lr"] == 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choices", "pairs"),
    [
        (
            ["optimizer=[kfac,ekfac]", "benchmark=digits_autoencoder"],
            {"digits_autoencoder-kfac", "digits_autoencoder-ekfac"},
        ),
        (["optimizer.kfac.relative_damping=0.37"], {f"{benchmark}-kfac" for benchmark in BENCHMARKS}),
        (["optimizer.sgd.lr=0.0123"], {f"{benchmark}-sgd" for benchmark in BENCHMARKS}),
        (["+optimizer=adamw"], {f"{benchmark}-adamw" for benchmark in BENCHMARKS}),
        (["images.digits_cnn.validation=0.2"], {"digits_cnn-sgd", "digits_cnn-kfac"}),
        (["seeds=[5]", "benchmark=toy_linear"], {"toy_linear-sgd", "toy_linear-kfac"}),
        (
            ["study=tiny", "seeds=[3]"],
            {f"{benchmark}-{optimizer}" for benchmark in BENCHMARKS for optimizer in ("sgd", "kfac", "gkfac")},
        ),
    ],
)
def test_a_choice_trains_what_it_changes_and_nothing_else(
    workspace: Workspace, choices: list[str], pairs: set[str]
) -> None:
    words = [word for choice in choices for word in ("-S", choice)]
    ran = stages_run(workspace.run("dvc", "exp", "run", *words))
    assert {name for name in ran if name.startswith("train@")} == {f"train@{pair}" for pair in pairs}
    printed = workspace.run("dvc", "exp", "run")
    assert not any(name.startswith("train@") for name in stages_run(printed))


@pytest.mark.slow
def test_a_fresh_clone_without_cache_trains_again(study: Study, tmp_path: Any) -> None:
    clone = tmp_path / "clone"
    study.workspace.run("git", "clone", "--quiet", ".", str(clone))
    elsewhere = Workspace(clone, study.workspace.environment)
    assert stages_run(elsewhere.run("dvc", "repro")) == stages_run(study.printed)
