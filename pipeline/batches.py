"""Which examples a step sees: the order of a seed, and how many are taken from it.

The one idea: the order is a function of the seed and the epoch alone, and a batch is the next so many examples of it,
whatever its size. So every optimizer sees the same examples in the same order, and a run that goes on from a
checkpoint needs to know nothing but how many it has seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.checks import ConfigError
from pipeline.config import RunConfig
from pipeline.seeds import number

_RISES = 6  # of a growing batch


def permutation(examples: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(examples, generator=generator)


class Order:
    """The endless order of examples at a seed: one permutation an epoch, each made from seed and epoch alone.

    It is drawn on the CPU, the same for every device, and moved once an epoch; a batch is then a slice on the device.
    What else each example of an epoch needs of chance is made likewise, by another ``make`` for another purpose.
    """

    def __init__(
        self,
        examples: int,
        seed: int,
        device: torch.device | str = "cpu",
        purpose: str = "order",
        make: Callable[[int, torch.Generator], Tensor] = permutation,
    ) -> None:
        self.examples = examples
        self._seed, self._device, self._purpose, self._make = seed, torch.device(device), purpose, make
        self._epoch = -1
        self._made = torch.empty(0)

    def next(self, position: int, count: int) -> Tensor:
        """Rows [count] for the examples number ``position`` and following; a batch may span two epochs."""
        parts: list[Tensor] = []
        while count > 0:
            epoch, start = divmod(position, self.examples)
            if epoch != self._epoch:
                self._begin(epoch)
            parts.append(self._made[start : start + count])
            position += len(parts[-1])
            count -= len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _begin(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(number(self._seed, f"{self._purpose} {epoch}"))
        made = self._make(self.examples, generator)
        if self._device.type == "cuda":
            made = made.pin_memory()  # or the copy would wait for all that the device still has to do
        self._made, self._epoch = made.to(self._device, non_blocking=True), epoch


def batch_size(run: RunConfig, seen: int, examples: int) -> int:
    """Size of the next batch after ``seen`` examples of a split of ``examples``: constant, or growing exponentially
    over the first ``over_epochs`` epochs, by a few rises: a shape that is new costs compiled kernels some time."""
    size = run.batch_size
    if isinstance(size, int):
        return size
    share = min(1.0, seen / (examples * size["over_epochs"]))
    share = round(share * _RISES) / _RISES
    return round(size["from"] * (size["to"] / size["from"]) ** share)


def check_batch_size(run: RunConfig, examples: int) -> None:
    size = run.batch_size
    largest = size if isinstance(size, int) else max(size["from"], size["to"])
    if largest > examples:
        raise ConfigError(
            f"batch_size: {largest} of {run.optimizer} on {run.benchmark} is not allowed; "
            f"expected at most {examples}, the examples of the training split"
        )
