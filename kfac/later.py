"""What the host knows of numbers on the device: at once on a CPU, elsewhere later, without ever waiting."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = {"cpu"}  # devices whose numbers the host has without waiting


def at_once(device: torch.device) -> bool:
    """Whether the host has numbers on a device without waiting."""
    return device.type in AT_ONCE


def seen_broken(finite: Tensor) -> bool:
    """Whether the host sees without waiting that a step is to be skipped; elsewhere than on a CPU it never looks."""
    return at_once(finite.device) and not finite.numpy()


def select(condition: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """`torch.where` for a 0-dimensional condition, None for zeros; on a CPU one of the tensors itself, not a copy."""
    if at_once(condition.device):
        return new if condition.numpy() else torch.zeros_like(new) if old is None else old
    return torch.where(condition, new, 0 if old is None else old)  # not 0.0: indices stay indices


class Later:
    """A tensor's values for the host, which learns them once the device has got there."""

    def __init__(self, values: Tensor):
        pinned = values.device.type == "cuda"
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        self._values.copy_(values, non_blocking=pinned)
        self._event = torch.cuda.Event() if pinned else None
        if self._event is not None:
            self._event.record()

    def known(self) -> bool:
        """Whether `value` can be read now."""
        return self._event is None or self._event.query()

    def value(self) -> Tensor:
        """The values, on the CPU."""
        return self._values
