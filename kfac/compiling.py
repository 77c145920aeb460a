"""Compiled models run eagerly while statistics are due, since no hook sees into a compiled forward.

`torch.compile` has a stance for that, "force_eager". It is one for the whole process, so the owners that need it are
counted: it holds from the first `arm` to the last `disarm`, whatever their order, and an owner that is garbage
collected is disarmed. What was compiled stays compiled and serves again afterwards.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import nn

_owners: dict[int, weakref.finalize] = {}
_eager: Any = None  # sets the eager stance
_before: Any = None  # restores the stance that it replaced


def arm(owner: object) -> None:
    """Let compiled code run eagerly until `owner` is disarmed or gone. Costs a few microseconds."""
    if id(owner) not in _owners:
        _owners[id(owner)] = weakref.finalize(owner, _release, id(owner))
        _owners[id(owner)].atexit = False
    _settle()


def disarm(owner: object) -> None:
    """`owner` needs the eager stance no more; nothing where it is not armed."""
    finalizer = _owners.pop(id(owner), None)
    if finalizer is not None:
        finalizer.detach()
        _settle()


def _release(key: int) -> None:
    _owners.pop(key, None)
    # Collected inside a compiled region, where stances are fixed, it leaves that to the next owner.
    with contextlib.suppress(RuntimeError):
        _settle()


def _settle() -> None:
    """Make the stance what `_owners` ask for; a stance that the user has set meanwhile is what is restored."""
    global _eager, _before
    if not _owners and _eager is None:
        return
    probe = torch.compiler.set_stance("default")  # the public way to learn what is in force
    if _eager is None:
        _eager = torch.compiler.set_stance("force_eager")
    if probe.prev is not _eager.stance:
        _before = probe
    if _owners:
        _eager.__enter__()
    else:
        _before.__exit__(None, None, None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers that only compile it or average its gradients over processes."""
    while True:
        inner = model._modules.get("_orig_mod")
        if isinstance(inner, nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def plain_name(name: str) -> str:
    """The name of a parameter or module without what compiling a part of the model adds to it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")
