"""Claims about a stage that dies, is interrupted, or loses its disk: processes are forked, and really die.

The one idea: a fork has torch and MLflow imported already, so that a life of a trainer takes a second, and many moments
of it can be tried.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from runs import a_network, a_run, some_data

from pipeline import checkpoint, data, interruption, models, records, tracking
from pipeline.checkpoint import Checkpoints
from pipeline.config import ConfigError, RunConfig
from pipeline.records import is_measured
from pipeline.train import Untracked, train

CANNOT = 77  # exit status of a child that cannot make its fault here
OPTIMIZERS = {"sgd": "torch.optim.SGD", "kfac": "kfac.KFAC", "ekfac": "kfac.EKFAC", "gkfac": "kfac.GKFAC"}
fork = multiprocessing.get_context("fork")


def a_stage(optimizer: str = "sgd", **changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "optimizer": optimizer,
        "target_class": OPTIMIZERS[optimizer],
        "options": {"lr": 0.05} if optimizer == "sgd" else {},
        "seeds": [0, 1],
        "steps": 320 if optimizer == "sgd" else 80,
        "evaluate_every": 16 if optimizer == "sgd" else 8,
        "diagnostics": "light",
        "averaging": 0.9,
    }
    return a_run(**{**fields, **changes})


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda benchmark, device: some_data())
    monkeypatch.setattr(models, "build", lambda model, shape, outputs, seed: a_network(seed, dropout=True))
    torch.set_num_threads(1)  # a fork has none of the threads of its parent


def in_child(
    root: Path, run: RunConfig, before: Callable[[], None] = lambda: None, *, tracked: bool = True, **options: Any
) -> BaseProcess:
    """Train a stage in the workspace `root`, in a process of its own; what it prints is in `root`/printed.

    Where a claim is not about MLflow, leaving it out makes a life of seconds one of a fraction.
    """

    results = options.pop("results", root / "results")

    def life() -> None:
        printed = os.open(root / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(printed, descriptor)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ["DVC_ROOT"] = str(root)
        os.chdir(root)
        atexit._clear()  # what the parent registered
        for number in (signal.SIGINT, signal.SIGHUP):  # ignored where the tests run in the background
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if not tracked:
            tracking.start = lambda *_: Untracked()  # type: ignore[assignment]
            tracking.complete = lambda folder: None
        before()
        try:
            train(run, results, **{"checkpoint_seconds": 0.0, **options})
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(2)
        except SystemExit as end:
            print(end.code, file=sys.stderr, flush=True)
            atexit._run_exitfuncs()
            os._exit(end.code if isinstance(end.code, int) else 1)

    process = fork.Process(target=life)
    process.start()
    return process


def printed(root: Path) -> str:
    return (root / "printed").read_text()


def ended(process: BaseProcess) -> int:
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    if process.exitcode == CANNOT:
        pytest.skip("this machine does not let a process make this fault")
    return process.exitcode


def without_clocks(root: Path, run: RunConfig) -> dict[int, str]:
    """All columns and keys that are no clocks, the text of each number the shortest."""
    found = {}
    for seed in run.seeds:
        record = records.read_run(root / "results" / run.benchmark / run.optimizer / f"seed-{seed}")
        history = [{key: value for key, value in row.items() if not is_measured(key)} for row in record.history]
        summary = {key: value for key, value in record.summary.items() if not is_measured(key)}
        found[seed] = repr((record.config, history, record.curvature, summary))
    return found


def check_store(root: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One finished run a seed, each step once, in a store that says what the records say."""
    monkeypatch.setenv("DVC_ROOT", str(root))
    store = tracking.Store()
    experiment = store.client.get_experiment_by_name(run.benchmark)
    assert experiment is not None
    runs = store.runs(experiment.experiment_id)
    assert sorted(found.info.run_name for found in runs) == sorted(f"{run.optimizer} seed {k}" for k in run.seeds)
    for found in runs:
        assert found.info.status == "FINISHED" and found.data.tags["status"] == "finished"
        folder = root / "results" / run.benchmark / run.optimizer / f"seed-{found.data.params['seed']}"
        history = records.read_history(folder)
        for name, column in (("loss/train", "train_loss"), ("time/training_seconds", "training_seconds")):
            points = store.client.get_metric_history(found.info.run_id, name)
            logged = sorted((point.step, point.value) for point in points)
            assert logged == [(row["step"], row[column]) for row in history], name
        for name in found.data.metrics:
            steps = [point.step for point in store.client.get_metric_history(found.info.run_id, name)]
            assert len(steps) == len(set(steps)), name
        assert {file.path for file in store.client.list_artifacts(found.info.run_id)} >= set(records.FILES)


@pytest.fixture
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, float]]:
    """What a stage leaves when nothing happens, and its seconds."""

    def measure(run: RunConfig, tracked: bool = False) -> tuple[Any, float]:
        other = tmp_path_factory.mktemp("undisturbed")
        (other / "mlflow.db").write_bytes((root / "mlflow.db").read_bytes())
        begin = time.monotonic()
        assert ended(in_child(other, run, tracked=tracked)) == 0, printed(other)
        return without_clocks(other, run), time.monotonic() - begin

    return measure


def kill_at_random_moments(root: Path, run: RunConfig, kills: int, seconds: float, seed: str) -> list[str]:
    """Kill lives of a stage, by turns at any moment of it and soon after it wrote a checkpoint; where each was."""
    moments, at = Random(seed), []
    for number in range(kills):
        process, begin, before = in_child(root, run), time.monotonic(), checkpoints(root)
        if number % 2:
            while process.is_alive() and checkpoints(root) == before:
                time.sleep(0.001)
        process.join(moments.uniform(0.0, 0.3 if number % 2 else 1.0) * seconds)
        if process.exitcode is not None:
            break
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        latest = "/".join(checkpoints(root)[-1].parts[-2:]) if checkpoints(root) else "none"
        at.append(f"{time.monotonic() - begin:.2f} s, last checkpoint {latest}")
    return at


def checkpoints(root: Path) -> list[Path]:
    return sorted(root.glob("checkpoints/*/*/*/seed-*/step-*.pt"))


@pytest.mark.parametrize(
    ("optimizer", "round_"),
    [
        ("kfac", 0),
        *(pytest.param(o, k, marks=pytest.mark.slow) for o in OPTIMIZERS for k in range(1, 6)),
    ],
)
def test_killed_at_any_moment_a_stage_goes_on_to_the_same_records(
    optimizer: str,
    round_: int,
    root: Path,
    undisturbed: Callable[..., tuple[Any, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = a_stage(optimizer)
    expected, seconds = undisturbed(run, tracked=True)
    at = kill_at_random_moments(root, run, kills=2 if round_ == 0 else 6, seconds=seconds, seed=f"{optimizer} {round_}")
    assert ended(in_child(root, run)) == 0, printed(root)
    assert without_clocks(root, run) == expected, at
    check_store(root, run, monkeypatch)
    assert not (root / "checkpoints").exists()
    print(f"KILLED {optimizer} {seconds:.1f} s:", "; ".join(at))


# ---------------------------------------------------------------- signals and locks


def wait_until(condition: Callable[[], Any], process: BaseProcess) -> None:
    while not condition():
        assert process.is_alive(), "it ended too early"
        time.sleep(0.002)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGHUP))]
)
def test_a_signal_ends_a_run_cleanly_and_it_goes_on(
    number: signal.Signals,
    root: Path,
    undisturbed: Callable[..., tuple[Any, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = a_stage("kfac", seeds=[0])
    expected, _ = undisturbed(run)
    process = in_child(root, run, checkpoint_seconds=3600.0)  # only the signal makes it write one
    wait_until(lambda: list(root.glob("checkpoints/*/*/*/*.lock")), process)
    time.sleep(0.2)
    os.kill(process.pid or 0, number)
    assert ended(process) == 128 + number
    [line] = printed(root).splitlines()[:1]
    assert line.startswith("tiny kfac seed 0: stopped after step ") and f"({number.name})" in line
    assert len(checkpoints(root)) == 1
    store = tracking.Store()
    experiment = store.client.get_experiment_by_name("tiny")
    assert experiment is not None
    assert [found.info.status for found in store.runs(experiment.experiment_id)] == ["KILLED"]
    assert ended(in_child(root, run)) == 0
    assert "tiny kfac seed 0: goes on from step" in printed(root)
    assert without_clocks(root, run) == expected
    check_store(root, run, monkeypatch)


def test_sigterm_makes_a_run_write_a_checkpoint_where_it_is(root: Path) -> None:
    process = in_child(root, a_stage("sgd", seeds=[0], steps=100_000), tracked=False)
    wait_until(lambda: checkpoints(root), process)
    os.kill(process.pid or 0, signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM
    step = int(checkpoints(root)[-1].stem.removeprefix("step-"))
    told = f"tiny sgd seed 0: stopped after step {step} (SIGTERM); the same command goes on from there"
    assert told in printed(root).splitlines()


def test_a_trainer_whose_dvc_was_killed_ends_with_a_checkpoint_and_the_next_goes_on(
    root: Path, undisturbed: Callable[..., tuple[Any, float]]
) -> None:
    run = a_stage("kfac", seeds=[0])
    expected, _ = undisturbed(run)

    def as_a_stage() -> None:
        interruption.IS_STAGE, interruption.STARTER = True, interruption._starter()
        interruption._LOOK_EVERY = 0.05

    def start_it() -> None:
        os.setsid()
        in_child(root, run, as_a_stage, tracked=False).join()

    dvc = fork.Process(target=start_it)
    dvc.start()
    wait_until(lambda: checkpoints(root), dvc)
    os.kill(dvc.pid or 0, signal.SIGKILL)
    assert ended(dvc) == -signal.SIGKILL
    next_one = in_child(root, run, tracked=False)  # at once: it waits for the orphan
    assert ended(next_one) == 0, printed(root)
    assert "(the dvc that started it is gone); the same command goes on from there" in printed(root)
    assert "goes on from step" in printed(root) and without_clocks(root, run) == expected


def test_a_second_trainer_of_a_configuration_is_refused_in_one_line_and_harms_nothing(
    root: Path, undisturbed: Callable[..., tuple[Any, float]]
) -> None:
    run = a_stage("kfac")
    expected, _ = undisturbed(run)
    first = in_child(root, run, tracked=False)
    wait_until(lambda: checkpoints(root), first)
    second = in_child(root, run, tracked=False)
    assert ended(second) == 2
    [line] = [line for line in printed(root).splitlines() if line.startswith("error: ")]
    assert f"process {first.pid} trains the same configuration and seed; wait for it, or end it" in line
    assert ended(first) == 0 and without_clocks(root, run) == expected


@pytest.mark.slow
def test_a_queued_run_waits_for_the_trainer_of_the_same_configuration(
    root: Path, undisturbed: Callable[..., tuple[Any, float]]
) -> None:
    run = a_stage("kfac")
    expected, _ = undisturbed(run)
    first = in_child(root, run, tracked=False)
    wait_until(lambda: checkpoints(root), first)
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    second = in_child(root, run, lambda: os.chdir(elsewhere), tracked=False, results=elsewhere / "results")
    assert ended(first) == ended(second) == 0, printed(root)
    assert printed(root).count("; waiting for it to end") == 1
    assert without_clocks(root, run) == without_clocks(elsewhere, run) == expected


def test_a_stage_that_succeeds_leaves_the_checkpoints_of_other_seeds(
    root: Path, undisturbed: Callable[..., tuple[Any, float]]
) -> None:
    other = a_stage("sgd", seeds=[1])
    expected, _ = undisturbed(other)
    running = in_child(root, other, tracked=False)
    wait_until(lambda: checkpoints(root), running)
    os.kill(running.pid or 0, signal.SIGSTOP)
    kept = sorted(root.glob("checkpoints/*/*/*/seed-1*"))
    elsewhere = {"results": root / "elsewhere"}
    try:
        assert ended(in_child(root, a_stage("sgd", seeds=[0]), tracked=False, **elsewhere)) == 0
        assert sorted(root.glob("checkpoints/*/*/*/seed-*")) == kept and len(kept) == 2
        assert ended(in_child(root, other, tracked=False, **elsewhere)) == 2  # its lock holds
    finally:
        os.kill(running.pid or 0, signal.SIGCONT)
    assert ended(running) == 0 and without_clocks(root, other) == expected
    assert not (root / "checkpoints").exists()


def test_killed_while_it_removes_what_it_kept_a_stage_ends_with_whole_records(
    root: Path, undisturbed: Callable[..., tuple[Any, float]]
) -> None:
    run = a_stage("sgd", steps=64)
    expected, _ = undisturbed(run)

    def die_in_the_middle() -> None:
        def remove_some(folder: Path, **_: Any) -> None:
            if found := [*folder.rglob("history.csv")]:
                found[0].unlink()
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.shutil.rmtree = remove_some  # type: ignore[assignment]

    assert ended(in_child(root, run, die_in_the_middle, tracked=False)) == -signal.SIGKILL
    assert ended(in_child(root, run, tracked=False)) == 0
    assert without_clocks(root, run) == expected and not (root / "checkpoints").exists()


def test_records_that_something_else_removed_are_a_failure(root: Path) -> None:
    def lose_records() -> None:
        Checkpoints.finish = lambda self: shutil.rmtree(self.records)  # type: ignore[method-assign]

    assert ended(in_child(root, a_stage("sgd", steps=64), lose_records, tracked=False)) == 1
    assert "2 of 2 seeds failed" in printed(root) and "seed-0/records: was removed by something else" in printed(root)


@pytest.mark.slow
def test_a_lock_of_a_killed_process_binds_nobody(root: Path) -> None:
    run = a_stage("sgd", steps=200)
    first = in_child(root, run, tracked=False)
    wait_until(lambda: checkpoints(root), first)
    first.kill()
    first.join()
    assert ended(in_child(root, run, tracked=False)) == 0


@pytest.mark.slow
def test_a_changed_configuration_starts_anew_and_the_killed_run_is_marked(
    root: Path, undisturbed: Callable[..., tuple[Any, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = in_child(root, a_stage("sgd", seeds=[0]))
    wait_until(lambda: len(checkpoints(root)) == 2, process)
    process.kill()
    process.join()
    run = a_stage("sgd", seeds=[0], options={"lr": 0.04})
    expected, _ = undisturbed(run)
    assert ended(in_child(root, run)) == 0
    assert "goes on" not in printed(root) and without_clocks(root, run) == expected
    assert len(checkpoints(root)) == 2  # those of the other configuration are still there
    store = tracking.Store()
    experiment = store.client.get_experiment_by_name("tiny")
    assert experiment is not None
    statuses = {found.data.params["optimizer.lr"]: found.info.status for found in store.runs(experiment.experiment_id)}
    assert statuses == {"0.05": "KILLED", "0.04": "FINISHED"}


@pytest.mark.slow
def test_a_store_that_was_emptied_between_two_lives_gets_the_whole_run(
    root: Path, new_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_stage("kfac", seeds=[0])
    process = in_child(root, run)
    wait_until(lambda: len(checkpoints(root)) == 2, process)
    process.kill()
    process.join()
    (root / "mlflow.db").write_bytes(new_store.read_bytes())
    assert ended(in_child(root, run)) == 0
    check_store(root, run, monkeypatch)


@pytest.mark.parametrize("moment", ["create_run", "log_batch", "set_terminated", "delete_run", "label"])
@pytest.mark.slow
def test_killed_between_two_calls_to_mlflow_leaves_no_run_behind(
    moment: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_stage("sgd", seeds=[0], steps=32)

    def die_after_it() -> None:
        place = tracking.Store if moment == "label" else MlflowClient
        call = getattr(place, moment)

        def dying(*arguments: Any, **options: Any) -> None:
            call(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(place, moment, dying)

    for _ in range(2):
        assert ended(in_child(root, run, die_after_it)) in (0, -signal.SIGKILL)
    assert ended(in_child(root, run)) == 0
    check_store(root, run, monkeypatch)


# ---------------------------------------------------------------- disks and stores that fail in mid-run


def own_mounts() -> None:
    """In this process and its children, mounts that nobody else sees; ends the process where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    new_namespaces = 0x00020000 | (0 if user == 0 else 0x10000000)
    if ctypes.CDLL(None, use_errno=True).unshare(new_namespaces) != 0:
        os._exit(CANNOT)
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")


def mount(*words: str) -> None:
    if subprocess.run(["mount", *words], check=False, capture_output=True).returncode != 0:
        os._exit(CANNOT)


def fill(folder: Path) -> None:
    """Write until the disk is full."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (2**20, 4096, 512):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def later(root: Path, act: Callable[[], None]) -> Callable[[], None]:
    """Before a life: have `act` done when the first seed has two checkpoints."""
    save = Checkpoints.save

    def save_and_act(self: Checkpoints, step: int, state: Mapping[str, Any]) -> bool:
        kept = save(self, step, state)
        if len(checkpoints(root)) == 2:
            Checkpoints.save = save  # type: ignore[method-assign]
            act()
        return kept

    def arrange() -> None:
        Checkpoints.save = save_and_act  # type: ignore[method-assign]

    return arrange


def in_own_mounts(test: Callable[[], None]) -> None:
    """Run the rest of a test in a process with mounts of its own."""

    def life() -> None:
        own_mounts()
        try:
            test()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = fork.Process(target=life)
    process.start()
    assert ended(process) == 0


@pytest.mark.parametrize("tracked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_full_disk_costs_checkpoints_and_tracking_but_no_record(
    tracked: bool, root: Path, undisturbed: Callable[..., tuple[Any, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_stage("sgd", seeds=[0])
    expected, _ = undisturbed(run)

    def test() -> None:
        disk = root / "disk"
        disk.mkdir()
        mount("-t", "tmpfs", "-o", "size=8m", "none", str(disk))
        (disk / "mlflow.db").write_bytes((root / "mlflow.db").read_bytes())
        status = ended(in_child(disk, run, later(disk, lambda: fill(disk)), tracked=tracked))
        said = (disk / "printed").read_text()
        (disk / "filler").unlink()
        if status != 0:  # there was no room for the records either
            assert said.splitlines()[-1].endswith(
                "No space left on device; the same command goes on from its checkpoint"
            )
            assert ended(in_child(disk, run, tracked=tracked)) == 0
            assert "goes on from step" in (disk / "printed").read_text()
        assert without_clocks(disk, run) == expected
        assert said.count("no checkpoint could be written: No space left on device; training goes on") == 1, said
        if tracked:
            monkeypatch.setenv("DVC_ROOT", str(disk))
            tracking.rebuild(disk / "results")
            check_store(disk, run, monkeypatch)

    in_own_mounts(test)


def test_results_that_cannot_be_written_any_more_are_kept_and_brought_in(
    root: Path, undisturbed: Callable[..., tuple[Any, float]]
) -> None:
    run = a_stage("sgd")
    expected, _ = undisturbed(run)

    def test() -> None:
        results = root / "results"
        results.mkdir()
        mount("--bind", str(results), str(results))
        read_only = later(root, lambda: mount("-o", "remount,bind,ro", str(results)))
        assert ended(in_child(root, run, read_only, tracked=False)) == 1
        line = printed(root).splitlines()[-1]
        assert "2 of 2 seeds failed" in line and "Read-only file system" in line and "brings them in" in line
        mount("-o", "remount,bind,rw", str(results))
        assert ended(in_child(root, run, tracked=False)) == 0
        assert printed(root).count("was over before the stage was stopped") == 2
        assert without_clocks(root, run) == expected

    in_own_mounts(test)


def locked_by_another(database: Path) -> None:
    """Until this process ends, another holds the database."""
    code = (
        "import sqlite3, sys; held = sqlite3.connect(sys.argv[1], timeout=60); held.execute('BEGIN EXCLUSIVE');"
        " print(flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(database)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    _HOLDERS.append(holder)


_HOLDERS: list[subprocess.Popen[bytes]] = []
STORE_FAULTS: dict[str, Callable[[Path], None]] = {
    "gone": lambda database: database.unlink(),
    "corrupt": lambda database: database.write_bytes(b"broken" * 10_000) and None,
    "locked": locked_by_another,
}


@pytest.mark.parametrize("fault", ["gone", *(pytest.param(f, marks=pytest.mark.slow) for f in ("corrupt", "locked"))])
def test_a_store_that_fails_in_mid_run_is_one_warning_and_is_made_again_from_the_records(
    fault: str,
    root: Path,
    new_store: Path,
    undisturbed: Callable[..., tuple[Any, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = a_stage("sgd", seeds=[0])
    expected, _ = undisturbed(run)
    assert ended(in_child(root, run, later(root, lambda: STORE_FAULTS[fault](root / "mlflow.db")))) == 0
    assert without_clocks(root, run) == expected
    [line] = [line for line in printed(root).splitlines() if line.startswith("warning: ")]
    assert "was lost" in line and "python -m pipeline.tracking rebuild" in line
    if fault != "locked":
        (root / "mlflow.db").write_bytes(new_store.read_bytes())
    monkeypatch.setenv("DVC_ROOT", str(root))
    assert tracking.rebuild(root / "results") == (1, 0)
    check_store(root, run, monkeypatch)
