"""What the host knows of a step that was skipped because a number in it was not finite, and when, without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def seen_broken(finite: Tensor) -> bool:
    """Whether the host sees without waiting that a step is to be skipped; elsewhere than on a CPU it never looks."""
    return finite.device.type == "cpu" and not finite.numpy()


class Skipped:
    """Whether a step was skipped, for a host that learns it once the device has got there, and never waits."""

    def __init__(self, finite: Tensor):
        pinned = finite.device.type == "cuda"
        self._finite = torch.empty((), dtype=torch.bool, pin_memory=pinned)
        self._finite.copy_(finite, non_blocking=pinned)
        self._event = torch.cuda.Event() if pinned else None
        if self._event is not None:
            self._event.record()

    def known(self) -> bool:
        return self._event is None or self._event.query()

    def value(self) -> bool:
        return not self._finite.numpy()
