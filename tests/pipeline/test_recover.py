"""Claims about `make recover` in a repository whose one stage sleeps: DVC is real and is really killed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import recover

REPOSITORY = Path(__file__).parents[2]
WELL = ["all is well: nothing was changed"]
STAGE = "stages: {train: {cmd: 'touch begun; sleep ${seconds}; exit ${status}', params: [seconds, status]}}\n"
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(root: Path) -> Iterator[Command]:
    """Runs Git, DVC (`dvc`) and recovery (`recover`) in a new repository, which has nothing of the user's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "DVC_"))}
    identity = {f"GIT_{role}_{kind}": "test@example.org" for role in ("AUTHOR", "COMMITTER")
                for kind in ("NAME", "EMAIL")}  # fmt: skip
    environment = {
        **{**inherited, **identity, "GIT_CONFIG_GLOBAL": os.devnull, "DVC_NO_ANALYTICS": "true"},
        **{f"DVC_{kind}_CONFIG_DIR": str(root / ".settings") for kind in ("GLOBAL", "SYSTEM")},
        **{"DVC_SITE_CACHE_DIR": str(root / ".settings"), "PYTHONPATH": str(REPOSITORY)},
        # queue workers call dvc by name
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    programs = {"dvc": [sys.executable, "-m", "dvc"], "recover": [sys.executable, "-m", "pipeline.recover"]}

    def call(program: str, *words: str, wait: bool = True) -> Any:
        line = [*programs.get(program, [program]), *words]
        if not wait:
            return subprocess.Popen(line, cwd=root, env=environment, stderr=subprocess.PIPE, start_new_session=True)
        return subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True, check=False)

    (root / "dvc.yaml").write_text(STAGE)
    (root / "params.yaml").write_text("seconds: 0\nstatus: 0\n")
    (root / ".gitignore").write_text(".settings\nbegun\nmlflow.db*\n")
    call("git", "init", "--quiet", "--initial-branch=main")
    assert call("dvc", "init", "--quiet").returncode == 0
    call("git", "add", "."), call("git", "commit", "--quiet", "--message=A stage that sleeps")
    yield call


def lines(ended: subprocess.CompletedProcess[str]) -> list[str]:
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def begun(root: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the stage runs."""
    while not [*root.glob("begun"), *root.glob(".dvc/tmp/exps/standalone/*/begun")]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def kill_workers(root: Path) -> None:
    """All queue workers, each with the experiment that it runs; a worker dies first and notes nothing of its end."""
    workers, _ = recover.Recovery(root).dvc_processes()
    below = [child for worker in workers for child in worker.children(recursive=True)]
    for process in workers + below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_an_exp_run_that_was_killed_is_queued_again_and_the_workspace_is_in_order(root: Path, command: Command) -> None:
    process = command("dvc", "exp", "run", "-n", "mine", "-S", "seconds=600", wait=False)
    begun(root, process)
    kill(process)
    assert command("git", "symbolic-ref", "HEAD").returncode != 0
    said = lines(command("recover"))
    assert "HEAD, which dvc had detached, is on branch main again" in said
    assert "experiment mine, whose `dvc exp run` was killed, is queued again" in said
    assert lines(command("git", "symbolic-ref", "HEAD")) == ["refs/heads/main"]
    assert lines(command("git", "status", "--porcelain")) == []
    assert "mine" in command("dvc", "queue", "status").stdout


def test_settings_that_cannot_be_composed_are_named_and_the_experiment_is_queued_again(
    root: Path, command: Command
) -> None:
    shutil.copytree(REPOSITORY / "pipeline", root / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    command("git", "add", "."), command("git", "commit", "--quiet", "--message=Settings")
    process = command("dvc", "exp", "run", "-n", "mine", "-S", "seconds=600", wait=False)
    begun(root, process)
    kill(process)
    (root / "pipeline" / "conf" / "optimizer" / "sgd.yaml").write_text("sgd: {lr: [")
    ended = command("recover")
    [line] = ended.stderr.splitlines()
    assert ended.returncode == 1 and "sgd.yaml" in line
    assert line.startswith("params.yaml: has the experiment's choices, for pipeline/conf cannot be composed: while ")
    assert "experiment mine, whose `dvc exp run` was killed, is queued again" in ended.stdout.splitlines()
    assert "mine" in command("dvc", "queue", "status").stdout
    assert lines(command("git", "symbolic-ref", "HEAD")) == ["refs/heads/main"]


@pytest.mark.parametrize("fault", ["an unknown experiment", "a broken file of DVC's"])
def test_what_was_done_is_said_also_where_recovery_cannot_go_on(root: Path, command: Command, fault: str) -> None:
    if fault == "an unknown experiment":
        lines(command("git", "update-ref", recover.UNFINISHED, "HEAD"))
    else:
        (root / ".dvc" / "config").write_text("[core")
    (root / ".git" / "index.lock").touch()
    ended = command("recover")
    [line] = ended.stderr.splitlines()
    assert ended.returncode == 1 and line.startswith("error: ")
    assert ended.stdout == ".git/index.lock: the lock of a git that is gone was removed\n"


def test_a_temporary_run_is_left_while_it_lives_and_queued_again_once_when_it_was_killed(
    root: Path, command: Command
) -> None:
    process = command("dvc", "exp", "run", "--temp", "-n", "mine", "-S", "seconds=600", wait=False)
    begun(root, process)
    refused = command("recover")
    assert refused.returncode == 1 and refused.stderr.startswith(f"error: dvc is running here (process {process.pid}: ")
    assert psutil.pid_exists(process.pid) and [*root.glob(".dvc/tmp/exps/standalone/*/begun")]
    kill(process)
    said = lines(command("recover"))
    assert "experiment mine, lost when its dvc was killed, is queued again" in said
    assert not [*root.glob(".dvc/tmp/exps/standalone/*/begun")]
    assert lines(command("recover")) == WELL


def test_the_point_of_a_killed_queue_worker_is_queued_again_beside_the_one_that_waits(
    root: Path, command: Command
) -> None:
    lines(command("dvc", "exp", "run", "--queue", "-n", "point", "-S", "seconds=600,601"))
    try:
        assert command("dvc", "queue", "start", wait=False).wait() == 0
        deadline = time.monotonic() + 120
        while not [*root.glob(".dvc/tmp/exps/tmp*/begun")]:
            assert time.monotonic() < deadline, "no worker runs a point"
            time.sleep(0.05)
    finally:
        kill_workers(root)
    [again] = [line for line in lines(command("recover")) if line.startswith("experiment")]
    assert re.fullmatch("experiment point-[12], lost when its dvc was killed, is queued again", again)
    assert not [*root.glob(".dvc/tmp/exps/tmp*/begun")]
    rows = [line.split() for line in lines(command("dvc", "queue", "status")) if " point-" in line]
    assert sorted((row[1], row[-1]) for row in rows) == [("point-1", "Queued"), ("point-2", "Queued")]


def test_a_trainer_that_ends_by_itself_meanwhile_is_no_trouble(
    root: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [sys.executable, "-c", "import time; time.sleep(600)", "pipeline.train", "tiny", "sgd"]
    trainer = subprocess.Popen(words, env={**os.environ, "DVC_ROOT": str(root)})
    look = recover._environment

    def end_it_after_a_look(process: psutil.Process) -> dict[str, str]:
        found = look(process)
        if process.pid == trainer.pid:
            trainer.kill()
            trainer.wait()
        return found

    monkeypatch.setattr(recover, "_environment", end_it_after_a_look)
    recovery = recover.Recovery(root)
    recovery._end_orphans(with_workers=True)
    assert trainer.returncode == -signal.SIGKILL and not recovery.done and not recovery.left


@pytest.mark.parametrize("place", [[], ["--temp"]], ids=["workspace", "temporary"])
def test_a_run_that_failed_or_was_removed_is_not_queued_again(root: Path, command: Command, place: list[str]) -> None:
    assert command("dvc", "exp", "run", *place, "-S", "status=1").returncode != 0
    lines(command("git", "checkout", "--force", "main"))
    lines(command("dvc", "exp", "run", *place, "-n", "mine", "-S", "status=0", "-S", "seconds=0.1"))
    lines(command("git", "checkout", "--force", "main"))
    lines(command("dvc", "exp", "remove", "mine"))
    assert lines(command("recover")) == WELL
