"""The plain files of a training run: written whole or not at all, read back to the very same numbers.

One run is one folder, ``results/<benchmark>/<optimizer>/seed-<k>/``:

| file | holds |
|---|---|
| ``config.yaml`` | the resolved configuration and the seed |
| ``environment.json`` | versions, machine, device, commit, the time it started |
| ``history.csv`` | one row an evaluation |
| ``curvature.csv`` | one row a diagnostic: step, layer (empty: the whole model), quantity, value |
| ``summary.json`` | the outcome, flat |
| ``reconstructions.png`` | of an autoencoder: inputs and what the trained network makes of them |

Floats are written by ``repr``, the shortest text that reads back to the same double. Columns and keys that hold a
clock or memory have ``seconds``, ``time`` or ``memory`` in their name (:func:`is_measured`); all others are functions
of configuration and seed.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import TARGETS, ConfigError

Value = float | int | str | bool | None
Row = dict[str, Value]

FILES = ("config.yaml", "environment.json", "history.csv", "curvature.csv", "summary.json")
PICTURES = ("reconstructions.png",)  # which not every run has
HISTORY_COLUMNS = (
    "step", "epoch", "examples", "training_seconds", "train_loss", "train_score", "validation_loss",
    "validation_score", "validation_error", "excess_loss", "lr", "batch_size", "forward_backward_seconds",
    "statistics_seconds", "inverses_seconds", "update_seconds", "peak_memory_mib",
)  # fmt: skip
CURVATURE_COLUMNS = ("step", "layer", "quantity", "value")
SUMMARY_KEYS = (
    "benchmark", "optimizer", "seed", "status", "message", "steps", "examples", "parameters", "training_seconds",
    "forward_backward_seconds", "statistics_seconds", "inverses_seconds", "update_seconds", "evaluation_seconds",
    "diagnostics_seconds", "peak_memory_mib", "target_metric",
    *(f"{target}_{key}" for target in TARGETS for key in ("target", "reached", "step", "seconds")),
    "train_loss", "train_score", "validation_loss", "validation_score", "validation_error", "test_loss", "test_score",
    "best_validation_loss", "excess_loss", "teacher_loss",
)  # fmt: skip
STATUSES = ("finished", "diverged", "failed")
_INTEGERS = frozenset({"step", "examples", "batch_size"})
_TEXTS = frozenset({"layer", "quantity"})


@dataclass(frozen=True)
class Run:
    """The records of one seed, typed: numbers as int or float, an empty cell as None."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    history: list[Row]
    curvature: list[Row]
    summary: dict[str, Any]


def seed_folder(results: str | Path, benchmark: str, optimizer: str, seed: int) -> Path:
    """Where the records of this run live below the folder ``results``."""
    return Path(results) / benchmark / optimizer / f"seed-{seed}"


def is_measured(name: str) -> bool:
    """Whether a column or key holds a clock or memory, so that running again gives another number."""
    return any(word in name for word in ("seconds", "time", "memory"))


# ---------------------------------------------------------------- writing


def write_run(
    folder: Path,
    *,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    history: Sequence[Mapping[str, Value]],
    curvature: Sequence[Mapping[str, Value]],
    summary: Mapping[str, Any],
    failure: str | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> None:
    """Write the records of a seed into a hidden folder beside ``folder``, then put it in place by one rename.

    ``failure`` (the traceback of a run that raised) becomes ``failure.txt``; ``pictures`` are files by name.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / "config.yaml").write_text(yaml.safe_dump(_plain(config), sort_keys=False), encoding="utf-8")
        _write_json(partial / "environment.json", environment)
        extra = dict.fromkeys(name for row in history for name in row if name not in HISTORY_COLUMNS)
        _write_csv(partial / "history.csv", (*HISTORY_COLUMNS, *extra), history)
        _write_csv(partial / "curvature.csv", CURVATURE_COLUMNS, curvature)
        _write_json(partial / "summary.json", summary)
        if failure is not None:
            (partial / "failure.txt").write_text(failure, encoding="utf-8")
        for name, content in (pictures or {}).items():
            (partial / name).write_bytes(content)
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_run(source: Path, folder: Path) -> None:
    """Copy the records of a seed, to be there whole or not at all. Raises OSError that names ``folder``."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for path in source.iterdir():
            (partial / path.name).write_bytes(path.read_bytes())
        _put_in_place(partial, folder)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename, once the disk has all of it: a folder that is there after a power cut is whole."""
    for path in (*partial.iterdir(), partial):
        settle(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    settle(folder.parent)


def settle(path: Path) -> None:
    """Wait until the disk has a file's content, or which files a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Value]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_cell(row.get(column)) for column in columns])


def _cell(value: Value) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def _write_json(path: Path, mapping: Mapping[str, Any]) -> None:
    """Strict JSON has no word for a number that is not finite: it is written as null."""
    path.write_text(json.dumps(_plain(mapping, finite=True), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any, *, finite: bool = False) -> Any:
    """Mappings, tuples and floats as the text formats know them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, finite=finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, finite=finite) for item in value]
    if finite and isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---------------------------------------------------------------- reading


def read_run(folder: str | Path) -> Run:
    """The whole record of a seed; ``ConfigError`` with one line when something is missing or unreadable."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected the records of a training run (run `dvc repro`)")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder}: no records of a training run: {', '.join(missing)} missing (run `dvc repro`)")
    return Run(
        folder=folder,
        config=_read_mapping(folder / "config.yaml"),
        environment=_read_mapping(folder / "environment.json"),
        history=read_history(folder),
        curvature=read_curvature(folder),
        summary=_read_summary(folder / "summary.json"),
    )


def read_runs(results: str | Path, benchmark: str, optimizer: str, seeds: Sequence[int]) -> list[Run]:
    """The records of a pair for these seeds, in their order."""
    return [read_run(seed_folder(results, benchmark, optimizer, seed)) for seed in seeds]


def read_history(folder: str | Path) -> list[Row]:
    """``history.csv``: ``step``, ``examples``, ``batch_size`` as int, all else as float, empty cells as None."""
    return _read_csv(Path(folder) / "history.csv", HISTORY_COLUMNS)


def read_curvature(folder: str | Path) -> list[Row]:
    """``curvature.csv``: ``step`` as int, ``layer`` and ``quantity`` as text, ``value`` as float."""
    return _read_csv(Path(folder) / "curvature.csv", CURVATURE_COLUMNS)


def _read_csv(path: Path, required: Sequence[str]) -> list[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    absent = [column for column in required if column not in header]
    if absent:
        raise ConfigError(f"{path}: column {absent[0]!r} missing; is it the record of a training run?")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise ConfigError(f"{path}: line {number} has {len(line)} cells, the header {len(header)}; cut off?")
        try:
            rows.append({name: _parse(name, text) for name, text in zip(header, line, strict=True)})
        except ValueError as error:
            raise ConfigError(f"{path}: line {number}: {error}") from None
    return rows


def _parse(name: str, text: str) -> Value:
    if name in _TEXTS:
        return text
    if not text:
        return None
    return int(text) if name in _INTEGERS else float(text)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds no mapping; is it the record of a training run?")
    return value


def _read_summary(path: Path) -> dict[str, Any]:
    summary = _read_mapping(path)
    absent = [key for key in SUMMARY_KEYS if key not in summary]
    if absent:
        raise ConfigError(f"{path}: key {absent[0]!r} missing; is it the record of a training run?")
    if summary["status"] not in STATUSES:
        raise ConfigError(f"{path}: status {summary['status']!r} is none of {', '.join(STATUSES)}")
    return summary
