"""The race: turns change no run, and ratios are to the Adam that is the best at a target."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import race
from pipeline import models
from pipeline.config import Params, resolve
from pipeline.data import Data, Split
from pipeline.loop import Training


@pytest.fixture(scope="module")
def small() -> Params:
    """The benchmark with a narrow network and a few steps."""
    params = race.composed(threads=1)
    task = params.benchmarks[race.BENCHMARK]
    model = task["model"] | {"widths": [20, 5]}
    return replace(params, benchmarks={race.BENCHMARK: task | {"model": model, "steps": 12, "seconds": None}})


@pytest.fixture(scope="module")
def data() -> Data:
    draw = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        pixels = torch.rand(count, 400, generator=draw).pow(4)
        return Split(pixels, pixels)

    parts = {part: split(1000) for part in ("train", "validation", "test")}
    return Data(**parts, population=None, teacher_loss=None, input_shape=(400,), outputs=400, manifest={})


def test_a_run_in_turns_is_the_run_by_itself(small: Params, data: Data) -> None:
    together = race.race([race.KFAC, race.ADAMS[1]], 0, small, data, limit=100.0)
    run = resolve(small, race.BENCHMARK, "kfac")
    model = models.build(run.model, data.input_shape, data.outputs, 0)
    alone = Training(replace(run, evaluate_every=3, diagnostics="off"), data, 0, model).train(race.Unwatched())
    assert together[0]["step"] == (0, 3, 6, 9, 12)
    assert together[0]["loss"] == [round(row["train_loss"], 3) for row in alone.history]
    assert together[1]["step"][-1] == 12


def test_whoever_is_at_his_last_target_takes_no_more_turns(small: Params, data: Data) -> None:
    easy = replace(race.CONTESTANTS[race.KFAC], last=1e9)
    runner = race.Runner(easy, small, data, 0, 100.0)
    runner.turn()
    assert runner.over
    assert runner.record()["step"] == (0,)


def one(name: str, target: float, step: int, seconds: float) -> dict:
    return {"contestant": name, "reached": {str(target): [step, seconds]}}


def test_ratios_are_to_the_best_adam_seed_by_seed() -> None:
    slow, fast = race.ADAMS
    races = [
        {"seed": 0, "runs": [one(race.KFAC, 63.0, 100, 10.0), one(slow, 63.0, 900, 50.0), one(fast, 63.0, 800, 20.0)]},
        {"seed": 1, "runs": [one(race.KFAC, 63.0, 110, 12.0), one(slow, 63.0, 900, 15.0), one(fast, 63.0, 800, 16.0)]},
        {"seed": 2, "runs": [one(race.KFAC, 63.0, 110, 12.0), one(slow, 63.0, 900, 30.0), one(fast, 63.0, 800, 15.0)]},
    ]
    assert race.ratios(races, race.KFAC, 63.0) == [0.5, 0.75, 0.8]
    assert "0.75 [0.50, 0.80]" in race.table(races)


def test_races_are_kept_as_they_are(tmp_path) -> None:
    races = [{"seed": 0, "circumstances": {"cores": 2}, "runs": [one(race.KFAC, 63.0, 100, 10.0)]}]
    race.write(tmp_path / "race.json", races)
    assert race.read(tmp_path / "race.json") == races
