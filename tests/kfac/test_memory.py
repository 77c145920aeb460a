"""Where rows would not fit into memory: exact vectors in turn give the same factors, and kept rows stay unbiased."""

from __future__ import annotations

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME
from torch import nn

from kfac import EKFAC, GKFAC, KFAC, collect
from kfac.optimizer import KroneckerOptimizer

CASES = ["mlp-ce-mean", "conv-groups-stride-dilation", "convnet-stride", "tokens-mse"]


@pytest.mark.parametrize("kind", [KFAC, EKFAC, GKFAC])
@pytest.mark.parametrize("name", CASES)
def test_vectors_in_turn_give_the_factors_of_all_at_once(
    name: str, kind: type[KroneckerOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for numbers in (2**24, 0):
        monkeypatch.setattr(collect, "AT_ONCE", numbers)
        monkeypatch.setattr(collect, "KEPT", numbers)
        problem = BY_NAME[name].make()
        optimizer = truth.start(kind, problem, damping=1.0, lr=0.0, fisher="exact")
        truth.step(optimizer, problem)
        found.append(optimizer.curvature())
    together, in_turn = found
    for layer in together:
        for side in ("A", "G"):
            torch.testing.assert_close(getattr(in_turn[layer], side), getattr(together[layer], side))


class Tied(nn.Module):
    """Tokens whose embedding is the decoder's weight too: rows a of it differ from vector to vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.decoder = nn.Linear(3, 5, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.tanh(self.embedding(tokens)))


def test_vectors_in_turn_give_the_factors_of_tied_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for numbers in (2**24, 0):
        monkeypatch.setattr(collect, "AT_ONCE", numbers)
        torch.manual_seed(0)
        model, criterion = Tied().double(), nn.CrossEntropyLoss()
        optimizer = KFAC(model, loss=criterion, lr=0.0, damping=1.0, fisher="exact")
        criterion(model(torch.randint(5, (7,))), torch.randint(5, (7,))).backward()
        optimizer.step()
        (layer,) = optimizer.curvature().values()
        found.append(torch.kron(layer.G[0], layer.A[0]))
    torch.testing.assert_close(*found)


def kept_curvature(name: str, seed: int) -> torch.Tensor:
    """The second moments of E-KFAC after one step, in the eigenbasis."""
    problem = BY_NAME[name].make()
    optimizer = truth.start(
        EKFAC, problem, damping=1.0, lr=0.0, fisher="exact", generator=torch.Generator().manual_seed(seed)
    )
    truth.step(optimizer, problem)
    layers = optimizer.state_dict()["curvature"]["layers"].values()
    return torch.cat([layer["solver.scales"].reshape(-1) for layer in layers])


@pytest.mark.parametrize("name", CASES)
def test_one_vector_with_random_signs_has_the_curvature_of_all_in_expectation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = kept_curvature(name, 0)
    monkeypatch.setattr(collect, "KEPT", 0)
    drawn = torch.stack([kept_curvature(name, seed) for seed in range(80)])
    error, scatter = drawn.mean(0) - exact, drawn.std(0) / len(drawn) ** 0.5
    assert (scatter > 0).any(), "nothing was drawn"
    assert (error.abs() <= 5 * scatter + 1e-9 * exact.max()).all()


def test_two_level_steps_from_one_vector_tend_to_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its coarse curvature is drawn, too; the decrease of the loss by a step stays of the same size."""
    losses = []
    for kept in (2**27, 0):
        monkeypatch.setattr(collect, "KEPT", kept)
        problem = BY_NAME["convnet-stride"].make()
        optimizer = GKFAC(problem.model, loss=problem.criterion)
        first = problem.loss().item()
        for _ in range(20):
            optimizer.zero_grad()
            problem.loss().backward()
            optimizer.step()
        losses.append(problem.loss().item() / first)
    all_vectors, one_vector = losses
    assert one_vector < 2 * all_vectors + 0.1
