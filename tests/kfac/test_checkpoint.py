"""Activation checkpointing: forwards that run again in the backward change neither curvature nor anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, Problem
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kfac import EKFAC, GKFAC, KFAC

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
EVERY: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1}
FIXED: dict[str, Any] = {"lr": 0.05, "damping": 0.1, **EVERY}
RULES = pytest.mark.parametrize("options", [EVERY, FIXED], ids=["self-tuning", "fixed"])


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def weights(model: nn.Module) -> Tensor:
    return truth.vector(parameter.detach().clone() for parameter in model.parameters())


class Blocks(nn.Module):
    """Two blocks with running statistics and a draw, one of them called twice, which may be recomputed; a head."""

    def __init__(self, how: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2)) for width in (4, 6)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, value: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[1]):
            value = block(value) if self.how is None else checkpoint(block, value, **self.how)
        return self.head(value)


def blocks_problem(how: dict[str, Any] | None, spectral: bool = False) -> Problem:
    def make() -> nn.Module:
        model = Blocks(how)
        if spectral:
            spectral_norm(model.blocks[1][0])
        return model

    problem = BY_NAME["mlp-ce-mean"].make()
    problem.model = seeded(make)
    return problem


RECOMPUTED: dict[str, Any] = {"use_reentrant": False}


@OPTIMIZERS
@RULES
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
@pytest.mark.parametrize("spectral", [False, True], ids=["batch norm", "power iteration"])
def test_recomputed_activations_leave_gradients_buffers_and_random_numbers_alone(
    optimizer: Any, options: Any, fisher: str, spectral: bool
) -> None:
    alone, watched = (blocks_problem(RECOMPUTED, spectral) for _ in range(2))
    used = optimizer(watched.model, loss=watched.criterion, fisher=fisher, **options)
    for _ in range(2):
        state = torch.get_rng_state()
        alone.model.zero_grad()
        alone.loss().backward()
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        used.zero_grad()
        watched.loss().backward()
        assert torch.equal(torch.get_rng_state(), after) and not torch.equal(state, after)
        for (name, own), other in zip(watched.model.named_parameters(), alone.model.parameters(), strict=True):
            assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad), name
        for (name, own), other in zip(watched.model.named_buffers(), alone.model.buffers(), strict=True):
            assert torch.equal(own, other), name
        used.step()
        with torch.no_grad():
            for target, moved in zip(alone.model.parameters(), watched.model.parameters(), strict=True):
                target.copy_(moved)
    assert int(alone.model.blocks[0][1].num_batches_tracked) == 4  # each step: a forward and a recomputation


@OPTIMIZERS
@RULES
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_recomputed_activations_give_the_same_curvature(optimizer: Any, options: Any, fisher: str) -> None:
    plain, recomputed = blocks_problem(None), blocks_problem(RECOMPUTED)
    first, second = (optimizer(p.model, loss=p.criterion, fisher=fisher, **options) for p in (plain, recomputed))
    for _ in range(3):
        state = torch.get_rng_state()
        truth.step(first, plain)
        torch.set_rng_state(state)
        truth.step(second, recomputed)
        for name, layer in first.curvature().items():
            assert truth.relative_error(second.curvature()[name].A, layer.A) < 1e-10
            assert truth.relative_error(second.curvature()[name].G, layer.G) < 1e-10
        assert truth.relative_error(weights(recomputed.model), weights(plain.model)) < 1e-10


def test_a_recomputation_that_stops_early_leaves_buffers_alone() -> None:
    """The last operation of the segment is the batch norm: its forward is cut short inside the module."""
    problem, alone = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    for each in (problem, alone):
        each.model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    used = KFAC(problem.model, loss=problem.criterion)
    for each in (problem, alone):
        hidden = checkpoint(each.model[:2], each.inputs, use_reentrant=False)
        each.criterion(each.model[2](hidden), each.targets).backward()
    for own, other in zip(problem.model.buffers(), alone.model.buffers(), strict=True):
        assert torch.equal(own, other)
    used.step()
    assert set(used.curvature()) == {"0", "1", "2"}


@OPTIMIZERS
@pytest.mark.parametrize(
    "recomputed", [(0, 4), (1, 4), (0, 5)], ids=["all but one", "a layer before", "the whole model"]
)
def test_reentrant_recomputation_is_refused_in_one_line(optimizer: Any, recomputed: tuple[int, int]) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)]
    model = seeded(lambda: nn.Sequential(*layers))
    start, end = recomputed

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, value: Tensor) -> Tensor:
            value = self.inner[:start](value)
            return self.inner[end:](checkpoint(self.inner[start:end], value, use_reentrant=True))

    inputs = problem.inputs.clone().requires_grad_()
    if end == 5:
        used = optimizer(model, loss=problem.criterion)
        output = checkpoint(model, inputs, use_reentrant=True)
    else:
        outer = Recomputed()
        used = optimizer(outer, loss=problem.criterion)
        output = outer(inputs)
    with pytest.raises(RuntimeError, match=r"allowed: .*use_reentrant=False") as error:
        problem.criterion(output, problem.targets).backward()
    assert "\n" not in str(error.value)
    assert not used.curvature()


@pytest.mark.parametrize("target_first", [True, False])
def test_layers_without_a_gradient_beside_recomputed_ones_are_no_mistake(target_first: bool) -> None:
    """A target network of the same layers under no_grad, as in self-supervised training."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)

        def forward(self, value: Tensor) -> Tensor:
            parts = {}
            for part in ("target", "online") if target_first else ("online", "target"):
                with torch.set_grad_enabled(part == "online"):
                    parts[part] = self.head(checkpoint(self.trunk, value, use_reentrant=False))
            return parts["online"] - parts["target"]

    problem = BY_NAME["mlp-ce-mean"].make()
    problem.model = seeded(Siamese)
    used = KFAC(problem.model, loss=problem.criterion)
    problem.loss().backward()
    with torch.no_grad():
        problem.loss()
    used.step()
    assert set(used.curvature()) == {"trunk.0", "head"}


@OPTIMIZERS
def test_a_layer_that_is_frozen_later_may_be_recomputed(optimizer: Any) -> None:
    problem = blocks_problem(RECOMPUTED)
    used = optimizer(problem.model, loss=problem.criterion, **FIXED)
    frozen = problem.model.blocks[0][0]
    for parameter in problem.model.blocks[0].parameters():
        parameter.requires_grad_(False)
    before = frozen.weight.clone()
    for _ in range(2):
        truth.step(used, problem)
    assert torch.equal(frozen.weight, before) and "blocks.1.0" in used.curvature()


def test_checkpoint_sequential() -> None:
    plain, recomputed = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    recomputed.model = nn.Sequential(*recomputed.model)
    first, second = (KFAC(p.model, loss=p.criterion, **FIXED) for p in (plain, recomputed))
    truth.step(first, plain)
    output = checkpoint_sequential(recomputed.model, 2, recomputed.inputs, use_reentrant=False)
    recomputed.criterion(output, recomputed.targets).backward()
    second.step()
    assert truth.relative_error(weights(recomputed.model), weights(plain.model)) < 1e-10
