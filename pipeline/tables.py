"""The comparison as text: ``table.csv``, and the tables for terminal, Markdown and LaTeX that are drawn from its rows.

The one idea: a row (a pair of benchmark and optimizer, see ``statistics.pair``) becomes cells in one place; the formats
only set them.
"""

from __future__ import annotations

import csv
import io
import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import verdicts
from pipeline.config import TARGETS, ConfigError
from pipeline.looks import METRICS

TABLE = "table.csv"
Table = list[dict[str, Any]]

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
HEADERS = ("optimizer", "train\nloss", "valid.\nloss", "test\nloss")
TARGET_HEADERS = ("reached\n{target}", "steps to {target}\nmedian [range]", "seconds to {target}\nmedian [range]")
COST_HEADERS = ("ms per\nstep", f"{TIMES} sgd")
SHOWN = ("hard",)  # the target that the terminal's table has room for; the pages have all
SENTENCES = 9  # of the verdicts, on the terminal
_TEXT_COLUMNS = frozenset({"benchmark", "optimizer", "target_metric", "notes"})


# ---------------------------------------------------------------- CSV


def write(rows: Iterable[Mapping[str, Any]], path: Path, columns: Sequence[str] = ()) -> None:
    """CSV; floats to full precision, ``inf`` for what was not reached or did not finish, empty for not measured.

    The columns are those of the first row, or ``columns`` where there may be none."""
    lines = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns or list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def read(path: Path) -> Table:
    """The rows of ``table.csv`` as ``write`` wrote them."""
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


# ---------------------------------------------------------------- cells


def blocks(rows: Table) -> list[Table]:
    """The rows of each benchmark."""
    return [[row for row in rows if row["benchmark"] == name] for name in dict.fromkeys(r["benchmark"] for r in rows)]


def caption(block: Table) -> str:
    """What the runs of a benchmark had to reach and within which budget."""
    row = block[0]
    seconds = "" if row["budget_seconds"] is None else f" or {row['budget_seconds']:g} s"
    return (
        f"{row['benchmark']}: target {METRICS.get(row['target_metric'], row['target_metric'])} ≤ "
        f"{row['hard_target']:g} (easy {row['easy_target']:g}) within {row['budget_steps']:g} steps"
        f"{seconds}, {row['seeds']:g} seed{plural(row['seeds'])}"
    )


def headers(block: Table, targets: Sequence[str] = TARGETS) -> list[str]:
    score = "excess\nloss" if _has_excess(block) else "test\nscore"
    reaching = [header.format(target=target) for target in targets for header in TARGET_HEADERS]
    return [*HEADERS, score, *reaching, *COST_HEADERS]


def cells(block: Table, targets: Sequence[str] = TARGETS) -> list[list[str]]:
    """A line of texts a row of the block, under ``headers``."""
    excess = _has_excess(block)
    return [
        [
            row["optimizer"],
            *(_final(row, quantity) for quantity in ("train_loss", "validation_loss", "test_loss")),
            _final(row, "excess_loss" if excess else "test_score"),
            *(cell for target in targets for cell in reaching(row, target)),
            number(row["milliseconds_per_step_median"]),
            number(row["step_time_ratio_to_sgd"], 2),
        ]
        for row in block
    ]


def reaching(row: Mapping[str, Any], target: str) -> tuple[str, str, str]:
    """How many seeds reached the target, after how many steps and after how many seconds."""
    reached = f"{row[f'reached_{target}']:g}/{row['seeds']:g}"
    return reached, _range(row, "steps", target), _range(row, "seconds", target)


def remarks(block: Table) -> list[str]:
    """How every run ended that did not finish."""
    return [f"{row['optimizer']}: {row['notes']}" for row in block if row["notes"]]


def missed(row: Mapping[str, Any]) -> str:
    """What stands for the steps of a median that is infinite: as many as the budget allowed were not enough."""
    return f">{row['steps_max']:g}" if row["finished"] else _ending(row)


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, with an exponent (and two digits) where it is tiny or huge."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, digits - 1 - exponent)}f}" if -3 <= exponent < 6 else f"{value:.1e}"


def plural(count: float) -> str:
    return "" if count == 1 else "s"


def _has_excess(block: Table) -> bool:
    """Planted targets have an excess loss, and it takes the place of the score. A pair that only diverged has none."""
    return any(row["excess_loss_median"] is not None for row in block)


def _final(row: Mapping[str, Any], quantity: str) -> str:
    value = row[f"{quantity}_median"]
    return number(value) if value is None or math.isfinite(value) else _ending(row)


def _ending(row: Mapping[str, Any]) -> str:
    return "diverged" if row["diverged"] >= row["failed"] else "failed"


def _range(row: Mapping[str, Any], quantity: str, target: str) -> str:
    """Median, smallest and largest to the target; infinity stands for a seed that did not get there."""
    middle, low, high = (row[f"{quantity}_to_{target}_{part}"] for part in ("median", "min", "max"))
    whole = quantity == "steps"
    if math.isinf(low):
        return missed(row) if whole else DASH
    texts = [
        "∞" if math.isinf(value) else f"{value:g}" if whole else number(value, digits)
        for value, digits in ((middle, 3), (low, 2), (high, 2))
    ]
    return f"{texts[0]} [{texts[1]}{DASH}{texts[2]}]"


# ---------------------------------------------------------------- formats


def show(report: Path) -> None:
    """Print the comparison, a block a benchmark, from ``table.csv``, and the first sentences of the verdicts."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an old terminal still gets its numbers
    console = Console(highlight=False)
    console.width = max(100, console.width) if console.is_terminal else 500  # a file or pipe has no width to keep to
    for block in blocks(read(report / TABLE)):
        console.print()
        console.print(caption(block), style="bold", markup=False)
        console.print(_rich(block))
        for line in remarks(block):
            console.print(f"  {line}", markup=False)
    console.print()
    for sentence in verdicts.read_sentences(report / verdicts.FILE)[:SENTENCES]:
        console.print(textwrap.fill(sentence, 100, subsequent_indent="  "), markup=False)


def _rich(block: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for place, header in enumerate(headers(block, SHOWN)):
        table.add_column(Text(header), justify="right" if place else "left", no_wrap=True)
    for line in cells(block, SHOWN):
        table.add_row(*map(Text, line))
    return table


def markdown(block: Table) -> str:
    names = [header.replace("\n", " ") for header in headers(block)]
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *cells(block)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex(rows: Table) -> str:
    """A tabular for a paper (package booktabs): steps and seconds to the hard target, the best median in bold."""
    lines = [
        "% needs \\usepackage{booktabs}; medians over seeds, in brackets the smallest and the largest",
        "\\begin{tabular}{llrrrr}",
        "\\toprule",
        "benchmark & optimizer & reached & steps to target & seconds to target & ms per step \\\\",
    ]
    for block in blocks(rows):
        lines.append("\\midrule")
        best = {clock: min(row[f"{clock}_to_hard_median"] for row in block) for clock in ("steps", "seconds")}
        for place, row in enumerate(block):
            reached, *times = map(_latex, reaching(row, "hard"))
            for column, clock in enumerate(best):
                if row[f"{clock}_to_hard_median"] == best[clock] < math.inf:
                    times[column] = f"\\textbf{{{times[column]}}}"
            name = _latex(row["benchmark"]) if place == 0 else ""
            step = _latex(number(row["milliseconds_per_step_median"]))
            lines.append(f"{name} & {_latex(row['optimizer'])} & {reached} & {times[0]} & {times[1]} & {step} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex(text: str) -> str:
    for plain, escaped in (("_", "\\_"), ("%", "\\%"), ("&", "\\&"), ("∞", "$\\infty$"), (DASH, "--"), (">", "$>$")):
        text = text.replace(plain, escaped)
    return text
