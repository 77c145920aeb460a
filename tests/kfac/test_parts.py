"""What a GPU does in few large operations is what a CPU does in many small ones, tried on a CPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, Problem
from test_resume_layers import NETS, OPTIMIZERS, SETTINGS, make, weights
from torch import Tensor, nn

from kfac import KFAC, parts
from kfac.kfac import INVERSES

EVERY = pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
pytestmark = pytest.mark.filterwarnings("ignore:.*without a curvature block")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switches this process's CPU to large operations."""
    return lambda: monkeypatch.setattr(parts, "ONE_BY_ONE", set())


@pytest.mark.parametrize(
    ("optimizer", "setting", "net"),
    [
        case
        for case in itertools.product(OPTIMIZERS, SETTINGS, NETS)
        if case != ("EKFAC", "reduced", "conv1d-3d")  # a layer has no curvature there: its eigenbasis is rounding
    ],
)
def test_steps_are_the_same(optimizer: str, setting: str, net: str, joined: Any) -> None:
    moved = []
    for switch in (lambda: None, joined):
        switch()
        problem, used = make(net, optimizer, setting)
        start = weights(problem)
        for _ in range(6):
            truth.step(used, problem)
        moved.append(weights(problem) - start)
    assert float(moved[0].norm()) > 0
    assert truth.relative_error(moved[1], moved[0]) < 1e-7


@EVERY
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_training_goes_on_bit_for_bit(optimizer: str, setting: str, joined: Any, tmp_path: Path) -> None:
    joined()
    straight, used = make("tied", optimizer, setting)
    for count in range(8):
        if count == 4:
            torch.save({"model": straight.model.state_dict(), "optimizer": used.state_dict()}, tmp_path / "state")
        truth.step(used, straight)
    resumed, other = make("tied", optimizer, setting)
    saved = torch.load(tmp_path / "state", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for _ in range(4):
        truth.step(other, resumed)
    assert torch.equal(weights(straight), weights(resumed))


class Net(nn.Module):
    """Three layers of one shape between two others, and norms of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.inner = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))

    def forward(self, value: Tensor) -> Tensor:
        value = self.first(value)
        for linear, norm in zip(self.inner, self.norms, strict=True):
            value = norm(linear(value).tanh())
        return self.last(value)


def start(**options: Any) -> tuple[Problem, Any]:
    """K-FAC with groups that differ in all that a group decides."""
    problem = BY_NAME["mlp-ce-mean"].make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        problem.model = Net().double()
    groups: list[dict[str, Any]] = [
        {"params": [*problem.model.first.parameters(), *problem.model.inner[1].parameters()], "lr": 0.5},
        {"params": list(problem.model.norms[0].parameters()), "momentum": 0.0, "weight_decay": 0.1},
        {"params": list(problem.model.inner[2].parameters()), "damping": 3.0, "weight_decay": 0.2},
    ]
    return problem, KFAC(problem.model, loss=problem.criterion, groups=groups, **options)


@pytest.mark.parametrize("options", [{"lr": 0.1, "kl_clip": 0.01}, {}], ids=["fixed", "self-tuning"])
def test_every_group_keeps_what_it_decides(options: dict[str, Any], joined: Any) -> None:
    moved = []
    for switch in (lambda: None, joined):
        switch()
        problem, used = start(weight_decay=0.01, **options)
        steps = [truth.step(used, problem) for _ in range(5)]
        moved.append(steps)
    for one, other in zip(*moved, strict=True):
        for name in one:
            assert truth.relative_error(other[name], one[name]) < 1e-8, name


def test_layers_of_one_shape_are_solved_together_and_share_their_memory(joined: Any) -> None:
    joined()
    problem, used = start(lr=0.1, factor_interval=1, inverse_interval=1)
    for _ in range(2):
        truth.step(used, problem)
    states = used._curvature.states
    found = [[block.name for block in stack.blocks] for stack in used._curvature.method.stacks.of(states, INVERSES)]
    assert sorted(map(sorted, found)) == [["inner.0", "inner.1", "inner.2"], ["norms.0", "norms.1", "norms.2"]]
    for name in INVERSES:
        where = {states[block].solver[name].untyped_storage().data_ptr() for block in states if block.name in found[0]}
        assert len(where) == 1, name


def test_a_failed_inverse_is_that_of_its_own_layer(joined: Any) -> None:
    joined()
    problem, used = start(lr=0.1, factor_interval=100, inverse_interval=1, damping=1e-3)
    truth.step(used, problem)
    states = {block.name: state for block, state in used._curvature.states.items()}
    kept = states["inner.1"].solver["inverse_a"].clone()
    states["inner.1"].A[0, 2, 2] = -1.0
    with pytest.warns(UserWarning, match=r"no damped inverse of inner\.1:"):
        truth.step(used, problem)
    assert float(used.stats["failed_inverses"]) == 1
    assert torch.equal(states["inner.1"].solver["inverse_a"], kept)
    assert float(states["inner.1"].jitter) == 1 and float(states["inner.0"].jitter) == 0
    states["inner.1"].A[0, 2, 2] = 1.0
    truth.step(used, problem)
    assert float(used.stats["failed_inverses"]) == 0


class Stochastic(nn.Module):
    """Residual layers of which a step leaves out some."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.left_out: set[int] = set()

    def forward(self, value: Tensor) -> Tensor:
        for number, layer in enumerate(self.inner):
            if number not in self.left_out:
                value = value + torch.tanh(layer(value))
        return value


@pytest.mark.parametrize("options", [{"lr": 0.01}, {}], ids=["fixed", "self-tuning"])
def test_layers_that_a_step_leaves_out_do_not_hold_the_momentum_of_all(options: dict[str, Any], joined: Any) -> None:
    joined()
    torch.manual_seed(0)
    problem = Problem(Stochastic(), nn.MSELoss(), torch.randn(5, 8), torch.randn(5, 8))
    used = KFAC(problem.model, loss=problem.criterion, **options)
    size = sum(p.numel() * p.element_size() for p in problem.model.parameters())
    for count in range(12):
        problem.model.left_out = {(count * 5 + i) % 6 for i in range(count % 4)}
        truth.step(used, problem)
        held = {s["momentum_buffer"].untyped_storage() for s in used.state.values()}
        sizes = {storage.data_ptr(): storage.nbytes() for storage in held}
        assert sum(sizes.values()) == size, count
