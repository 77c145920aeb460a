"""What the report shows beside the records, where it is there: tuning trials, manifests of the data, the simulation.

The one idea: runs are compared without it, so what is absent is left out; what is there has to be readable.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checks import ConfigError

TRIAL_COLUMNS = [
    "benchmark", "optimizer", "trial", "values", "target", "seconds_to_target", "steps_to_target", "best_loss",
    "diverged", "chosen",
]  # fmt: skip
_TRIALS = ("benchmark", "optimizer", "trials", "chosen", "won_by_first", "budget_curve", "date")


@dataclass(frozen=True)
class Evidence:
    """`tuning`: benchmark -> optimizer -> the file of its trials; `data`: benchmark -> manifest; `coverage`: the lines
    of the simulation's table (`python -m benchmarks.coverage`)."""

    tuning: Mapping[str, Mapping[str, dict[str, Any]]] = field(default_factory=dict)
    data: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    coverage: Sequence[Mapping[str, Any]] = ()


def read(root: Path, benchmarks: Iterable[str], optimizers: Iterable[str]) -> Evidence:
    """The evidence below the repository's root that concerns these pairs. Raises ConfigError."""
    names, pairs = list(benchmarks), list(optimizers)
    tuning = {}
    for benchmark in names:
        trials = {name: _read(root / "tuning" / benchmark / f"{name}.json", _TRIALS) for name in pairs}
        tuning[benchmark] = {name: found for name, found in trials.items() if found}
    simulated = _read(root / "benchmarks" / "results" / "coverage.json", ("rows",))
    manifests = {name: _read(root / "data" / name / "manifest.json", ("sha256", "examples")) for name in names}
    return Evidence(
        tuning={benchmark: found for benchmark, found in tuning.items() if found},
        data={name: found for name, found in manifests.items() if found},
        coverage=simulated["rows"] if simulated else (),
    )


def winner(tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The trial that was chosen, in the file of a pair's trials."""
    return next(trial for trial in tuned["trials"] if trial["values"] == tuned["chosen"])


def reached(tuned: Mapping[str, Any]) -> int:
    """How many trials reached the target, by the median of their seeds; one that diverged is a miss."""
    return sum(trial["seconds_to_target"] is not None and not trial["diverged"] for trial in tuned["trials"])


def trial_rows(found: Evidence) -> Iterator[dict[str, Any]]:
    """``tuning.csv``: a row a trial, its values as JSON."""
    for benchmark, pairs in found.tuning.items():
        for optimizer, tuned in pairs.items():
            for number, trial in enumerate(tuned["trials"], 1):
                of_pair = {"benchmark": benchmark, "optimizer": optimizer, "trial": number}
                of_pair |= {"target": tuned.get("target"), "chosen": trial["values"] == tuned["chosen"]}
                of_trial = {name: trial[name] for name in TRIAL_COLUMNS if name in trial}
                yield of_pair | of_trial | {"values": json.dumps(trial["values"])}


def _read(path: Path, keys: Iterable[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds no mapping")
    absent = [key for key in keys if key not in value]
    if absent:
        raise ConfigError(f"{path}: key {absent[0]!r} missing; expected {', '.join(keys)}")
    return value
