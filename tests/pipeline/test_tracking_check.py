"""`python -m pipeline.tracking check`: runs without records, records without runs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline import tracking
from pipeline.records import copy_run
from tests.pipeline import synthetic_records as study

BENCHMARK = "digits_cnn"


@pytest.fixture
def rebuilt(root: Path) -> Path:
    """Two runs and their mean, in records and in the store."""
    study.write_study(root / "results", study.params((BENCHMARK,), ("kfac",), (0, 1)))
    tracking.rebuild(root / "results")
    return root


def runs(root: Path) -> dict[str, Any]:
    store = tracking.Store()
    return {r.info.run_name: r for e in store.experiments() for r in store.runs(e.experiment_id)}


def status(*words: str) -> int:
    try:
        tracking.main([*words])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_all_is_well_after_a_rebuild(rebuilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tracking.check(rebuilt / "results") == [] and status("check", "results") == 0
    assert "every run has its record, every record below results its run" in capsys.readouterr().out


def test_a_record_without_a_run_is_a_line_and_exit_status_1(rebuilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracking.Store().client.delete_run(runs(rebuilt)["kfac seed 1"].info.run_id)
    assert status("check", "results") == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"results/{BENCHMARK}/kfac/seed-1: has no run in sqlite:///")
    tracking.rebuild(rebuilt / "results")
    assert tracking.check(rebuilt / "results") == []


def test_runs_and_means_without_records_are_a_line_each(rebuilt: Path) -> None:
    changed = study.params((BENCHMARK,), ("kfac",), (0, 1))
    changed.optimizers["kfac"]["lr"] = 0.3
    before = runs(rebuilt)
    study.write_study(rebuilt / "results", changed)
    lines = tracking.check(Path("results"))
    gone = [line for line in lines if line.endswith("has no record below results")]
    assert len(gone) == 3 and all(any(run.info.run_id in line for line in gone) for run in before.values())
    assert f"{BENCHMARK} mean kfac mean (experiment" in "\n".join(gone)
    assert [line.partition(": ")[0] for line in lines if line not in gone] == [
        f"results/{BENCHMARK}/kfac/seed-0",
        f"results/{BENCHMARK}/kfac/seed-1",
        f"results/{BENCHMARK}/kfac",
    ]


def test_a_killed_run_is_listed_and_one_that_goes_on_is_not(rebuilt: Path) -> None:
    params = study.params((BENCHMARK,), ("sgd",), (0,))
    run = tracking.start(tracking_config(params), 0, {})
    assert tracking.check(rebuilt / "results") == []
    tracking.Store().end_as_killed(run.run_id)
    [line] = tracking.check(rebuilt / "results")
    assert line.startswith(f"{BENCHMARK} sgd seed 0 (") and "killed" in line


def test_a_trial_of_a_tuning_needs_its_run_and_a_run_its_trial(rebuilt: Path) -> None:
    params = study.params((BENCHMARK,), ("sgd",), (0,))
    folders = []
    for key in ("older", "newer"):  # the same setting, by other code
        written = study.write_record(rebuilt / key, params, BENCHMARK, "sgd", 0)
        environment = json.loads((written / "environment.json").read_text())
        environment.update(dvc_exp_name=f"tune-{key}", start_time=2e9 if key == "newer" else 1e9)
        (written / "environment.json").write_text(json.dumps(environment))
        folders.append(rebuilt / "trials" / BENCHMARK / "sgd" / key / "seed-0")
        copy_run(written, folders[-1])
    assert tracking.check(Path("results")) == [
        f"trials/{BENCHMARK}/sgd/newer/seed-0: has no run in {tracking.Store().place}"
    ]
    assert tracking.rebuild(Path("results")) == (1, 2) and tracking.check(Path("results")) == []
    shutil.rmtree(folders[-1])
    assert [line.partition(" (")[0] for line in tracking.check(Path("results"))] == [
        f"{BENCHMARK} tuning sgd seed 0",
        f"trials/{BENCHMARK}/sgd/older/seed-0: has no run in {tracking.Store().place}",
    ]


def tracking_config(params: Any) -> Any:
    from pipeline.config import resolve

    return resolve(params, BENCHMARK, "sgd")


def test_the_runs_of_an_experiment_that_dvc_has_are_not_missing(rebuilt: Path) -> None:
    store = tracking.Store()
    for run in runs(rebuilt).values():
        store.client.set_tag(run.info.run_id, "DVC_EXP_NAME", "bumpy-pup")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message=Empty"], check=True)
    for folder in (rebuilt / "results").glob("*/*/seed-*"):
        folder.rename(rebuilt / f"away-{folder.name}")
    assert len(tracking.check(rebuilt / "results")) == 3
    subprocess.run([*git, "update-ref", "refs/exps/ab/cdef/bumpy-pup", "HEAD"], check=True)
    assert tracking.check(rebuilt / "results") == []
