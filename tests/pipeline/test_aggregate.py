"""The comparison as a stage: what it reads, what it refuses, what it writes and prints."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_records as synthetic
from ruamel.yaml import YAML

from pipeline import aggregate, tables
from pipeline.config import ConfigError, Params
from pipeline.records import is_measured

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def chosen() -> Params:
    return synthetic.params(("toy_mlp", "digits_cnn"), ("sgd", "kfac"))


@pytest.fixture
def results(tmp_path: Path, chosen: Params) -> Path:
    return synthetic.write_study(tmp_path / "results", chosen, diverged=(("toy_mlp", "kfac", 2),))


def rows_of(report: Path) -> list[dict[str, str]]:
    with (report / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_has_all_parts_and_nothing_else(tmp_path: Path, chosen: Params, results: Path) -> None:
    report = tmp_path / "report"
    aggregate.aggregate(chosen, results, report)
    made = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]["aggregate"]["outs"]
    outs = {out if isinstance(out, str) else next(iter(out)) for out in made}
    assert {f"report/{path.name}" for path in report.iterdir()} == outs
    page = (report / "report.md").read_text()
    linked = {word.split(")")[0] for word in page.split("](")[1:]}
    assert linked == {f"figures/{path.name}" for path in (report / "figures").iterdir()}


def test_the_table_has_a_row_a_pair_to_full_precision(tmp_path: Path, chosen: Params, results: Path) -> None:
    rows = aggregate.tabulate(aggregate.collect(chosen, results))
    tables.write(rows, tmp_path / "table.csv")
    assert [(row["benchmark"], row["optimizer"]) for row in rows] == [
        ("toy_mlp", "sgd"),
        ("toy_mlp", "kfac"),
        ("digits_cnn", "sgd"),
        ("digits_cnn", "kfac"),
    ]
    assert tables.read(tmp_path / "table.csv") == rows


def test_columns_that_differ_between_repetitions_are_named_as_clocks(chosen: Params, results: Path) -> None:
    def table(factor: float) -> list[dict[str, object]]:
        study = aggregate.collect(chosen, results)
        for pairs in study.values():
            for runs in pairs.values():
                for run in runs:
                    for key, value in run.summary.items():
                        if is_measured(key) and value is not None:
                            run.summary[key] = value * factor * (1.1 if run.summary["optimizer"] == "sgd" else 1)
        return aggregate.tabulate(study)

    for before, after in zip(table(1.0), table(2.0), strict=True):
        for name, value in before.items():
            assert value == after[name] or is_measured(name), name


def test_stale_folders_are_ignored(tmp_path: Path, chosen: Params, results: Path) -> None:
    for stale in ("digits_cnn/ekfac/seed-0", "old_benchmark/sgd/seed-0", "digits_cnn/sgd/seed-7"):
        (results / stale).mkdir(parents=True)
    rows = aggregate.tabulate(aggregate.collect(chosen, results))
    assert {row["optimizer"] for row in rows} == {"sgd", "kfac"}
    assert {row["seeds"] for row in rows} == {3}


@pytest.mark.parametrize("missing", ["", "summary.json", "history.csv"])
def test_an_incomplete_record_names_the_folder_and_the_command(
    tmp_path: Path, chosen: Params, results: Path, missing: str
) -> None:
    folder = results / "digits_cnn" / "kfac" / "seed-1"
    if missing:
        (folder / missing).unlink()
    else:
        shutil.rmtree(folder)
    with pytest.raises(ConfigError) as refusal:
        aggregate.aggregate(chosen, results, tmp_path / "report")
    assert str(folder) in str(refusal.value)
    assert "`dvc repro train@digits_cnn-kfac`" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "report").exists()


def test_a_truncated_history_is_refused(chosen: Params, results: Path) -> None:
    history = results / "digits_cnn" / "kfac" / "seed-1" / "history.csv"
    history.write_text(history.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"history\.csv"):
        aggregate.collect(chosen, results)


def test_records_of_other_settings_are_refused(chosen: Params, results: Path) -> None:
    changed = replace(chosen, optimizers={**chosen.optimizers, "kfac": {"_target_": "torch.optim.SGD", "lr": 0.3}})
    with pytest.raises(ConfigError, match=r"kfac.*lr.*train@toy_mlp-kfac"):
        aggregate.collect(changed, results)


def test_runs_of_other_settings_of_speed_are_refused_together_but_not_across_benchmarks(
    tmp_path: Path, chosen: Params, results: Path
) -> None:
    synthetic.write_study(results, replace(synthetic.params(("digits_cnn",), ("sgd", "kfac")), threads=1))
    aggregate.aggregate(chosen, results, tmp_path / "report")
    record = results / "toy_mlp" / "kfac" / "seed-1" / "environment.json"
    record.write_text(record.read_text().replace('"threads": 2', '"threads": 2, "device_name": "NVIDIA H100"'))
    config = results / "toy_mlp" / "sgd" / "seed-0" / "config.yaml"
    config.write_text(config.read_text().replace("threads: 2", "threads: 4"))
    with pytest.raises(ConfigError) as refusal:
        aggregate.collect(chosen, results)
    assert str(refusal.value) == (
        "toy_mlp: runs that cannot stand in one table: device_name is null (sgd, kfac seed 0, kfac seed 2) and "
        "'NVIDIA H100' (kfac seed 1), threads is 4 (sgd seed 0) and 2 (sgd seed 1, sgd seed 2, kfac); "
        "`dvc repro -f -s train@toy_mlp-sgd train@toy_mlp-kfac` trains again what differs"
    )


def test_metrics_hold_one_figure_a_pair_and_tell_not_reached_from_not_run(chosen: Params, results: Path) -> None:
    rows = aggregate.tabulate(aggregate.collect(chosen, results))
    found = json.loads(json.dumps(aggregate.metrics(rows), allow_nan=False))
    assert found["digits_cnn"]["kfac"] == rows[3]["steps_to_hard_median"]
    assert found["digits_cnn"]["sgd"] == ">200"


def test_a_pair_that_only_diverged_says_so(tmp_path: Path) -> None:
    chosen = synthetic.params(("digits_cnn",), ("kfac",))
    lost = tuple(("digits_cnn", "kfac", seed) for seed in synthetic.SEEDS)
    results = synthetic.write_study(tmp_path, chosen, diverged=lost)
    assert aggregate.metrics(aggregate.tabulate(aggregate.collect(chosen, results))) == {
        "digits_cnn": {"kfac": "diverged"}
    }


def test_planted_targets_are_compared_by_excess_loss_though_the_first_pair_diverged(
    tmp_path: Path, chosen: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = tuple(("toy_mlp", "sgd", seed) for seed in synthetic.SEEDS)
    results = synthetic.write_study(tmp_path / "results", chosen, diverged=lost)
    aggregate.aggregate(chosen, results, tmp_path / "report")
    planted, images = (tmp_path / "report" / "report.md").read_text().split("| optimizer |")[1:3]
    assert "excess loss" in planted and "test score" not in planted
    assert "test score" in images.splitlines()[0]
    assert "excess" in capsys.readouterr().out


def test_the_printed_table_fits_100_columns_and_names_runs_that_diverged(
    tmp_path: Path, chosen: Params, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aggregate.aggregate(chosen, results, tmp_path)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "kfac: seed 2 diverged after 40 steps: training loss is not finite" in printed
    assert "2/3" in printed and "∞" in printed and "…" not in printed
    tables.show(tmp_path)
    assert capsys.readouterr().out == printed


def test_a_new_report_replaces_the_old_one_whole(tmp_path: Path, chosen: Params, results: Path) -> None:
    report = tmp_path / "report"
    aggregate.aggregate(chosen, results, report)
    aggregate.aggregate(synthetic.params(("toy_mlp",), ("kfac",)), results, report)
    assert not (report / "figures" / "loss_digits_cnn.svg").exists()
    assert [row["optimizer"] for row in rows_of(report)] == ["kfac"]
    assert rows_of(report)[0]["step_time_ratio_to_sgd"] == ""


def test_show_needs_no_torch_mlflow_or_matplotlib(tmp_path: Path, chosen: Params, results: Path) -> None:
    tables.write(aggregate.tabulate(aggregate.collect(chosen, results)), tmp_path / "table.csv")
    program = (
        "import sys, pathlib; from pipeline import aggregate, tables; tables.show(pathlib.Path(sys.argv[1]));"
        "sys.exit(','.join({'torch', 'mlflow', 'matplotlib', 'dvc', 'hydra'} & set(sys.modules)) or 0)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "digits_cnn" in done.stdout


def run_show(folder: Path, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "pipeline.aggregate", "--show"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_show_prints_on_a_terminal_without_unicode(tmp_path: Path, chosen: Params, results: Path) -> None:
    (tmp_path / "report").mkdir()
    rows = aggregate.tabulate(aggregate.collect(chosen, results))
    tables.write(rows, tmp_path / "report" / "table.csv")
    done = run_show(tmp_path, "ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "digits_cnn: target training loss" in done.stdout


def test_the_first_sentences_follow_the_table(
    tmp_path: Path, chosen: Params, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aggregate.aggregate(chosen, results, tmp_path / "report")
    sentences = json.loads((tmp_path / "report" / "verdicts.json").read_text())["sentences"]
    assert sentences[0].startswith("No verdict: 3 seeds.")
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.endswith(" ".join(sentences[: tables.SENTENCES]))


def test_verdicts_that_cannot_be_read_are_one_line(tmp_path: Path, chosen: Params, results: Path) -> None:
    (tmp_path / "report").mkdir()
    tables.write(aggregate.tabulate(aggregate.collect(chosen, results)), tmp_path / "report" / "table.csv")
    (tmp_path / "report" / "verdicts.json").write_text("{")
    done = run_show(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: report/verdicts.json: no verdicts of a report (")
    assert len(done.stderr.splitlines()) == 1


def test_show_without_a_report_is_one_line(tmp_path: Path) -> None:
    done = run_show(tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: report/table.csv: no such file; `dvc repro` makes it\n"
