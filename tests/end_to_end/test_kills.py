"""Claims about death: SIGKILL at any moment of `dvc repro`, then `dvc repro`, and nobody sees a difference.

The one idea: a small study is trained once undisturbed, then in another clone with kills at moments drawn from a seeded
stream. What both leave has to be the same to the bit, but for clocks and memory.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from mlflow_store import Tracked, tracked
from repository import Workspace, new_repository, yaml_edited
from ruamel.yaml import YAML

from pipeline.records import is_measured

SEEDS = [0, 1]
STEPS = 150
FAST = "kfac"  # of the short form


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A fresh repository with one benchmark, a checkpoint at every evaluation, and its data."""
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
    killed_and_run_again(study, FAST, tmp_path, kills=1, seed="short form")


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(3))
@pytest.mark.parametrize("optimizer", ["sgd", "kfac", "ekfac", "gkfac"])
def test_kills_in_a_loop(study: Workspace, optimizer: str, round_: int, tmp_path: Path) -> None:
    killed_and_run_again(study, optimizer, tmp_path, kills=5, seed=f"{optimizer} {round_}")


# ---------------------------------------------------------------- dvc dies, the trainer does not


def trainers(workspace: Workspace) -> list[psutil.Process]:
    """Training processes that belong to this workspace, temporary and queued ones too."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("DVC_ROOT") == str(workspace.root)
            if ours and "pipeline.train" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)
    return value


def checkpoints(workspace: Workspace) -> list[Path]:
    return sorted(workspace.root.glob("checkpoints/*/*/*/seed-*/step-*.pt"))


@pytest.mark.slow
def test_a_trainer_whose_dvc_was_killed_ends_and_the_next_goes_on(study: Workspace, tmp_path: Path) -> None:
    workspace = clone(study, tmp_path / "orphan")
    process = start(workspace, "dvc", "repro", "train@digits_cnn-sgd")
    wait_until(lambda: checkpoints(workspace))
    [trainer] = trainers(workspace)
    for parent in trainer.parents()[:-1]:
        if any(Path(word).name == "dvc" for word in parent.cmdline()[:3]):
            parent.kill()
    process.wait()
    printed = workspace.run("dvc", "repro", "train@digits_cnn-sgd")  # at once: it waits for the orphan
    assert "goes on from step" in printed or "was over before" in printed
    assert not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE
    assert records(workspace, "sgd") == undisturbed(study, "sgd", tmp_path / "undisturbed")[0]
    check_store(workspace.root, ["sgd"])


# ---------------------------------------------------------------- make recover


def experiments(workspace: Workspace) -> list[str]:
    return workspace.run("dvc", "exp", "list", "--name-only").split()


def run_queue(workspace: Workspace, names: list[str], workers: int = 1) -> None:
    """Start workers and wait until these experiments are there."""
    subprocess.run(
        ["dvc", "queue", "start", "-j", str(workers)], cwd=workspace.root, env=workspace.environment, check=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: set(names) <= set(experiments(workspace)), 600)


def recovered(workspace: Workspace) -> list[str]:
    return workspace.run("python", "-m", "pipeline.recover").splitlines()


CHOICES = ("-S", "optimizer=kfac", "-S", "optimizer.kfac.relative_damping=0.3")


@pytest.fixture(scope="module")
def experiment(study: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Records of the experiment that the tests below kill."""
    workspace = clone(study, tmp_path_factory.mktemp("experiment") / "undisturbed")
    workspace.run("dvc", "exp", "run", *CHOICES)
    return records(workspace, "kfac")


@pytest.mark.slow
def test_recover_after_a_killed_exp_run(study: Workspace, experiment: dict[str, Any], tmp_path: Path) -> None:
    workspace = clone(study, tmp_path / "killed")
    place = workspace.position()
    process = start(workspace, "dvc", "exp", "run", "-n", "mine", *CHOICES)
    wait_until(lambda: checkpoints(workspace))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert workspace.call("git", "symbolic-ref", "HEAD").returncode != 0  # detached
    said = recovered(workspace)
    assert "HEAD, which dvc had detached, is on branch main again" in said
    assert "experiment mine, whose `dvc exp run` was killed, is queued again" in said
    assert workspace.position() == place and workspace.changes() == ""
    run_queue(workspace, ["mine"])
    workspace.run("dvc", "exp", "apply", "mine")
    assert records(workspace, "kfac") == experiment
    check_store(workspace.root, ["kfac"])


@pytest.mark.slow
def test_recover_leaves_what_the_user_changed(study: Workspace, tmp_path: Path) -> None:
    workspace = clone(study, tmp_path / "edited")
    with yaml_edited(workspace.root / "pipeline" / "conf" / "optimizer" / "sgd.yaml") as content:
        content["sgd"]["lr"] = 0.01
    process = start(workspace, "dvc", "exp", "run", *CHOICES)
    wait_until(lambda: checkpoints(workspace))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (workspace.root / "README.md").write_text("Mine.\n")
    said = recovered(workspace)
    assert "params.yaml: composed again from pipeline/conf, without the experiment's choices" in said
    assert (workspace.root / "README.md").read_text() == "Mine.\n"
    changed = {line[3:] for line in workspace.changes().splitlines()}
    assert changed == {"README.md", "params.yaml", "pipeline/conf/optimizer/sgd.yaml"}
    params = YAML(typ="safe").load(workspace.root / "params.yaml")
    assert params["optimizer"]["sgd"]["lr"] == 0.01 and list(params["optimizer"]) == ["sgd", "kfac", "ekfac", "gkfac"]


@pytest.mark.slow
def test_recover_after_killed_queue_workers(study: Workspace, experiment: dict[str, Any], tmp_path: Path) -> None:
    workspace = clone(study, tmp_path / "queue")
    for name, damping in (("first", 0.3), ("second", 0.5), ("third", 0.7)):
        workspace.run(
            *("dvc", "exp", "run", "--queue", "-n", name, "-S", "optimizer=kfac"),
            *("-S", f"optimizer.kfac.relative_damping={damping}"),
        )
    run_queue_until_it_trains(workspace, 2)
    kill_workers(workspace)
    said = recovered(workspace)
    again = [line for line in said if "is queued again" in line]
    assert len(again) == 2 and all("lost when its dvc was killed" in line for line in again), said
    run_queue(workspace, ["first", "second", "third"], workers=2)
    workspace.run("dvc", "exp", "apply", "first")
    assert records(workspace, "kfac") == experiment
    runs = tracked(workspace.root)
    assert len(runs) == 6 and {run.status for run in runs} == {"FINISHED"}
    for run in runs:
        check_steps(run)
    kill_workers(workspace)  # a worker whose monitor stumbled over a message stays for ever
    workspace.run("git", "checkout", "--quiet", "--", ".")
    assert recovered(workspace) == ["all is well: nothing was changed"]


def run_queue_until_it_trains(workspace: Workspace, count: int) -> None:
    subprocess.run(
        ["dvc", "queue", "start", "-j", str(count)], cwd=workspace.root, env=workspace.environment, check=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: len({path.parts[-3] for path in checkpoints(workspace)}) >= count)


def workers(workspace: Workspace) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if ("queue-worker" in words or "exec-run" in words) and process.cwd().startswith(str(workspace.root)):
                found.append(process)
    return found


def kill_workers(workspace: Workspace) -> None:
    for process in workers(workspace):
        with contextlib.suppress(psutil.Error):
            process.kill()
    wait_until(lambda: not trainers(workspace))


@pytest.mark.slow
def test_twelve_queued_runs_at_once_on_an_empty_store(study: Workspace, tmp_path: Path) -> None:
    workspace = clone(study, tmp_path / "twelve")
    assert not (workspace.root / "mlflow.db").exists()
    rates = ",".join(str(0.01 * number) for number in range(1, 13))
    workspace.run("dvc", "exp", "run", "--queue", "-S", "optimizer=sgd", "-S", f"optimizer.sgd.lr={rates}")
    subprocess.run(
        ["dvc", "queue", "start", "-j", "2"], cwd=workspace.root, env=workspace.environment, check=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: len(experiments(workspace)) == 12, 900)
    runs = tracked(workspace.root)
    assert len(runs) == 24 and {run.status for run in runs} == {"FINISHED"}
    assert len({(run.params["optimizer.lr"], run.params["seed"]) for run in runs}) == 24
    for run in runs:
        check_steps(run)


@pytest.mark.slow
def test_two_dvc_at_once_lose_nothing(study: Workspace, tmp_path: Path) -> None:
    workspace = clone(study, tmp_path / "two")
    same = ("-S", "optimizer=sgd", "-S", "seeds=[0,1]")
    both = [start(workspace, "dvc", "exp", "run", "--temp", "-n", name, *same) for name in ("one", "other")]
    assert [process.wait() for process in both] == [0, 0]
    assert sorted(experiments(workspace)) == ["one", "other"]
    check_store(workspace.root, ["sgd"])
