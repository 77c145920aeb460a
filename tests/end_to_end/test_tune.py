"""Claims about `python -m pipeline.tune` as users type it: nothing is lost, nothing is done twice, `--write` writes.

The one idea: the trials of a study of seconds, by DVC's queue and by Ray. What is lost on the way (a record, a queue
worker, a Ray worker with its training) has to come back by itself or by the same command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow_store import tracked
from repository import HANGS, Workspace, new_repository, shrink_study, yaml_edited
from ruamel.yaml import YAML

from pipeline.validation import by_benchmark

TUNE = ("python", "-m", "pipeline.tune", "--benchmarks", "toy_linear", "--seeds", "1000")


def untuned(root: Path) -> None:
    shrink_study(root)
    shutil.rmtree(root / "tuning")


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    found = new_repository(tmp_path, untuned)
    yield found
    found.call("dvc", "queue", "stop", "--kill")


def counts(printed: str) -> dict[str, list[int]]:
    """Trials of each optimizer: asked, found, queued, again, missing."""
    rows = re.findall(r"^toy_linear +(\w+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) ", printed, re.MULTILINE)
    return {optimizer: list(map(int, numbers)) for optimizer, *numbers in rows}


def kept(workspace: Workspace) -> list[Path]:
    return sorted(path.parent for path in (workspace.root / "trials").glob("*/*/*/seed-1000/summary.json"))


def evidence(workspace: Workspace, optimizer: str) -> dict[str, Any]:
    return json.loads((workspace.root / "tuning" / "toy_linear" / f"{optimizer}.json").read_text())


def start(workspace: Workspace, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=workspace.root,
        env=workspace.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(what: Callable[[], Any], running: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + HANGS
    while not (found := what()):
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.1)
    return found


def processes(workspace: Workspace, *words: str) -> list[psutil.Process]:
    """Processes in the repository, or told of it, with these words in their command."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            inside = process.cwd().startswith(str(workspace.root)) or str(workspace.root) in " ".join(line)
        except psutil.Error:
            continue
        if inside and all(word in line for word in words):
            found.append(process)
    return found


@pytest.mark.slow
def test_a_trial_becomes_a_record_and_evidence_and_no_experiment_stays(workspace: Workspace) -> None:
    printed = workspace.run(*TUNE, "--optimizers", "sgd", "--trials", "1")
    assert counts(printed) == {"sgd": [1, 0, 1, 0, 0]}
    assert len(kept(workspace)) == 1
    found = evidence(workspace, "sgd")
    assert found["won_by_first"] and found["chosen"] == {"lr": 0.04} and len(found["trials"]) == 1
    assert "| sgd | 1 |" in (workspace.root / "docs" / "tuning.md").read_text()
    assert workspace.run("git", "for-each-ref", "refs/exps") == ""
    [run] = tracked(workspace.root)
    assert run.benchmark == "toy_linear tuning" and run.tags["record"] == "trials/toy_linear/sgd"
    changed = {line.split()[-1] for line in workspace.changes().splitlines()}
    assert changed == {"docs/tuning.md", "docs/images/tuning.svg", "tuning/"}


@pytest.mark.slow
def test_a_removed_record_is_queued_again_and_write_puts_the_choice_into_the_yaml(workspace: Workspace) -> None:
    command = (*TUNE, "--optimizers", "sgd,kfac", "--trials", "2", "--workers", "2")
    printed = workspace.run(*command)
    assert counts(printed) == {"sgd": [2, 0, 2, 0, 0], "kfac": [2, 0, 2, 0, 0]}
    before = {optimizer: evidence(workspace, optimizer) for optimizer in ("sgd", "kfac")}
    lost, cut, *_ = kept(workspace)
    shutil.rmtree(lost)
    (cut / "history.csv").write_text("step\n")
    printed = workspace.run(*command)
    assert sum(numbers[1] for numbers in counts(printed).values()) == 2  # found
    assert sum(numbers[2] for numbers in counts(printed).values()) == 2  # queued
    assert len(kept(workspace)) == 4
    again = {optimizer: evidence(workspace, optimizer) for optimizer in ("sgd", "kfac")}
    for optimizer, found in again.items():
        assert [t["steps_to_target"] for t in found["trials"]] == [
            t["steps_to_target"] for t in before[optimizer]["trials"]
        ]

    workspace.run("git", "add", ".")
    workspace.run("git", "commit", "--quiet", "--message=Evidence")
    conf, yaml = workspace.root / "pipeline" / "conf" / "optimizer", YAML(typ="safe", pure=True)
    settings = {optimizer: yaml.load(conf / f"{optimizer}.yaml")[optimizer] for optimizer in again}
    printed = workspace.run(*command, "--write")
    assert counts(printed) == {"sgd": [2, 2, 0, 0, 0], "kfac": [2, 2, 0, 0, 0]}
    composed = yaml.load(workspace.root / "params.yaml")["optimizer"]
    for optimizer, found in again.items():
        after = yaml.load(conf / f"{optimizer}.yaml")[optimizer]
        assert composed[optimizer] == after
        for field, value in found["chosen"].items():
            assert by_benchmark(after[field], "toy_linear") == value
            assert by_benchmark(after[field], "digits_cnn") == by_benchmark(settings[optimizer][field], "digits_cnn")
    written = {line[3:] for line in workspace.changes().splitlines()}
    lost_to_shipped = {o for o, found in again.items() if not found["won_by_first"]}
    expected = {f"pipeline/conf/optimizer/{o}.yaml" for o in lost_to_shipped} | (
        {"params.yaml"} if lost_to_shipped else set()
    )
    assert written == expected
    workspace.run(*command)
    assert {line[3:] for line in workspace.changes().splitlines()} == expected  # the evidence is what it was


@pytest.mark.slow
def test_a_killed_queue_worker_costs_no_trial(workspace: Workspace) -> None:
    lengthen(workspace, steps=6000)
    tuning = start(workspace, *TUNE, "--optimizers", "sgd", "--trials", "2")
    wait_for(lambda: processes(workspace, "pipeline.train"), tuning)
    for worker in processes(workspace, "queue-worker"):
        worker.kill()
    printed, _ = tuning.communicate(timeout=HANGS)
    assert tuning.returncode == 0, printed
    asked, found, queued, again, missing = counts(printed)["sgd"]
    assert (asked, found, queued, missing) == (2, 0, 2, 0) and again >= 1, printed
    assert len(kept(workspace)) == 2


@pytest.mark.slow
def test_a_trial_that_fails_is_named_and_its_pair_is_not_judged(workspace: Workspace) -> None:
    with yaml_edited(workspace.root / "pipeline" / "conf" / "optimizer" / "sgd.yaml") as content:
        content["sgd"]["_target_"] = "torch.optim.LBFGS"  # needs a closure: each start of it ends with an error
        for field in ("momentum", "nesterov", "weight_decay"):
            del content["sgd"][field]
    (workspace.root / "pipeline" / "conf" / "search" / "sgd.yaml").write_text("lr: {log: [0.003, 3.0]}\n")
    ended = workspace.call(*TUNE, "--optimizers", "sgd,kfac", "--trials", "1", "--workers", "2")
    assert ended.returncode == 1, ended.stderr
    assert counts(ended.stdout) == {"sgd": [1, 0, 1, 2, 1], "kfac": [1, 0, 1, 0, 0]}
    [line] = ended.stderr.splitlines()
    name = re.fullmatch(
        r"toy_linear sgd trial 1 \(lr 0\.04\): has no record; `dvc queue logs (\S+)` says why; .*", line
    )
    assert name is not None, line
    assert "needs a closure" in workspace.run("dvc", "queue", "logs", name.group(1))
    assert not (workspace.root / "tuning" / "toy_linear" / "sgd.json").exists()
    assert evidence(workspace, "kfac")["won_by_first"]
    workspace.run(*TUNE, "--optimizers", "sgd", "--trials", "1", "--accept-missing")
    assert evidence(workspace, "sgd")["trials"] == [
        {"values": {"lr": 0.04}, "missed": {"easy": 1, "hard": 1}, "seconds_to_target": None, "steps_to_target": None,
         "best_loss": None, "diverged": False, "edge": []}
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_ray_worker_costs_no_trial_and_its_record_is_there_once(
    workspace: Workspace, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("ray", reason="needs the extra [ray]")
    lengthen(workspace, steps=6000)
    node = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets are below it
    request.addfinalizer(lambda: shutil.rmtree(node))
    workspace.environment["TMPDIR"] = str(node)
    tuning = start(workspace, *TUNE, "--optimizers", "sgd,adam", "--trials", "2", "--workers", "2", "--engine", "ray")

    def trainers() -> list[psutil.Process]:
        found = [p for p in psutil.process_iter(["cmdline", "cwd"]) if "pipeline.train" in (p.info["cmdline"] or [])]
        return [process for process in found if (process.info["cwd"] or "").startswith(str(node))]

    trainer = wait_for(trainers, tuning)[0]
    worker = trainer.parent()
    assert worker is not None and worker.name().startswith("ray::"), worker
    os.kill(worker.pid, signal.SIGKILL)
    printed, _ = tuning.communicate(timeout=HANGS)
    assert tuning.returncode == 0, printed
    rows = counts(printed)
    assert [rows[name][:3] + rows[name][4:] for name in ("sgd", "adam")] == [[2, 0, 2, 0]] * 2
    assert sum(row[3] for row in rows.values()) == 1, printed  # again
    assert len(kept(workspace)) == 4
    for folder in kept(workspace):
        assert len(list(folder.parent.iterdir())) == 1
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["status"], summary["steps"]) == ("finished", 6000) or summary["status"] == "diverged"
    assert not trainer.is_running()


# ---------------------------------------------------------------- killed while it queues


KILLED_AT = """
import os, signal
from dvc.repo.experiments.queue.base import BaseStashQueue
from dvc.repo.experiments.queue.celery import LocalCeleryQueue
from scmrepo.git import Git, Stash

def die(*words, **options):
    os.kill(os.getpid(), signal.SIGKILL)

{call} = die
from pipeline.tune import main
main({words})
"""
MOMENTS = {
    "nothing done": "Git.stash_workspace",
    "the user's changes stashed": "Git.checkout",
    "HEAD detached": "BaseStashQueue._update_params",
    "params.yaml staged": "BaseStashQueue._stash_commit_deps",
    "all staged": "BaseStashQueue._stash_msg",
    "the experiment stashed": "Git.reset",
    "HEAD about to return": "Git.set_ref",
    "HEAD back": "Stash.pop",
    "the user's changes back": "Stash.drop",
}


KILLS = [*((moment, True) for moment in MOMENTS), *((moment, False) for moment in list(MOMENTS)[2:7])]


@pytest.mark.parametrize(
    ("moment", "changed"),
    [pytest.param(*kill, marks=[] if kill == ("all staged", True) else pytest.mark.slow) for kill in KILLS],
)
def test_recover_after_a_tuning_that_was_killed_while_it_queued(
    queueing: Workspace, moment: str, changed: bool
) -> None:
    workspace = queueing
    if changed:
        change(workspace)
    before = everything(workspace)
    kill_at(workspace, moment)
    line = workspace.refusal(*TUNE, "--optimizers", "sgd", "--trials", "1")
    assert line == (
        "error: HEAD and files are as a dvc that was killed left them; `make recover`, then this command again"
    )
    workspace.run("python", "-m", "pipeline.recover")
    assert everything(workspace) == before
    assert workspace.run("git", "stash", "list") == ""
    assert workspace.run("python", "-m", "pipeline.recover") == "all is well: nothing was changed\n"


@pytest.mark.slow
def test_recover_keeps_what_was_changed_after_the_kill(queueing: Workspace) -> None:
    change(queueing)
    place = queueing.position()
    kill_at(queueing, "all staged")
    with (queueing.root / "README.md").open("a") as file:
        file.write("Later.\n")
    ended = queueing.call("python", "-m", "pipeline.recover")
    assert ended.returncode == 1 and "README.md: changed since dvc was killed" in ended.stderr
    assert queueing.position() == place
    assert (queueing.root / "README.md").read_text().endswith("Mine.\nLater.\n")
    assert queueing.run("git", "show", "stash:README.md").endswith("Mine.\n")
    assert queueing.run("git", "diff", "--name-only", "HEAD").split() == ["README.md", "docs/library.md"]


def change(workspace: Workspace) -> None:
    """Staged, not staged, new."""
    for name, line in (("README.md", "Mine.\n"), ("docs/library.md", "mine\n"), ("new.txt", "new\n")):
        with (workspace.root / name).open("a") as file:
            file.write(line)
    workspace.run("git", "add", "README.md", "new.txt")


def everything(workspace: Workspace) -> list[Any]:
    """Branch, commit, what is staged and what is changed."""
    return [workspace.position(), workspace.changes(), workspace.run("git", "diff", "HEAD")]


def kill_at(workspace: Workspace, moment: str) -> None:
    words = [*TUNE[3:], "--optimizers", "sgd", "--trials", "1"]
    ended = workspace.call("python", "-c", KILLED_AT.format(call=MOMENTS[moment], words=words))
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return new_repository(tmp_path_factory.mktemp("killed"), shrink_study)


@pytest.fixture
def queueing(killed: Workspace) -> Iterator[Workspace]:
    """A repository on a branch, with another at the same commit."""
    killed.run("git", "branch", "--force", "other")
    yield killed
    killed.run("git", "symbolic-ref", "HEAD", "refs/heads/main")
    killed.run("git", "reset", "--hard", "--quiet")
    killed.run("git", "stash", "clear")
    (killed.root / "new.txt").unlink(missing_ok=True)


def lengthen(workspace: Workspace, steps: int) -> None:
    """Trainings long enough to be killed in, that end at their steps on a busy machine too."""
    with yaml_edited(workspace.root / "pipeline" / "conf" / "benchmark" / "toy_linear.yaml") as content:
        content["benchmark"]["toy_linear"].update(steps=steps, evaluate_every=steps // 20, seconds=None)
