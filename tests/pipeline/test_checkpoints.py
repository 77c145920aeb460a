"""Claims about checkpoints: a run stopped anywhere goes on to the same numbers, and nothing wrong is loaded."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from runs import Listener, a_network, a_run, some_data

from pipeline import checkpoint
from pipeline.checkpoint import Checkpoints
from pipeline.composition import compose
from pipeline.config import Params, RunConfig, load, resolve
from pipeline.loop import Outcome, Training
from pipeline.records import is_measured
from pipeline.states import plain, whole
from pipeline.validation import available

ROOT = Path(__file__).parents[2]
SHIPPED = available("optimizer")  # every optimizer of pipeline/conf, as it is set for a benchmark
FIXED_RULE = {"lr": 0.03, "damping": 0.01, "inverse_interval": 7, "factor_interval": 3}
FAST = ("sgd", "shampoo", "kfac", "ekfac", "gkfac")
STEPS = 40


@functools.cache
def composed() -> Params:
    with tempfile.TemporaryDirectory() as folder:
        compose(Path(folder) / "params.yaml", [f"optimizer=[{','.join(SHIPPED)}]", "benchmark=digits_cnn"])
        return load(Path(folder) / "params.yaml")


def shipped(name: str) -> dict[str, Any]:
    """Class and arguments of an optimizer of pipeline/conf."""
    run = resolve(composed(), "digits_cnn", name)
    return {"target_class": run.target_class, "options": dict(run.options), "rest": run.rest}


def a_long_run(name: str, **changes: Any) -> RunConfig:
    """All that has a state: averaging, warm-up, a schedule, growing batches, diagnostics, dropout, batch norm."""
    settings = shipped("kfac" if name == "fixed rule" else name)
    if name == "fixed rule":
        settings["options"] |= FIXED_RULE
    growing = {"from": 6, "to": 20, "over_epochs": 5.0}
    fields = {
        **{"steps": STEPS, "batch_size": growing, "averaging": 0.9, "warmup": 5, "schedule": "cosine"},
        **{"diagnostics": "full", "loss": "cross_entropy", **settings},
    }
    return a_run(**{**fields, **changes})


def begin(run: RunConfig) -> Training:
    return Training(run, some_data(run.loss), 0, a_network(dropout=True, batch_norm=True))


def without_clocks(outcome: Outcome) -> Any:
    history = [{key: value for key, value in row.items() if not is_measured(key)} for row in outcome.history]
    summary = {key: value for key, value in outcome.summary.items() if not is_measured(key)}
    return repr((history, outcome.curvature, summary))  # the shortest text of each number, and nan equal to nan


def stop_after(step: int, training: Training) -> Callable[[], str]:
    return lambda: "test" if training.progress.step >= step else ""


@pytest.mark.parametrize(
    "name",
    [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in ("fixed rule", *SHIPPED) if name not in FAST)],
)
def test_a_run_stopped_anywhere_goes_on_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    run, moments = a_long_run(name), Random(name)
    pytest.importorskip(run.target_class.partition(".")[0])
    undisturbed = without_clocks(begin(run).train(Listener()))
    for number in range(2):
        kept = Checkpoints(tmp_path / str(number), 0, 0.0)
        at = sorted(moments.sample(range(STEPS), 3))
        for step in at:  # each time a new network, optimizer and random stream
            training = begin(run)
            if (earlier := kept.load()) is not None:
                training.restore(earlier)
            outcome = training.train(Listener(), lambda progress: None, stop_after(step, training))
            assert outcome.interruption == "test" and training.progress.step == step
            assert kept.save(step, training.state())
            torch.rand(3)  # the next process has another random stream
        training = begin(run)
        training.restore(kept.load() or {})
        assert without_clocks(training.train(Listener())) == undisturbed, f"stopped after {at}"


def test_writing_checkpoints_alters_nothing(tmp_path: Path) -> None:
    for name in ("kfac", "gkfac"):
        run = a_long_run(name)
        undisturbed = without_clocks(begin(run).train(Listener()))
        training, kept = begin(run), Checkpoints(tmp_path / name, 0, 0.0)
        outcome = training.train(Listener(), lambda p, t=training, k=kept: k.save(p.step, t.state()) and None)
        assert without_clocks(outcome) == undisturbed
        assert [path.name for path in sorted(kept.folder.iterdir())] == [f"step-{s:012d}.pt" for s in (35, 40)]


def test_clocks_go_on_and_leave_out_what_a_checkpoint_costs(tmp_path: Path) -> None:
    training, kept = begin(a_long_run("sgd", diagnostics="off")), Checkpoints(tmp_path, 0, 0.0)

    def slowly(progress: Any) -> None:
        time.sleep(0.05)
        kept.save(progress.step, training.state())

    before = training.train(Listener(), slowly, stop_after(20, training))
    assert kept.save(20, training.state())
    went_on = begin(a_long_run("sgd", diagnostics="off"))
    went_on.restore(kept.load() or {})
    after = went_on.train(Listener())
    clock = [float(row["training_seconds"] or 0) for row in after.history]
    assert clock == sorted(clock) and clock[4] == before.history[4]["training_seconds"] < 0.2
    assert after.summary["evaluation_seconds"] > before.summary["evaluation_seconds"]


# ---------------------------------------------------------------- what is loaded, and what is not


def some_state(value: int) -> dict[str, Any]:
    return {"value": value, "tensor": torch.full((1000,), float(value))}


def two_checkpoints(folder: Path) -> tuple[Checkpoints, list[Path]]:
    kept = Checkpoints(folder, 0, 0.0)
    for step in (5, 10, 15):
        assert kept.save(step, some_state(step))
    return kept, sorted(kept.folder.iterdir())


@pytest.mark.parametrize("damage", ["cut off", "a bit", "empty", "the checksum", "no checkpoint"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, (before, latest) = two_checkpoints(tmp_path)
    content = bytearray(latest.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
    elif damage == "the checksum":
        content[-1] ^= 1
    latest.write_bytes({"cut off": content[:-100], "empty": b"", "no checkpoint": b"x" * 500}.get(damage, content))
    found = kept.load()
    assert found is not None and found["value"] == 10 and torch.equal(found["tensor"], some_state(10)["tensor"])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {latest}: is damaged and not used")
    before.unlink()
    assert kept.load() is None


def test_a_checkpoint_runs_no_code_when_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Checkpoints(tmp_path, 0, 0.0)
    kept.save(5, {"harmless": Path("x")})  # a class
    assert kept.load() is None and "is damaged" in capsys.readouterr().err


class Counter:
    """State of an optimizer's own kind."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value, self.shape, self.parts = value, value.shape, [value, (1, value)]


def test_an_object_in_a_state_is_made_again_from_plain_values_but_never_one_of_another_package() -> None:
    state = plain({"state": {0: {"counter": Counter(torch.ones(2)), "step": 3}}, "param_groups": [{"betas": (0.9, 1)}]})
    assert "Counter" in str(state) and not isinstance(state["state"][0]["counter"], Counter)
    again = whole(state, {__name__.partition(".")[0]}, torch.device("cpu"))
    made = again["state"][0]["counter"]
    assert isinstance(made, Counter) and torch.equal(made.parts[1][1], torch.ones(2)) and made.shape == (2,)
    assert again["state"][0]["step"] == 3 and again["param_groups"] == [{"betas": (0.9, 1)}]
    with pytest.raises(ValueError, match="another package"):
        whole(state, {"torch"}, torch.device("cpu"))


def an_address(root: Path, target: type = torch.optim.SGD, **changes: Any) -> Path:
    environment = {"torch": "2.14.1", "device": "cpu", "device_name": "a processor", "threads": 1, "git_commit": "abc"}
    manifest = {"sha256": changes.pop("sha256", "1")}
    run = a_run(**changes.pop("run", {}))
    return checkpoint.home(run, manifest, {**environment, **changes}, target).relative_to(root / "checkpoints")


def test_the_address_is_another_for_whatever_decides_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    same = [an_address(tmp_path), an_address(tmp_path, git_commit="def"), an_address(tmp_path, run={"seeds": [0, 1]})]
    assert len(set(same)) == 1 and same[0].parts[:2] == ("tiny", "sgd")
    others = [
        an_address(tmp_path, run={"options": {"lr": 0.2}}),
        an_address(tmp_path, run={"steps": 21}),
        an_address(tmp_path, sha256="2"),
        an_address(tmp_path, torch="2.15"),
        an_address(tmp_path, device_name="another processor"),
        an_address(tmp_path, threads=2),
        an_address(tmp_path, target=Mine),
    ]
    assert len({*same, *others}) == 1 + len(others)


class Mine(torch.optim.SGD):
    """An optimizer whose code is not among the dependencies of the stage."""


def test_the_address_is_another_when_code_of_the_stage_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kfac", "pipeline", "dvc.yaml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    code = "from pipeline import checkpoint; print(sorted(checkpoint._code(dict).items()))"

    def checksums() -> str:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    first = checksums()
    for name in ("pipeline/views.py", "pipeline/aggregate.py"):
        with (tmp_path / name).open("a") as file:
            file.write("# decides nothing\n")
    assert checksums() == first
    seen = {first}
    for name in ("kfac/rules.py", "pipeline/loop.py", "pipeline/models/cnn.py"):
        with (tmp_path / name).open("a") as file:
            file.write("# decides the numbers\n")
        seen.add(checksums())
    assert len(seen) == 4


def test_writing_may_take_a_twentieth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, now = Checkpoints(tmp_path, 0, 60.0), [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    kept.save(0, {})
    for later, due in ((59.0, False), (61.0, True)):
        now[0] = 1000.0 + later
        assert kept.due is due

    def slowly(path: Path, state: Any) -> None:
        now[0] += 30.0

    monkeypatch.setattr(checkpoint, "_write", slowly)
    kept.save(5, {})
    written = now[0]
    for later, due in ((599.0, False), (601.0, True)):
        now[0] = written + later
        assert kept.due is due
