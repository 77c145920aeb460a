"""Parameters without a Kronecker block: torch's AdamW, inside the same trust region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .quadratic import dot

FALLBACK_LR = 1e-3  # AdamW's customary rate


class Fallback:
    """AdamW on some groups of an optimizer, its state kept in that optimizer's `state`."""

    def __init__(self, weight_decay: float):
        empty = nn.Parameter(torch.zeros(()))
        self._adamw = torch.optim.AdamW([empty], lr=FALLBACK_LR, weight_decay=weight_decay)
        self._adamw.param_groups = []
        self._moved: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def settings(self) -> list[str]:
        """The names of a group's settings."""
        return list(self._adamw.defaults)

    def group(self, parameters: Sequence[Any], lr: float = FALLBACK_LR) -> dict[str, Any]:
        """A parameter group with AdamW's settings."""
        return {**self._adamw.defaults, "params": parameters, "lr": lr, "first_order": True}

    def step(self, groups: list[dict[str, Any]], state: dict, finite: Tensor) -> Tensor:
        """One step, undone where `finite` is False; returns its part of the KL clip's quadratic form.

        That part is lr |<step, gradient>| = lr^2 |<direction, gradient>|.
        """
        form = torch.zeros((), device=finite.device)
        moving = [p for group in groups for p in group["params"] if p.grad is not None]
        self._moved = [(p, p.clone()) for p in moving]
        if not moving:
            return form
        kept = {p: {name: entry.clone() for name, entry in state[p].items()} for p in moving}
        self._adamw.param_groups, self._adamw.state = groups, state  # type: ignore[assignment]
        self._adamw.step()
        for parameter, old in self._moved:
            parameter.copy_(torch.where(finite, parameter, old))
            for name, entry in state[parameter].items():
                if entry.device == finite.device:  # the step count lies on the host, and reading `finite` there waits
                    entry.copy_(torch.where(finite, entry, kept[parameter].get(name, torch.zeros_like(entry))))
        rates = {p: group["lr"] for group in groups for p in group["params"]}
        for parameter, old in self._moved:
            assert parameter.grad is not None
            form = form + rates[parameter] * torch.where(finite, dot(parameter - old, parameter.grad).abs(), 0.0)
        return form

    def scale(self, factor: Tensor) -> None:
        """Scale the last step."""
        for parameter, old in self._moved:
            parameter.copy_(torch.lerp(old, parameter, factor.to(parameter.dtype)))
