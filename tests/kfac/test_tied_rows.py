"""Weights of several layers or calls, and layers that see no batch: examples stay apart and rows exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import Problem
from layer_rows import check_rows_are_example_gradients, dense, send
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC, rows
from kfac.find import find_blocks
from kfac.linalg import diagonal

DAMPING = 0.03


class Tied(nn.Module):
    """Two linear layers with one weight, with one bias, two or none."""

    def __init__(self, bias: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=bias != "none"), nn.Linear(4, 4, bias=bias != "none")
        self.two.weight = self.one.weight
        if bias == "same":
            self.two.bias = self.one.bias

    def forward(self, value: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(value)))


class TiedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
        self.two.weight = self.one.weight

    def forward(self, value: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(value)))


class TiedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.mix, self.two = nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias

    def forward(self, value: Tensor) -> Tensor:
        return self.two(torch.tanh(self.mix(self.one(value))))


class LanguageModel(nn.Module):
    """Token and position embeddings, a decoder that shares the tokens' weight."""

    def __init__(self, bias: bool = True, padding: int | None = None, positions: str = "flat") -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4, padding_idx=padding)
        self.positions = nn.Embedding(6, 4) if positions else None
        self.flat = positions == "flat"
        self.middle, self.norm, self.decoder = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=bias)
        self.decoder.weight = self.tokens.weight

    def forward(self, index: Tensor) -> Tensor:
        value = self.tokens(index)
        if self.positions is not None:
            where = torch.arange(index.shape[1])
            value = value + self.positions(where if self.flat else where[None])
        return self.decoder(self.norm(value + torch.tanh(self.middle(value))))


SHARED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    # name: (model, shape of its inputs, names of its blocks)
    "linear": (lambda: Tied("own"), (3, 4), ["one", "one.bias", "two"]),
    "linear-sequence": (lambda: Tied("own"), (3, 2, 4), ["one", "one.bias", "two"]),
    "linear-same-bias": (lambda: Tied("same"), (3, 4), ["one"]),
    "linear-no-bias": (lambda: Tied("none"), (3, 4), ["one"]),
    "conv": (TiedConv, (2, 4, 5, 6), ["one", "one.bias", "two"]),
    "norm": (TiedNorm, (3, 2, 4), ["one", "mix"]),
    "language": (lambda: LanguageModel(positions=""), (3, 5), ["tokens", "middle", "norm", "decoder"]),
    "language-padding": (
        lambda: LanguageModel(bias=False, padding=2, positions=""),
        (3, 5),
        ["tokens", "middle", "norm"],
    ),
}  # fmt: skip


def shared(name: str) -> tuple[nn.Module, Tensor]:
    build, shape, _ = SHARED[name]
    torch.manual_seed(5)
    model = build().double()
    return model, torch.randint(7, shape) if "language" in name else torch.randn(shape).double()


@pytest.mark.parametrize("name", list(SHARED))
def test_tied_weights_have_one_block_with_the_gradient_of_all_calls(name: str) -> None:
    model, inputs = shared(name)
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == SHARED[name][2]
    assert len({id(p) for block in blocks for p in block.parameters}) == len(list(model.parameters()))
    check_rows_are_example_gradients(model, inputs, inputs.shape[0])


def test_traces_of_a_tied_embedding_multiply_to_that_of_its_calls() -> None:
    model, inputs = shared("language")
    got, _, _, blocks = send(model, inputs)
    block = blocks[0]
    assert block.kind == "tied"
    a, g = got.layers[block]
    outer_a, count, outer_g = *rows.moment_a(block, a, g, None, got.vectors), rows.moment_g(block, a, g)
    product = diagonal(outer_a / count).sum(-1) * diagonal(outer_g).sum(-1)
    # The decoder's call, then the embedding's.
    halves = [slice(None, 5), slice(5, None)]
    means = [(a[:, :, h].square().sum(-1).mean() * g[:, 0, :, h].square().sum()) for h in halves]
    torch.testing.assert_close(product[0], sum(means))


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
@pytest.mark.parametrize("positions", ["flat", "batched"])
@pytest.mark.parametrize("max_factor_size", [8192, 5])
def test_a_language_model_with_tied_weights_trains(optimizer: Any, positions: str, max_factor_size: int) -> None:
    torch.manual_seed(6)
    model = LanguageModel(positions=positions).double()
    inputs = torch.randint(7, (8, 6))
    case = Problem(model, nn.CrossEntropyLoss(), inputs, inputs.roll(1, 1))
    used = optimizer(nn.Sequential(model), loss=case.criterion, max_factor_size=max_factor_size)
    losses = []
    for _ in range(25):
        used.zero_grad()
        loss = case.criterion(used_output(model, inputs), case.targets.flatten())
        loss.backward()
        used.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert set(used.curvature()) == {"0.tokens", "0.positions", "0.middle", "0.norm", "0.decoder"}


def used_output(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).flatten(0, 1)


@pytest.mark.parametrize("positions", ["flat", "batched"])
@pytest.mark.parametrize(("examples", "length"), [(3, 4), (8, 4), (3, 6), (4, 5)])
def test_positions_that_all_examples_share_leave_the_examples_apart(positions: str, examples: int, length: int) -> None:
    torch.manual_seed(7)
    model = LanguageModel(positions=positions).double()
    model.decoder.weight = nn.Parameter(model.decoder.weight.detach().clone())
    inputs = torch.randint(7, (examples, length))
    got, vectors, output, blocks = send(model, inputs)
    for block in blocks:
        a, g = got.layers[block]
        assert a.shape[1] == g.shape[2] == examples, block.name
    block = next(block for block in blocks if block.name == "positions")
    a, g = got.layers[block]
    for m, vector in enumerate(vectors):
        total = torch.autograd.grad(output, block.parameters, vector, retain_graph=True)
        own = torch.einsum("knti,kntj->kij", g[:, m], dense(block, a)) / examples**0.5
        torch.testing.assert_close(own, block.matrix(total))


@pytest.mark.parametrize("name", list(SHARED))
def test_ekfac_scales_have_the_exact_trace_of_tied_blocks(name: str) -> None:
    model, inputs = shared(name)
    model = nn.Sequential(model, nn.Tanh(), nn.Flatten())
    output = model(inputs)
    case = Problem(model, nn.MSELoss(), inputs, torch.randn_like(output))
    optimizer = truth.start(EKFAC, case, damping=DAMPING)
    before = {block: truth.ggn(case, block.parameters).trace() for block in optimizer.blocks}
    truth.step(optimizer, case)
    for block, trace in before.items():
        torch.testing.assert_close(optimizer._curvature.states[block].solver["scales"].sum(), trace)
