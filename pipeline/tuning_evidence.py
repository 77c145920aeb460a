"""What a tuning leaves to be read: tuning/<benchmark>/<optimizer>.json, tables and figure of docs/tuning.md.

The one idea: the files have all that the choice was made from, and are committed; tables and figure are views of them.
For each trial: how many seeds `missed` each target, the median seconds and steps to the hardest target that any trial
reached, the best validation loss.
"""

from __future__ import annotations

import datetime
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import selection
from pipeline.checks import ConfigError
from pipeline.composition import ROOT
from pipeline.evidence import reached, winner
from pipeline.records import Run
from pipeline.selection import Judged
from pipeline.statistics import ordered
from pipeline.trials import Choice, Pair, Trial

FOLDER = ROOT / "tuning"
PAGE = ROOT / "docs" / "tuning.md"
FIGURE = ROOT / "docs" / "images" / "tuning.svg"
BEGIN, END = "<!-- tables: begin, written by pipeline.tune -->", "<!-- tables: end -->"
HEADERS = ("optimizer", "trials", "reached", "diverged", "target", "best, s (steps)", "chosen", "won by trial 1",
           "at an edge", "date")  # fmt: skip
NONE_YET = "No tuning has been recorded yet."
Evidence = dict[str, Any]


def read(folder: Path = FOLDER) -> dict[Pair, Evidence]:
    """All evidence, by benchmark and optimizer. Raises ConfigError for a file that cannot be read."""
    found = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            evidence = json.loads(path.read_text(encoding="utf-8"))
            found[evidence["benchmark"], evidence["optimizer"]] = evidence
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}; `git checkout {path}`") from None
    return found


def evidence(
    choice: Choice, trials: Sequence[Trial], runs: Sequence[Sequence[Run]], before: Evidence | None
) -> Evidence:
    """What came of the trials of a pair; `before` is what an earlier tuning of it left."""
    judged = [
        selection.judged(t.values, of, [edge for d in t.space if (edge := d.edge(t.values[d.field]))])
        for t, of in zip(trials, runs, strict=True)
    ]
    won, target = selection.ranked(judged)[0], selection.target(judged)
    ranges = {d.field: list(d.choices if d.kind == "choice" else d.ends) for d in trials[0].space}
    environments = [run.environment for of in runs for run in of]
    started = max((float(environment.get("start_time") or 0.0) for environment in environments), default=0.0)
    widened = 0
    if before is not None:
        widened = before["trials_before_widening"] + (len(before["trials"]) if before["ranges"] != ranges else 0)
    return {
        "benchmark": trials[0].benchmark,
        "optimizer": trials[0].optimizer,
        "date": datetime.datetime.fromtimestamp(started, datetime.UTC).date().isoformat(),
        "device": next((environment.get("device_name") for environment in environments), None),
        "seeds": list(choice.seeds),
        "points": "grid" if choice.grid else "sobol",
        "ranges": ranges,
        "trials_before_widening": widened,
        "target": target,
        "trials": [_line(trial, target, len(choice.seeds)) for trial in judged],
        "chosen": judged[won].values,
        "won_by_first": won == 0,
        "budget_curve": selection.budget_curve(judged),
    }


def _line(trial: Judged, target: str | None, seeds: int) -> dict[str, Any]:
    return {
        "values": trial.values,
        "missed": {name: round(share * seeds) for name, share in trial.missed.items()},
        "seconds_to_target": _finite(trial.seconds[target]) if target else None,
        "steps_to_target": _finite(trial.steps[target]) if target else None,
        "best_loss": _finite(trial.best_loss),
        "diverged": trial.diverged,
        "edge": list(trial.edge),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write(found: Evidence, folder: Path = FOLDER) -> None:
    path = folder / found["benchmark"] / f"{found['optimizer']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- the page


def publish(found: Mapping[Pair, Evidence]) -> None:
    """Bring tables and figure of docs/tuning.md up to date."""
    page = PAGE.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ConfigError(f"{PAGE}: has lost the lines {BEGIN!r} and {END!r}; `git checkout {PAGE}`")
    body = "\n".join(tables(found.values())) if found else NONE_YET
    new = f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"
    if new != page:
        PAGE.write_text(new, encoding="utf-8")
    if found:
        draw(found, FIGURE)


def tables(found: Iterable[Evidence]) -> list[str]:
    """Markdown: how often the shipped setting won, then a table a benchmark."""
    by_benchmark: dict[str, dict[str, Evidence]] = defaultdict(dict)
    for each in found:
        by_benchmark[each["benchmark"]][each["optimizer"]] = each
    all_of = [each for pairs in by_benchmark.values() for each in pairs.values()]
    won = sum(each["won_by_first"] for each in all_of)
    lines = [
        f"Trial 1, the shipped setting, won {won} of {len(all_of)} times.",
        "",
        "![Expected seconds to the target of the best of so many trials](images/tuning.svg)",
    ]
    for benchmark, pairs in by_benchmark.items():
        lines += [
            "", f"### {benchmark}", "",
            f"| {' | '.join(HEADERS)} |", f"|{'---|' * len(HEADERS)}",
            *(_row(pairs[name]) for name in ordered(pairs)),
        ]  # fmt: skip
    return lines


def _row(found: Evidence) -> str:
    best, trials = winner(found), found["trials"]
    before = found["trials_before_widening"]
    seconds, steps = best["seconds_to_target"], best["steps_to_target"]
    cells = [
        found["optimizer"],
        f"{len(trials)} (+{before})" if before else str(len(trials)),
        str(reached(found)),
        str(sum(trial["diverged"] for trial in trials)),
        found["target"] or "none",
        "-" if seconds is None else f"{seconds:.3g} ({steps:g})",
        text(found["chosen"]),
        "yes" if found["won_by_first"] else "no",
        ", ".join(best["edge"]) or "no",
        found["date"],
    ]
    return f"| {' | '.join(cells)} |"


def text(values: Mapping[str, Any]) -> str:
    """A setting in a line."""
    return ", ".join(f"{field} {json.dumps(value)}" for field, value in values.items())


def draw(found: Mapping[Pair, Evidence], path: Path) -> None:
    """Expected best of so many trials, a panel a benchmark, a line an optimizer."""
    import matplotlib
    from matplotlib.figure import Figure

    from pipeline.views import colour

    benchmarks = list(dict.fromkeys(benchmark for benchmark, _ in found))
    optimizers = ordered(dict.fromkeys(optimizer for _, optimizer in found))
    columns = min(3, len(benchmarks))
    rows = math.ceil(len(benchmarks) / columns)
    with matplotlib.rc_context({"svg.hashsalt": "tuning", "font.size": 8}):
        figure = Figure(figsize=(3.2 * columns, 2.4 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for panel in panels:
            panel.set_visible(False)
        for benchmark, panel in zip(benchmarks, figure.axes, strict=False):
            panel.set_visible(True)
            panel.set(title=benchmark, xlabel="trials", ylabel="expected best, s", yscale="log")
            for name in optimizers:
                curve = found[benchmark, name]["budget_curve"] if (benchmark, name) in found else []
                points = [(point["trials"], point["expected"]) for point in curve if point["expected"] is not None]
                if points:
                    panel.plot(*zip(*points, strict=True), marker=".", color=colour(name), label=name)
        handles = {  # every optimizer once
            label: line for panel in figure.axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
