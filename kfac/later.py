"""What the host knows of numbers on the device: at once on a CPU, elsewhere later, without ever waiting."""

from __future__ import annotations

import torch
from torch import Tensor

ON_HOST = {"cpu"}  # devices whose numbers the host has without waiting

TOGETHER_AFTER = 10  # steps


def at_once(device: torch.device) -> bool:
    """Whether the host has numbers on a device without waiting."""
    return device.type in ON_HOST


def seen_broken(finite: Tensor) -> bool:
    """Whether the host sees without waiting that a step is to be skipped; elsewhere than on a CPU it never looks."""
    return at_once(finite.device) and not finite.numpy()


def seen_one(number: Tensor) -> bool:
    """Whether the host sees without waiting that a number is 1, which nothing has to be multiplied by."""
    return at_once(number.device) and bool(number.numpy() == 1)


def select(condition: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """`torch.where` for a 0-dimensional condition, None for zeros; on a CPU one of the tensors itself, not a copy."""
    if at_once(condition.device):
        return new if condition.numpy() else torch.zeros_like(new) if old is None else old
    return torch.where(condition, new, 0 if old is None else old)  # not 0.0: indices stay indices


class Later:
    """A tensor's values at a step for the host, which learns them once the device has got there.

    Args:
        values: of any shape.
        step: when they were made.
        device: where they were, if they have been brought to the host since.
    """

    def __init__(self, values: Tensor, step: int, device: torch.device | None = None):
        self.step = step
        self._at_once = at_once(device or values.device)
        pinned = values.device.type == "cuda"
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        self._values.copy_(values, non_blocking=pinned)
        self._event = torch.cuda.Event() if pinned else None
        if self._event is not None:
            self._event.record()

    def known(self, step: int, together: bool = False) -> bool:
        """Whether `value` can be read at a step.

        `together` is for several processes that have to learn it at the same step, however fast each of their devices
        is: so many steps later that there is nothing left to wait for.
        """
        if self._at_once:
            return True
        if not together:
            return self._event is None or self._event.query()
        return step - self.step >= TOGETHER_AFTER

    def value(self) -> Tensor:
        """The values, on the CPU; waits for them where they are not known."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
