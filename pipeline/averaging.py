"""The running average of a network's weights: what is judged where a run averages.

The one idea: the first updates weigh much and later ones little (`averaging_coefficient`), so that the average soon
forgets where training began and is smooth at its end.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def averaging_coefficient(k: int, largest: float) -> float:
    """Share of the old average after ``k`` updates: min(1 - 10 / (k + 10), ``largest``)."""
    return min(1.0 - 10.0 / (k + 10.0), largest)


class Average(nn.Module):
    """A running average of parameters and buffers, so that batch-norm statistics belong to about the weights they
    are used with; counts are copied. Its own count is on the CPU, so that an update waits for no device (torch's
    ``AveragedModel`` does)."""

    n_averaged: Tensor

    def __init__(self, model: nn.Module, largest: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)
        self.largest = largest
        self.register_buffer("n_averaged", torch.tensor(0))

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the present weights of ``model``; the first ones are copied."""
        share = 1.0 - averaging_coefficient(int(self.n_averaged), self.largest)
        averaged, present = (dict(net.named_parameters()) | dict(net.named_buffers()) for net in (self.module, model))
        numbers = [name for name, tensor in averaged.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([averaged[name] for name in numbers], [present[name] for name in numbers], share)
        if counts := [name for name in averaged if name not in set(numbers)]:
            torch._foreach_copy_([averaged[name] for name in counts], [present[name] for name in counts])
        self.n_averaged += 1
