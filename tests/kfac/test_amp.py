"""Mixed precision: a loss scale drops out, steps compute in the parameters' dtype, overflows leave nothing behind."""

from __future__ import annotations

import warnings
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, Problem
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC, Preconditioner

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
EVERY: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1}
FIXED: dict[str, Any] = {"lr": 0.05, "damping": 0.1, **EVERY}
RULES = pytest.mark.parametrize("options", [EVERY, FIXED], ids=["self-tuning", "fixed"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def make(name: str = "mlp-ce-mean") -> Problem:
    """In single precision, as autocast expects."""
    problem = BY_NAME[name].make()
    problem.model.float()
    problem.criterion.float()
    problem.inputs = problem.inputs.float()
    if problem.targets.is_floating_point():
        problem.targets = problem.targets.float()
    return problem


def weights(model: nn.Module) -> Tensor:
    return truth.vector(parameter.detach().clone() for parameter in model.parameters())


def loss_in(problem: Problem, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype=dtype):
        return problem.loss()


@OPTIMIZERS
@RULES
@DTYPES
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("name", ["mlp-ce-mean", "mlp-mse-mean", "convnet-stride"])
def test_curvature_and_steps_are_those_of_single_precision_up_to_rounding(
    optimizer: Any, options: Any, dtype: torch.dtype, fisher: str, name: str
) -> None:
    single, half = make(name), make(name)
    first, second = (optimizer(p.model, loss=p.criterion, fisher=fisher, **options) for p in (single, half))
    before = weights(single.model)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    truth.step(first, single)
    scaler.scale(loss_in(half, dtype)).backward()
    scaler.step(second)
    scaler.update()
    tolerance = 0.1 if dtype is torch.bfloat16 else 0.02
    for layer, curvature in first.curvature().items():
        own = second.curvature()[layer]
        assert own.A.dtype == own.G.dtype == torch.float32
        assert truth.relative_error(own.A, curvature.A) < tolerance
        assert truth.relative_error(own.G, curvature.G) < 2 * tolerance
    assert truth.relative_error(weights(half.model) - before, weights(single.model) - before) < 3 * tolerance


@OPTIMIZERS
@RULES
@DTYPES
def test_gradients_are_as_without_the_optimizer(optimizer: Any, options: Any, dtype: torch.dtype) -> None:
    alone, watched = make("convnet-stride"), make("convnet-stride")
    used = optimizer(watched.model, loss=watched.criterion, **options)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    for problem, scaler in zip((alone, watched), scalers, strict=True):
        scaler.scale(loss_in(problem, dtype)).backward()
    scalers[1].unscale_(used)
    for own, other in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad / 2.0**10)


@OPTIMIZERS
@RULES
@DTYPES
def test_a_scale_and_an_accumulation_drop_out_together(optimizer: Any, options: Any, dtype: torch.dtype) -> None:
    """Two micro-batches under a scaler make the step of one batch without it."""
    whole, parts = make(), make()
    first, second = (optimizer(p.model, loss=p.criterion, fisher="exact", **options) for p in (whole, parts))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    loss_in(whole, dtype).backward()
    first.step()
    for inputs, targets in zip(parts.inputs.split((2, 4)), parts.targets.split((2, 4)), strict=True):
        with torch.autocast("cpu", dtype=dtype):
            loss = parts.criterion(parts.model(inputs), targets) * len(inputs) / 6
        scaler.scale(loss).backward()
    scaler.step(second)
    tolerance = 1e-2 if dtype is torch.bfloat16 else 2e-3
    for layer, curvature in first.curvature().items():
        assert truth.relative_error(second.curvature()[layer].A, curvature.A) < tolerance
        assert truth.relative_error(second.curvature()[layer].G, curvature.G) < tolerance
    if "lr" not in options:
        assert float(second.stats["loss"]) == pytest.approx(float(first.stats["loss"]), rel=tolerance)


@OPTIMIZERS
@RULES
@DTYPES
def test_a_backward_and_a_step_inside_the_autocast_region_are_those_outside(
    optimizer: Any, options: Any, dtype: torch.dtype
) -> None:
    """What the optimizer computes for itself is never in half precision, whatever region the loop is in."""
    outside, inside = make(), make()
    first, second = (optimizer(p.model, loss=p.criterion, **options) for p in (outside, inside))
    for _ in range(3):
        first.zero_grad()
        loss_in(outside, dtype).backward()
        first.step()
        with torch.autocast("cpu", dtype=dtype):
            second.zero_grad()
            inside.loss().backward()
            second.step()
            assert torch.is_autocast_enabled("cpu")
        assert torch.equal(weights(outside.model), weights(inside.model))


@DTYPES
def test_a_preconditioner_inside_the_autocast_region(dtype: torch.dtype) -> None:
    outside, inside = make(), make()
    used = [Preconditioner(p.model, loss=p.criterion, factor_interval=1) for p in (outside, inside)]
    loss_in(outside, dtype).backward()
    used[0].step()
    with torch.autocast("cpu", dtype=dtype):
        inside.loss().backward()
        used[1].step()
    for own, other in zip(inside.model.parameters(), outside.model.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad)


def test_a_closure_keeps_the_callers_autocast() -> None:
    problem = make()
    used = KFAC(problem.model, loss=problem.criterion, **FIXED)
    seen = []

    def closure() -> Tensor:
        used.zero_grad()
        output = problem.model(problem.inputs)
        seen.append(output.dtype)
        loss = problem.criterion(output, problem.targets)
        loss.backward()
        return loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        used.step(closure)
    assert seen == [torch.bfloat16]


def zeroed_by_optimizer(used: Any, model: nn.Module) -> None:
    used.zero_grad()


def zeroed_by_model(used: Any, model: nn.Module) -> None:
    model.zero_grad()


@OPTIMIZERS
@RULES
@pytest.mark.parametrize("zero", [zeroed_by_optimizer, zeroed_by_model])
def test_a_step_that_the_scaler_skips_leaves_nothing_behind(optimizer: Any, options: Any, zero: Any) -> None:
    """The first scale overflows in fp16, so the scaler never calls `step`; the next batch stands alone."""
    clean, scaled = make(), make()
    first, second = (optimizer(p.model, loss=p.criterion, fisher="exact", **options) for p in (clean, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-32)
    before = weights(scaled.model)
    plenty = scaled.inputs
    for attempt in range(2):
        zero(second, scaled.model)
        scaled.inputs = 3 * plenty if attempt == 0 else plenty
        scaler.scale(loss_in(scaled, torch.float16)).backward()
        scaler.step(second)
        scaler.update()
        assert torch.equal(weights(scaled.model), before) == (attempt == 0)
    loss_in(clean, torch.float16).backward()
    first.step()
    for layer, curvature in first.curvature().items():
        assert truth.relative_error(second.curvature()[layer].A, curvature.A) < 1e-5
        assert truth.relative_error(second.curvature()[layer].G, curvature.G) < 1e-5
    if options is FIXED:
        assert truth.relative_error(weights(scaled.model), weights(clean.model)) < 1e-4


@OPTIMIZERS
@RULES
@DTYPES
def test_training_in_mixed_precision_lowers_the_loss(optimizer: Any, options: Any, dtype: torch.dtype) -> None:
    problem = make("convnet-stride")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used = optimizer(problem.model, loss=problem.criterion, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        start = problem.loss().item()
        for _ in range(10):
            used.zero_grad()
            scaler.scale(loss_in(problem, dtype)).backward()
            scaler.unscale_(used)
            torch.nn.utils.clip_grad_norm_(problem.model.parameters(), 10.0)
            scaler.step(used)
            scaler.update()
    assert problem.loss().item() < 0.9 * start
