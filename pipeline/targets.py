"""When a run reached a target: at the first evaluation at or below it that the next evaluation confirms.

The one idea: one function of a run's history says it, so that the summary, the tables and the verdicts cannot differ.
A single evaluation below the target may be luck; two in a row are the rule, and the time is that of the first. An
evaluation after the seconds of the budget can confirm but does not reach; the last evaluation has none to confirm it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any


def crossing(
    history: Sequence[Mapping[str, Any]], metric: str, target: float, seconds: float | None = None
) -> tuple[int, float] | None:
    """Step and training seconds at which the rows of ``history.csv`` reached ``target``; None: missed."""
    for row, following in pairwise(history):
        if seconds is not None and row["training_seconds"] > seconds:
            return None
        if _met(row[metric], target) and _met(following[metric], target):
            return row["step"], row["training_seconds"]
    return None


def target_keys(
    history: Sequence[Mapping[str, Any]], metric: str, targets: Mapping[str, float], seconds: float | None
) -> dict[str, Any]:
    """What the summary says of each target: ``hard_target``, ``hard_reached``, ``hard_step``, ``hard_seconds``, …"""
    keys: dict[str, Any] = {}
    for name, target in targets.items():
        found = crossing(history, metric, target, seconds)
        step, spent = found or (None, None)
        keys |= {f"{name}_target": target, f"{name}_reached": found is not None}
        keys |= {f"{name}_step": step, f"{name}_seconds": spent}
    return keys


def _met(value: float | None, target: float) -> bool:
    return value is not None and value <= target
