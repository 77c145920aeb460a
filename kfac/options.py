"""The constructor arguments that all optimizers share, the range of each, and one clear line for a value outside it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch


class Options(TypedDict, total=False):
    """The keyword arguments that all Kronecker optimizers share; see `KroneckerOptimizer`."""

    lr: float | None
    momentum: float
    damping: float | Callable[[int], float] | None
    relative_damping: float | Callable[[int], float]
    weight_decay: float
    decoupled_weight_decay: bool
    kl_clip: float | None
    max_decrease: float
    warmup: int
    max_growth: float
    fisher: str
    fisher_samples: int
    stat_decay: float | None
    factor_interval: int | Callable[[int], int] | None
    inverse_interval: int | Callable[[int], int] | None
    preconditioning_dtype: torch.dtype | str | None
    generator: torch.Generator | None
    groups: Sequence[dict[str, Any]] | None
    sharing: str | Mapping[str, str]
    max_factor_size: int
    adapt_damping: bool


FISHERS = ("auto", "exact", "sampled", "empirical")
SHARINGS = ("expand", "reduce")
COARSE_SPACES = ("krylov", "constant", "residual", "spectral", "history")
COMBINATIONS = ("deflated", "additive", "balanced")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _floating(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point


_Range = tuple[Callable[[Any], bool], str]

_INTERVAL: _Range = (
    lambda v: v is None or callable(v) or (_whole(v) and v >= 1),
    "None, a whole number >= 1 or a callable",
)
_RANGES: dict[str, _Range] = {
    "model": (lambda v: isinstance(v, torch.nn.Module), "a torch.nn.Module (the network itself, not its parameters)"),
    "lr": (lambda v: v is None or (_number(v) and v >= 0), "None (self-tuning) or a number >= 0"),
    "momentum": (lambda v: _number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "damping": (lambda v: v is None or callable(v) or (_number(v) and v > 0), "None, a number > 0 or a callable"),
    "relative_damping": (lambda v: callable(v) or (_number(v) and v > 0), "a number > 0 or a callable"),
    "weight_decay": (lambda v: _number(v) and v >= 0, "a number >= 0"),
    "decoupled_weight_decay": (lambda v: isinstance(v, bool), "True or False"),
    "kl_clip": (lambda v: v is None or (_number(v) and v > 0), "None or a number > 0"),
    "max_decrease": (lambda v: _number(v) and 0 < v <= 1, "a number in (0, 1]"),
    "warmup": (lambda v: _whole(v) and v >= 0, "a whole number >= 0"),
    "max_growth": (lambda v: _number(v) and v > 1, "a number > 1"),
    "fisher": (lambda v: v in FISHERS, "one of " + ", ".join(FISHERS)),
    "fisher_samples": (lambda v: _whole(v) and v >= 1, "a whole number >= 1"),
    "stat_decay": (lambda v: v is None or (_number(v) and 0 <= v < 1), "None or a number in [0, 1)"),
    "factor_interval": _INTERVAL,
    "inverse_interval": _INTERVAL,
    "scale_interval": _INTERVAL,
    "preconditioning_dtype": (
        lambda v: v is None or _floating(getattr(torch, v, None) if isinstance(v, str) else v),
        "None, a floating torch.dtype or the name of one",
    ),
    "generator": (lambda v: v is None or isinstance(v, torch.Generator), "None or a torch.Generator"),
    "groups": (
        lambda v: v is None or (isinstance(v, Sequence) and all(isinstance(g, dict) and "params" in g for g in v)),
        'None or a list of dicts, each with "params"',
    ),
    "sharing": (
        lambda v: (
            all(x in SHARINGS for x in v.values())
            if isinstance(v, Mapping)
            else isinstance(v, str) and v in SHARINGS
        ),
        "expand, reduce, or a dict from layer names (globs) to these",
    ),
    "max_factor_size": (lambda v: _whole(v) and v >= 1, "a whole number >= 1"),
    "adapt_damping": (lambda v: isinstance(v, bool), "True or False"),
    "method": (lambda v: v in ("kfac", "ekfac", "gkfac"), "one of kfac, ekfac, gkfac"),
    "solver": (lambda v: v in ("cholesky", "eigh"), "one of cholesky, eigh"),
    "coarse_space": (lambda v: v in COARSE_SPACES, "one of " + ", ".join(COARSE_SPACES)),
    "combination": (lambda v: v in COMBINATIONS, "one of " + ", ".join(COMBINATIONS)),
    "coarse_fisher": (lambda v: v in ("exact", "kronecker"), "one of exact, kronecker"),
}  # fmt: skip


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for the first argument that is out of range, naming it, its value and what is allowed."""
    for name, value in options.items():
        allowed, text = _RANGES[name]
        if not allowed(value):
            shown = " ".join(repr(value).split())  # one line, whatever the value
            raise ValueError(f"{name}={shown if len(shown) < 80 else shown[:76] + ' ...'}; allowed: {text}")


def check_names(owner: object, options: Mapping[str, Any]) -> None:
    """Raise TypeError for the first argument that the shared constructor does not have."""
    for name in options:
        if name not in Options.__annotations__:
            shown = ", ".join(inspect.signature(type(owner)).parameters)
            raise TypeError(f"{type(owner).__name__}: no argument {name!r}; allowed: {shown}")


def value_at(value: Any, step: int) -> Any:
    """A number, or a callable of the step, at a step."""
    return value(step) if callable(value) else value


def gradual(interval: int, step: int) -> int:
    """An interval at a step that grows by one with every eighth step until it is `interval`."""
    return min(interval, 1 + step // 8)


def dtype_of(value: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype given by itself or by its name in torch."""
    return getattr(torch, value) if isinstance(value, str) else value
