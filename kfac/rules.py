"""How far to go: the step rules, from natural gradients to the steps of all layers.

`SelfTuningRule` minimises a quadratic model over the natural gradient and the last step, bounds what it promises, and
needs no learning rate. `FixedRule` is the papers' rule: learning rate, momentum, KL clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import clip, quadratic
from .collect import Rows
from .layers import LinearBlock


@dataclass
class Problem:
    """What a rule works on. Lists run over the layers of this step; matrices are [K, d_out, d_in].

    `groups` are the layers' parameter groups, `buffers` their "momentum_buffer" (zeros at first), `solve` maps
    gradients to natural gradients, `first_order` is the part of the KL clip's quadratic form that parameters without
    a block add.
    """

    blocks: list[LinearBlock]
    gradients: list[Tensor]
    buffers: list[Tensor]
    groups: list[dict[str, Any]]
    solve: Callable[[list[Tensor]], list[Tensor]]
    finite: Tensor
    first_order: Tensor
    damping: Tensor
    rows: list[Rows]
    norm: Tensor | None
    loss: Tensor | None
    step: int


@dataclass
class Plan:
    """What a rule decided: steps and new buffers, the rate of decoupled weight decay of each layer, the factor that the
    steps of the other parameters are to be scaled by, and what was measured."""

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
    """

    def __init__(self, kl_clip: float | None):
        self.kl_clip = kl_clip

    def __call__(self, problem: Problem) -> Plan:
        groups = problem.groups
        inputs = zip(problem.gradients, problem.buffers, groups, strict=True)
        buffers = [gradient + group["momentum"] * old for gradient, old, group in inputs]
        directions = problem.solve(buffers)
        form = problem.first_order.clone()
        for direction, buffer, group in zip(directions, buffers, groups, strict=True):
            form = form + group["lr"] ** 2 * quadratic.dot(direction, buffer).abs()
        factor = torch.ones_like(form) if self.kl_clip is None else clip.kl_factor(form, self.kl_clip)
        steps = [-group["lr"] * factor * x for x, group in zip(directions, groups, strict=True)]
        rates = [group["lr"] for group in groups]
        return Plan(steps, buffers, rates, factor, problem.finite, {"kl_clip": factor})


class SelfTuningRule:
    """step = s (alpha x + mu last step): x minus the natural gradient, (alpha, mu) from the quadratic model, s from
    a bound.

    1. (alpha, mu) minimise the model of arXiv 1503.05671, section 7, over the box 0 <= alpha <= max_growth times its
    running
       mean (and 1), 0 <= mu <= 0.95, with the curvature along both directions from vectors sampled for this very batch.
    2. s <= 1 bounds the promised decrease by `max_decrease` (reached over `warmup` steps) times the loss above its
    floor.
    """

    def __init__(self, max_decrease: float, warmup: int, max_growth: float, floor: float):
        self.max_decrease, self.warmup, self.max_growth, self.floor = max_decrease, warmup, max_growth, floor
        self.alpha_mean: Tensor | None = None

    def __call__(self, problem: Problem) -> Plan:
        assert problem.loss is not None
        directions = [-x for x in problem.solve(problem.gradients)]
        form = self._curvature(problem, directions)
        slope = torch.stack([quadratic.dots(v, problem.gradients) for v in (directions, problem.buffers)])
        largest = form.new_ones(())
        if self.alpha_mean is not None:
            largest = (self.max_growth * self.alpha_mean).clamp_max(1.0)
        momentum = 0.95 if problem.groups[0]["momentum"] else 0.0
        upper = torch.stack([largest, torch.full_like(largest, momentum)])
        weights = quadratic.minimise_in_box(slope, form, torch.zeros_like(upper), upper)

        share = min(self.max_decrease, 0.02 + self.max_decrease * problem.step / max(self.warmup, 1))
        promise, bend = -(weights @ slope), weights @ form @ weights
        scale = quadratic.bounded_scale(promise, bend, share * (problem.loss - self.floor).clamp_min(0))
        finite = problem.finite & weights.isfinite().all() & scale.isfinite()
        last = largest if self.alpha_mean is None else self.alpha_mean
        mean = weights[0] if self.alpha_mean is None else 0.9 * self.alpha_mean + 0.1 * weights[0]
        self.alpha_mean = torch.where(finite, mean, last)

        alpha, mu = scale * weights
        pairs = zip(directions, problem.buffers, problem.groups, strict=True)
        steps = [group["lr"] * (alpha * direction + mu * last) for direction, last, group in pairs]
        stats = {
            "alpha": alpha,
            "momentum": mu,
            "loss": problem.loss,
            "predicted_decrease": scale * promise - 0.5 * scale**2 * bend,
        }
        return Plan(steps, steps, [group["lr"] * alpha for group in problem.groups], None, finite, stats)

    def _curvature(self, problem: Problem, directions: list[Tensor]) -> Tensor:
        """V^T (F + damping I) V for V = [direction, last step]: [2, 2]."""
        gram = torch.stack(
            [
                quadratic.dots(directions, directions),
                quadratic.dots(directions, problem.buffers),
                quadratic.dots(problem.buffers, problem.buffers),
            ]
        )
        form = problem.damping * torch.stack([gram[:2], gram[1:]])
        pairs = {
            block: torch.stack(pair) for block, *pair in zip(problem.blocks, directions, problem.buffers, strict=True)
        }
        assert problem.norm is not None
        for rows in problem.rows:
            products = [
                quadratic.row_products(a, g, pairs[block]) for block, (a, g) in rows.layers.items() if block in pairs
            ]
            if products:
                s = torch.stack(products).sum(0)
                form = form + s.mT @ s * (rows.weight / problem.norm)
        return form
