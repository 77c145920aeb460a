"""How far to go: the step rules, from natural gradients to the steps of all layers.

`SelfTuningRule` minimises a quadratic model over the natural gradient and the last step, bounds what it promises, and
needs no learning rate. `FixedRule` is the papers' rule: learning rate, momentum, KL clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import clip, quadratic
from .later import select
from .parts import Parts


@dataclass
class Problem:
    """What a rule works on. Vectors are lists that run over `parts`, the layers one by one or those of a group.

    `gradients` are those of each layer's parameters, `buffers` the last momentum (zeros at first), `groups` the
    parameter groups, `dampings` what is added to the curvature, `solve` maps gradients to natural gradients in new
    tensors, `form` I vectors to their quadratic form [I, I] on this batch's curvature, `first_order` is the part of the
    KL clip's quadratic form that parameters without a block add.
    """

    parts: Parts
    gradients: list[list[Tensor | None]]
    buffers: list[Tensor]
    solve: Callable[[list[Tensor]], list[Tensor]]
    finite: Tensor
    first_order: Tensor
    dampings: list[Tensor]
    form: Callable[[Sequence[Sequence[Tensor]]], Tensor]
    loss: Tensor | None
    room: Tensor | None
    step: int

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter group of each part."""
        return self.parts.groups


@dataclass
class Plan:
    """What a rule decided: steps and new buffers (zeros and the old ones where a number is not finite), the rate of
    decoupled weight decay of each part, the factor for the steps of the other parameters, and what was measured."""

    steps: list[Tensor]
    buffers: list[Tensor]
    rates: list[Tensor | float]
    factor: Tensor | None
    finite: Tensor
    stats: dict[str, Tensor]


class FixedRule:
    """buffer = momentum buffer + gradient; step = -lr nu K^-1 buffer.

    Momentum averages gradients before they are preconditioned, so lr^2 <K^-1 buffer, buffer> is the quadratic form
    of the step really taken, and nu = min(1, sqrt(kl_clip / form)) bounds it over all parameters.

    That form is the step's curvature only while curvature is there: a classifier that is sure and wrong has none, and a
    gradient. So nu is also at most what makes the step's first-order promise <step, gradient> the whole loss above its
    floor, as last known.
    """

    def __init__(self, kl_clip: float | None):
        self.kl_clip = kl_clip
        self.room: Tensor | None = None

    def save(self) -> dict[str, Tensor | None]:
        """What the rule remembers between steps, None before the first."""
        return {"room": self.room}

    def load(self, saved: dict[str, Tensor | None], device: torch.device) -> None:
        """Take over what `save` gave, as copies on `device`."""
        room = saved.get("room")
        self.room = None if room is None else room.to(device, copy=True)

    def __call__(self, problem: Problem) -> Plan:
        groups = problem.groups
        buffers = problem.parts.added(problem.gradients, problem.buffers, [group["momentum"] for group in groups])
        directions = problem.solve(buffers)
        along = [quadratic.dot(direction, buffer) for direction, buffer in zip(directions, buffers, strict=True)]
        form = problem.first_order.clone()
        for product, group in zip(along, groups, strict=True):
            form = form + group["lr"] ** 2 * product
        factor = torch.ones_like(form)
        if self.kl_clip is not None:
            factor = clip.kl_factor(form, self.kl_clip)
            if problem.room is not None:
                known = torch.full_like(problem.room, torch.inf) if self.room is None else self.room
                self.room = torch.where(problem.finite, problem.room, known)
            if self.room is not None:
                promise = torch.zeros_like(form)
                for product, direction, old, group in zip(along, directions, problem.buffers, groups, strict=True):
                    slope = product - group["momentum"] * quadratic.dot(direction, old)  # <direction, gradient>
                    promise = promise + group["lr"] * slope
                tiny = torch.finfo(promise.dtype).tiny
                factor = torch.minimum(factor, self.room.to(factor.dtype) / promise.abs().clamp_min(tiny))
        finite = problem.finite & form.isfinite() & factor.isfinite()  # a direction that is not shows in the form
        steps = [
            select(finite, x.mul_(-group["lr"] * factor), None) for x, group in zip(directions, groups, strict=True)
        ]
        buffers = [select(finite, new, old) for new, old in zip(buffers, problem.buffers, strict=True)]
        rates = [group["lr"] for group in groups]
        return Plan(steps, buffers, rates, torch.where(finite, factor, 0.0), finite, {"kl_clip": factor})


MOST_MOMENTUM = 0.95


class SelfTuningRule:
    """step = alpha x + mu last step, x minus the natural gradient.

    1. (alpha, mu) minimise the quadratic model of arXiv 1503.05671, section 7, over the box 0 <= alpha <= max_growth
       times its running mean (and 1), `least_momentum` <= mu <= 0.95, with the curvature along both from vectors
       sampled for this very batch. The batch sees in its own gradient more than there is for others, and asks for
       too little of the last step, which came from them; so a part of that is kept. Where even the best such step
       goes uphill, mu is 0. For a group whose `momentum` is 0 the last step counts as none.
    2. What is added to the kept part is scaled down until the step promises at most a share of the loss above its
       floor: 0.02 at first, `max_decrease` from step `warmup` on.
    """

    def __init__(self, max_decrease: float, warmup: int, max_growth: float, least_momentum: float):
        self.max_decrease, self.warmup, self.max_growth = max_decrease, warmup, max_growth
        self.least_momentum = least_momentum
        self.alpha_mean: Tensor | None = None

    def save(self) -> dict[str, Tensor | None]:
        """What the rule remembers between steps, None before the first."""
        return {"alpha_mean": self.alpha_mean}

    def load(self, saved: dict[str, Tensor | None], device: torch.device) -> None:
        """Take over what `save` gave, as copies on `device`."""
        mean = saved.get("alpha_mean")
        self.alpha_mean = None if mean is None else mean.to(device, copy=True)

    def __call__(self, problem: Problem) -> Plan:
        assert problem.room is not None
        gradients = problem.parts.gathered(problem.gradients)
        parts = zip(problem.solve(gradients), problem.buffers, problem.groups, strict=True)
        pairs = [(x.neg_(), last if group["momentum"] else torch.zeros_like(last)) for x, last, group in parts]
        form = _gram(pairs, problem.dampings) + problem.form(list(zip(*pairs, strict=True)))
        slopes = [[quadratic.dot(v, g) for v in pair] for pair, g in zip(pairs, gradients, strict=True)]
        slope = _totals(slopes)
        largest = form.new_ones(())
        if self.alpha_mean is not None:
            largest = (self.max_growth * self.alpha_mean).clamp_max(1.0)
        kept = any(group["momentum"] for group in problem.groups)
        least, most = (self.least_momentum, MOST_MOMENTUM) if kept else (0.0, 0.0)
        lower = torch.stack([torch.zeros_like(largest), torch.full_like(largest, least)])
        upper = torch.stack([largest, torch.full_like(largest, most)])
        weights = quadratic.minimise_in_box(slope, form, lower, upper)
        alone = (-slope[0] / form[0, 0].clamp_min(torch.finfo(form.dtype).tiny)).clamp(lower[0], upper[0])

        share = min(self.max_decrease, 0.02 + self.max_decrease * problem.step / max(self.warmup, 1))
        limit = share * problem.room
        taken = _bounded(weights, lower, slope, form, limit)
        without = _bounded(torch.stack([alone, torch.zeros_like(alone)]), torch.zeros_like(lower), slope, form, limit)
        taken = torch.where(_decrease(taken, slope, form) >= 0, taken, without)
        finite = problem.finite & torch.cat([form.reshape(-1), slope, weights, taken]).isfinite().all()
        known = largest if self.alpha_mean is None else self.alpha_mean
        mean = weights[0] if self.alpha_mean is None else 0.9 * self.alpha_mean + 0.1 * weights[0]
        # A direction that does not lead down, as where the gradient is zero, says nothing about how far to go.
        self.alpha_mean = torch.where(finite & (slope[0] < 0), mean, known)

        alpha, mu = taken
        steps = [
            select(finite, x.mul_(group["lr"] * alpha).addcmul_(last, group["lr"] * mu), None)
            for (x, last), group in zip(pairs, problem.groups, strict=True)
        ]
        stats = {
            "alpha": alpha,
            "momentum": mu,
            "loss": problem.loss,
            "predicted_decrease": _decrease(taken, slope, form),
        }
        buffers = [select(finite, new, old) for new, old in zip(steps, problem.buffers, strict=True)]
        return Plan(steps, buffers, [group["lr"] * alpha for group in problem.groups], None, finite, stats)


def _bounded(weights: Tensor, kept: Tensor, slope: Tensor, form: Tensor, limit: Tensor) -> Tensor:
    """`weights`, of which what exceeds `kept` is scaled down until the whole promises at most `limit`."""
    kept = kept * quadratic.bounded_scale(-kept @ slope, kept @ form @ kept, limit)
    added = weights - kept
    room = limit - _decrease(kept, slope, form).clamp_min(0)
    return kept + added * quadratic.bounded_scale(-added @ (slope + form @ kept), added @ form @ added, room)


def _decrease(weights: Tensor, slope: Tensor, form: Tensor) -> Tensor:
    """What the quadratic model promises for a step."""
    return -weights @ slope - 0.5 * weights @ form @ weights


def _gram(pairs: list[tuple[Tensor, Tensor]], weights: list[Tensor]) -> Tensor:
    """Inner products of two vectors, given part by part, with each other, with a weight for each part: [2, 2]."""
    products = [[quadratic.dot(u, u), quadratic.dot(u, v), quadratic.dot(v, v)] for u, v in pairs]
    uu, uv, vv = torch.stack(weights) @ torch.stack([torch.stack(row) for row in products])
    return torch.stack([uu, uv, uv, vv]).reshape(2, 2)


def _totals(numbers: list[list[Tensor]]) -> Tensor:
    """Sums over the parts of a few numbers of each."""
    return torch.stack([torch.stack(row) for row in numbers]).sum(0)
