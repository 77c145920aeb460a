"""Parameter groups: which parameters move by curvature and which by AdamW, each group with its own settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .fallback import Fallback
from .layers import Block
from .options import check_options

KRONECKER_KEYS = ("params", "lr", "momentum", "weight_decay", "damping", "first_order")


def first_order_ids(groups: Sequence[dict[str, Any]]) -> frozenset[int]:
    """The ids of all parameters in groups that are marked as first-order."""
    return frozenset(id(p) for group in groups if group.get("first_order") for p in parameters_of(group))


def parameters_of(group: dict[str, Any]) -> list[nn.Parameter]:
    """The parameters of a group: a tensor, tensors, or pairs of a name and a tensor, as in torch.

    Makes a list of what may be an iterator, in place.
    """
    given = group["params"]
    group["params"] = [given] if isinstance(given, Tensor) else list(given)
    return [p[1] if isinstance(p, tuple) else p for p in group["params"]]


def split(
    groups: Sequence[dict[str, Any]], blocks: Iterable[Block], model: nn.Module, fallback: Fallback
) -> list[dict[str, Any]]:
    """All groups of an optimizer: the default Kronecker group, the given ones, and the first-order ones at the end.

    A given group keeps its parameters that belong to a block; the others go to a first-order group with its weight
    decay, at AdamW's own rate or, where its `lr` is 0, at none. The last group has the parameters that were in no group
    and have no block.

    Raises:
        ValueError: for a key that a group cannot have, or a parameter that is not the model's or is given twice.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    owned = {id(p) for block in blocks for p in block.parameters}
    taken: set[int] = set()
    kronecker, first_order = [], []
    for number, group in enumerate(groups):
        parameters = parameters_of(group)
        settings = {key: value for key, value in group.items() if key != "params"}
        _check(settings, f"groups[{number}]", fallback)
        for p in parameters:
            if id(p) not in names:
                raise ValueError(f"groups[{number}]: {_shown(p, names)} is not a parameter of the model")
            if id(p) in taken:
                raise ValueError(f"groups[{number}]: parameter {names[id(p)]!r} is already in another group")
            taken.add(id(p))
        trainable = [p for p in parameters if p.requires_grad]
        if settings.get("first_order"):
            first_order.append({**fallback.group(_named(trainable, names)), **settings})
            continue
        with_block = [p for p in trainable if id(p) in owned]
        without = [p for p in trainable if id(p) not in owned]
        if with_block:
            kronecker.append({**settings, "params": _named(with_block, names)})
        if without:
            adamw = fallback.group(_named(without, names))
            decay = {"weight_decay": settings["weight_decay"]} if "weight_decay" in settings else {}
            rate = {"lr": 0.0} if settings.get("lr") == 0 else {}
            first_order.append({**adamw, **rate, **decay})
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    own = [p for p in rest if id(p) in owned]
    other = [p for p in rest if id(p) not in owned]
    default: list[dict[str, Any]] = [{"params": _named(own, names)}] if own else []
    last = [fallback.group(_named(other, names))] if other else []
    return [group for group in default + kronecker + first_order + last if group["params"]]


def added(group: dict[str, Any], names: dict[int, str], owned: set[int], fallback: Fallback) -> dict[str, Any]:
    """A group for `add_param_group`: first-order unless all of it belongs to blocks, and with names.

    Raises:
        ValueError: for a key that a group cannot have, or `first_order=False` with a parameter that has no block.
    """
    parameters = parameters_of(group)
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    without = [p for p in parameters if id(p) not in owned]
    if settings.get("first_order", bool(without)):
        settings = {**fallback.group([]), **settings}
    _check(settings, "param_group", fallback)
    if without and not settings.get("first_order"):
        raise ValueError(
            f"param_group: first_order=False with {_shown(without[0], names)}, which has no block; allowed: True"
        )
    for p in parameters:
        names.setdefault(id(p), f"added.{len(names)}")
    return {**settings, "params": _named(parameters, names)}


def _check(settings: dict[str, Any], where: str, fallback: Fallback) -> None:
    allowed = [*KRONECKER_KEYS, *(fallback.settings if settings.get("first_order") else ())]
    for key, value in settings.items():
        if key not in allowed:
            raise ValueError(f"{where}: {key!r}; allowed: {', '.join(sorted(set(allowed)))}")
        if key == "first_order" and not isinstance(value, bool):
            raise ValueError(f"{where}: first_order={value!r}; allowed: True or False")
        if key == "lr" and value is None:
            raise ValueError(f"{where}: lr=None; allowed: a number >= 0 (self-tuning: a multiplier of the step, 1.0)")
        if key in ("lr", "momentum", "weight_decay", "damping") and not isinstance(value, Tensor):
            try:
                check_options({key: value})
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None


def _named(parameters: Iterable[nn.Parameter], names: dict[int, str]) -> list[tuple[str, nn.Parameter]]:
    return [(names[id(p)], p) for p in parameters]


def _shown(p: Any, names: dict[int, str]) -> str:
    """A parameter as messages have it."""
    if id(p) in names:
        return f"parameter {names[id(p)]!r}"
    return f"a tensor {list(p.shape)}" if isinstance(p, Tensor) else repr(p)
