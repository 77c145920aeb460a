"""The charts of the page, as plotly's plain data: traces and axes, without colours.

The one idea: a trace says which optimizer (or phase) it belongs to by `legendgroup`; the page's script gives it that
one's colour for the theme that is on, hides it when the reader switches it off, and draws what is scrolled to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline import curves, looks, statistics
from pipeline.config import TARGETS
from pipeline.curves import Study
from pipeline.looks import CLOCKS, CURVATURE, METRICS, PHASES
from pipeline.records import Run
from pipeline.verdicts import Profile, Speedup

Chart = dict[str, Any]
_POINTS = 100  # of a curve, at most
_MARKS = {"●": "circle", "◆": "diamond", "■": "square"}  # of references
_NEUTRAL = "#8a8f98"  # readable on both grounds


def of_benchmark(benchmark: str, pairs: Mapping[str, Sequence[Run]]) -> dict[str, Chart]:
    """The charts of one benchmark by name: `loss-steps`, `loss-seconds`, `seeds-…`, `phases`, `curvature-…`."""
    found = {f"loss-{clock}": loss(pairs, clock) for clock in CLOCKS}
    found |= {f"seeds-{clock}": seeds(pairs, clock) for clock in CLOCKS}
    found["phases"] = phases({name: _cost(runs) for name, runs in pairs.items()}, "milliseconds per step")
    found |= {f"curvature-{name}": chart for name in CURVATURE if (chart := curvature(pairs, name))}
    return {f"{benchmark}-{name}": chart for name, chart in found.items()}


def loss(pairs: Mapping[str, Sequence[Run]], clock: str) -> Chart:
    """The target's metric on one clock: medians over seeds with their bands, and the two targets."""
    first = next(iter(pairs.values()))[0].summary
    metric = str(first["target_metric"])
    targets = {name: float(first[f"{name}_target"]) for name in TARGETS}
    drawn = {name: _thinned(curves.over_seeds(pairs[name], metric, clock)) for name in statistics.ordered(pairs)}
    shown = looks.limits([values for curve in drawn.values() for values in (curve.middle, curve.low)], targets.values())
    low, high = shown or (min(targets.values()), max(targets.values()))
    traces: list[Chart] = []
    for name, curve in drawn.items():
        traces += _curve(name, curve)
    end = max((curves.interesting(pairs[name], curve, clock) for name, curve in drawn.items()), default=1.0)
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": CLOCKS[clock]}, "range": [0, _short(end)], "nticks": 6, "showgrid": False},
            "yaxis": {"title": {"text": METRICS.get(metric, metric)}, **_log(low, high)},
            "shapes": [_line(y0=target, y1=target, xref="paper", x0=0, x1=1) for target in targets.values()],
            "annotations": [
                {"text": name, "xref": "paper", "x": 1, "xanchor": "right", "y": math.log10(target),
                 "yanchor": "bottom", "showarrow": False, "font": {"size": 11, "color": _NEUTRAL}}
                for name, target in targets.items()
            ],
        },
    }  # fmt: skip


def seeds(pairs: Mapping[str, Sequence[Run]], clock: str) -> Chart:
    """Every seed's time to the hard target; at the right edge, open, the seeds that did not get there."""
    names, quantity = statistics.ordered(pairs), curves.OUTCOMES[clock]
    times = {name: [statistics.to_target(run.summary, "hard", quantity) for run in pairs[name]] for name in names}
    known = [value for values in times.values() for value in values if 0 < value < math.inf]
    low, high = (min(known), max(known)) if known else (1.0, 10.0)
    margin = max(high / low, 2.0) ** 0.06
    missed = any(math.isinf(value) for values in times.values() for value in values)
    edge = high * (margin**3 if missed else 1)
    traces = []
    for place, name in enumerate(names):
        spots = [place + 0.5 * ((at + 0.5) / len(times[name]) - 0.5) for at in range(len(times[name]))]
        marks, words = [], []
        for run, value in zip(pairs[name], times[name], strict=True):
            ended = "circle-open" if statistics.finished(run.summary) else "x"
            marks.append("circle" if math.isfinite(value) else ended)
            words.append(f"{name} seed {run.summary['seed']}: {_when(run, value)}")
        x = [_short(max(value, low) if math.isfinite(value) else edge) for value in times[name]]
        traces.append({
            "type": "scatter", "mode": "markers", "legendgroup": name, "name": name, "x": x, "y": spots,
            "marker": {"symbol": marks, "size": 9}, "text": words, "hovertemplate": "%{text}<extra></extra>",
        })  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": f"{CLOCKS[clock]} to the hard target"},
                      **_log(low / margin, edge * margin, up_to=high * margin)},
            "yaxis": {"range": [len(names) - 0.5, -0.5], "tickvals": list(range(len(names))), "ticktext": names,
                      "showgrid": False, "zeroline": False},
            "shapes": [_line(x0=high * margin**1.5, x1=high * margin**1.5, yref="paper", y0=0, y1=1)] if missed else [],
        },
        "height": 96 + 26 * len(names),
    }  # fmt: skip


def phases(costs: Mapping[str, Mapping[str, float]], words: str) -> Chart:
    """Stacked bars: the cost of a step (optimizer -> phase -> cost) in the unit that `words` names."""
    names = [name for name in statistics.ordered(costs) if costs[name]]
    used = [phase for phase in PHASES if any(costs[name].get(phase) for name in names)]
    traces = [
        {
            "type": "bar", "orientation": "h", "legendgroup": f"phase:{phase}", "name": PHASES[phase][0], "y": names,
            "x": [_short(costs[name].get(phase, 0.0)) for name in names],
            "hovertemplate": f"%{{y}}, {PHASES[phase][0]}: %{{x:.3g}}<extra></extra>",
        }
        for phase in used
    ]  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "barmode": "stack", "bargap": 0.35,
            "xaxis": {"title": {"text": words}, "nticks": 6, "rangemode": "tozero"},
            "yaxis": {"autorange": "reversed", "showgrid": False, "type": "category"},
        },
        "height": 96 + 26 * len(names),
    }  # fmt: skip


def relative_cost(study: Study, reference: str) -> dict[str, dict[str, float]]:
    """Optimizer -> phase -> its cost in steps of the reference, mean over the benchmarks that both ran."""
    found: dict[str, dict[str, list[float]]] = {}
    for pairs in study.values():
        unit = sum(_cost(pairs[reference]).values()) if reference in pairs else 0.0
        for name, runs in pairs.items():
            for phase, cost in _cost(runs).items() if unit else ():
                found.setdefault(name, {}).setdefault(phase, []).append(cost / unit)
    return {name: {phase: sum(each) / len(each) for phase, each in parts.items()} for name, parts in found.items()}


def curvature(pairs: Mapping[str, Sequence[Run]], quantity: str) -> Chart | None:
    """A diagnostic of the whole model over steps; None where nobody measured it."""
    _, scale = CURVATURE[quantity]
    drawn = {name: curves.of_diagnostic(pairs[name], quantity) for name in statistics.ordered(pairs)}
    drawn = {name: _thinned(curve) for name, curve in drawn.items() if curve.x}
    values = [value for curve in drawn.values() for value in (*curve.low, *curve.high) if scale != "log" or value > 0]
    if not values:
        return None
    axis = _log(min(values) / 1.2, max(values) * 1.2) if scale == "log" else {"nticks": 5, "zeroline": False}
    return {
        "data": [trace for name, curve in drawn.items() for trace in _curve(name, curve, markers=True)],
        "layout": {
            "xaxis": {"title": {"text": CLOCKS["steps"]}, "rangemode": "tozero", "nticks": 6, "showgrid": False},
            "yaxis": axis,
        },
        "height": 260,
    }


def profile(profiles: Sequence[Profile], clock: str) -> Chart:
    """Share of the problems that an optimizer solves within so many times the time of the fastest."""
    own = {found.optimizer: found for found in profiles if found.clock == clock and found.tau}
    last = max((found.tau[-1] for found in own.values()), default=10.0)
    traces = [
        {
            "type": "scatter", "mode": "lines", "legendgroup": name, "name": name,
            "x": _shorts([*own[name].tau, last]), "y": _shorts([*own[name].share, own[name].share[-1]]),
            "line": {"shape": "hv", "width": 2.2},
            "hovertemplate": f"{name}: %{{y:.0%}} within %{{x:.3g}} times<extra></extra>",
        }
        for name in statistics.ordered(own)
    ]  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": f"{clock} over those of the fastest"}, "showgrid": False, **_log(1.0, last)},
            "yaxis": {"title": {"text": "problems solved"}, "range": [-0.02, 1.04], "tickformat": ".0%", "nticks": 5},
        },
    }


def speedup(found: Sequence[Speedup], clock: str) -> Chart | None:
    """Speed-up over each reference with its interval; None where there is none."""
    own = [each for each in found if each.clock == clock and each.ratio]
    references = _references(found)
    names = statistics.ordered({each.optimizer for each in own})
    if not own:
        return None
    traces = []
    for each in own:
        assert each.ratio is not None
        place = references.index(each.reference)
        ratio = each.ratio
        traces.append({
            "type": "scatter", "mode": "markers", "legendgroup": each.optimizer, "name": each.optimizer,
            "x": [_short(ratio.estimate)],
            "y": [names.index(each.optimizer) + 0.24 * (place - (len(references) - 1) / 2)],
            "error_x": {"type": "data", "symmetric": False, "array": [_short(ratio.high - ratio.estimate)],
                        "arrayminus": [_short(ratio.estimate - ratio.low)], "thickness": 2, "width": 4},
            "marker": {"symbol": list(_MARKS.values())[place % len(_MARKS)], "size": 10},
            "text": [f"{each.optimizer} over {each.reference}"],
            "hovertemplate": f"%{{text}}: %{{x:.3g}} [{ratio.low:.3g}, {ratio.high:.3g}]<extra></extra>",
        })  # fmt: skip
    ends = [end for each in own if each.ratio for end in (each.ratio.low, each.ratio.high) if 0 < end < math.inf]
    low, high = min(1.0, *ends) / 1.15, max(1.0, *ends) * 1.15
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": f"speed-up in {clock}"}, **_log(low, high)},
            "yaxis": {"range": [len(names) - 0.5, -0.5], "tickvals": list(range(len(names))), "ticktext": names,
                      "showgrid": False, "zeroline": False},
            "shapes": [_line(x0=1, x1=1, yref="paper", y0=0, y1=1)],
        },
        "height": 96 + 16 * len(names) * len(references),
    }  # fmt: skip


def marks(found: Sequence[Speedup]) -> str:
    """Which mark stands for which reference."""
    return ", ".join(f"{mark} over {name}" for mark, name in zip(_MARKS, _references(found), strict=False))


def _references(found: Sequence[Speedup]) -> list[str]:
    return statistics.ordered({each.reference for each in found if each.ratio})


def budget(tuned: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Expected best of so many trials: optimizer -> the file of its trials."""
    found = {name: [point for point in tuned[name]["budget_curve"] if point["expected"]] for name in tuned}
    traces = [
        {
            "type": "scatter", "mode": "lines+markers", "legendgroup": name, "name": name, "marker": {"size": 5},
            "x": [point["trials"] for point in found[name]],
            "y": _shorts([point["expected"] for point in found[name]]),
            "hovertemplate": f"{name}, %{{x}} trials: %{{y:.3g}} s<extra></extra>",
        }
        for name in statistics.ordered(found) if found[name]
    ]  # fmt: skip
    values = [float(point["expected"]) for points in found.values() for point in points]
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "trials"}, "nticks": 8, "showgrid": False},
            "yaxis": {"title": {"text": "expected best, seconds to target"},
                      **(_log(min(values) / 1.1, max(values) * 1.1) if values else {})},
        },
    }  # fmt: skip


# ---------------------------------------------------------------- parts of a chart


def _curve(name: str, curve: curves.Curve, markers: bool = False) -> Iterator[Chart]:
    """The band, then the line over it; a line ends where the median is infinite."""
    x, low, high = curve.band()
    if len(x) > 1 and low != high:
        yield {
            "type": "scatter", "mode": "lines", "fill": "toself", "legendgroup": name, "hoverinfo": "skip",
            "x": _shorts([*x, *reversed(x)]), "y": _shorts([*high, *reversed(low)]),
        }  # fmt: skip
    yield {
        "type": "scatter", "mode": "lines+markers" if markers else "lines", "legendgroup": name, "name": name,
        "line": {"width": 2.2}, "marker": {"size": 5}, "x": _shorts(curve.x), "y": _shorts(curve.middle),
        "hovertemplate": f"{name}: %{{y:.3g}} at %{{x:.4g}}<extra></extra>",
    }  # fmt: skip


def _cost(runs: Sequence[Run]) -> dict[str, float]:
    """Median milliseconds of a step by phase; empty where no run made one."""
    row = statistics.pair([run.summary for run in runs], runs[0].config["steps"])
    return {phase: cost for phase in PHASES if (cost := row[f"milliseconds_per_step_{phase}"]) is not None}


def _thinned(curve: curves.Curve) -> curves.Curve:
    stride = math.ceil(len(curve.x) / _POINTS) or 1
    kept = [place for place in range(len(curve.x)) if place % stride == 0 or place == len(curve.x) - 1]
    columns = (curve.x, curve.middle, curve.low, curve.high)
    return curves.Curve(*([column[place] for place in kept] for column in columns))


def _log(low: float, high: float, up_to: float = math.inf) -> dict[str, Any]:
    """A log axis with a few round labels, also where it spans less than a decade."""
    high = high if high > low else low * 2
    found = looks.ticks(low, min(high, up_to))
    return {
        "type": "log", "range": [round(math.log10(low), 4), round(math.log10(high), 4)], "tickmode": "array",
        "tickvals": found, "ticktext": [f"{tick:g}" for tick in found], "minor": {"ticks": ""}, "zeroline": False,
    }  # fmt: skip


def _line(**where: Any) -> dict[str, Any]:
    return {"type": "line", "layer": "below", "line": {"color": _NEUTRAL, "dash": "dash", "width": 1}, **where}


def _when(run: Run, value: float) -> str:
    if math.isfinite(value):
        return f"{value:.4g}"
    return "not within the budget" if statistics.finished(run.summary) else f"{run.summary['status']}"


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _shorts(values: Sequence[float]) -> list[float | None]:
    return [_short(value) for value in values]
