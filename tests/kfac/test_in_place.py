"""Layer outputs that are changed in place: statistics and steps are those of the same network out of place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ground_truth as truth
import pytest
import torch
import torch.nn.functional as F
from cases import LOSSES, Problem
from layer_cases import LayerCase, numbers
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
EVERY: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1}
FIXED: dict[str, Any] = {"lr": 0.05, "damping": 0.1, **EVERY}

# What becomes of two layers' outputs, which are views of a base with fewer dimensions. Only the first is changed.


def activated(one: Tensor, two: Tensor, inplace: bool) -> Tensor:
    return F.relu(one, inplace) + two


def added(one: Tensor, two: Tensor, inplace: bool) -> Tensor:
    return one.add_(two) if inplace else one + two


def added_and_activated(one: Tensor, two: Tensor, inplace: bool) -> Tensor:
    return F.relu(added(one, two, inplace), inplace)


def a_token_scaled(one: Tensor, two: Tensor, inplace: bool) -> Tensor:
    if inplace:
        one[:, 0].mul_(3)
    else:
        one = torch.cat([3 * one[:, :1], one[:, 1:]], 1)
    return one + two


class Tokens(nn.Module):
    """Two layers on tokens whose outputs are joined, and a head on the mean; `inner` puts another layer before them."""

    def __init__(self, join: Callable[..., Tensor], inner: bool, inplace: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4) if inner else nn.Identity()
        self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.join = partial(join, inplace=inplace)

    def forward(self, value: Tensor) -> Tensor:
        value = torch.tanh(self.first(value))
        return self.head(self.join(self.one(value), self.two(value)).mean(1))


def tokens(join: Callable[..., Tensor], inner: bool, inplace: bool) -> Problem:
    return LayerCase("tokens", lambda: Tokens(join, inner, inplace), numbers(6, 3, 4), LOSSES["ce-mean"]).make()


def normed(inplace: bool) -> Problem:
    def net() -> nn.Module:
        norm, activation = nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.1, inplace)
        return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), norm, activation, nn.Flatten(), nn.Linear(24, 3))

    return LayerCase("normed", net, numbers(6, 2, 4, 5), LOSSES["ce-mean"]).make()


TOKENS = {
    f"{join.__name__}, {'inner' if inner else 'first'}": partial(tokens, join, inner)
    for join in (activated, added, added_and_activated, a_token_scaled)
    for inner in (False, True)
}
NETS: dict[str, Callable[..., Problem]] = {**TOKENS, "instance norm": normed}


@OPTIMIZERS
@pytest.mark.parametrize("name", list(TOKENS))
def test_factors_are_those_by_autograd(optimizer: Any, name: str) -> None:
    problem = TOKENS[name](inplace=True)
    used = truth.start(optimizer, problem, damping=0.1)
    truth.step(used, problem)
    expected = truth.factors(TOKENS[name](inplace=False))
    assert used.curvature().keys() == expected.keys()
    for layer, (a, g) in expected.items():
        found = used.curvature()[layer]
        assert truth.relative_error(found.A, a.reshape(found.A.shape)) < 1e-10, layer
        assert truth.relative_error(found.G, g.reshape(found.G.shape)) < 1e-10, layer


@OPTIMIZERS
@pytest.mark.parametrize(
    "options", [EVERY, FIXED, {**FIXED, "fisher": "sampled"}], ids=["self-tuning", "fixed", "fixed-sampled"]
)
@pytest.mark.parametrize("name", list(NETS))
def test_steps_are_those_out_of_place(optimizer: Any, options: dict[str, Any], name: str) -> None:
    plain, inplace = NETS[name](inplace=False), NETS[name](inplace=True)
    first, second = (optimizer(p.model, loss=p.criterion, **options) for p in (plain, inplace))
    for _ in range(3):
        expected, found = truth.step(first, plain), truth.step(second, inplace)
        for parameter in expected:
            assert truth.relative_error(found[parameter], expected[parameter]) < 1e-10, parameter
    assert second.curvature().keys() == first.curvature().keys()
