"""What a training run's records are called in MLflow: one mapping, used live and when the store is rebuilt from files.

Everything before the last `/` of a name is a section of the UI's charts and sections sort by name, so losses come
first; the whole-model diagnostics have no `/` and come last.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import TARGETS
from pipeline.records import FILES

_LOSSES = {"train_loss": "loss/train", "validation_loss": "loss/validation", "excess_loss": "loss/excess"}
HISTORY = {
    **_LOSSES,
    "train_score": "score/train",
    "validation_error": "score/validation_error",
    "validation_score": "score/validation",
    "lr": "optimizer/lr",
    "batch_size": "optimizer/batch_size",
    "epoch": "time/epochs",
    "examples": "time/examples",
    "peak_memory_mib": "time/peak_memory_mib",
}
_SUMMARY = {
    **{
        key: f"result/{key}"
        for key in (
            *("train_loss", "train_score", "validation_loss", "validation_score", "validation_error", "test_loss"),
            *("test_score", "best_validation_loss", "excess_loss", "teacher_loss", "parameters", "steps", "examples"),
        )
    },
    **{
        f"{target}_{key}": f"target/{target}_{name}"
        for target in TARGETS
        for key, name in (("reached", "reached"), ("step", "steps"), ("seconds", "seconds"))
    },
    "evaluation_seconds": "time/evaluation_seconds",
    "diagnostics_seconds": "time/diagnostics_seconds",
}


def history_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one evaluation. Empty and non-finite values are left out: the files have them."""
    named = {}
    for column, value in row.items():
        if column.startswith("stats_"):
            named[f"optimizer/{column.removeprefix('stats_')}"] = value
        elif column in HISTORY:
            named[HISTORY[column]] = value
        elif column.endswith("_seconds"):
            named[f"time/{column}"] = value
    return _finite(named)


def curvature_metrics(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of the diagnostics rows of one step."""
    named = {}
    for row in rows:
        layer, quantity = row["layer"], row["quantity"]
        named[f"weights/{layer}/{quantity}" if layer else f"curvature_{quantity}"] = row["value"]
    return _finite(named)


def summary_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the end of a run."""
    return _finite({name: summary.get(key) for key, name in _SUMMARY.items()})


def with_limits(metric: str) -> tuple[str, str, str]:
    """The names of a mean over seeds and of the limits of its interval."""
    return metric, f"{metric}_low", f"{metric}_high"


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """The resolved configuration, flat: `optimizer.lr`, `model.widths`, `batch_size`, …; lists and null as JSON."""
    flat: dict[str, str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{prefix}.{key}", inner)
        else:
            flat[prefix] = value if isinstance(value, str) else json.dumps(value, default=str)

    for key, value in config.items():
        if key != "seeds":
            add({"options": "optimizer", "target_class": "optimizer._target_"}.get(key, key), value)
    return flat


def configuration_hash(config: Mapping[str, Any]) -> str:
    """Twelve digits that are the same for every seed of a resolved configuration."""
    relevant = {key: value for key, value in parameters(config).items() if key != "seed"}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def records_hash(folder: Path) -> str:
    """Checksum of the record files of one run."""
    digest = hashlib.sha256()
    for name in FILES:
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _finite(named: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in sorted(named.items()):  # losses first
        if value is not None and value != "" and math.isfinite(number := float(value)):
            numbers[re.sub(r"[^\w\-. :/]", "_", name)] = number
    return numbers
