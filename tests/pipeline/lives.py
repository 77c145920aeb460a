"""Lives of a stage in processes that are forked and may really die, and what they leave.

The one idea: a fork has torch and MLflow imported already, so that a life of a trainer takes a second, and many moments
of it can be tried.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from runs import a_run

from pipeline import checkpoint, records, tracking
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


def in_child(
    root: Path, run: RunConfig, before: Callable[[], None] = lambda: None, *, tracked: bool = True, **options: Any
) -> BaseProcess:
    """Train a stage in the workspace `root`, in a process of its own; what it prints is in `root`/printed.

    Where a claim is not about MLflow, leaving it out makes a life of seconds one of a fraction. A checkpoint is written
    at every evaluation, also on a slow disk, where a run this short would have one.
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
        checkpoint.SHARE = math.inf
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


def checkpoints(root: Path) -> list[Path]:
    return sorted(root.glob("checkpoints/*/*/*/seed-*/step-*.pt"))


def wait_until(condition: Callable[[], Any], process: BaseProcess) -> None:
    while not condition():
        assert process.is_alive(), "it ended too early"
        time.sleep(0.002)
