"""The figures for papers, of the records: matplotlib only, no numbers computed here beyond medians over seeds.

The same records give the same bytes: salted ids, no dates, text drawn as paths (no fonts needed to look at them).
Up to five seeds are drawn one by one with their median over them, more as a band (:mod:`pipeline.curves`). An optimizer
has the colour that the MLflow UI gives it. Figures of the verdicts are in :mod:`pipeline.verdict_figures`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline import curves, looks, statistics, verdict_figures
from pipeline import figure_parts as parts
from pipeline.config import TARGETS
from pipeline.curves import Study
from pipeline.evidence import Evidence
from pipeline.looks import CURVATURE, METRICS, PHASES, on_light
from pipeline.records import Run
from pipeline.statistics import ordered
from pipeline.verdicts import Verdicts

_SINGLE = 5  # seeds, at most, that are drawn one by one
_DIAGNOSED = ("cosine_natural", "top_eigenvalue")  # of CURVATURE


def draw(study: Study, folder: Path, verdicts: Verdicts, evidence: Evidence, suffix: str = "svg") -> list[Path]:
    """All figures of a study.

    Arguments:
        study: benchmark -> optimizer -> runs, in the order of presentation.
        folder: where the files go; made if need be.
        verdicts, evidence: what was found about the study.
        suffix: ``svg`` or ``png``.

    Returns:
        The files: ``summary``, ``step_cost``, one ``loss_<benchmark>`` a benchmark; where any run measured curvature
        ``curvature``; where there are any ``profiles``, ``speedups`` and ``tuning``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with parts.style():
        figures = {"summary": summary(study)}
        figures |= {f"loss_{benchmark}": loss(benchmark, pairs) for benchmark, pairs in study.items()}
        figures["step_cost"] = step_cost(study)
        diagnosed = curvature(study)
        if diagnosed is not None:
            figures["curvature"] = diagnosed
        figures |= verdict_figures.of(verdicts, evidence)
        metadata = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
        for name, figure in figures.items():
            files.append(folder / f"{name}.{suffix}")
            figure.savefig(files[-1], metadata=metadata, facecolor="white")
    return files


# ---------------------------------------------------------------- loss against both clocks


def loss(benchmark: str, pairs: Mapping[str, Sequence[Run]]) -> Figure:
    """The benchmark's target metric against optimizer steps (left) and seconds of training (right).

    A thick line is the median over seeds; thin lines are single seeds, with a dot where a seed reached a target. More
    seeds than five are a band.
    """
    first = next(iter(pairs.values()))[0].summary
    metric, targets = str(first["target_metric"]), {name: float(first[f"{name}_target"]) for name in TARGETS}
    figure = Figure(figsize=(8.4, 3.7), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, clock in zip(axes, curves.COLUMNS, strict=True):
        ends = [_curves(axis, pairs[name], clock, metric, on_light(name)) for name in ordered(pairs)]
        for target in targets.values():
            axis.axhline(target, zorder=1.5, **parts.TARGET_LINE)
        axis.set_xlim(0, 1.02 * max(ends) or None)
        axis.xaxis.set_major_locator(MaxNLocator(6))
    axes[0].set_xlabel("optimizer steps")
    axes[1].set_xlabel("training time [s]")
    axes[0].set_ylabel(METRICS.get(metric, metric.replace("_", " ")))
    axes[0].set_yscale("log")
    _fit_losses(axes[0], pairs, metric, targets.values())
    parts.log(axes[0], "y")
    handles = [Line2D([], [], color=on_light(name), linewidth=2.2, label=name) for name in ordered(pairs)]
    words = " and ".join(f"{name} {target:g}" for name, target in targets.items())
    handles.append(Line2D([], [], label=f"targets: {words}", **parts.TARGET_LINE))
    runs, most = [run for runs in pairs.values() for run in runs], max(map(len, pairs.values()))
    if any(run.summary[f"{name}_reached"] for run in runs for name in TARGETS) and most <= _SINGLE:
        handles.append(Line2D([], [], label="target reached", **parts.dot("#777777")))
    if not all(statistics.finished(run.summary) for run in runs):
        handles.append(Line2D([], [], label="diverged or failed", **parts.cross("#777777")))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(8, len(handles)), handlelength=1.8, columnspacing=1.4
    )
    figure.suptitle(benchmark, fontsize=11, fontweight="bold")
    return figure


def _curves(axis: Axes, runs: Sequence[Run], clock: str, metric: str, shade: str) -> float:
    """Draws the seeds of an optimizer; how far along the clock they are worth seeing."""
    curve = curves.over_seeds(runs, metric, clock)
    if len(runs) > _SINGLE:
        axis.fill_between(*curve.band(), color=shade, alpha=0.16, linewidth=0, zorder=2)
    for run in runs:
        points = _points(run, curves.COLUMNS[clock], metric)
        if len(runs) <= _SINGLE:
            axis.plot(*parts.columns(points), color=shade, linewidth=0.8, alpha=0.5, zorder=2)
        if not statistics.finished(run.summary):
            axis.plot(*parts.columns(points[-1:]), zorder=4, **parts.cross(shade))
        value, when = (dict(_points(run, "step", column)) for column in (metric, curves.COLUMNS[clock]))
        for at in (run.summary[f"{name}_step"] for name in TARGETS) if len(runs) <= _SINGLE else ():
            if at in value:  # step 0 has no place on a log scale: the clock's 0
                axis.plot([when.get(at, 0.0)], [value[at]], zorder=4, **parts.dot(shade))
    middle = [(x, y) for x, y in zip(curve.x, curve.middle, strict=True) if parts.positive(y)]
    axis.plot(*parts.columns(middle), color=shade, linewidth=2.0, zorder=3)
    return curves.interesting(runs, curve, clock)


def _points(run: Run, horizontal: str, vertical: str) -> list[tuple[float, float]]:
    """Two columns of the history, where the second is a number that a log scale can show."""
    rows: list[Any] = list(run.history)
    return [(float(row[horizontal]), float(row[vertical])) for row in rows if parts.positive(row[vertical])]


def _fit_losses(axis: Axes, pairs: Mapping[str, Sequence[Run]], metric: str, targets: Collection[float]) -> None:
    """Keep one exploding run from flattening all others."""
    points = [_points(run, "step", metric) for runs in pairs.values() for run in runs]
    found = looks.limits([[value for _, value in curve] for curve in points], targets)
    if found:
        axis.set_ylim(*found)


# ---------------------------------------------------------------- steps and seconds to target


def summary(study: Study) -> Figure:
    """Steps and seconds to the hard target, a dot a seed, a bar at the median; rings at the edge did not get there."""
    names = {benchmark: ordered(pairs) for benchmark, pairs in study.items()}
    heights = [len(order) + 0.9 for order in names.values()]
    figure = Figure(figsize=(8.4, 0.9 + 0.29 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(study), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (benchmark, pairs), axes in zip(study.items(), grid, strict=True):
        for axis, clock in zip(axes, ("step", "seconds"), strict=True):
            _dots(axis, pairs, names[benchmark], clock)
        axes[1].set_yticklabels([])
        axes[0].set_title(benchmark, loc="left", fontweight="bold")
    for axis, clock in zip(grid[-1], ("optimizer steps", "training seconds"), strict=True):
        axis.set_xlabel(f"{clock} to the hard target")
    marks = [
        Line2D([], [], label="a seed", **parts.dot("#777777")),
        Line2D(
            [],
            [],
            color="#777777",
            marker="|",
            markersize=13,
            markeredgewidth=2.2,
            linestyle="",
            label="median",
        ),
    ]
    missed = [run.summary for run in _runs(study) if not run.summary["hard_reached"]]
    if any(statistics.finished(outcome) for outcome in missed):
        marks.append(Line2D([], [], label="not reached within the budget", **parts.ring("#777777")))
    if not all(statistics.finished(outcome) for outcome in missed):
        marks.append(Line2D([], [], label="diverged or failed", **parts.cross("#777777")))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))
    return figure


def _dots(axis: Axes, pairs: Mapping[str, Sequence[Run]], names: Sequence[str], clock: str) -> None:
    outcomes = {name: [statistics.to_target(run.summary, "hard", clock) for run in pairs[name]] for name in names}
    known = [value for values in outcomes.values() for value in values if math.isfinite(value) and value > 0]
    low, high = (min(known), max(known)) if known else (1.0, 10.0)
    reach = max(high / low, 2.0) ** 0.06
    missed = any(math.isinf(value) for values in outcomes.values() for value in values)
    edge = high * reach**3 if missed else high
    for place, name in enumerate(names):
        values = outcomes[name]
        for number, value in enumerate(values):
            offset = place + 0.6 * ((number + 0.5) / len(values) - 0.5)
            if math.isfinite(value):
                axis.plot([max(value, low)], [offset], zorder=3, **parts.dot(on_light(name)))
            elif statistics.finished(pairs[name][number].summary):
                axis.plot([edge], [offset], zorder=3, **parts.ring(on_light(name)))
            else:
                axis.plot([edge], [offset], zorder=3, **parts.cross(on_light(name)))
        middle = statistics.spread(values)
        if middle and math.isfinite(middle.median):
            axis.plot(
                [max(middle.median, low)] * 2,
                [place - 0.46, place + 0.46],
                color=on_light(name),
                linewidth=2.2,
                zorder=2,
            )
    axis.set_xscale("log")
    axis.set_xlim(low / reach, edge * reach)
    parts.log(axis, "x", up_to=high * reach**1.5)
    if not known:
        axis.set_xticks([])
    elif missed:
        axis.axvline(high * reach**1.5, color="#BBBBBB", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")


# ---------------------------------------------------------------- what a step costs


def step_cost(study: Study) -> Figure:
    """Milliseconds of an optimizer step (median over seeds), split by phase, and its multiple of SGD's if that ran."""
    names = {benchmark: ordered(pairs) for benchmark, pairs in study.items()}
    columns = min(2, len(study))
    rows = math.ceil(len(study) / columns)
    tallest = max(len(order) for order in names.values())
    figure = Figure(figsize=(4.2 * columns, 0.7 + rows * (0.8 + 0.26 * tallest)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    used: set[str] = set()
    for axis, (benchmark, pairs) in zip(grid.flat, study.items(), strict=False):
        used |= _bars(axis, pairs, names[benchmark])
        axis.set_title(benchmark, loc="left", fontweight="bold")
        axis.set_xlabel("time per step [ms]")
    for axis in list(grid.flat)[len(study) :]:
        axis.set_axis_off()
    handles = [
        Line2D([], [], color=shade, linewidth=6, solid_capstyle="butt", label=words)
        for phase, (words, shade, _) in PHASES.items()
        if phase in used
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.2)
    return figure


def _bars(axis: Axes, pairs: Mapping[str, Sequence[Run]], names: Sequence[str]) -> set[str]:
    rows = [statistics.pair([run.summary for run in pairs[name]], pairs[name][0].config["steps"]) for name in names]
    multiples = statistics.relative_step_time(rows)
    used = set()
    longest = max((row["milliseconds_per_step_median"] or 0.0 for row in rows), default=0.0)
    for place, row in enumerate(rows):
        total = row["milliseconds_per_step_median"]
        if total is None:
            axis.text(0, place, " no step", va="center", color="#777777", fontsize=8)
            continue
        parts = {phase: row[f"milliseconds_per_step_{phase}"] or 0.0 for phase in statistics.PHASES}
        stretch = total / (sum(parts.values()) or total)  # medians of phases do not add up to the median of their sum
        left = 0.0
        for phase, width in ((phase, part * stretch) for phase, part in parts.items()):
            if width > 0.005 * longest:
                axis.barh(place, width, left=left, height=0.66, color=PHASES[phase][1], linewidth=0)
                left += width
                used.add(phase)
        multiple = multiples[row["optimizer"]]
        if multiple is not None and row["optimizer"] != "sgd":
            axis.text(
                left + 0.015 * longest,
                place,
                f"\N{MULTIPLICATION SIGN} {multiple:.1f}",
                va="center",
                fontsize=8,
                color="#333333",
            )
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.45, -0.55)
    axis.set_xlim(0, (longest or 1.0) * 1.15)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    return used


# ---------------------------------------------------------------- curvature


def curvature(study: Study) -> Figure | None:
    """Diagnostics of the whole model over steps, a row a quantity, a column a benchmark; None without any."""
    quantities = [name for name in _DIAGNOSED if any(_traces(run, name) for run in _runs(study))]
    if not quantities:
        return None
    figure = Figure(figsize=(1.2 + 2.3 * len(study), 0.8 + 1.9 * len(quantities)), layout="constrained")
    grid = figure.subplots(len(quantities), len(study), squeeze=False, sharex="col")
    for axes, quantity in zip(grid, quantities, strict=True):
        label, scale = CURVATURE[quantity]
        axes[0].set_ylabel(textwrap.fill(label, 30, break_on_hyphens=False))
        for axis, pairs in zip(axes, study.values(), strict=True):
            for optimizer in ordered(pairs):
                traces = [dict(_traces(run, quantity)) for run in pairs[optimizer]]
                for trace in traces:
                    axis.plot(
                        *parts.columns(sorted(trace.items())), color=on_light(optimizer), linewidth=0.7, alpha=0.4
                    )
                axis.plot(*parts.columns(statistics.median_curve(traces)), color=on_light(optimizer), linewidth=1.7)
            axis.set_xlim(left=0)
            if scale == "log":
                axis.set_yscale("log")
                parts.log(axis, "y")
            axis.xaxis.set_major_locator(MaxNLocator(4))
    for benchmark, top, bottom in zip(study, grid[0], grid[-1], strict=True):
        top.set_title(benchmark, fontweight="bold")
        bottom.set_xlabel("optimizer steps")
    names = ordered({optimizer for pairs in study.values() for optimizer in pairs})
    handles = [Line2D([], [], color=on_light(name), linewidth=2.2, label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.8)
    return figure


def _runs(study: Study) -> Iterator[Run]:
    for pairs in study.values():
        for runs in pairs.values():
            yield from runs


def _traces(run: Run, quantity: str) -> list[tuple[float, float]]:
    shown = parts.positive if CURVATURE[quantity][1] == "log" else parts.finite
    rows: list[Any] = [row for row in run.curvature if row["quantity"] == quantity and row["layer"] == ""]
    return [(float(row["step"]), float(row["value"])) for row in rows if shown(row["value"])]
