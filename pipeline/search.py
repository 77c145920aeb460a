"""Where a tuning looks: the search spaces of pipeline/conf/search, and the points of one.

The one idea: every optimizer gets the same number of points. The first is the setting that it ships with; the others
are a scrambled Sobol sequence over its ranges, or a grid. With 8 trials a space has a learning rate and a damping or
an epsilon; what is marked `from: 16` joins from 16 trials.

A file `pipeline/conf/search/<optimizer>.yaml` has a line a field of the optimizer's yaml (`training.schedule` for one
in a mapping there), of one of three types. An end may be a mapping by benchmark, as any value of an optimizer.

    lr: {log: [0.001, 1.0]}
    momentum: {linear: [0.8, 0.99], from: 16}
    training.schedule: {choice: [constant, cosine], from: 16}

An optimizer without a file is searched in its learning rate, from a thirtieth to thirty times that of the first point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from pipeline.checks import COUNT, ConfigError, Number, check, check_mapping, unknown
from pipeline.seeds import number
from pipeline.validation import by_benchmark

TYPES = ("log", "linear", "choice")
WITHOUT_A_SPACE = 30.0  # times the shipped learning rate, and as much below it
EDGE = 0.1  # of a range, on its own scale: what lies there is at its edge
DIGITS = 3  # significant, of a value in a range
Values = dict[str, Any]


@dataclass(frozen=True)
class Dimension:
    """A field of an optimizer and the values that are open to it: a range `(low, high)`, or the `choices`."""

    field: str
    kind: str
    ends: tuple[float, float] = (0.0, 0.0)
    choices: tuple[Any, ...] = ()

    def at(self, share: float) -> Any:
        """The value at a share, 0 to 1, of the range."""
        if self.kind == "choice":
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        low, high = map(self._scale, self.ends)
        value = low + share * (high - low)
        return float(f"{math.exp(value) if self.kind == 'log' else value:.{DIGITS}g}")

    def edge(self, value: Any) -> str | None:
        """`<field>: low` or `<field>: high` for a value at an edge of the range, or beyond it."""
        if self.kind == "choice" or value is None:
            return None
        low, high = map(self._scale, self.ends)
        share = (self._scale(value) - low) / (high - low)
        return None if EDGE < share < 1 - EDGE else f"{self.field}: {'low' if share <= EDGE else 'high'}"

    def widened(self, side: str) -> tuple[float, float]:
        """The ends of the range with half as much again on one side, on the range's own scale."""
        low, high = map(self._scale, self.ends)
        low, high = (low - (high - low) / 2, high) if side == "low" else (low, high + (high - low) / 2)
        values = [float(f"{math.exp(end) if self.kind == 'log' else end:.{DIGITS}g}") for end in (low, high)]
        return (values[0], self.ends[1]) if side == "low" else (self.ends[0], values[1])

    def _scale(self, value: float) -> float:
        if self.kind != "log":
            return value
        return math.log(value) if value > 0 else -math.inf


def declared(file: Path) -> dict[str, Any] | None:
    """The search space in a file; None where there is none."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not file.exists():
        return None
    try:
        return check_mapping(str(file), YAML(typ="safe", pure=True).load(file))
    except YAMLError as error:
        raise ConfigError(f"{file}: is not YAML: {' '.join(str(error).split())}") from None


def space(optimizer: str, benchmark: str, trials: int, shipped: Values, lines: Mapping[str, Any] | None) -> list:
    """The dimensions that so many trials are spread over; `shipped` has every field that the optimizer knows.

    Raises ConfigError for a line that says nothing, and for a field that the optimizer does not have.
    """
    name = f"search.{optimizer}"
    if lines is None:
        rate = shipped.get("lr")
        if not isinstance(rate, int | float) or not rate > 0:
            raise ConfigError(f"{name}: has no learning rate to search; write pipeline/conf/search/{optimizer}.yaml")
        lines = {"lr": {"log": [rate / WITHOUT_A_SPACE, rate * WITHOUT_A_SPACE]}}
    found = []
    for field, line in lines.items():
        if field not in shipped:
            raise unknown(f"{name}.{field}", field, shipped, "field")
        line = check_mapping(f"{name}.{field}", line)
        start = line.pop("from", 1)
        check(f"{name}.{field}.from", start, COUNT)
        if len(line) != 1 or next(iter(line)) not in TYPES:
            raise ConfigError(f"{name}.{field}: has {', '.join(line) or 'no type'}; expected one of {', '.join(TYPES)}")
        if start <= trials:
            [(kind, values)] = line.items()
            found.append(_dimension(f"{name}.{field}.{kind}", field, kind, by_benchmark(values, benchmark)))
    if not found:
        raise ConfigError(f"{name}: nothing is open with {trials} trials; expected a field without `from`")
    return found


def _dimension(name: str, field: str, kind: str, values: Any) -> Dimension:
    if not isinstance(values, list) or (kind != "choice" and len(values) != 2) or not values:
        allowed = "a list of values" if kind == "choice" else "a list of two numbers"
        raise ConfigError(f"{name}: {values!r} is not allowed; expected {allowed}")
    if kind == "choice":
        return Dimension(field, kind, choices=tuple(values))
    for end in values:
        check(name, end, Number(0, open_low=True) if kind == "log" else Number())
    if not values[0] < values[1]:
        raise ConfigError(f"{name}: {values} is not allowed; expected the lower end first")
    return Dimension(field, kind, ends=(float(values[0]), float(values[1])))


def points(
    dimensions: Sequence[Dimension], shipped: Values, trials: int, purpose: str, *, grid: bool = False
) -> list[Values]:
    """So many settings of the dimensions' fields, the shipped one first; `purpose` seeds all that is random.

    The others leave it out, so that it is trained once. Raises ConfigError where the space has fewer.
    """
    first = {dimension.field: shipped[dimension.field] for dimension in dimensions}
    others = (_grid if grid else _sobol)(dimensions, trials - 1, purpose, first)
    if len(others) < trials - 1:
        raise ConfigError(f"trials: {trials} are more than the {len(others) + 1} points of the space")
    return [first, *others]


def _others(dimensions: Sequence[Dimension], shares: Iterable[Sequence[float]], first: Values) -> list[Values]:
    """The settings at these shares of the ranges, but for the first."""
    settings = [{d.field: d.at(share) for d, share in zip(dimensions, row, strict=True)} for row in shares]
    return [setting for setting in settings if setting != first]


def _sobol(dimensions: Sequence[Dimension], count: int, purpose: str, first: Values) -> list[Values]:
    """So many points of a scrambled Sobol sequence, one at least in each of as many equal slices."""
    from scipy.stats import qmc

    sequence = qmc.Sobol(len(dimensions), scramble=True, seed=number(0, purpose))
    return _others(dimensions, sequence.random_base2(count.bit_length()).tolist(), first)[:count]


def _grid(dimensions: Sequence[Dimension], count: int, purpose: str, first: Values) -> list[Values]:
    """Points of the smallest grid that has so many: levels as even as they go, the first fields have more.

    Ends are levels. What the grid has too many is left out at random.
    """
    levels = [1] * len(dimensions)
    most = [len(d.choices) if d.kind == "choice" else count + 1 for d in dimensions]
    while len(nodes := _others(dimensions, _nodes(levels), first)) < count:
        open_to_more = [i for i, level in enumerate(levels) if level < most[i]]
        if not open_to_more:
            return nodes
        levels[min(open_to_more, key=lambda i: (levels[i], i))] += 1
    kept = sorted(Random(number(0, purpose)).sample(range(len(nodes)), count))
    return [nodes[i] for i in kept]


def _nodes(levels: Sequence[int]) -> Iterable[Sequence[float]]:
    """A grid's nodes, as shares of each range; a single level is its middle."""
    return itertools.product(*([0.5] if n == 1 else [i / (n - 1) for i in range(n)] for n in levels))
