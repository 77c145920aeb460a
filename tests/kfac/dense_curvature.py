"""Small float64 problems and their dense curvature by autograd: what operators and diagnostics are held to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Case(NamedTuple):
    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor


NETS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "tanh mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        ),
        (2, 4, 4),
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.Flatten(), nn.Linear(12, 3)),
        (2, 4, 4),
    ),
}
LOSSES = {
    "cross entropy": (lambda r: nn.CrossEntropyLoss(reduction=r), "classes"),
    "cross entropy, weights, ignored class, smoothing": (
        lambda r: nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]), ignore_index=1, label_smoothing=0.1, reduction=r),
        "classes",
    ),
    "bce": (lambda r: nn.BCEWithLogitsLoss(reduction=r), "numbers"),
    "mse": (lambda r: nn.MSELoss(reduction=r), "numbers"),
    "poisson": (lambda r: nn.PoissonNLLLoss(reduction=r), "numbers"),
}


def case(net: str = "tanh mlp", loss: str = "cross entropy", reduction: str = "mean", n: int = 6) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build, shape = NETS[net]
        make, kind = LOSSES[loss]
        targets = torch.arange(n) % 3 if kind == "classes" else torch.rand(n, 3).double()
        return Case(build().double(), make(reduction).double(), torch.randn(n, *shape).double(), targets)


def dense_ggn(c: Case, parameters: list[Tensor] | None = None) -> Tensor:
    """Jᵀ H J from whole Jacobian and Hessian matrices."""
    named = {
        name: p
        for name, p in c.model.named_parameters()
        if (p.requires_grad if parameters is None else any(p is q for q in parameters))
    }
    model = copy.deepcopy(c.model)

    def outputs(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(named, values, strict=True)), (c.inputs,))

    values = tuple(p.detach() for p in named.values())
    z = outputs(*values).detach()
    columns = torch.autograd.functional.jacobian(outputs, values)
    jacobian = torch.cat([block.reshape(z.numel(), -1) for block in columns], 1)
    hessian = torch.autograd.functional.hessian(lambda o: c.criterion(o.view_as(z), c.targets), z.flatten())
    return jacobian.T @ hessian @ jacobian


def gradient(c: Case) -> list[Tensor]:
    model = copy.deepcopy(c.model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(c.criterion(model(c.inputs), c.targets), parameters))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
