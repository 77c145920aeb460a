"""Claims about the record files: exact, whole or absent, and clear about what is wrong."""

import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from pipeline.checks import ConfigError, describe
from pipeline.records import SUMMARY_KEYS, copy_run, is_measured, read_run, read_runs, seed_folder, write_run

SUMMARY: dict[str, Any] = {key: None for key in SUMMARY_KEYS} | {
    "status": "finished",
    "train_loss": 0.1 + 0.2,
}
HISTORY: list[dict[str, Any]] = [
    {"step": 0, "examples": 0, "train_loss": 1 / 3, "excess_loss": None, "batch_size": 8},
    {"step": 10, "examples": 80, "train_loss": 5e-324, "lr": 1e-3, "batch_size": 8, "stats_damping": 0.1},
    {"step": 20, "examples": 160, "train_loss": math.inf, "train_score": math.nan, "batch_size": 8},
]
CURVATURE: list[dict[str, Any]] = [
    {"step": 10, "layer": "", "quantity": "trace", "value": 2.0},
    {"step": 10, "layer": "0.weight, odd", "quantity": "pi", "value": 1e300},
]


def written(folder: Path, **changes: Any) -> Path:
    records: dict[str, Any] = {
        "config": {"options": {"lr": 1e-05, "betas": (0.9, 0.999)}, "seed": 3},
        "environment": {"torch": "2"},
        "history": HISTORY,
        "curvature": CURVATURE,
        "summary": SUMMARY,
    }
    write_run(folder, **{**records, **changes})
    return folder


def test_numbers_read_back_are_the_same_to_the_bit(tmp_path: Path) -> None:
    run = read_run(written(tmp_path / "seed-3"))
    assert [row["train_loss"] for row in run.history] == [1 / 3, 5e-324, math.inf]
    assert math.isnan(float(run.history[2]["train_score"] or 0))
    assert run.curvature == CURVATURE
    assert run.summary == SUMMARY
    assert run.config == {"options": {"lr": 1e-05, "betas": [0.9, 0.999]}, "seed": 3}


def test_columns_read_back_have_types(tmp_path: Path) -> None:
    first, second, _ = read_run(written(tmp_path / "seed-3")).history
    assert isinstance(second["step"], int) and isinstance(second["examples"], int)
    assert first["excess_loss"] is None and first["lr"] is None and first["stats_damping"] is None
    assert second["stats_damping"] == 0.1


def test_a_number_that_is_not_finite_is_null_in_the_summary(tmp_path: Path) -> None:
    folder = written(tmp_path / "seed-3", summary={**SUMMARY, "train_loss": math.nan, "status": "diverged"})
    assert read_run(folder).summary["train_loss"] is None
    assert "NaN" not in (folder / "summary.json").read_text()


def test_records_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = written(tmp_path / "seed-3")
    with pytest.raises(TypeError):
        written(folder, environment={"torch": object()})
    assert read_run(folder).environment == {"torch": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["seed-3"]


def test_records_get_their_name_when_the_disk_has_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk, lacking = set(), []
    sync, rename = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        sync(descriptor)
        on_disk.add(os.fstat(descriptor).st_ino)

    def note_rename(source: Path, target: Path) -> None:
        lacking.extend(path for path in (source, *source.iterdir()) if path.stat().st_ino not in on_disk)
        on_disk.discard(target.parent.stat().st_ino)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    folder = written(tmp_path / "kept" / "seed-3", pictures={"reconstructions.png": b"picture"})
    (tmp_path / "results").mkdir()
    copy_run(folder, tmp_path / "results" / "seed-3")
    assert lacking == [] and len([*(tmp_path / "results" / "seed-3").iterdir()]) == 6
    assert {(tmp_path / name).stat().st_ino for name in ("kept", "results")} <= on_disk  # and the names


def test_a_copy_for_which_there_is_no_room_names_its_folder_and_leaves_nothing(tmp_path: Path) -> None:
    source, folder = written(tmp_path / "seed-3"), tmp_path / "results" / "seed-3"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(OSError) as refusal:
            copy_run(source, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert describe(refusal.value) == f"{folder}: File too large"
    assert list(folder.parent.iterdir()) == []


def test_new_records_replace_old_ones(tmp_path: Path) -> None:
    folder = written(tmp_path / "seed-3", failure="Traceback")
    assert (folder / "failure.txt").read_text() == "Traceback"
    written(folder, history=HISTORY[:1])
    assert len(read_run(folder).history) == 1
    assert not (folder / "failure.txt").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("summary.json", None, "summary.json missing"),
        ("summary.json", "{", "cannot be read"),
        ("summary.json", "{}", "key 'benchmark' missing"),
        ("history.csv", "", "column 'step' missing"),
        ("history.csv", "cut", "cells"),
        ("history.csv", "word", "line 2"),
        ("config.yaml", "3", "holds no mapping"),
    ],
)
def test_damaged_records_are_refused_in_one_line_that_names_the_file(
    tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    path = written(tmp_path / "seed-3") / name
    text = path.read_text()
    if content is None:
        path.unlink()
    elif content == "cut":
        path.write_text(text[:-3])
    elif content == "word":
        path.write_text(text.replace("0,,0", "zero,,0", 1))
    else:
        path.write_text(content)
    with pytest.raises(ConfigError, match=said) as refusal:
        read_run(path.parent)
    assert "\n" not in str(refusal.value) and "seed-3" in str(refusal.value)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="seed-1: no such folder"):
        written(seed_folder(tmp_path, "b", "o", 0))
        read_runs(tmp_path, "b", "o", [0, 1])


def test_clocks_and_memory_are_known_by_name() -> None:
    assert is_measured("training_seconds") and is_measured("peak_memory_mib") and is_measured("start_time")
    assert not is_measured("hard_step") and not is_measured("train_loss")
