"""Claims about the stage ``train``: whole records of every seed, clear refusals before the first step, honest exits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import Listener, a_network, a_run, some_data

from pipeline import data, models, tracking
from pipeline.config import ConfigError, RunConfig
from pipeline.records import FILES, is_measured, read_run, read_runs
from pipeline.train import train

ROOT = Path(__file__).parents[2]


class FailsAtSeedOne(torch.optim.SGD):
    def __init__(self, params: Any, lr: float, generator: torch.Generator | None = None) -> None:
        super().__init__(params, lr=lr)
        self.taken = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.taken += 1
        if self.taken > 3 and current["seed"] == 1:
            raise RuntimeError("no luck")
        super().step()


current: dict[str, int] = {}


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[Listener]:
    """Small data and networks, and trackers that listen, in the order in which they were started."""
    started: list[Listener] = []

    def start(run: RunConfig, seed: int, environment: dict[str, Any], *earlier: Any) -> Listener:
        current["seed"] = seed
        started.append(Listener())
        return started[-1]

    monkeypatch.setenv("DVC_ROOT", str(tmp_path_factory.mktemp("root")))
    monkeypatch.setattr(tracking, "start", start)
    monkeypatch.setattr(data, "load", lambda benchmark, device: some_data())
    monkeypatch.setattr(models, "build", lambda model, input_shape, outputs, seed: a_network(seed))
    return started


def test_every_seed_leaves_whole_records_and_tells_its_tracker_the_same(
    tmp_path: Path, trackers: list[Listener], capsys: pytest.CaptureFixture[str]
) -> None:
    train(a_run(seeds=[0, 3], diagnostics="light"), tmp_path)
    runs = read_runs(tmp_path, "tiny", "sgd", [0, 3])
    assert sorted(path.name for path in (tmp_path / "tiny/sgd").iterdir()) == ["seed-0", "seed-3"]
    for run, tracker, seed in zip(runs, trackers, (0, 3), strict=True):
        assert sorted(path.name for path in run.folder.iterdir()) == sorted(FILES)
        assert run.config["seed"] == run.summary["seed"] == seed
        assert run.history == tracker.rows and run.curvature == tracker.curvature
        assert [run.summary] == tracker.finished
        assert run.environment["torch"] == torch.__version__.partition("+")[0]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("tiny sgd seed 0: finished, loss ")


def test_records_made_again_are_the_same_but_for_clocks_and_memory(tmp_path: Path, trackers: list[Listener]) -> None:
    for folder in ("one", "other"):
        train(a_run(diagnostics="light", target_class="torch.optim.Adam", options={"lr": 0.01}), tmp_path / folder)
    one, other = (read_run(tmp_path / folder / "tiny/sgd/seed-0") for folder in ("one", "other"))
    assert (one.folder / "curvature.csv").read_bytes() == (other.folder / "curvature.csv").read_bytes()
    for first, second in zip([*one.history, one.summary], [*other.history, other.summary], strict=True):
        assert first.keys() == second.keys()
        assert {k: v for k, v in first.items() if not is_measured(k)} == {
            k: v for k, v in second.items() if not is_measured(k)
        }


def test_seeds_that_are_no_longer_asked_for_leave_no_records(tmp_path: Path, trackers: list[Listener]) -> None:
    train(a_run(seeds=[0, 1]), tmp_path)
    train(a_run(seeds=[1]), tmp_path)
    assert [path.name for path in (tmp_path / "tiny/sgd").iterdir()] == ["seed-1"]


def test_a_diverged_seed_is_a_result_and_the_stage_succeeds(tmp_path: Path, trackers: list[Listener]) -> None:
    train(a_run(options={"lr": 1e20}, seeds=[0, 1]), tmp_path)
    assert [run.summary["status"] for run in read_runs(tmp_path, "tiny", "sgd", [0, 1])] == ["diverged"] * 2


def test_a_failed_seed_is_recorded_the_others_are_trained_and_the_stage_fails(
    tmp_path: Path, trackers: list[Listener]
) -> None:
    run = a_run(target_class=f"{__name__}.FailsAtSeedOne", seeds=[0, 1, 2])
    with pytest.raises(SystemExit) as end:
        train(run, tmp_path)
    assert "1 of 3 seeds failed; seed 1: after 3 steps: RuntimeError: no luck" in str(end.value.code)
    assert "\n" not in str(end.value.code)
    runs = read_runs(tmp_path, "tiny", "sgd", [0, 1, 2])
    assert [run.summary["status"] for run in runs] == ["finished", "failed", "finished"]
    assert "Traceback" in (runs[1].folder / "failure.txt").read_text()
    assert trackers[1].finished[0]["status"] == "failed"


@pytest.mark.parametrize(
    "broken", [{"options": {"lr": 0.1, "momentun": 1}}, {"target_class": "torch.nn.Linear"}, {"batch_size": 1000}]
)
def test_what_cannot_be_trained_is_refused_and_old_records_stay(
    tmp_path: Path, trackers: list[Listener], broken: dict[str, Any]
) -> None:
    train(a_run(), tmp_path)
    with pytest.raises(ConfigError):
        train(a_run(**broken), tmp_path)
    assert read_run(tmp_path / "tiny/sgd/seed-0").summary["status"] == "finished"


def test_a_server_that_cannot_be_reached_at_the_start_stops_the_stage(
    tmp_path: Path, trackers: list[Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any) -> None:
        raise ConfigError("MLFLOW_TRACKING_URI: http://nowhere does not answer")

    monkeypatch.setattr(tracking, "start", unreachable)
    with pytest.raises(ConfigError, match="nowhere"):
        train(a_run(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_server_lost_between_seeds_is_a_warning(
    tmp_path: Path, trackers: list[Listener], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(run: RunConfig, seed: int, environment: dict[str, Any], *earlier: Any) -> Listener:
        if seed:
            raise ConfigError("MLFLOW_TRACKING_URI: http://nowhere does not answer")
        return Listener()

    monkeypatch.setattr(tracking, "start", lost)
    train(a_run(seeds=[0, 1]), tmp_path)
    assert len(read_runs(tmp_path, "tiny", "sgd", [0, 1])) == 2
    assert capsys.readouterr().err.splitlines() == [
        "warning: seed 1 is not tracked: MLFLOW_TRACKING_URI: http://nowhere does not answer"
    ]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"tiny/sgd: cannot write records there: Permission denied"):
        train(a_run(), tmp_path)


def test_a_file_in_the_place_of_the_results_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(ConfigError, match=r"results/tiny/sgd: cannot write records there: Not a directory"):
        train(a_run(), tmp_path / "results")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["toy_mlp"], "usage: python -m pipeline.train <benchmark> <optimizer>"),
        (["toy_mlp", "sdg"], "nearest: sgd"),
        (["toy_mlp", "sgd"], "data/toy_mlp"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline.train", *words]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode != 0 and said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_the_resolved_configuration_is_recorded(tmp_path: Path, trackers: list[Listener]) -> None:
    run = a_run(batch_size={"from": 4, "to": 8, "over_epochs": 1.0}, averaging=0.9, options={"lr": 1e-5})
    train(run, tmp_path)
    recorded = yaml.safe_load((tmp_path / "tiny/sgd/seed-0/config.yaml").read_text())
    assert recorded == {**run.as_dict(), "seed": 0}
