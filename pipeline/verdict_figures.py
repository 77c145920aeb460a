"""The figures for papers, of what was found: performance profiles, speed-ups, budget curves of the tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline import figure_parts as parts
from pipeline.evidence import Evidence
from pipeline.looks import on_light
from pipeline.statistics import ordered
from pipeline.verdicts import CLOCKS, Profile, Speedup, Verdicts

_MARKS = ("o", "D", "s")


def of(verdicts: Verdicts, evidence: Evidence) -> dict[str, Figure]:
    """`profiles`, `speedups` and `tuning`, as far as there are any."""
    found = {}
    if any(each.tau for each in verdicts.profiles):
        found["profiles"] = profiles([each for each in verdicts.profiles if each.tau])
    if any(each.ratio for each in verdicts.speedups):
        found["speedups"] = speedups([each for each in verdicts.speedups if each.ratio])
    if evidence.tuning:
        found["tuning"] = tuning(evidence.tuning)
    return found


def profiles(found: Sequence[Profile]) -> Figure:
    """Share of the problems solved within so many times the time of the fastest, on both clocks."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, clock in zip(axes, CLOCKS, strict=True):
        own = {each.optimizer: each for each in found if each.clock == clock}
        last = max((each.tau[-1] for each in own.values()), default=2.0)
        for name in ordered(own):
            x, y = [*own[name].tau, last], [*own[name].share, own[name].share[-1]]
            axis.step(x, y, where="post", color=on_light(name), linewidth=2.0)
        axis.set_xlim(1, max(last, 1.1))
        parts.log(axis, "x")
        axis.set_xlabel(f"{clock} over those of the fastest")
    axes[0].set_ylim(-0.02, 1.03)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].set_ylabel("problems solved")
    return _with_legend(figure, ordered({each.optimizer for each in found}))


def speedups(found: Sequence[Speedup]) -> Figure:
    """Geometric mean of the speed-up over each reference, with its interval."""
    names = ordered({each.optimizer for each in found})
    references = ordered({each.reference for each in found})
    figure = Figure(figsize=(8.4, 1.0 + 0.2 * len(names) * (1 + len(references))), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, clock in zip(axes, CLOCKS, strict=True):
        ends = [1.0]
        for each in (each for each in found if each.clock == clock):
            assert each.ratio is not None
            place = references.index(each.reference)
            height = names.index(each.optimizer) + 0.24 * (place - (len(references) - 1) / 2)
            own = [end for end in (each.ratio.low, each.ratio.high) if 0 < end < math.inf]
            axis.plot(own, [height] * len(own), color=on_light(each.optimizer), linewidth=1.6)
            axis.plot(
                [each.ratio.estimate], [height], color=on_light(each.optimizer), marker=_MARKS[place % 3], markersize=6
            )
            ends += [each.ratio.estimate, *own]
        axis.axvline(1, zorder=1, **parts.TARGET_LINE)
        axis.set_xlim(min(ends) / 1.15, max(ends) * 1.15)
        parts.log(axis, "x")
        axis.set_xlabel(f"speed-up in {clock}")
        axis.grid(False, axis="y")
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    handles = [
        Line2D([], [], color="#777777", marker=mark, linewidth=1.6, label=f"over {reference}")
        for mark, reference in zip(_MARKS, references, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def tuning(tuned: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Expected best of so many trials, a panel a benchmark."""
    columns = min(2, len(tuned))
    figure = Figure(figsize=(4.2 * columns, 0.6 + 2.4 * math.ceil(len(tuned) / columns)), layout="constrained")
    axes = list(figure.subplots(math.ceil(len(tuned) / columns), columns, squeeze=False).flat)
    for axis, (benchmark, found) in zip(axes, tuned.items(), strict=False):
        for name in ordered(found):
            points = [(point["trials"], point["expected"]) for point in found[name]["budget_curve"]]
            known = [(trials, expected) for trials, expected in points if parts.positive(expected)]
            axis.plot(*parts.columns(known), color=on_light(name), marker="o", markersize=3)
        if axis.lines and any(len(line.get_xdata()) for line in axis.lines):
            parts.log(axis, "y")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_title(benchmark, loc="left", fontweight="bold")
        axis.set_xlabel("trials")
        axis.set_ylabel("expected best,\nseconds to target")
    for axis in axes[len(tuned) :]:
        axis.set_axis_off()
    return _with_legend(figure, ordered({name for found in tuned.values() for name in found}))


def _with_legend(figure: Figure, names: Sequence[str]) -> Figure:
    handles = [Line2D([], [], color=on_light(name), linewidth=2.2, label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)), handlelength=1.8)
    return figure
