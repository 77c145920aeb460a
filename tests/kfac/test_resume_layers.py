"""Every kind of block goes on bit for bit after a save: in memory, through a file, in a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import LOSSES, Problem
from layer_cases import LayerCase, Mean, numbers, tokens
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC

OPTIMIZERS = {"KFAC": KFAC, "EKFAC": EKFAC, "GKFAC": GKFAC}
SETTINGS: dict[str, dict[str, Any]] = {
    "self-tuning": {"fisher": "sampled"},
    "fixed": {"lr": 0.05, "fisher": "sampled", "factor_interval": 2, "inverse_interval": 3, "weight_decay": 0.01},
    "reduced": {"sharing": "reduce", "max_factor_size": 4},
}


class Table(nn.Module):
    """Tokens to logits with one table at both ends, and a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(7, 5), nn.Linear(5, 5), nn.RMSNorm(5)
        self.scale = nn.Parameter(torch.ones(5))
        self.decode = nn.Linear(5, 7, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, value: Tensor) -> Tensor:
        return self.decode(self.scale * torch.tanh(self.norm(self.mix(self.embed(value))))).movedim(-1, 1)


NETS = {
    "tokens": LayerCase(
        "tokens",
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), Mean(), nn.Linear(5, 3)),
        tokens(7, 8, 3),
        LOSSES["ce-mean"],
    ),
    "conv": LayerCase(
        "conv",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 2),
            nn.GroupNorm(1, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(32, 3),
        ),
        numbers(8, 2, 3, 3),
        LOSSES["ce-mean"],
    ),
    "tied": LayerCase("tied", Table, tokens(7, 6, 4), LOSSES["ce-mean"]),
    "conv1d-3d": LayerCase(
        "conv1d-3d",
        lambda: nn.Sequential(
            nn.Conv3d(1, 3, 2), nn.InstanceNorm3d(3, affine=True), nn.Tanh(), nn.Flatten(2), nn.Conv1d(3, 2, 3), Mean(2)
        ),
        numbers(4, 1, 2, 3, 4),
    ),
}


def make(net: str, optimizer: str, setting: str) -> tuple[Problem, Any]:
    problem = NETS[net].make()
    return problem, OPTIMIZERS[optimizer](problem.model, loss=problem.criterion, **SETTINGS[setting])


def weights(problem: Problem) -> Tensor:
    return truth.vector(p.detach().clone() for p in problem.model.parameters())


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize(("setting", "steps"), [("self-tuning", 6), ("fixed", 1), ("fixed", 4), ("reduced", 3)])
@pytest.mark.parametrize("net", list(NETS))
def test_saved_and_loaded_training_goes_on_bit_for_bit(
    optimizer: str, setting: str, net: str, steps: int, tmp_path: Path
) -> None:
    straight, used = make(net, optimizer, setting)
    for count in range(2 * steps):
        if count == steps:
            torch.save({"model": straight.model.state_dict(), "optimizer": used.state_dict()}, tmp_path / "state")
            middle = weights(straight)
        truth.step(used, straight)
    resumed, other = make(net, optimizer, setting)
    saved = torch.load(tmp_path / "state", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for _ in range(steps):
        truth.step(other, resumed)
    assert torch.equal(weights(straight), weights(resumed))
    assert not torch.equal(weights(straight), middle), "nothing moved after the save"
    for name, layer in used.curvature().items():
        assert torch.equal(other.curvature()[name].A, layer.A), name
        assert torch.equal(other.curvature()[name].G, layer.G), name
    assert all(torch.equal(value, other.stats[key]) for key, value in used.stats.items())


RESUME = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import ground_truth as truth
from test_resume_layers import make, weights
problem, used = make(*sys.argv[4:])
saved = torch.load(sys.argv[2], weights_only=True)
problem.model.load_state_dict(saved["model"])
used.load_state_dict(saved["optimizer"])
for _ in range(4):
    truth.step(used, problem)
torch.save(weights(problem), sys.argv[3])
"""


@pytest.mark.parametrize("optimizer", ["GKFAC"])
def test_training_goes_on_bit_for_bit_in_a_new_process(optimizer: str, tmp_path: Path) -> None:
    names = ("tied", optimizer, "self-tuning")
    problem, used = make(*names)
    for count in range(8):
        if count == 4:
            torch.save({"model": problem.model.state_dict(), "optimizer": used.state_dict()}, tmp_path / "state")
        truth.step(used, problem)
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", RESUME, str(here), str(tmp_path / "state"), str(tmp_path / "end"), *names],
        check=True,
        cwd=here.parents[1],
    )
    assert torch.equal(torch.load(tmp_path / "end", weights_only=True), weights(problem))
