"""Claims about death: SIGKILL at any moment of `dvc repro`, then `dvc repro`, and nobody sees a difference.

The one idea: a small study is trained once undisturbed, then in another clone with kills at moments drawn from a seeded
stream. What both leave has to be the same to the bit, but for clocks and memory.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mlflow_store import Tracked, tracked
from repository import ROOT, Workspace, new_repository, yaml_edited

from pipeline.records import is_measured

SEEDS = [0, 1]
STEPS = 150
FAST = "kfac"  # of the short form


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A fresh repository with one benchmark, a checkpoint at every evaluation, and its data."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository, not a copy of its files")
    workspace = new_repository(tmp_path_factory.mktemp("kills"), edit=shorten)
    workspace.run("dvc", "repro", "prepare@digits_cnn")
    workspace.run("git", "add", ".")
    workspace.run("git", "commit", "--quiet", "--message=Data")
    return workspace


def shorten(root: Path) -> None:
    """Short runs, long enough to be killed in."""
    conf = root / "pipeline" / "conf"
    with yaml_edited(conf / "config.yaml") as content:
        content.update(seeds=SEEDS, checkpoint_seconds=0)
        for entry in content["defaults"]:
            if "benchmark" in entry:
                entry["benchmark"] = ["digits_cnn"]
            if "optimizer" in entry:
                entry["optimizer"] = ["sgd", "kfac", "ekfac", "gkfac"]
    with yaml_edited(conf / "benchmark" / "digits_cnn.yaml") as content:
        content["benchmark"]["digits_cnn"].update(batch_size=64, steps=STEPS, evaluate_every=5)


def clone(study: Workspace, folder: Path) -> Workspace:
    """A copy of the repository and its cache."""
    subprocess.run(["cp", "-a", str(study.root), str(folder)], check=True)
    return Workspace(folder, study.environment)


def start(workspace: Workspace, *words: str) -> subprocess.Popen[bytes]:
    """A command in a group of its own, to be killed with all its children."""
    return subprocess.Popen(
        words,
        cwd=workspace.root,
        env=workspace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_after(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Kill the group after so many seconds; False if the command was over before."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def records(workspace: Workspace, optimizer: str) -> dict[str, Any]:
    """All that the seeds of a stage leave, without what clocks and memory decide."""
    folder = workspace.root / "results" / "digits_cnn" / optimizer
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "environment.json":
            found[str(path.relative_to(folder))] = _without_clocks(path)
    return found


def _without_clocks(path: Path) -> Any:
    if path.suffix == ".json":
        return {key: value for key, value in json.loads(path.read_text()).items() if not is_measured(key)}
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [{key: cell for key, cell in row.items() if not is_measured(key)} for row in csv.DictReader(file)]
    return path.read_bytes()


def check_store(root: Path, optimizers: list[str]) -> None:
    """One finished run for each seed, and each step of each metric once."""
    runs = tracked(root)
    assert sorted(run.name for run in runs) == sorted(f"{o} seed {seed}" for o in optimizers for seed in SEEDS)
    for run in runs:
        assert run.status == "FINISHED"
        check_steps(run)


def check_steps(run: Tracked) -> None:
    for name, points in run.series.items():
        steps = [step for step, _, _ in points]
        assert len(steps) == len(set(steps)), f"{run.name}: {name} has a step twice"
    assert len(run.series["loss/train"]) == STEPS // 5 + 1
    times = [milliseconds for _, _, milliseconds in run.series["loss/train"]]
    assert times == sorted(times)  # the training clock goes on


def undisturbed(study: Workspace, optimizer: str, folder: Path) -> tuple[dict[str, Any], float]:
    """Records, and how long the command took."""
    workspace = clone(study, folder)
    begin = time.monotonic()
    workspace.run("dvc", "repro", f"train@digits_cnn-{optimizer}")
    return records(workspace, optimizer), time.monotonic() - begin


def killed_and_run_again(study: Workspace, optimizer: str, folder: Path, kills: int, seed: str) -> None:
    expected, duration = undisturbed(study, optimizer, folder / "undisturbed")
    workspace, moments = clone(study, folder / "killed"), Random(seed)
    stage, at = f"train@digits_cnn-{optimizer}", []
    for _ in range(kills):
        moment = moments.uniform(0.1, 1.0) * duration
        if not kill_after(start(workspace, "dvc", "repro", stage), moment):
            break
        kept = sorted(str(p.relative_to(workspace.root)) for p in workspace.root.glob("checkpoints/*/*/*/*/*"))
        at.append((round(moment, 1), kept[-1:]))
    printed = workspace.run("dvc", "repro", stage)
    print(optimizer, "killed at", at, "\n", printed)
    assert records(workspace, optimizer) == expected, at
    check_store(workspace.root, [optimizer])
    assert not (workspace.root / "checkpoints").exists()  # removed on success


def test_a_killed_stage_goes_on_to_the_same_records(study: Workspace, tmp_path: Path) -> None:
    killed_and_run_again(study, FAST, tmp_path, kills=2, seed="short form")


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(3))
@pytest.mark.parametrize("optimizer", ["sgd", "kfac", "ekfac", "gkfac"])
def test_kills_in_a_loop(study: Workspace, optimizer: str, round_: int, tmp_path: Path) -> None:
    killed_and_run_again(study, optimizer, tmp_path, kills=5, seed=f"{optimizer} {round_}")
