"""What the criterion sees: several outputs of the network, outputs in containers, several calls of the criterion."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ground_truth as truth
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME
from torch import Tensor, nn

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


def drawn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TwoHeads(nn.Module):
    def __init__(self, out: int = 2) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, out), nn.Linear(5, out)

    def forward(self, value: Tensor) -> Any:
        value = torch.tanh(self.trunk(value))
        return self.one(value), F.softplus(self.two(value)) + 0.1


class WeightedSquares(nn.Module):
    """sum_n (f_n - y_n)^2 / (2 s_n) + log(s_n) / 2 over the batch, with f and s from the network: its own curvature.

    Vectors of the Fisher are (1/sqrt(s), 0) and (0, 1/(sqrt(2) s)) for each output number.
    """

    floor = None
    arguments = ((0, "input"), (2, "var"))

    def forward(self, input: Tensor, target: Tensor, var: Tensor) -> Tensor:
        return 0.5 * ((input - target) ** 2 / var + var.log()).mean()

    def outputs(self, output: tuple[Tensor, Tensor]) -> int:
        return 2 * output[0][0].numel()

    def exact(self, output: tuple[Tensor, Tensor], target: Tensor | None) -> Any:
        mean, var = output
        roots = var.rsqrt() / mean.numel() ** 0.5, 1 / (2**0.5 * var * mean.numel() ** 0.5)
        for which in range(2):
            for k in range(mean.shape[1]):
                vectors: list[Any] = [torch.zeros_like(mean), torch.zeros_like(mean)]
                vectors[which][:, k] = roots[which][:, k]
                yield tuple(vectors)

    def sampled(self, output: Any, target: Any, samples: int, generator: torch.Generator) -> Any:
        yield from self.exact(output, target)


@OPTIMIZERS
@pytest.mark.parametrize("by_name", [False, True], ids=["positional", "keywords"])
def test_a_criterion_of_two_network_outputs_has_the_curvature_of_both(optimizer: Any, by_name: bool) -> None:
    model, criterion = seeded(TwoHeads), WeightedSquares()
    inputs, targets = drawn(6, 4), drawn(6, 2, seed=6)
    used = optimizer(model, loss=criterion, **FIXED, fisher="exact")
    mean, var = model(inputs)
    loss = criterion(input=mean, var=var, target=targets) if by_name else criterion(mean, targets, var)
    loss.backward()
    used.step()
    curvature, count, var = used.curvature(), mean.numel(), var.detach()
    assert set(curvature) == {"trunk", "one", "two"}
    # The Fisher is 1 / s for the mean and 1 / (2 s^2) for the variance, which is softplus(z) + 0.1 of what "two" gives.
    slope = 1 - torch.exp(-(var - 0.1))
    assert truth.relative_error(curvature["one"].G, torch.diag((1 / var).sum(0)) / count) < 1e-10
    assert truth.relative_error(curvature["two"].G, torch.diag((slope**2 / (2 * var**2)).sum(0)) / count) < 1e-10


VARIANCES: dict[str, Any] = {
    "number": 1.5,
    "tensor": torch.full((6, 2), 1.5, dtype=torch.float64),
    "leaf": torch.full((6, 2), 1.5, dtype=torch.float64, requires_grad=True),
}


@pytest.mark.parametrize("var", VARIANCES.values(), ids=list(VARIANCES))
def test_an_argument_may_get_no_vector(var: Any) -> None:
    model, criterion = seeded(lambda: nn.Linear(4, 2)), WeightedSquares()
    criterion.forward = lambda input, target, var: 0.5 * ((input - target) ** 2 / var).mean()  # type: ignore[method-assign]
    got = []

    def exact(output: Any, target: Tensor) -> Any:
        got.append(output)
        for k in range(2):
            vector = torch.zeros_like(output[0])
            vector[:, k] = 1.0
            yield vector, None

    criterion.exact = exact  # type: ignore[method-assign]
    used = KFAC(model, loss=criterion, **FIXED, fisher="exact")
    criterion(model(drawn(6, 4)), drawn(6, 2), var).backward()
    used.step()
    assert torch.equal(used.curvature()[""].G, 6 * torch.eye(2, dtype=torch.float64)) and len(got) == 1
    assert got[0][1] is var if isinstance(var, float) else torch.equal(got[0][1], var)


class Output(OrderedDict):
    """As language-model libraries have it: a dictionary that is also read by attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass
class Record:
    extra: Tensor
    logits: Tensor


CONTAINERS: dict[str, Callable[[Tensor], tuple[Any, Callable[[Any], Tensor]]]] = {
    "tuple": lambda x: ((x, x.detach().sum()), lambda out: out[0]),
    "dict": lambda x: ({"logits": x, "n": 3}, lambda out: out["logits"]),
    "ordered dict": lambda x: (Output(loss=x.sum(), logits=x), lambda out: out.logits),
    "dataclass": lambda x: (Record(x.detach(), x), lambda out: out.logits),
    "nested": lambda x: ([{"a": [None, (x,)]}], lambda out: out[0]["a"][1][0]),
}


@pytest.mark.parametrize("functional", [False, True], ids=["criterion", "functional"])
@pytest.mark.parametrize("kind", list(CONTAINERS))
def test_outputs_in_containers(kind: str, functional: bool) -> None:
    class Contained(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, value: Tensor) -> Any:
            return CONTAINERS[kind](self.inner(value))[0]

    plain, other = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    contained = Contained(other.model)
    first = KFAC(plain.model, loss=plain.criterion, **FIXED)
    second = KFAC(contained, loss=other.criterion, **FIXED)
    for _ in range(2):
        truth.step(first, plain)
        second.zero_grad()
        out = contained(other.inputs)
        logits = CONTAINERS[kind](torch.zeros(()))[1](out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if functional else "error")
            (F.cross_entropy if functional else other.criterion)(logits, other.targets).backward()
            second.step()
        assert truth.relative_error(weights(contained), weights(plain.model)) < 1e-10


def test_forwards_first_with_reshaped_outputs_are_told_apart() -> None:
    """The criterion sees a view of the output, and two forwards wait for one backward."""
    problem = BY_NAME["tokens-mse"].make()
    parts = problem.copy()
    first, second = (KFAC(p.model, loss=p.criterion, **FIXED) for p in (problem, parts))
    truth.step(first, problem)
    outputs = [parts.model(inputs) for inputs in parts.inputs.split((2, 1))]
    losses = [
        parts.criterion(2 * (out / 2).flatten(0, 1), targets.flatten(0, 1)) * len(out) / 3
        for out, targets in zip(outputs, parts.targets.split((2, 1)), strict=True)
    ]
    sum(losses).backward()
    second.step()
    assert truth.relative_error(weights(parts.model), weights(problem.model)) < 1e-10


def test_a_loss_of_two_forwards_has_the_calls_of_both() -> None:
    """criterion(model(x) - model(z), y) is criterion(pair(x, z), y), where the layers are called twice in a forward."""

    class Pair(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            return self.inner(one) - self.inner(two)

    apart, together = (BY_NAME["mlp-mse-mean"].make() for _ in range(2))
    pair, other = Pair(together.model), drawn(*apart.inputs.shape)
    first, second = KFAC(apart.model, loss=apart.criterion, **FIXED), KFAC(pair, loss=together.criterion, **FIXED)
    apart.criterion(apart.model(apart.inputs) - apart.model(other), apart.targets).backward()
    together.criterion(pair(together.inputs, other), together.targets).backward()
    first.step()
    second.step()
    assert truth.relative_error(weights(apart.model), weights(pair)) < 1e-10


@OPTIMIZERS
@RULES
@pytest.mark.parametrize("name", ["mlp-ce-mean", "mlp-ce-sum"])
def test_mixed_targets_are_one_loss(optimizer: Any, options: Any, name: str) -> None:
    """Mixup: share * l(f, y) + (1 - share) * l(f, z) has the curvature of a cross entropy at the mixed target."""
    mixed, soft = (BY_NAME[name].make() for _ in range(2))
    share, other = 0.3, mixed.targets.roll(1)
    one, two = F.one_hot(mixed.targets, 3).double(), F.one_hot(other, 3).double()
    soft.targets = share * one + (1 - share) * two
    first, second = (optimizer(p.model, loss=p.criterion, fisher="exact", **options) for p in (mixed, soft))
    out = mixed.model(mixed.inputs)
    (share * mixed.criterion(out, mixed.targets) + (1 - share) * mixed.criterion(out, other)).backward()
    soft.loss().backward()
    first.step()
    second.step()
    for name, layer in second.curvature().items():
        assert truth.relative_error(first.curvature()[name].A, layer.A) < 1e-10
        assert truth.relative_error(first.curvature()[name].G, layer.G) < 1e-10
    if options is FIXED:
        assert truth.relative_error(weights(mixed.model), weights(soft.model)) < 1e-10
    else:
        assert float(first.stats["loss"]) == pytest.approx(float(second.stats["loss"]), rel=1e-10)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_an_auxiliary_loss_adds_its_curvature(scale: float) -> None:
    """l(f) + 0.3 l(h) of two heads: each head has its own share, the trunk the sum; a loss scale drops out."""

    class Logits(TwoHeads):
        def forward(self, value: Tensor) -> Any:
            value = torch.tanh(self.trunk(value))
            return self.one(value), self.two(value)

    model, criterion = seeded(lambda: Logits(3)), nn.CrossEntropyLoss()
    inputs, targets = drawn(6, 4), torch.arange(6) % 3
    curvature = {}
    for case in ("both", "one", "two"):
        used = KFAC(model, loss=criterion, fisher="exact", lr=0.0, **EVERY)
        one, two = model(inputs)
        losses = {"one": lambda: criterion(one, targets), "two": lambda: criterion(two, targets)}  # noqa: B023
        loss = losses["one"]() + 0.3 * losses["two"]() if case == "both" else losses[case]()
        model.zero_grad()
        (loss * scale).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        used.step()
        curvature[case] = {name: layer.G for name, layer in used.curvature().items()}
    assert truth.relative_error(curvature["both"]["one"], curvature["one"]["one"]) < 1e-10
    assert truth.relative_error(curvature["both"]["two"], 0.3 * curvature["two"]["two"]) < 1e-10
    expected = curvature["one"]["trunk"] + 0.3 * curvature["two"]["trunk"]
    assert truth.relative_error(curvature["both"]["trunk"], expected) < 1e-10


def test_a_loss_that_is_scaled_in_place_is_known_as_it_was() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    used = KFAC(problem.model, loss=problem.criterion)
    loss = problem.loss()
    value = loss.item()
    loss /= 4
    loss.backward()
    used.step()
    assert float(used.stats["loss"]) == pytest.approx(value, rel=1e-12)
