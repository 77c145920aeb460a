"""What the figures for papers are made of: style, marks, axes. The same records give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from pipeline import looks

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "pipeline",
    "svg.fonttype": "path",
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.solid_capstyle": "round",
}
TARGET_LINE: dict[str, Any] = {"color": "#555555", "linestyle": (0, (5, 3)), "linewidth": 1.0}


@contextmanager
def style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def dot(shade: str) -> dict[str, Any]:
    return {"color": shade, "marker": "o", "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.7,
            "linestyle": ""}  # fmt: skip


def ring(shade: str) -> dict[str, Any]:
    return {"color": shade, "marker": "o", "markersize": 5, "markerfacecolor": "white", "markeredgewidth": 1.3,
            "linestyle": ""}  # fmt: skip


def cross(shade: str) -> dict[str, Any]:
    return {"color": shade, "marker": "x", "markersize": 5.5, "markeredgewidth": 1.6, "linestyle": ""}


def log(axis: Axes, which: str, up_to: float = math.inf) -> None:
    """A log scale whose labels are plain numbers, also where it spans less than a decade; for limits that are final."""
    (axis.set_yscale if which == "y" else axis.set_xscale)("log")
    side = axis.yaxis if which == "y" else axis.xaxis
    low, high = side.get_view_interval()
    side.set_major_locator(FixedLocator(looks.ticks(low, min(high, up_to))))
    side.set_minor_locator(LogLocator(subs=range(1, 10), numticks=50) if math.isinf(up_to) else NullLocator())
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())


def columns(points: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [x for x, _ in points], [y for _, y in points]


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def positive(value: Any) -> bool:
    return finite(value) and value > 0
