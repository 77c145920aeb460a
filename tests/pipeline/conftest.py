"""Fixtures: a workspace with an empty MLflow store of its own, records of two tunings, and a stage undisturbed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import ended, in_child, printed, without_clocks
from runs import a_network, some_data
from synthetic_records import write_study

from pipeline import data, models, tracking, trials
from pipeline.composition import compose
from pipeline.config import RunConfig, load
from pipeline.trials import Choice, all_trials


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as it is made on first use; making it takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.Store()
    return folder / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, new_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with an empty store."""
    shutil.copy(new_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[trials.Pair, list[trials.Trial]], Path]:
    """Two trials of SGD, which miss the targets, and of K-FAC, whose second is the quicker, and their records."""
    folder = tmp_path_factory.mktemp("recorded")
    asked = all_trials(Choice(("toy_linear",), ("sgd", "kfac"), 2, (1000,)), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "FOLDER", folder / "trials")
        for trial in [trial for of in asked.values() for trial in of]:
            compose(folder / "params.yaml", list(trial.overrides))
            write_study(folder / "results", load(folder / "params.yaml"))
            if trial.number == 2:
                summary = folder / "results" / "toy_linear" / trial.optimizer / "seed-1000" / "summary.json"
                found = json.loads(summary.read_text())
                summary.write_text(json.dumps(found | {"hard_seconds": 0.5 * (found["hard_seconds"] or 0.0)}))
            trial.keep(folder / "results")
    return asked, folder / "trials"


@pytest.fixture
def tuned(
    recorded: tuple[dict[trials.Pair, list[trials.Trial]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[trials.Pair, list[trials.Trial]]:
    """The same, for the test to change."""
    shutil.copytree(recorded[1], tmp_path / "trials")
    monkeypatch.setattr(trials, "FOLDER", tmp_path / "trials")
    return recorded[0]


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small data set and network in place of a benchmark's own."""
    monkeypatch.setattr(data, "load", lambda benchmark, device: some_data())
    monkeypatch.setattr(models, "build", lambda model, shape, outputs, seed: a_network(seed, dropout=True))
    torch.set_num_threads(1)  # a fork has none of the threads of its parent


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
