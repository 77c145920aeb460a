"""On a CUDA device: no step waits for it, and the backward's own thread changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, Problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac import EKFAC, GKFAC, KFAC

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
EVERY: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1}
FIXED: dict[str, Any] = {"lr": 0.05, "damping": 0.1, **EVERY}
RULES = pytest.mark.parametrize("options", [EVERY, FIXED], ids=["self-tuning", "fixed"])


class Recomputed(nn.Module):
    """Convolution, batch norm and dropout, recomputed in the backward; a head."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(64, 3)

    def forward(self, value: Tensor) -> Tensor:
        value = checkpoint(self.body, value, use_reentrant=False) if self.recompute else self.body(value)
        return self.head(value.flatten(1))


LOSSES: dict[str, tuple[nn.Module, Tensor]] = {
    "classes": (nn.CrossEntropyLoss(), torch.arange(12) % 3),
    # not both at once: torch's own loss waits for the device then
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.5])), torch.arange(12) % 3),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), torch.arange(12) % 3),
    "binary": (nn.BCEWithLogitsLoss(), (torch.arange(36) % 2).reshape(12, 3).float()),
    "squares": (nn.MSELoss(), torch.arange(36).reshape(12, 3).sin()),
}


def images(recompute: bool = False, loss: str = "classes") -> Problem:
    criterion, targets = copy.deepcopy(LOSSES[loss])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        problem = Problem(Recomputed(recompute), criterion, torch.randn(12, 2, 4, 4), targets)
    return on_device(problem)


def on_device(problem: Problem) -> Problem:
    problem.model.cuda()
    problem.criterion.cuda()
    problem.inputs, problem.targets = problem.inputs.cuda(), problem.targets.cuda()
    return problem


def weights(model: nn.Module) -> Tensor:
    return truth.vector(parameter.detach().clone() for parameter in model.parameters())


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "optimizer, options",
    [
        (KFAC, {"lr": 0.05, "damping": 0.1, "weight_decay": 0.01, "factor_interval": 2, "inverse_interval": 4}),
        (KFAC, {"lr": 0.05, "factor_interval": 1, "inverse_interval": 1, "fisher": "sampled"}),
        (KFAC, {}),
        (KFAC, {"factor_interval": 1, "inverse_interval": 1}),
        (EKFAC, {"lr": 0.05, "damping": 0.1, "factor_interval": 1, "inverse_interval": 1000}),
        (EKFAC, {"inverse_interval": 1000}),
        (GKFAC, {"lr": 0.05, "damping": 0.1, "factor_interval": 1, "inverse_interval": 4}),
        (GKFAC, {}),
    ],
    ids=[
        *("fixed", "fixed-every-step", "self-tuning", "self-tuning-every-step"),
        *("ekfac-fixed", "ekfac-self-tuning", "gkfac-fixed", "gkfac-self-tuning"),
    ],
)
@pytest.mark.parametrize("loss", list(LOSSES))
def test_no_step_waits_for_the_device(optimizer: Any, options: Any, loss: str) -> None:
    """After the first steps, which allocate, and for E-KFAC outside the steps that renew its basis."""
    problem = images(loss=loss)
    used = optimizer(problem.model, loss=problem.criterion, **options)
    for _ in range(7):
        truth_step(used, problem)
    with no_waiting():
        for _ in range(12):
            truth_step(used, problem)
    assert bool(weights(problem.model).isfinite().all()) and float(used.stats["skipped"]) == 0


def truth_step(used: Any, problem: Problem) -> None:
    used.zero_grad()
    problem.loss().backward()
    used.step()


@OPTIMIZERS
@pytest.mark.parametrize("name", ["mlp-ce-mean", "mlp-mse-sum", "convnet-groups", "tokens-mixed"])
def test_steps_are_those_of_the_cpu(optimizer: Any, name: str) -> None:
    host, device = BY_NAME[name].make(), on_device(BY_NAME[name].make())
    used = [optimizer(p.model, loss=p.criterion, fisher="exact", **FIXED) for p in (host, device)]
    for _ in range(3):
        for each, problem in zip(used, (host, device), strict=True):
            truth_step(each, problem)
    assert truth.relative_error(weights(device.model).cpu(), weights(host.model)) < 1e-8
    assert all(layer.A.is_cuda and layer.G.is_cuda for layer in used[1].curvature().values())


@OPTIMIZERS
@RULES
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_buffers_and_random_numbers_are_as_without_the_optimizer(
    optimizer: Any, options: Any, recompute: bool
) -> None:
    alone, watched = images(recompute), images(recompute)
    used = optimizer(watched.model, loss=watched.criterion, **options)
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        state = torch.cuda.get_rng_state()
        alone.loss().backward()
        after = torch.cuda.get_rng_state()
        torch.cuda.set_rng_state(state)
        watched.loss().backward()
    assert torch.equal(torch.cuda.get_rng_state(), after)
    for own, other in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad)
    used.step()
    for (name, own), other in zip(watched.model.named_buffers(), alone.model.buffers(), strict=True):
        assert torch.equal(own, other), name
    assert len(used.curvature()) >= 2


@OPTIMIZERS
@RULES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_backward_and_a_step_inside_the_autocast_region_are_those_outside(
    optimizer: Any, options: Any, dtype: torch.dtype
) -> None:
    """The backward's thread has an autocast state of its own."""
    outside, inside = (on_device(BY_NAME["mlp-ce-mean"].make()) for _ in range(2))
    for problem in (outside, inside):
        problem.model.float()
        problem.inputs = problem.inputs.float()
    first, second = (optimizer(p.model, loss=p.criterion, **options) for p in (outside, inside))
    for _ in range(3):
        with torch.autocast("cuda", dtype=dtype):
            loss = outside.loss()
        first.zero_grad()
        loss.backward()
        first.step()
        with torch.autocast("cuda", dtype=dtype):
            second.zero_grad()
            inside.loss().backward()
            second.step()
        assert truth.relative_error(weights(inside.model), weights(outside.model)) < 1e-6


@OPTIMIZERS
@RULES
def test_training_with_a_scaler(optimizer: Any, options: Any) -> None:
    problem = images()
    used = optimizer(problem.model, loss=problem.criterion, **options)
    scaler = torch.amp.GradScaler("cuda")
    start = problem.loss().item()
    for _ in range(15):
        used.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = problem.loss()
        scaler.scale(loss).backward()
        scaler.step(used)
        scaler.update()
    assert problem.loss().item() < start


def test_a_side_stream() -> None:
    """Forward, backward and step on a stream of the user's."""
    plain, other = (on_device(BY_NAME["mlp-ce-mean"].make()) for _ in range(2))
    first, second = (KFAC(p.model, loss=p.criterion, **FIXED) for p in (plain, other))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        truth_step(first, plain)
        with torch.cuda.stream(stream):
            truth_step(second, other)
    torch.cuda.synchronize()
    assert truth.relative_error(weights(other.model), weights(plain.model)) < 1e-10
