"""Claims about trials on Ray, as far as they hold without it: what is asked for again, kept and told."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import imagefiles, metrics, ray_engine, tracking, trials, tune
from pipeline.store import place
from pipeline.trials import Choice, all_trials


class FakeRay:
    """Ray as far as the engine calls it: a task brings `files`, but for the first times that `lost` has of it."""

    class exceptions:
        RayError, RayTaskError = OSError, RuntimeError

    def __init__(self, files: dict[str, dict[str, bytes]], lost: dict[str, int]) -> None:
        self.files, self.lost, self.given = files, lost, itertools.count()

    def remote(self, **options: Any) -> Any:
        return lambda function: SimpleNamespace(
            options=lambda name: SimpleNamespace(remote=lambda *_: self._give(name))
        )

    def _give(self, name: str) -> tuple[str, int]:
        return name, next(self.given)

    def wait(self, tasks: list[Any]) -> Any:
        return tasks[:1], tasks[1:]

    def get(self, task: tuple[str, int]) -> dict[str, bytes]:
        if self.lost[task[0]]:
            self.lost[task[0]] -= 1
            raise OSError("the worker died")
        return self.files[task[0]]

    def cluster_resources(self) -> dict[str, float]:
        return {}

    def shutdown(self) -> None: ...


def taken(of: list[trials.Trial]) -> dict[str, dict[str, bytes]]:
    """Take the records of these trials away: what their tasks bring, by name."""
    files = {}
    for trial in of:
        folder = trial.folder / "seed-1000"
        pair = f"{trial.benchmark}/{trial.optimizer}"
        files[trial.name] = {f"{pair}/seed-1000/{path.name}": path.read_bytes() for path in folder.iterdir()}
        shutil.rmtree(trial.folder)
    return files


def test_with_ray_a_trial_without_records_is_asked_for_again_three_times_at_most(
    tuned: dict[trials.Pair, list[trials.Trial]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of = [*tuned["toy_linear", "sgd"], tuned["toy_linear", "kfac"][0]]
    files = taken(of)
    ray = FakeRay(files, dict(zip(files, (0, 1, 9), strict=True)))
    monkeypatch.setattr(ray_engine, "_connect", lambda workers: ray)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")  # the nodes' runs are there already
    over: list[trials.Trial] = []
    asked = ray_engine.train(of, 1, over.append)
    assert [asked[trial.name] for trial in of] == [1, 2, 3] and over == of[:2]
    assert [trial.records() is not None for trial in of] == [True, True, False]
    assert capsys.readouterr().err.count("the worker died") == 1 + 3


def test_records_that_cannot_be_kept_end_a_tuning_in_one_line(
    tuned: dict[trials.Pair, list[trials.Trial]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = taken(tuned["toy_linear", "sgd"])
    monkeypatch.setattr(ray_engine, "_connect", lambda workers: FakeRay(files, dict.fromkeys(files, 0)))
    monkeypatch.setattr("pipeline.recover.Recovery.needed", lambda self: False)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    no_folder = tmp_path / "no folder"
    no_folder.touch()
    monkeypatch.setattr(trials, "FOLDER", no_folder)
    words = "--benchmarks toy_linear --optimizers sgd --trials 2 --seeds 1000 --engine ray"
    with pytest.raises(SystemExit) as end:
        tune.main(words.split())
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"error: {no_folder}/toy_linear/sgd/")
    assert line.endswith("/seed-1000: Not a directory; the same command goes on")


@pytest.mark.parametrize("address", [None, "sqlite:///mlflow.db"])
def test_with_ray_a_store_that_is_a_file_gets_its_runs_on_this_machine(
    address: str | None, root: Path, tuned: dict[trials.Pair, list[trials.Trial]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    [trial, _] = tuned["toy_linear", "sgd"]
    ray = FakeRay(taken([trial]), {trial.name: 0})
    monkeypatch.setattr(ray_engine, "_connect", lambda workers: ray)
    ray_engine.train([trial], 1, lambda _: None)
    store = tracking.Store()
    runs = [run for experiment in store.experiments() for run in store.runs(experiment.experiment_id)]
    assert [run.data.tags["records"] for run in runs] == [metrics.records_hash(trial.folder / "seed-1000")]


@pytest.mark.parametrize("settings", [(), ("image_folder=images",)], ids=["IMAGE_FOLDER", "image_folder"])
def test_relative_paths_are_the_same_on_a_node_of_ray(
    settings: tuple[str, ...], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [[trial]] = all_trials(Choice(("toy_linear",), ("sgd",), 1, (1000,), settings=settings), {}).values()
    for name in ("images", "node"):
        (root / name).mkdir()
    monkeypatch.setenv("IMAGE_FOLDER", "" if settings else "images")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    params = ray_engine._params(trial)
    assert ray_engine._variables(trial, params)["MLFLOW_TRACKING_URI"] == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    variables = {**ray_engine._variables(trial, params), "DVC_ROOT": str(root / "node")}
    (root / "node" / "params.yaml").write_text(params)
    monkeypatch.chdir(root / "node")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert imagefiles.image_folder() == root / "images"
    assert place().database == root / "node" / "mlflow.db"  # from where its runs come here as records
