"""Where the runs of a report come from: code, versions, machine, dates, data; as words, for both pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline import comparability
from pipeline.records import Run
from pipeline.tables import DASH

_UNLISTED = ("start_time", "machine")  # a clock, and the name of a host


def facts(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """A line a fact; several values where benchmarks do not share one. At a benchmark all runs agree on their keys."""
    found: dict[str, list[str]] = {"git commit": []}
    for run in runs:
        for name, value in (run.environment | comparability.key(run.config, run.environment)).items():
            if value is not None and not name.startswith("dvc_") and name not in _UNLISTED:
                known = found.setdefault(name.replace("_", " "), [])
                if str(value) not in known:
                    known.append(str(value))
    return [(name, ", ".join(values)) for name, values in found.items() if values]


def dates(runs: Iterable[Run]) -> str:
    times = [run.environment["start_time"] for run in runs if run.environment.get("start_time")]
    days = [datetime.fromtimestamp(time, UTC).strftime("%-d %B %Y") for time in sorted(times)]
    return DASH.join(dict.fromkeys([days[0], days[-1]])) if days else ""


def machines(runs: Iterable[Run]) -> str:
    """Where seconds were measured: the device, of a CPU with its cores."""
    found = []
    for environment in (run.environment for run in runs):
        if environment.get("device_name"):
            cores = f", {environment['cores']} cores" if environment.get("device") == "cpu" else ""
            found.append(f"{environment['device_name']}{cores}")
    return "; ".join(dict.fromkeys(found))


def data(benchmark: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    examples = " / ".join(f"{count}" for count in manifest["examples"].values())
    return {"benchmark": benchmark, "examples": examples, "sha256": manifest["sha256"]}
