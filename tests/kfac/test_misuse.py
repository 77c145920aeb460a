"""What users do without meaning it: it works, or one line says what is wrong."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC, Preconditioner

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def classes(n: int = 32, count: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 20), torch.randint(count, (n,))


def network(outputs: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, outputs))


def messages(loop: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop()
    return [str(warning.message) for warning in caught]


def steps(optimizer: Any, backward: Callable[[], Any], count: int = 3) -> None:
    for _ in range(count):
        backward()
        optimizer.step()
        optimizer.zero_grad()


# A factor on the loss


@OPTIMIZERS
@pytest.mark.parametrize("factor", [0.01, 4.0])
def test_a_factor_on_the_loss_is_named_when_self_tuning(optimizer: Any, factor: float) -> None:
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), classes()
    used = optimizer(model, loss=criterion)
    found = messages(lambda: steps(used, lambda: (factor * criterion(model(x), y)).backward()))
    assert [f"by {factor:.4g} in all" in message for message in found] == [True], found


def test_micro_batches_without_a_mean_are_named() -> None:
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), classes()
    used = KFAC(model, loss=criterion)

    def backward() -> None:
        for part in (slice(0, 16), slice(16, 32)):
            criterion(model(x[part]), y[part]).backward()

    assert ["by 2 in all" in message for message in messages(lambda: steps(used, backward))] == [True]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_means_over_micro_batches_sums_and_loss_scales_are_not(reduction: str) -> None:
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(reduction=reduction), classes()
    parts, share = (slice(0, 24), slice(24, 32)), {"mean": (0.75, 0.25), "sum": (1.0, 1.0)}[reduction]

    def accumulated() -> None:
        for part, weight in zip(parts, share, strict=True):
            (weight * criterion(model(x[part]), y[part])).backward()

    def scaled() -> None:
        (65536.0 * criterion(model(x), y)).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= 65536.0

    for backward in (accumulated, scaled):
        assert messages(partial(steps, KFAC(model, loss=criterion), backward)) == []


def test_the_fixed_rule_takes_any_factor() -> None:
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), classes()
    used = KFAC(model, loss=criterion, lr=0.01)
    assert messages(lambda: steps(used, lambda: (4 * criterion(model(x), y)).backward())) == []


# Settings


@OPTIMIZERS
@pytest.mark.parametrize("decay", [0.95, 0.999])
def test_a_long_average_does_not_begin_with_a_handful_of_examples(optimizer: Any, decay: float) -> None:
    model, criterion, (x, y) = network(18), nn.CrossEntropyLoss(), classes(512, 18)
    used = optimizer(model, loss=criterion, stat_decay=decay)
    steps(used, lambda: criterion(model(x), y).backward(), 1)
    for layer in used.curvature().values():
        assert torch.linalg.matrix_rank(layer.A) == layer.A.shape[-1]


class Scale(nn.Module):
    """A layer and a parameter that has no block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 5)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


@pytest.mark.parametrize("lr", [None, 0.3], ids=["self-tuning", "fixed"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_groups_rate_of_zero_holds_for_parameters_without_a_block_too(lr: float | None, rate: float) -> None:
    model, criterion, (x, y) = Scale(), nn.CrossEntropyLoss(), classes()
    with pytest.warns(UserWarning, match="scale"):
        used = KFAC(model, loss=criterion, lr=lr, groups=[{"params": [model.scale], "lr": rate}])
    steps(used, lambda: criterion(model(x), y).backward())
    assert torch.equal(model.scale, torch.ones(5)) is (rate == 0)


@pytest.mark.parametrize("dtype", ["int64", "bool", torch.complex64, "nothing"])
def test_products_in_a_dtype_without_fractions_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"preconditioning_dtype=.*allowed: None, a floating torch.dtype"):
        KFAC(network(), loss=nn.CrossEntropyLoss(), preconditioning_dtype=dtype)


def test_a_preconditioner_takes_none_for_its_averages() -> None:
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), classes()
    used = Preconditioner(model, loss=criterion, stat_decay=None)
    criterion(model(x), y).backward()
    used.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Criteria


class Focal(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss = super().forward(input, target)
        return (1 - torch.exp(-loss)) ** 2 * loss


class Named(nn.CrossEntropyLoss):
    """Of another name, and otherwise the same."""


def test_a_criterion_with_a_forward_of_its_own_is_not_taken_for_its_parent() -> None:
    with pytest.raises(ValueError, match=r"loss: Focal; allowed: .* with that class's forward"):
        KFAC(network(), loss=Focal())
    KFAC(network(), loss=Named())


class Uncertain(nn.Module):
    """A mean for every position, and one variance for all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 3)
        self.log_variance = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x).flatten(0, 1), self.log_variance.exp()


@OPTIMIZERS
def test_one_variance_for_all_examples_and_positions(optimizer: Any) -> None:
    model, criterion = Uncertain(), nn.GaussianNLLLoss()
    x, y = torch.randn(8, 4, 20), torch.randn(32, 3)
    with pytest.warns(UserWarning, match="log_variance"):
        used = optimizer(model, loss=criterion, fisher="exact")

    def backward() -> None:
        mean, variance = model(x)
        criterion(mean, y, variance).backward()

    before = model.layer.weight.clone()
    steps(used, backward)
    assert model.layer.weight.isfinite().all() and not torch.equal(model.layer.weight, before)


# Layers


class Spectral(nn.Module):
    """A complex layer between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(20, 16, dtype=torch.cfloat)
        self.outer = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x.to(torch.cfloat)).abs())


@OPTIMIZERS
def test_complex_layers_are_trained_without_a_block(optimizer: Any) -> None:
    model, criterion, (x, y) = Spectral(), nn.CrossEntropyLoss(), classes()
    with pytest.warns(UserWarning, match=r"inner.weight \(it is complex\)"):
        used = optimizer(model, loss=criterion)
    before = model.inner.weight.clone()
    steps(used, lambda: criterion(model(x), y).backward())
    assert [block.name for block in used.blocks] == ["outer"]
    assert not torch.equal(model.inner.weight, before)


class Normed(nn.Module):
    """Calls its layers with their arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.RMSNorm(20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=self.norm(x=x))


@OPTIMIZERS
def test_layers_called_by_the_names_of_their_arguments(optimizer: Any) -> None:
    model, criterion, (x, y) = Normed(), nn.CrossEntropyLoss(), classes()
    used = optimizer(model, loss=criterion)
    steps(used, lambda: criterion(model(x), y).backward())
    assert not torch.equal(model.norm.weight, torch.ones(20))


def test_summary_of_a_lazy_layer_without_a_block() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, 5))
    used = KFAC(model, loss=nn.CrossEntropyLoss(), groups=[{"params": model[0].parameters(), "first_order": True}])
    line = next(line for line in used.summary().splitlines() if line.startswith("0.weight"))
    assert line.split() == ["0.weight", "AdamW", "?"]


# The optimizer as an object


@OPTIMIZERS
@pytest.mark.parametrize("lr", [None, 0.1], ids=["self-tuning", "fixed"])
def test_a_skipped_step_leaves_the_names_of_what_it_would_have_measured(optimizer: Any, lr: float | None) -> None:
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), classes()
    used = optimizer(model, loss=criterion, lr=lr)
    steps(used, lambda: criterion(model(x), y).backward(), 2)
    names = set(used.stats)
    steps(used, lambda: criterion(model(x * torch.nan), y).backward(), 1)
    assert names <= set(used.stats)
    assert used.stats["skipped"] == 1
    assert all(value.isnan().all() for name, value in used.stats.items() if name != "skipped")


@OPTIMIZERS
@pytest.mark.parametrize("through", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_an_optimizer_has_no_copy(optimizer: Any, through: Callable[[Any], Any]) -> None:
    used = optimizer(network(), loss=nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"its hooks belong to one model.*allowed: its state_dict\(\)"):
        through(used)


def test_a_closure_that_returns_nothing_is_named_before_anything_moves() -> None:
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), classes()
    used = KFAC(model, loss=criterion, adapt_damping=True)

    def closure() -> None:
        used.zero_grad()
        criterion(model(x), y).backward()

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="closure: it returned None with adapt_damping=True"):
        for _ in range(10):
            before = copy.deepcopy(model.state_dict())
            used.step(closure)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
