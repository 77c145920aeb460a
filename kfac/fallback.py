"""Parameters without a Kronecker block: torch's AdamW, inside the same trust region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .quadratic import dot

FALLBACK_LR = 1e-3  # AdamW's customary rate
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW's state


class Fallback:
    """AdamW on some groups of an optimizer, its state kept in that optimizer's `state`."""

    def __init__(self, weight_decay: float):
        empty = nn.Parameter(torch.zeros(()))
        self._adamw = torch.optim.AdamW([empty], lr=FALLBACK_LR, weight_decay=weight_decay)
        self._adamw.param_groups = []
        self._moved: list[tuple[nn.Parameter, Tensor, dict[str, Tensor]]] = []  # with what they and their state were

    @property
    def settings(self) -> list[str]:
        """The names of a group's settings."""
        return list(self._adamw.defaults)

    def group(self, parameters: Sequence[Any], lr: float = FALLBACK_LR) -> dict[str, Any]:
        """A parameter group with AdamW's settings."""
        return {**self._adamw.defaults, "params": parameters, "lr": lr, "first_order": True}

    def step(self, groups: list[dict[str, Any]], state: dict, finite: Tensor) -> Tensor:
        """One step, to be settled; returns its part of the KL clip's quadratic form, 0 unless `finite`.

        That part is lr |<step, gradient>| = lr^2 |<direction, gradient>|.
        """
        form = torch.zeros((), device=finite.device)
        moving = [p for group in groups for p in group["params"] if p.grad is not None]
        self._moved = [(p, p.clone(), {name: entry.clone() for name, entry in state[p].items()}) for p in moving]
        if not moving:
            return form
        self._adamw.param_groups, self._adamw.state = groups, state  # type: ignore[assignment]
        self._adamw.step()
        rates = {p: group["lr"] for group in groups for p in group["params"]}
        for parameter, old, _ in self._moved:
            assert parameter.grad is not None
            form = form + rates[parameter] * torch.where(finite, dot(parameter - old, parameter.grad).abs(), 0.0)
        return form

    def forget(self, parameter: nn.Parameter, state: dict) -> None:
        """Free the moments of a parameter that has a block's step now."""
        for name in MOMENTS:
            state.get(parameter, {}).pop(name, None)

    def settle(self, state: dict, finite: Tensor, factor: Tensor | None) -> None:
        """Scale the last step by `factor`, or undo it where `finite` is False."""
        for parameter, old, kept in self._moved:
            new = parameter if factor is None else torch.lerp(old, parameter, factor.to(parameter.dtype))
            parameter.copy_(torch.where(finite, new, old))
            for name, entry in state[parameter].items():
                if entry.device == finite.device:  # the step count lies on the host, and reading `finite` there waits
                    entry.copy_(torch.where(finite, entry, kept.get(name, torch.zeros_like(entry))))
        self._moved = []
