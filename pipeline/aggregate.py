"""Stage ``aggregate``: the comparison of all optimizers, from the records of the pairs that params.yaml names.

``python -m pipeline.aggregate`` reads results/ and writes report/: ``table.csv`` (one row a pair, full precision),
``metrics.json`` (one figure a pair, for DVC), ``report.md`` and ``figures/``, and prints the table.
``python -m pipeline.aggregate --show`` prints it again.

The one idea: ``table.csv`` is the comparison; the terminal's table and the report's are views of its rows.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import comparability, records, statistics
from pipeline.config import TARGETS, ConfigError, Params, load, resolve, run_stage

RESULTS, REPORT = Path("results"), Path("report")
TABLE = "table.csv"
REFERENCE = "sgd"
Table = list[dict[str, Any]]

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
HEADERS = ("optimizer", "train\nloss", "valid.\nloss", "test\nloss")
TARGET_HEADERS = ("reached\n{target}", "steps to {target}\nmedian [range]", "seconds to {target}\nmedian [range]")
COST_HEADERS = ("ms per\nstep", f"{TIMES} sgd")
SHOWN = ("hard",)  # the target that the terminal's table has room for; the page has all
_TEXT_COLUMNS = frozenset({"benchmark", "optimizer", "target_metric", "notes"})
_WORDS = {
    "train_loss": "training loss",
    "validation_loss": "validation loss",
    "validation_error": "validation error",
    "excess_loss": "excess loss",
}
_SAME_RUN = ("seeds", "device", "threads", "diagnostics")  # settings that do not change what is trained


def main() -> None:
    """The stage, on the workspace."""
    aggregate(load(), RESULTS, REPORT)


def aggregate(params: Params, results: Path, report: Path) -> Table:
    """Compare the chosen pairs: write everything below ``report`` and print the table.

    Raises:
        ConfigError: records of a chosen pair are missing, cut off, of another configuration, or not comparable with
            those beside them. Nothing is written.
    """
    study = collect(params, results)
    rows = tabulate(study)
    from pipeline import figures  # matplotlib is slow to import and of no use to the checks above

    report.mkdir(parents=True, exist_ok=True)
    partial = report / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pictures = figures.draw(study, partial / "figures")
        (partial / "metrics.json").write_text(json.dumps(metrics(rows), indent=2) + "\n", encoding="utf-8")
        (partial / "report.md").write_text(page(rows, study, [picture.stem for picture in pictures]), encoding="utf-8")
        write_table(rows, partial / TABLE)
        shutil.rmtree(report / "figures", ignore_errors=True)
        for made in sorted(partial.iterdir()):
            os.replace(made, report / made.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    show(report)
    return rows


# ---------------------------------------------------------------- reading


def collect(params: Params, results: Path) -> dict[str, dict[str, list[records.Run]]]:
    """Benchmark -> optimizer -> runs in the order of the seeds, for the pairs that ``params`` names and no others."""
    study: dict[str, dict[str, list[records.Run]]] = {}
    for benchmark in params.benchmarks:
        study[benchmark] = {}
        for optimizer in statistics.ordered(params.optimizers):
            command = f"`dvc repro train@{benchmark}-{optimizer}` makes it"
            expected = resolve(params, benchmark, optimizer).as_dict()
            runs = []
            for seed in params.seeds:
                folder = records.seed_folder(results, benchmark, optimizer, seed)
                if not all((folder / name).is_file() for name in records.FILES):
                    raise ConfigError(f"{folder}: no complete record of a training run; {command}")
                run = records.read_run(folder)
                _check_same(run, expected, command)
                runs.append(run)
            study[benchmark][optimizer] = runs
        comparability.check(benchmark, study[benchmark])
    return study


def _check_same(run: records.Run, expected: Mapping[str, Any], command: str) -> None:
    """Refuse a record of other settings than params.yaml has now: one left behind by an earlier study."""
    for key, value in expected.items():
        if key not in _SAME_RUN and run.config.get(key) != value:
            raise ConfigError(
                f"{run.folder}: trained with {key} {run.config.get(key)!r}, now it is {value!r}; {command} again"
            )


def tabulate(study: Mapping[str, Mapping[str, Sequence[records.Run]]]) -> Table:
    """The rows of ``table.csv``: see ``statistics.pair``, and the cost of a step relative to SGD."""
    rows = []
    for pairs in study.values():
        block = []
        for runs in pairs.values():
            config = runs[0].config
            block.append(statistics.pair([_with_examples(run) for run in runs], config["steps"], config["seconds"]))
        ratios = statistics.relative_step_time(block, REFERENCE)
        for row in block:
            row["step_time_ratio_to_sgd"] = ratios[row["optimizer"]]
        rows += block
    return rows


def _with_examples(run: records.Run) -> dict[str, Any]:
    """The summary, with the number of training examples that each target took."""
    seen = {row["step"]: row["examples"] for row in run.history}
    return {**run.summary, **{f"{target}_examples": seen.get(run.summary[f"{target}_step"]) for target in TARGETS}}


# ---------------------------------------------------------------- writing


def write_table(rows: Table, path: Path) -> None:
    """CSV; floats to full precision, ``inf`` for what was not reached or did not finish, empty for not measured."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> Table:
    """The rows that ``write_table`` wrote."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        return [
            {name: text if name in _TEXT_COLUMNS else float(text) if text else None for name, text in line.items()}
            for line in lines
        ]
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `dvc repro` makes it") from None
    except (ValueError, TypeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a table of the report ({error}); `dvc repro` makes it again") from None


def metrics(rows: Table) -> dict[str, dict[str, float | str]]:
    """Benchmark -> optimizer -> median steps to the hard target.

    Where the median seed did not get there: the steps that were made as text, ``>400``, or how the runs ended. DVC
    leaves out a null, which would look like a pair that was never trained; a text it shows as it is.
    """
    found: dict[str, dict[str, float | str]] = {}
    for row in rows:
        steps = row["steps_to_hard_median"]
        figure = (int(steps) if steps == int(steps) else steps) if math.isfinite(steps) else _missed(row)
        found.setdefault(row["benchmark"], {})[row["optimizer"]] = figure
    return found


# ---------------------------------------------------------------- the table as text


def show(report: Path = REPORT) -> None:
    """Print the comparison, a block a benchmark, from ``table.csv``."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an old terminal still gets its numbers
    console = Console(highlight=False)
    console.width = max(100, console.width) if console.is_terminal else 500  # a file or pipe has no width to keep to
    for block in _blocks(read_table(report / TABLE)):
        console.print()
        console.print(_caption(block), style="bold", markup=False)
        console.print(_rich_table(block))
        for line in _remarks(block):
            console.print(f"  {line}", markup=False)


def _rich_table(block: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for place, header in enumerate(_headers(block, SHOWN)):
        table.add_column(Text(header), justify="right" if place else "left", no_wrap=True)
    for row in block:
        table.add_row(*(Text(cell) for cell in _cells(row, _has_excess(block), SHOWN)))
    return table


def _blocks(rows: Table) -> list[Table]:
    return [[row for row in rows if row["benchmark"] == name] for name in dict.fromkeys(r["benchmark"] for r in rows)]


def _caption(block: Table) -> str:
    row = block[0]
    seconds = "" if row["budget_seconds"] is None else f" or {row['budget_seconds']:g} s"
    return (
        f"{row['benchmark']}: target {_WORDS[row['target_metric']]} ≤ {row['hard_target']:g} (easy "
        f"{row['easy_target']:g}) within {row['budget_steps']:g} steps"
        f"{seconds}, {row['seeds']:g} seed{_s(row['seeds'])}"
    )


def _headers(block: Table, targets: Sequence[str]) -> list[str]:
    score = "excess\nloss" if _has_excess(block) else "test\nscore"
    reaching = [header.format(target=target) for target in targets for header in TARGET_HEADERS]
    return [*HEADERS, score, *reaching, *COST_HEADERS]


def _has_excess(block: Table) -> bool:
    """Planted targets have an excess loss, and it takes the place of the score. A pair that only diverged has none."""
    return any(row["excess_loss_median"] is not None for row in block)


def _cells(row: Mapping[str, Any], excess: bool, targets: Sequence[str]) -> list[str]:
    reaching = [
        (f"{row[f'reached_{target}']:g}/{row['seeds']:g}", _range(row, "steps", target), _range(row, "seconds", target))
        for target in targets
    ]
    return [
        row["optimizer"],
        *(_final(row, quantity) for quantity in ("train_loss", "validation_loss", "test_loss")),
        _final(row, "excess_loss" if excess else "test_score"),
        *(cell for cells in reaching for cell in cells),
        number(row["milliseconds_per_step_median"]),
        number(row["step_time_ratio_to_sgd"], 2),
    ]


def _final(row: Mapping[str, Any], quantity: str) -> str:
    value = row[f"{quantity}_median"]
    return number(value) if value is None or math.isfinite(value) else _ending(row)


def _ending(row: Mapping[str, Any]) -> str:
    return "diverged" if row["diverged"] >= row["failed"] else "failed"


def _missed(row: Mapping[str, Any]) -> str:
    """What stands for the steps of a median that is infinite: as many as the budget allowed were not enough."""
    return f">{row['steps_max']:g}" if row["finished"] else _ending(row)


def _range(row: Mapping[str, Any], quantity: str, target: str) -> str:
    """Median, smallest and largest to the target; infinity stands for a seed that did not get there."""
    middle, low, high = (row[f"{quantity}_to_{target}_{part}"] for part in ("median", "min", "max"))
    whole = quantity == "steps"
    if math.isinf(low):
        return _missed(row) if whole else DASH
    texts = [
        "∞" if math.isinf(value) else f"{value:g}" if whole else number(value, digits)
        for value, digits in ((middle, 3), (low, 2), (high, 2))
    ]
    return f"{texts[0]} [{texts[1]}{DASH}{texts[2]}]"


def _remarks(block: Table) -> list[str]:
    """How every run ended that did not finish."""
    return [f"{row['optimizer']}: {row['notes']}" for row in block if row["notes"]]


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, with an exponent (and two digits) where it is tiny or huge."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, digits - 1 - exponent)}f}" if -3 <= exponent < 6 else f"{value:.1e}"


# ---------------------------------------------------------------- the page


def page(rows: Table, study: Mapping[str, Mapping[str, Sequence[records.Run]]], pictures: Sequence[str]) -> str:
    """``report.md``: what was compared and where, the table, the pictures and how to read them."""
    runs = [run for pairs in study.values() for each in pairs.values() for run in each]
    unfinished = [run for run in runs if not statistics.finished(run.summary)]
    seeds = ", ".join(str(run.summary["seed"]) for run in next(iter(next(iter(study.values())).values())))
    optimizers = ", ".join(dict.fromkeys(row["optimizer"] for row in rows))
    parts = [
        "# Comparison of optimizers",
        f"{len(study)} benchmark{_s(len(study))} ({', '.join(study)}), optimizers {optimizers}, seeds {seeds}: "
        f"{len(runs)} training runs, {len(unfinished) or 'none'} of which diverged or failed. At a seed all optimizers "
        "start from the same weights and see the examples in the same order. The targets were fixed beforehand.",
        "## Where it ran",
        _environment(runs),
        "## Steps and seconds to the hard target",
        _picture("summary", "steps and seconds to the hard target"),
        "A point is a seed, a bar the median over seeds; to the left is better. Behind the dotted line stand seeds "
        "that did not reach the target within the budget (rings) or did not finish (crosses).",
        "## Table",
        "Medians over seeds. `reached` counts the seeds that got to the easy or the hard target within the budget; the "
        "bracket is the smallest and the largest over seeds. A seed that did not get there counts as infinitely late "
        "(∞), and a run that did not finish as one of infinite loss, so that a median says what most seeds do. Losses "
        "and scores are those of the weights that an optimizer hands over at the end of the budget (averaged ones, "
        f"where it averages). `{TIMES} sgd` is the cost of a step over that of SGD. All columns, to full precision: "
        "`table.csv`.",
    ]
    for block in _blocks(rows):
        parts += [f"**{_caption(block)}**", _markdown_table(block), *_remarks(block)]
    parts.append("## Loss against steps and against seconds")
    parts += [_picture(name, name.removeprefix("loss_")) for name in pictures if name.startswith("loss_")]
    parts += [
        "Thin lines are seeds, thick lines medians over seeds. Training time leaves out evaluation, logging and "
        "diagnostics; everything that an optimizer does counts, its curvature statistics and inverses too.",
        "## What a step costs",
        _picture("step_cost", "time per step by phase"),
        "Medians over seeds: the network's forward and backward pass, the gathering of curvature statistics, inverses "
        "and eigenbases, preconditioning and update.",
    ]
    if "curvature" in pictures:
        parts += [
            "## Curvature along the way",
            _picture("curvature", "curvature diagnostics"),
            "Measured on a fixed probe batch with the exact Gauss-Newton matrix. A cosine of 1 means that the update "
            "points along the exact damped natural gradient.",
        ]
    parts += [
        "## What is not claimed",
        f"{_seeds(rows)} show what is large and hide what is small: nothing here is a test of significance, and ranges "
        "are no intervals of confidence. The target is looked for at evaluations only, so steps to target are rounded "
        "up to a multiple of the evaluation interval. Seconds belong to the machine above and to networks of this "
        "size. An optimizer's settings are those of params.yaml; other settings may rank them differently.",
    ]
    return "\n\n".join(parts) + "\n"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _seeds(rows: Table) -> str:
    count = int(rows[0]["seeds"])
    return {1: "One seed", 3: "Three seeds", 5: "Five seeds"}.get(count, f"{count} seeds")


def _picture(name: str, words: str) -> str:
    return f"![{words}](figures/{name}.svg)"


def _markdown_table(block: Table) -> str:
    headers = [header.replace("\n", " ") for header in _headers(block, TARGETS)]
    cells = [_cells(row, _has_excess(block), TARGETS) for row in block]
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _environment(runs: Iterable[records.Run]) -> str:
    """A line a fact; several values where benchmarks do not share one. At a benchmark all runs agree on their keys."""
    facts: dict[str, list[str]] = {}
    for run in runs:
        for name, value in (run.environment | comparability.key(run.config, run.environment)).items():
            known = facts.setdefault(name, [])
            if value is not None and not name.startswith("dvc_") and str(value) not in known:
                known.append(str(value))
    lines = [
        f"| {name.replace('_', ' ')} | {', '.join(values)} |"
        for name, values in facts.items()
        if values and name not in ("start_time", "git_commit", "machine")
    ]
    return "\n".join(["| | |", "|---|---|", *lines])


if __name__ == "__main__":
    if "--show" in sys.argv[1:]:
        run_stage(lambda _: show(), "--show")
    else:
        run_stage(main)
