"""Levenberg-Marquardt damping by the reduction ratio, and steps taken back (arXiv 1503.05671, section 6.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .curvature import Curvature
from .layers import Block

INTERVAL = 5  # steps between checks
OMEGA = (19 / 20) ** INTERVAL
SMALLEST_TRUST = 0.02  # of the damping that was asked for: less of it gains nothing on the deep autoencoder


class LevenbergMarquardt:
    """Every `INTERVAL` steps: rho = (h(new) - h) / (model(new) - h) on the same batch, masks and buffers.

    rho > 3/4 lowers the damping by `OMEGA`, rho < 1/4 raises it by 1 / `OMEGA`; a step after which the loss is higher
    or not a number is taken back. The model has no damping term, so rho is 1 on a quadratic. `stats` gets
    "reduction_ratio" and "rejected". Nothing waits for the device.
    """

    def __init__(self, model: nn.Module, curvature: Curvature):
        self._model, self._curvature = model, curvature
        self._random: list[Tensor] = []
        self._parameters: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._states: dict[nn.Parameter, dict[str, Tensor]] = {}

    def due(self) -> bool:
        return self._curvature.step % INTERVAL == 0

    def start(self, closure: Callable[[], Any] | None) -> None:
        """Before the closure: remember the random state, so that its second call draws the same masks."""
        if closure is None:
            raise ValueError(
                "closure: None with adapt_damping=True; allowed: step(closure) with one that returns the loss"
            )
        if self.due():
            self._random = _random_state()

    def before(self, value: Any, groups: list[dict[str, Any]], state: dict) -> None:
        """Before the step: keep what a step that is taken back restores. `value` is what the closure returned.

        Raises:
            ValueError: where that is None.
        """
        if value is None:
            raise ValueError("closure: it returned None with adapt_damping=True; allowed: one that returns the loss")
        parameters = [p for group in groups for p in group["params"]]
        self._parameters = [(p, p.clone(), p.grad.clone()) for p in parameters if p.grad is not None]
        # A layer's momentum is with its weight, which may be frozen while the bias moves.
        self._states = {p: {name: entry.clone() for name, entry in state.get(p, {}).items()} for p in parameters}

    def judge(
        self,
        closure: Callable[[], Any] | None,
        before: Any,
        steps: dict[Block, Tensor],
        state: dict,
    ) -> None:
        """After the step: evaluate again, adapt the damping, take a step back that raised the loss."""
        assert closure is not None
        slope = sum(((p - old) * g).sum() for p, old, g in self._parameters)
        bend: Tensor | float = 0.0
        if steps and self._curvature.collector.model_rows:
            bend = self._curvature.quadratic_form({block: step[None] for block, step in steps.items()})[0, 0]
        predicted = slope + 0.5 * bend
        after = self._evaluate(closure)
        change = after - torch.as_tensor(before, device=after.device).detach()
        change = self._curvature.mean_over_ranks(change)  # all ranks keep a step or take it back
        ratio = change / predicted
        trust = self._curvature.trust
        trust = torch.ones_like(ratio) if trust is None else trust
        factor = torch.where(ratio > 0.75, OMEGA, torch.where(ratio >= 0.25, 1.0, 1 / OMEGA))
        # At a minimum nothing is promised: no sign of a bad model.
        factor = torch.where((predicted == 0) & (change == 0), 1.0, factor)
        self._curvature.trust = (trust * factor).clamp_min(SMALLEST_TRUST)
        good = change <= 0
        for parameter, old, _ in self._parameters:
            parameter.copy_(torch.where(good, parameter, old))
        for parameter, kept in self._states.items():
            for name, entry in state.get(parameter, {}).items():
                if entry.device == good.device:  # AdamW's count lies on the host, and reading `good` there waits
                    entry.copy_(torch.where(good, entry, kept.get(name, torch.zeros_like(entry))))
        self._curvature.stats |= {"reduction_ratio": ratio, "rejected": 1.0 - good.to(ratio.dtype)}
        self._parameters, self._states = [], {}

    def _evaluate(self, closure: Callable[[], Any]) -> Tensor:
        """The closure's value at the new point; gradients, module buffers and random states stay as they were."""
        buffers = [(b, b.clone()) for b in self._model.buffers()]
        now = _random_state()
        _set_random_state(self._random)
        try:
            with torch.enable_grad(), self._curvature.paused():
                value = torch.as_tensor(closure(), device=next(self._model.parameters()).device).detach()
        finally:
            _set_random_state(now)
        for buffer, kept in buffers:
            buffer.copy_(kept)
        for parameter, _, gradient in self._parameters:
            parameter.grad = gradient
        return value


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + (torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
