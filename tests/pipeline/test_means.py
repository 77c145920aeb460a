"""Means over seeds: worked by hand, and as runs of their own in the store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline import means, records, tracking, views
from pipeline.aggregate import collect
from pipeline.metrics import with_limits
from pipeline.tracker import CLOCK_ZERO
from tests.pipeline import synthetic_records as study

BENCHMARK = "digits_cnn"


def client(root: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{root}/mlflow.db")


def stored(root: Path) -> dict[str, Any]:
    experiment = client(root).get_experiment_by_name(f"{BENCHMARK} mean")
    assert experiment is not None
    return {run.info.run_name: run for run in client(root).search_runs([experiment.experiment_id])}


def a_study(root: Path, seeds: tuple[int, ...] = (0, 1, 2), **changes: Any) -> dict[str, Any]:
    params = study.params((BENCHMARK,), ("sgd", "kfac"), seeds)
    params.optimizers["kfac"].update(changes)
    study.write_study(root / "results", params)
    return collect(params, root / "results")


def test_an_interval_is_student_s() -> None:
    # 1, 2, 4: mean 7/3, standard deviation 1.5275, t of two degrees of freedom 4.3027; 4.3027 * 1.5275 / sqrt(3)
    assert means.interval([1.0, 2.0, 4.0]) == pytest.approx((2.33333, -1.46130, 6.12796), abs=1e-4)
    assert means.interval([3.0]) == (3.0,)


def test_losses_are_averaged_on_the_logarithmic_scale_and_scores_as_they_are(tmp_path: Path) -> None:
    runs = a_study(tmp_path)[BENCHMARK]["kfac"]
    step, seconds, found = list(means.curves(runs))[3]
    rows = [run.history[3] for run in runs]
    assert step == 30 and seconds == pytest.approx(sum(row["training_seconds"] for row in rows) / 3)
    logs = means.interval([math.log(row["train_loss"]) for row in rows])
    assert [found[name] for name in with_limits("loss/train")] == pytest.approx([math.exp(value) for value in logs])
    scores = means.interval([row["train_score"] for row in rows])
    assert [found[name] for name in with_limits("score/train")] == pytest.approx(scores)


def test_a_curve_ends_where_a_seed_does_and_a_target_that_one_missed_has_no_mean(tmp_path: Path) -> None:
    params = study.params((BENCHMARK,), ("sgd",), (0, 1, 2))
    study.write_study(tmp_path, params, diverged=((BENCHMARK, "sgd", 1),))
    runs = records.read_runs(tmp_path, BENCHMARK, "sgd", (0, 1, 2))
    with_loss = [step for step, _, found in means.curves(runs) if "loss/train" in found]
    assert with_loss == [0, 10, 20, 30]  # its loss at step 40 is not finite
    found = means.summary(runs)
    assert found["target/hard_reached"] < 1 and "target/hard_reached_low" not in found
    assert "target/hard_steps" not in found


def test_means_are_runs_of_their_own_experiment_with_their_limits(root: Path) -> None:
    made = a_study(root)
    tracking.show_means(made)
    found = stored(root)
    assert set(found) == {"sgd mean", "kfac mean"}
    run = found["kfac mean"]
    assert run.info.status == "FINISHED" and run.data.tags["seeds"] == "0, 1, 2"
    assert run.data.params["optimizer"] == "kfac" and "seed" not in run.data.params
    expected = {step: (seconds, values) for step, seconds, values in means.curves(made[BENCHMARK]["kfac"])}
    for name in with_limits("loss/train"):
        points = client(root).get_metric_history(run.info.run_id, name)
        assert {p.step: p.value for p in points} == {step: values[name] for step, (_, values) in expected.items()}
        times = {p.step: p.timestamp / 1000 - CLOCK_ZERO for p in points}
        assert times == pytest.approx({step: seconds for step, (seconds, _) in expected.items()}, abs=2e-3)
    experiment = client(root).get_experiment(run.info.experiment_id)
    card = views.read(experiment.tags[views.VIEW_TAG])["compareRunCharts"][0]
    assert card["selectedMetricKeys"] == ["loss/train", "loss/train_low", "loss/train_high"]
    assert "95% interval" in experiment.tags["mlflow.note.content"]


def test_means_are_replaced_never_twice_and_another_setting_stands_beside_them(root: Path) -> None:
    tracking.show_means(a_study(root))
    first = stored(root)
    tracking.show_means(a_study(root))
    assert {name: run.info.run_id for name, run in stored(root).items()} == {
        name: run.info.run_id for name, run in first.items()
    }
    tracking.show_means(a_study(root, seeds=(0, 1, 2, 3)))
    again = stored(root)
    assert set(again) == {"sgd mean", "kfac mean"} and again["kfac mean"].data.tags["seeds"] == "0, 1, 2, 3"
    assert again["kfac mean"].info.run_id != first["kfac mean"].info.run_id
    tracking.show_means(a_study(root, lr=0.3))
    assert set(stored(root)) == {"sgd mean", "kfac lr=0.1 mean", "kfac lr=0.3 mean"}


def test_rebuild_brings_the_means_too(root: Path) -> None:
    a_study(root)
    tracking.rebuild(root / "results")
    first = stored(root)
    tracking.rebuild(root / "results")
    assert set(first) == {"sgd mean", "kfac mean"}
    assert {run.info.run_id for run in stored(root).values()} == {run.info.run_id for run in first.values()}


def test_a_store_that_is_gone_costs_aggregate_one_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = a_study(root)
    (root / "mlflow.db").write_bytes(b"broken" * 10_000)
    tracking.show_means(made)
    assert tracking.links(made) == {}
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: ") and first.endswith("`python -m pipeline.tracking rebuild`")
    assert second.startswith("warning: ") and second.endswith("the report has no links to MLflow")


def test_links_lead_from_records_to_runs_and_back(root: Path) -> None:
    made = a_study(root, seeds=(0, 1))
    aside = (root / "results" / BENCHMARK / "sgd" / "seed-1").rename(root / "aside")
    tracking.rebuild(root / "results")
    aside.rename(root / "results" / BENCHMARK / "sgd" / "seed-1")  # which the store does not have
    found = tracking.links(made)
    assert set(found) == {(BENCHMARK, "sgd", 0), (BENCHMARK, "kfac", 0), (BENCHMARK, "kfac", 1)}
    link = found[BENCHMARK, "kfac", 1]
    run = client(root).get_run(link.run)
    assert run.info.run_name == "kfac seed 1" and run.data.tags["record"] == f"results/{BENCHMARK}/kfac/seed-1"
    assert link.address == f"http://mlflow.localhost:5000/#/experiments/{link.experiment}/runs/{link.run}"
