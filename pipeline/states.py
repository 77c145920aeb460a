"""The state of an optimizer as plain values and tensors, which a checkpoint can be read back from without running code.

The one idea: most optimizers keep nothing else, but some keep objects of their own (the Shampoo of pytorch-optimizer
its preconditioners). Such an object is written as the name of its class and its attributes, and made again from them
if the class belongs to a package of the optimizer.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from enum import Enum
from typing import Any

import torch
from torch import Tensor

_CLASS, _ATTRIBUTES = "class of an object", "its attributes"


def plain(value: Any) -> Any:
    """Mappings and lists as they are, objects as mappings; tensors are not copied."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if hasattr(value, "__dict__") and not isinstance(value, Tensor | torch.dtype | torch.device | type):
        kind = type(value)
        return {_CLASS: [kind.__module__, kind.__qualname__], _ATTRIBUTES: plain(vars(value))}
    return value


def whole(value: Any, packages: Collection[str], device: torch.device) -> Any:
    """What ``plain`` was given; tensors of objects come to ``device``, for no optimizer moves them itself.

    Raises ValueError for an object whose class is of none of these ``packages``.
    """
    if isinstance(value, dict):
        if value.keys() != {_CLASS, _ATTRIBUTES}:
            return {key: whole(item, packages, device) for key, item in value.items()}
        module, name = value[_CLASS]
        made: Any = object.__new__(_class(module, name, packages))
        vars(made).update(_moved(whole(value[_ATTRIBUTES], packages, device), device))
        return made
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(whole(item, packages, device) for item in value)
    return value


def _class(module: str, name: str, packages: Collection[str]) -> type:
    if module.partition(".")[0] not in packages:
        raise ValueError(f"{module}.{name}: an object of another package than the optimizer's, {', '.join(packages)}")
    found = getattr(importlib.import_module(module), name, None)
    if not isinstance(found, type):
        raise ValueError(f"{module}.{name}: is no class")
    return found


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_moved(item, device) for item in value)
    return value
