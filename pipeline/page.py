"""The report as pages: ``index.html``, one file that loads nothing, and ``report.md``.

The one idea: everything that a page says is gathered here as plain values under the names that the templates use
(`pipeline/templates`); verdicts come from :mod:`pipeline.verdicts`, cells from :mod:`pipeline.tables`, charts from
:mod:`pipeline.charts`.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from pipeline import charts, curves, looks, provenance, records, statistics, tables, verdicts
from pipeline.config import TARGETS
from pipeline.curves import Study
from pipeline.evidence import Evidence, reached, winner
from pipeline.records import Run
from pipeline.tables import DASH, Table, number, plural
from pipeline.verdicts import ALL, CLOCKS, Outcome, Verdicts

TEMPLATES = Path(__file__).parent / "templates"
# Settings of an optimizer's training beside its own.
_LOOP = ("batch_size", "averaging", "warmup", "schedule", "evaluate_every")
CURVATURE_COLUMNS = ("benchmark", "optimizer", "seed", *records.CURVATURE_COLUMNS)
_COSTS = {"milliseconds_per_step_median": 3, "step_time_ratio_to_sgd": 2, "peak_memory_mib_median": 3}  # and digits
_RATIOS = ("steps", "cost", "seconds")


@dataclass(frozen=True)
class Report:
    """What the pages are about; ``rows`` are those of ``table.csv``, ``links`` are addresses of runs in MLflow by
    benchmark, optimizer and seed."""

    study: Study
    rows: Table
    verdicts: Verdicts
    evidence: Evidence
    links: Mapping[tuple[str, str, int], str] = field(default_factory=dict)


# ---------------------------------------------------------------- the two pages


def html(report: Report) -> str:
    """``index.html``: styles, script, charts and the chart library inside."""
    from plotly.offline import get_plotlyjs

    drawn: dict[str, Any] = {}
    for benchmark, pairs in report.study.items():
        drawn |= charts.of_benchmark(benchmark, pairs)
    for clock in CLOCKS:
        drawn[f"profile-{clock}"] = charts.profile(report.verdicts.profiles, clock)
        drawn[f"speedup-{clock}"] = charts.speedup(report.verdicts.speedups, clock)
    reference = _reference(report.study)
    if reference:
        costs = charts.relative_cost(report.study, reference)
        drawn["cost"] = charts.phases(costs, f"cost of a step, in steps of {reference}")
    for benchmark, tuned in report.evidence.tuning.items():
        drawn[f"tuning-{benchmark}"] = charts.budget(tuned)
    drawn = {name: chart for name, chart in drawn.items() if chart and chart["data"]}
    names = statistics.ordered({name for pairs in report.study.values() for name in pairs})
    palette = {name: [looks.on_light(name), looks.on_dark(name)] for name in names}
    palette |= {f"phase:{phase}": shades for phase, (_, *shades) in looks.PHASES.items()}
    return _template("index.html").render(
        **_common(report),
        optimizers=names,
        marks=charts.marks(report.verdicts.speedups),
        phases={phase: words for phase, (words, *_) in looks.PHASES.items()},
        pooled=[each for each in report.verdicts.comparisons if each.benchmark == ALL],
        palette=palette,
        glance=[_glance(report, target) for target in reversed(TARGETS)],
        benchmarks=[_benchmark(report, name) for name in report.study],
        charts=drawn,
        reference=reference,
        why=list(_why(report, reference)) if reference else [],
        means=list(_means(report, reference)) if reference else [],
        tuning=[_tuned(name, tuned) for name, tuned in report.evidence.tuning.items()],
        runs=[{**_run(run), "link": _link(report, run)} for run in _runs(report.study)],
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode(),
    )


def markdown(report: Report, pictures: Iterable[str]) -> str:
    """``report.md``, with the pictures of these names in ``figures/``."""
    drawn = list(pictures)
    return _template("report.md").render(
        **_common(report),
        blocks=[
            {"caption": tables.caption(block), "table": tables.markdown(block), "remarks": tables.remarks(block)}
            for block in tables.blocks(report.rows)
        ],
        losses=[name for name in drawn if name.startswith("loss_")],
        pictures=drawn,
    )


def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "percent": lambda share: f"{share:.0%}", "times": _times}
    environment.filters["breakable"] = lambda name: Markup(str(escape(name)).replace("_", "_<wbr>"))
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    return environment.get_template(f"{name}.j2")


def _common(report: Report) -> dict[str, Any]:
    """What both pages say."""
    runs = list(_runs(report.study))
    seeds = sorted({run.summary["seed"] for run in runs})
    unfinished = [run for run in runs if not statistics.finished(run.summary)]
    return {
        "verdicts": report.verdicts,
        **_sentences(report),
        "names": list(report.study),
        "compared": statistics.ordered({run.summary["optimizer"] for run in runs}),
        "seeds": seeds,
        "confidence": curves.confidence(len(seeds)),
        "run_count": len(runs),
        "unfinished": [_run(run) for run in unfinished],
        "missing": [line for line in report.verdicts.missing if not any(_is_about(run, line) for run in unfinished)],
        "unreached": list(_unreached(report.verdicts.outcomes)),
        "machines": provenance.machines(runs),
        "dates": provenance.dates(runs),
        "facts": provenance.facts(runs),
        "data": [provenance.data(name, manifest) for name, manifest in report.evidence.data.items()],
        "untuned": list(_untuned(report)),
        "coverage_table": report.evidence.coverage,
        "plural": plural,
    }


def _sentences(report: Report) -> dict[str, Any]:
    """The sentences on the whole study, by the clock that they speak of, and those on single benchmarks."""
    names = report.study if len(report.study) > 1 else ()
    of_one = {name: [each for each in report.verdicts.sentences if _names(name, each)] for name in names}
    single = {each for sentences in of_one.values() for each in sentences}
    over_all = [each for each in report.verdicts.sentences if each not in single]
    return {
        "over_all": {
            clock: [each for each in over_all if (clock in each) and not (clock == "steps" and "seconds" in each)]
            for clock in CLOCKS
        },
        "general": [each for each in over_all if not any(clock in each for clock in CLOCKS)],
        "of_one": of_one,
    }


def _names(name: str, sentence: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", sentence) is not None


# ---------------------------------------------------------------- at a glance


def _outcomes(report: Report) -> dict[tuple[str, str, str, str], Outcome]:
    return {(each.benchmark, each.optimizer, each.target, each.clock): each for each in report.verdicts.outcomes}


def _glance(report: Report, target: str) -> dict[str, Any]:
    """For each clock a line a benchmark: the median time of every optimizer and how many times the best it is."""
    outcomes = _outcomes(report)
    by_pair = {(row["benchmark"], row["optimizer"]): row for row in report.rows}
    names = statistics.ordered({row["optimizer"] for row in report.rows})
    found: dict[str, Any] = {"target": target, "clocks": {}}
    for clock in CLOCKS:
        lines = []
        for benchmark in report.study:
            own = {name: outcomes.get((benchmark, name, target, clock)) for name in names}
            times = {name: outcome.median for name, outcome in own.items() if outcome and outcome.median}
            best = min(times.values(), default=None)
            lines.append({
                "benchmark": benchmark,
                "cells": [_glanced(own[name], by_pair.get((benchmark, name)), best) for name in names],
            })  # fmt: skip
        found["clocks"][clock] = {"optimizers": names, "lines": lines}
    return found


def _glanced(outcome: Outcome | None, row: Mapping[str, Any] | None, best: float | None) -> dict[str, Any]:
    if outcome is None or row is None:
        return {
            "text": DASH,
            "sort": "inf",
            "factor": None,
            "reached": "",
            "note": "not run, or initial weights meet the target",
        }
    reached = f"{outcome.reached} of {outcome.seeds} seeds reached it"
    if outcome.median is None or not best:
        text = tables.missed(row) if outcome.clock == "steps" else DASH
        return {"text": text, "sort": "inf", "factor": None, "note": reached, "reached": _reached(outcome)}
    return {
        "text": _time(outcome),
        "sort": outcome.median,
        "factor": outcome.median / best,
        "note": f"{reached}{_of(outcome)}",
        "reached": "" if outcome.reached == outcome.seeds else _reached(outcome),
    }


def _reached(outcome: Outcome) -> str:
    return f"{outcome.reached}/{outcome.seeds}"


def _time(outcome: Outcome) -> str:
    return f"{outcome.median:g}" if outcome.clock == "steps" else number(outcome.median)


def _of(outcome: Outcome) -> str:
    interval = outcome.interval
    if interval is None:
        return ""
    return f"; {interval.level:.0%} interval {number(interval.low)} to {number(interval.high)} ({interval.method})"


# ---------------------------------------------------------------- a benchmark


def _benchmark(report: Report, benchmark: str) -> dict[str, Any]:
    pairs = report.study[benchmark]
    block = [row for row in report.rows if row["benchmark"] == benchmark]
    outcomes = _outcomes(report)
    return {
        "name": benchmark,
        "caption": tables.caption(block).partition(": ")[2],
        "sentences": _sentences(report)["of_one"].get(benchmark, []),
        "leaders": [leader for clock in CLOCKS if (leader := _leader(report, benchmark, clock))],
        "score": "excess loss" if any(row["excess_loss_median"] is not None for row in block) else "test score",
        "lines": [_pair(row, outcomes, pairs[row["optimizer"]][0].config) for row in block],
        "comparisons": [each for each in report.verdicts.comparisons if each.benchmark == benchmark],
        "remarks": tables.remarks(block),
        "curvature": [
            {"chart": f"{benchmark}-curvature-{name}", "words": words}
            for name, (words, _) in looks.CURVATURE.items()
            if any(row["quantity"] == name for runs in pairs.values() for run in runs for row in run.curvature)
        ],
        "pictures": list(_pictures(pairs)),
    }


def _leader(report: Report, benchmark: str, clock: str) -> str:
    """Who has the smallest median time to the hard target: no verdict, only what the line of the list says."""
    outcomes = report.verdicts.outcomes
    _, best = verdicts.least(
        each for each in outcomes if (each.benchmark, each.target, each.clock) == (benchmark, "hard", clock)
    )
    if not best:
        return ""
    who = f"{', '.join(each.optimizer for each in best)} {_time(best[0])}"
    return f"fewest steps {who}" if clock == "steps" else f"least time {who} s"


def _pair(row: Mapping[str, Any], outcomes: Mapping[Any, Outcome], config: Mapping[str, Any]) -> dict[str, Any]:
    final = "excess_loss" if row["excess_loss_median"] is not None else "test_score"
    cells = []
    for target in reversed(TARGETS):
        reached, *ranges = tables.reaching(row, target)
        cells.append(_cell(reached, row[f"reached_{target}"]))
        for clock, text in zip(CLOCKS, ranges, strict=True):
            outcome = outcomes.get((row["benchmark"], row["optimizer"], target, clock))
            cells.append(_cell(_timed(outcome, text), outcome.median if outcome else None))
    cells += [_cell(number(row[name], digits), row[name]) for name, digits in _COSTS.items()]
    cells += [
        _cell(number(row[f"{quantity}_median"]) if row["finished"] else tables.missed(row), row[f"{quantity}_median"])
        for quantity in ("train_loss", "validation_loss", "test_loss", final)
    ]
    settings = {key: value for key, value in config["options"].items() if value is not None}
    settings |= {key: config[key] for key in _LOOP if config.get(key) is not None}
    return {
        "optimizer": row["optimizer"],
        "cells": cells,
        "class": config["target_class"],
        "settings": ", ".join(f"{key} {_value(value)}" for key, value in settings.items()),
    }


def _cell(text: str, value: float | None) -> dict[str, Any]:
    return {"text": text, "sort": "inf" if value is None or not math.isfinite(value) else value}


def _timed(outcome: Outcome | None, ranged: str) -> str:
    """The median with its interval in brackets; without one with the smallest and largest seed in braces."""
    if outcome is None or outcome.median is None or outcome.interval is None:
        return ranged.replace("[", "{").replace("]", "}")
    return f"{_time(outcome)} [{number(outcome.interval.low)}{DASH}{number(outcome.interval.high)}]"


def _pictures(pairs: Mapping[str, Sequence[Run]]) -> Iterator[dict[str, str]]:
    """The reconstructions of each optimizer's first seed that has some."""
    for name in statistics.ordered(pairs):
        for run in pairs[name]:
            file = run.folder / "reconstructions.png"
            if file.is_file():
                yield {
                    "words": f"{name}, seed {run.summary['seed']}",
                    "source": f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}",
                }
                break


# ---------------------------------------------------------------- why faster


def _reference(study: Study) -> str | None:
    """The optimizer that costs are compared with: SGD, else Adam, if it ran on every benchmark."""
    return next((name for name in ("sgd", "adam") if all(name in pairs for pairs in study.values())), None)


def _why(report: Report, reference: str) -> Iterator[dict[str, Any]]:
    """Seconds are steps times the cost of a step: for each pair the three ratios to the reference, phase by phase."""
    by_pair = {(row["benchmark"], row["optimizer"]): row for row in report.rows}
    for row in report.rows:
        base = by_pair[row["benchmark"], reference]
        if row is base:
            continue
        yield {
            "benchmark": row["benchmark"],
            "optimizer": row["optimizer"],
            "steps": statistics.ratio(base["steps_to_hard_median"], row["steps_to_hard_median"]),
            "cost": statistics.ratio(row["milliseconds_per_step_median"], base["milliseconds_per_step_median"]),
            "seconds": statistics.ratio(base["seconds_to_hard_median"], row["seconds_to_hard_median"]),
            "phases": [row[f"milliseconds_per_step_{phase}"] for phase in looks.PHASES],
        }


def _means(report: Report, reference: str) -> Iterator[dict[str, Any]]:
    """The same for each optimizer: geometric means over the benchmarks on which both got there."""
    lines = list(_why(report, reference))
    for name in statistics.ordered({line["optimizer"] for line in lines}):
        own = [line for line in lines if line["optimizer"] == name and all(line[key] for key in _RATIOS)]
        if own:
            means = {key: geometric_mean(line[key] for line in own) for key in _RATIOS}
            yield {"optimizer": name, "benchmarks": len(own), **means}


# ---------------------------------------------------------------- tuning, runs, what is missing


def _tuned(benchmark: str, tuned: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    lines = []
    for name in statistics.ordered(tuned):
        found = tuned[name]
        won = winner(found)
        lines.append({
            "optimizer": name,
            "trials": len(found["trials"]),
            "reached": reached(found),
            "diverged": sum(bool(trial["diverged"]) for trial in found["trials"]),
            "best": won["seconds_to_target"],
            "chosen": ", ".join(f"{key} {_value(value)}" for key, value in found["chosen"].items()),
            "won_by_first": found["won_by_first"],
            "edges": ", ".join(won["edge"]),
            "date": found["date"],
        })  # fmt: skip
    return {"benchmark": benchmark, "chart": f"tuning-{benchmark}", "lines": lines}


def _untuned(report: Report) -> Iterator[str]:
    for benchmark, pairs in report.study.items():
        tuned = report.evidence.tuning.get(benchmark, {})
        names = [name for name in statistics.ordered(pairs) if name not in tuned]
        if names:
            yield f"{benchmark}: {', '.join(names)}"


def _unreached(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    for each in outcomes:
        if each.clock == "steps" and each.reached < each.seeds:
            yield {"benchmark": each.benchmark, "optimizer": each.optimizer, "target": each.target,
                   "missed": each.seeds - each.reached, "seeds": each.seeds}  # fmt: skip


def _runs(study: Study) -> Iterator[Run]:
    for pairs in study.values():
        for runs in pairs.values():
            yield from runs


def _run(run: Run) -> dict[str, Any]:
    """A line of the table of all runs, and of ``runs.csv``: the summary of a seed."""
    return dict(run.summary)


def _is_about(run: Run, line: str) -> bool:
    """Whether a line of what is missing says what stands in the run's own record."""
    return line.startswith(f"{run.summary['benchmark']}, {run.summary['optimizer']}, seed {run.summary['seed']}:")


def _link(report: Report, run: Run) -> str:
    summary = run.summary
    return report.links.get((summary["benchmark"], summary["optimizer"], summary["seed"]), "")


def run_rows(study: Study) -> Iterator[dict[str, Any]]:
    """``runs.csv``: one row a run."""
    return (_run(run) for run in _runs(study))


def curvature_rows(study: Study) -> Iterator[dict[str, Any]]:
    """``curvature.csv``: one row a diagnostic of a run, as its own ``curvature.csv`` has it."""
    for run in _runs(study):
        config = run.config
        of_run = {"benchmark": config["benchmark"], "optimizer": config["optimizer"], "seed": run.summary["seed"]}
        yield from (of_run | row for row in run.curvature)


# ---------------------------------------------------------------- words


def _times(value: float | None) -> str:
    return (
        DASH if value is None else f"{number(value, 3 if 1 < value < 1.1 or value >= 10 else 2)}\N{MULTIPLICATION SIGN}"
    )


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, list | dict) else str(value)
