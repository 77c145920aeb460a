"""Claims about sending a vector back for a part of the examples: the same rows as by autograd, where a graph allows it.

Each case trains two equal networks, one with the chain switched off: all statistics and parameters have to agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from kfac import EKFAC, GKFAC, KFAC, Preconditioner, chain

N = 500  # examples; factors at a decay of 0.95 and the model take 125 each


def mlp(*activations: nn.Module, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for activation in activations:
        layers += [nn.Linear(6, 6, bias=bias), activation]
    return nn.Sequential(*layers, nn.Linear(6, 20, bias=bias))


class Custom(nn.Module):
    """A forward of its own."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: nn.Module):
        super().__init__()
        self.how = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def linears(count: int = 3) -> dict[str, nn.Module]:
    return {f"layer{i}": nn.Linear(6, 6 if i < count - 1 else 20) for i in range(count)}


def by_functions(net: Any, x: Tensor) -> Tensor:
    return net.layer2(torch.sigmoid(net.layer1(net.layer0(x).tanh())))


def residual(net: Any, x: Tensor) -> Tensor:
    y = net.layer0(x).tanh()
    return net.layer2(y + net.layer1(y).tanh())


def generated_weight(net: Any, x: Tensor) -> Tensor:
    y = net.layer0(x).tanh()
    return net.layer2(y @ (net.layer1(y).T @ y / N))


def recomputed(net: Any, x: Tensor) -> Tensor:
    y = net.layer1(checkpoint(torch.tanh, net.layer0(x), use_reentrant=False))
    return net.layer2(checkpoint(torch.sigmoid, y, use_reentrant=False))


def moved_away(net: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return by_functions(net, x)


def tokens(net: Any, x: Tensor) -> Tensor:
    return net.layer1(net.layer0(x.reshape(N, 3, 2).repeat(1, 1, 3)).tanh()).sum(1)


def mixed_examples(net: Any, x: Tensor) -> Tensor:
    y = net.layer0(x).tanh()
    return net.layer1((y.T @ y).tanh())[:1].expand(N, 20)


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "tanh": lambda: mlp(nn.Tanh(), nn.Tanh()),
    "relu, sigmoid": lambda: mlp(nn.ReLU(), nn.Sigmoid()),
    "relu in place": lambda: mlp(nn.ReLU(inplace=True), nn.Tanh()),
    "leaky relu, silu": lambda: mlp(nn.LeakyReLU(0.2), nn.SiLU()),
    "gelu": lambda: mlp(nn.GELU(), nn.GELU("tanh")),
    "linear, without bias": lambda: mlp(nn.Identity(), nn.Tanh(), bias=False),
    "activation last": lambda: nn.Sequential(*mlp(nn.Tanh()), nn.Tanh()),
    "functions": lambda: Custom(by_functions, **linears()),
    "flattened input": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten(), *mlp(nn.Tanh())),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Custom(residual, **linears()),
    "generated weight": lambda: Custom(generated_weight, **linears()),
    "recomputed activations": lambda: Custom(recomputed, **linears()),
    "moved away": lambda: Custom(moved_away, **linears()),
    "tokens": lambda: Custom(tokens, **linears(2)),
    "examples mixed": lambda: Custom(mixed_examples, **linears(2)),
    "norm": lambda: mlp(nn.LayerNorm(6), nn.Tanh()),
    "dropout": lambda: mlp(nn.Dropout(0.5), nn.Tanh()),
    "output reshaped": lambda: nn.Sequential(*mlp(nn.Tanh()), nn.Unflatten(1, (4, 5)), nn.Flatten()),
    "parametrized": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), weight_norm(nn.Linear(6, 6)), nn.Linear(6, 20)),
    "called twice": lambda: (lambda layer: nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 20)))(
        nn.Linear(6, 6)
    ),
}
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mse": nn.MSELoss,
    "mse-sum": lambda: nn.MSELoss(reduction="sum"),
    "bce": nn.BCEWithLogitsLoss,
    "classes": lambda: nn.CrossEntropyLoss(ignore_index=1),
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "fixed": lambda model, loss: KFAC(model, loss=loss, lr=0.1, factor_interval=1, inverse_interval=2),
    "self-tuning": lambda model, loss: KFAC(model, loss=loss, stat_decay=0.95),
    "ekfac": lambda model, loss: EKFAC(model, loss=loss, stat_decay=0.95),
    "gkfac": lambda model, loss: GKFAC(model, loss=loss, lr=0.1, factor_interval=1, inverse_interval=2),
}


def target_of(loss: nn.Module, output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.randint(output.shape[1], output.shape[:1], generator=generator)
    return torch.rand(output.shape, generator=generator, dtype=output.dtype)


def trained(
    build: Callable[[], nn.Module], make: Callable[..., Any], loss: nn.Module, monkeypatch: pytest.MonkeyPatch, on: bool
) -> tuple[list[Tensor], int]:
    """Parameters and factors after three steps, and how many vectors went back along a chain."""
    sent = 0
    find, pass_back = chain.find, chain.pass_back

    def counted(*args: Any) -> None:
        nonlocal sent
        sent += 1
        pass_back(*args)

    torch.manual_seed(0)
    model = build().double()
    optimizer = make(model, loss)
    x = torch.randn(N, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(chain, "find", find if on else lambda *_: None)
        patch.setattr(chain, "pass_back", counted)
        for _ in range(3):
            output = model(x)
            loss(output, target_of(loss, output)).backward()
            optimizer.step()
            optimizer.zero_grad()
    curvature = optimizer.curvature().values()
    return [*model.parameters(), *(x for layer in curvature for x in (layer.A, layer.G))], sent


def assert_same(
    build: Callable[[], nn.Module], make: Callable[..., Any], loss: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> int:
    found, sent = trained(build, make, loss, monkeypatch, True)
    expected, without = trained(build, make, loss, monkeypatch, False)
    assert without == 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    return sent


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_part_of_the_examples_has_the_rows_that_autograd_gives(
    optimizer: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert assert_same(CHAINS["tanh"], OPTIMIZERS[optimizer], LOSSES[loss](), monkeypatch) > 0


@pytest.mark.parametrize("network", CHAINS)
def test_layers_and_activations_in_a_row_are_a_chain(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assert_same(CHAINS[network], OPTIMIZERS["self-tuning"], nn.MSELoss(), monkeypatch) > 0


@pytest.mark.parametrize("network", OTHERS)
@pytest.mark.filterwarnings("ignore:.*without a curvature block")
def test_any_other_graph_is_left_to_autograd(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assert_same(OTHERS[network], OPTIMIZERS["self-tuning"], nn.MSELoss(), monkeypatch) == 0


def test_micro_batches_and_a_preconditioner_go_along_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loop:
        """Two micro-batches a step, in front of SGD."""

        def __init__(self, model: nn.Module, loss: nn.Module):
            self.preconditioner = Preconditioner(model, loss=loss)
            self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            self.calls = 0

        def step(self) -> None:
            self.calls += 1
            if self.calls % 2 == 0:
                self.preconditioner.step()
                self.optimizer.step()

        def zero_grad(self) -> None:
            if self.calls % 2 == 0:
                self.optimizer.zero_grad()

        def curvature(self) -> Any:
            return self.preconditioner.curvature()

    assert assert_same(CHAINS["tanh"], Loop, nn.BCEWithLogitsLoss(), monkeypatch) > 0
