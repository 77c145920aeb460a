"""Claims about a stage that dies or is interrupted, and about its locks: processes are forked, and really die."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from lives import (
    OPTIMIZERS,
    a_stage,
    check_store,
    checkpoints,
    ended,
    fork,
    in_child,
    printed,
    wait_until,
    without_clocks,
)
from mlflow import MlflowClient

from pipeline import checkpoint, interruption, tracking
from pipeline.checkpoint import Checkpoints
from pipeline.config import RunConfig

pytestmark = pytest.mark.usefixtures("small_world")


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
