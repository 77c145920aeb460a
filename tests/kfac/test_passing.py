"""A single vector's gradients are used while it passes the layers: the same factors and steps, a layer's at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC, rows
from kfac.collect import Collector
from kfac.optimizer import KroneckerOptimizer


class Towers(nn.Module):
    """Two towers that nothing joins before their sum, a block that is skipped at times, a layer that leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.right = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1))
        self.skipped = nn.Conv2d(4, 4, 1)
        self.nowhere = nn.Linear(4, 2)
        self.last = nn.Linear(4, 20)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x) + self.right(x)
        y = y if self.skip else y + self.skipped(y)
        y = y.mean((2, 3))
        self.nowhere(y)
        return self.last(y)


def residual() -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.last = nn.Linear(64, 20)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.norm(self.first(x)))
            return self.last((y + torch.relu(self.second(y))).flatten(1))

    return Residual()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 20))


def trained(make: Callable[[], nn.Module], kind: type[KroneckerOptimizer], options: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    model, criterion = make().double(), nn.CrossEntropyLoss()
    optimizer = kind(model, loss=criterion, factor_interval=1, inverse_interval=2, **options)
    for step in range(6):
        model.skip = step in (1, 4)  # type: ignore[assignment]
        x, y = torch.randn(30, 3, 4, 4).double(), torch.randint(20, (30,))
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    curvature = [side for layer in optimizer.curvature().values() for side in (layer.A, layer.G)]
    return [*model.state_dict().values(), *curvature]


@pytest.mark.parametrize("options", [{}, {"lr": 0.05}, {"lr": 0.05, "fisher": "empirical"}], ids=str)
@pytest.mark.parametrize("kind", [KFAC, EKFAC, GKFAC])
@pytest.mark.parametrize("make", [mlp, residual, Towers])
def test_training_is_that_by_gradients_of_all_layers_at_once(
    make: Callable[[], nn.Module],
    kind: type[KroneckerOptimizer],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passing = trained(make, kind, options)
    monkeypatch.setattr(Collector, "_passed", lambda *_, **__: None)
    for found, expected in zip(passing, trained(make, kind, options), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"lr": 0.05}, {}], ids=["fixed", "self-tuning"])
def test_the_gradients_of_one_layer_are_there_at_a_time(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = [0]
    plain = rows.moment_g

    def counted(block: Any, a: Any, g: Tensor) -> Tensor:
        alive.append(weakref.ref(g))
        most[0] = max(most[0], sum(own() is not None for own in alive))
        return plain(block, a, g)

    monkeypatch.setattr(rows, "moment_g", counted)
    monkeypatch.setattr(rows, "MODEL_ROWS", 2)
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh())]
    model, criterion = nn.Sequential(*layers, nn.Linear(8, 20)), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss=criterion, factor_interval=1, **options)
    for _ in range(3):  # the first step learns where a vector has to go
        alive.clear()
        most[0] = 0
        optimizer.zero_grad()
        criterion(model(torch.randn(16, 8)), torch.randint(20, (16,))).backward()
        optimizer.step()
    assert len(alive) == 7 and most[0] <= 2


def test_nothing_listens_on_the_graph_once_a_vector_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0]
    plain = rows.moment_g

    def counted(block: Any, a: Any, g: Tensor) -> Tensor:
        passed[0] += 1
        return plain(block, a, g)

    monkeypatch.setattr(rows, "moment_g", counted)
    model, criterion = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 20)), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss=criterion, lr=0.1)
    loss = criterion(model(torch.randn(8, 4)), torch.randint(20, (8,)))
    loss.backward(retain_graph=True)
    assert passed == [2]
    once = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    loss.backward()
    assert passed == [2]
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    optimizer.step()
