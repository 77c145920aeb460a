"""Training loops of every shape: recomputed activations, several outputs and losses, gradients that are dropped."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ground_truth as truth
import pytest
import torch
import torch.nn.functional as F
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


def drawn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Activation checkpointing


class Blocks(nn.Module):
    """Two blocks with running statistics and a draw, which may be recomputed, and a head."""

    def __init__(self, how: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2)) for width in (4, 6)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, value: Tensor) -> Tensor:
        for block in self.blocks:
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
    assert set(used.curvature()) == {"0", "2"}


@OPTIMIZERS
@pytest.mark.parametrize("first", [False, True], ids=["all inside", "a layer before"])
def test_reentrant_recomputation_is_refused_in_one_line(optimizer: Any, first: bool) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)]
    problem.model = seeded(lambda: nn.Sequential(*layers))

    class Recomputed(nn.Module):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, value: Tensor) -> Tensor:
            start = 1 if first else 0
            value = self.inner[:start](value)
            value = checkpoint(self.inner[start:4], value.requires_grad_(), use_reentrant=True)
            return self.inner[4:](value)

    problem.model = Recomputed(problem.model)
    used = optimizer(problem.model, loss=problem.criterion)
    with pytest.raises(RuntimeError, match="use_reentrant=False") as error:
        problem.inputs = problem.inputs.clone()
        problem.loss().backward()
    assert "\n" not in str(error.value)
    del used


def test_layers_without_a_gradient_beside_recomputed_ones_are_no_mistake() -> None:
    """A target network of the same layers under no_grad, as in self-supervised training."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)

        def forward(self, value: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.head(self.trunk(value))
            return self.head(checkpoint(self.trunk, value, use_reentrant=False)) - target

    problem = BY_NAME["mlp-ce-mean"].make()
    problem.model = seeded(Siamese)
    used = KFAC(problem.model, loss=problem.criterion)
    problem.loss().backward()
    with torch.no_grad():
        problem.loss()
    used.step()
    assert set(used.curvature()) == {"trunk.0", "head"}


def test_checkpoint_sequential() -> None:
    plain, recomputed = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    recomputed.model = nn.Sequential(*recomputed.model)
    first, second = (KFAC(p.model, loss=p.criterion, **FIXED) for p in (plain, recomputed))
    truth.step(first, plain)
    output = checkpoint_sequential(recomputed.model, 2, recomputed.inputs, use_reentrant=False)
    recomputed.criterion(output, recomputed.targets).backward()
    second.step()
    assert truth.relative_error(weights(recomputed.model), weights(plain.model)) < 1e-10


# Several outputs, containers, several calls of the criterion


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


@pytest.mark.parametrize("var", [1.5, torch.full((6, 2), 1.5, dtype=torch.float64)], ids=["number", "tensor"])
def test_an_argument_that_needs_no_gradient_gets_no_vector(var: Any) -> None:
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
def test_mixed_targets_are_one_loss(optimizer: Any, options: Any) -> None:
    """Mixup: share * l(f, y) + (1 - share) * l(f, z) has the curvature of a cross entropy at the mixed target."""
    mixed, soft = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
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


# Gradients that are dropped, and those that are not


ORDERS = ["zero forward backward", "forward zero backward", "zero forward zero backward", "forward forward backward"]


@OPTIMIZERS
@RULES
@pytest.mark.parametrize("order", ORDERS)
def test_zero_grad_may_come_anywhere_before_the_backward(optimizer: Any, options: Any, order: str) -> None:
    plain, other = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    first, second = (optimizer(p.model, loss=p.criterion, **options) for p in (plain, other))
    for _ in range(3):
        first.zero_grad()
        plain.loss().backward()
        first.step()
        if "zero" not in order:
            second.zero_grad()
        for action in order.split():
            if action == "zero":
                second.zero_grad()
            elif action == "forward":
                loss = other.loss()
            else:
                loss.backward()
        second.step()
        assert torch.equal(weights(plain.model), weights(other.model))


def dropped_by_optimizer(used: Any, model: nn.Module) -> None:
    used.zero_grad()


def dropped_by_zeros(used: Any, model: nn.Module) -> None:
    used.zero_grad(set_to_none=False)


def dropped_by_model(used: Any, model: nn.Module) -> None:
    model.zero_grad()


DROPS = pytest.mark.parametrize("drop", [dropped_by_optimizer, dropped_by_zeros, dropped_by_model])


@OPTIMIZERS
@RULES
@DROPS
def test_statistics_go_with_gradients_that_are_dropped(optimizer: Any, options: Any, drop: Any) -> None:
    """A batch whose gradients are thrown away, as after an overflow, is as if it had never been."""
    clean, other = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    first, second = (optimizer(p.model, loss=p.criterion, fisher="exact", **options) for p in (clean, other))
    for _ in range(2 if options is FIXED else 1):  # when self-tuning, the batch has drawn vectors by then
        for problem, used in ((clean, first), (other, second)):
            used.zero_grad()
            if problem is other:
                (1e4 * problem.criterion(problem.model(5 * problem.inputs), problem.targets)).backward()
                drop(used, problem.model)
            for inputs, targets in zip(problem.inputs.split(3), problem.targets.split(3), strict=True):
                (problem.criterion(problem.model(inputs), targets) / 2).backward()
            used.step()
        for name, layer in first.curvature().items():
            assert truth.relative_error(second.curvature()[name].G, layer.G) < 1e-12
    if options is FIXED:
        assert truth.relative_error(weights(other.model), weights(clean.model)) < 1e-10


# Derivatives of the user's own


def test_an_attack_before_the_training_step_leaves_no_trace() -> None:
    """Gradients of the loss by the inputs, and a forward whose backward never comes."""
    clean, other = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    first, second = (KFAC(p.model, loss=p.criterion, fisher="exact", **FIXED) for p in (clean, other))
    for _ in range(2):
        inputs = (3 * other.inputs).requires_grad_()
        torch.autograd.grad(other.criterion(other.model(inputs), other.targets), inputs)
        other.loss()
        truth.step(first, clean)
        truth.step(second, other)
        assert torch.equal(weights(clean.model), weights(other.model))


@OPTIMIZERS
@RULES
def test_a_gradient_penalty_is_differentiated_through(optimizer: Any, options: Any) -> None:
    """Double backward: gradients are those without the optimizer, and the batch counts once."""
    alone, watched = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    used = optimizer(watched.model, loss=watched.criterion, **options)
    for problem in (alone, watched):
        inputs = problem.inputs.clone().requires_grad_()
        loss = problem.criterion(problem.model(inputs), problem.targets)
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + slope.square().sum()).backward()
    for own, other in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad)
    used.step()
    plain = BY_NAME["mlp-ce-mean"].make()
    reference = optimizer(plain.model, loss=plain.criterion, **options)
    truth.step(reference, plain)
    for name, layer in reference.curvature().items():
        assert truth.relative_error(used.curvature()[name].G, layer.G) < 1e-12


def test_a_graph_that_is_retained_counts_once() -> None:
    plain, other = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    first, second = (KFAC(p.model, loss=p.criterion, **FIXED) for p in (plain, other))
    truth.step(first, plain)
    loss = other.loss()
    loss.backward(retain_graph=True)
    other.model.zero_grad()
    loss.backward()
    second.step()
    for name, layer in first.curvature().items():
        assert torch.equal(second.curvature()[name].G, layer.G)


@RULES
def test_function_transforms_and_traces_run_while_statistics_are_due(options: Any) -> None:
    clean, other = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    first, second = (KFAC(p.model, loss=p.criterion, **options) for p in (clean, other))
    model, x, y = other.model, other.inputs, other.targets

    def loss_of(parameters: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return other.criterion(torch.func.functional_call(model, parameters, (one[None],)), label[None])

    parameters = dict(model.named_parameters())
    for _ in range(2):
        per_example = torch.func.vmap(torch.func.grad(loss_of), (None, 0, 0))(parameters, x, y)
        assert per_example["0.weight"].shape[0] == len(x)
        torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
        torch.func.jvp(model, (x,), (x,))
        torch.autograd.functional.jacobian(model, x, vectorize=True)
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))
        torch.export.export(model, (x,))
        truth.step(first, clean)
        truth.step(second, other)
        assert torch.equal(weights(clean.model), weights(model))


def test_functional_call_with_the_models_own_parameters_is_a_training_step() -> None:
    plain, other = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    first, second = (KFAC(p.model, loss=p.criterion, **FIXED) for p in (plain, other))
    truth.step(first, plain)
    output = torch.func.functional_call(other.model, dict(other.model.named_parameters()), (other.inputs,))
    other.criterion(output, other.targets).backward()
    second.step()
    assert torch.equal(weights(plain.model), weights(other.model))


# Other guests


def test_hooks_of_others_that_replace_outputs_belong_to_the_network() -> None:
    """Whether set before or after ours, at a layer or at the root."""
    scaled, watched = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))

    class Scaled(nn.Module):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, value: Tensor) -> Tensor:
            return 3 * self.inner[2](self.inner[1](2 * self.inner[0](value)))

    early = watched.model[0].register_forward_hook(lambda module, args, output: 2 * output)
    first = KFAC(Scaled(scaled.model), loss=scaled.criterion, **FIXED)
    second = KFAC(watched.model, loss=watched.criterion, **FIXED)
    late = watched.model.register_forward_hook(lambda module, args, output: 3 * output)
    wrapped = Scaled(scaled.model)
    del first
    first = KFAC(wrapped, loss=scaled.criterion, **FIXED)
    for _ in range(2):
        scaled.criterion(wrapped(scaled.inputs), scaled.targets).backward()
        watched.loss().backward()
        for used in (first, second):
            used.step()
            used.zero_grad()
        assert truth.relative_error(weights(watched.model), weights(scaled.model)) < 1e-12
    early.remove()
    late.remove()


def test_no_hook_is_there_at_steps_where_nothing_is_due() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    used = KFAC(problem.model, loss=problem.criterion, lr=0.05, factor_interval=3)
    counts = []
    for _ in range(5):
        counts.append(sum(len(module._forward_hooks) for module in problem.model.modules()) > 0)
        truth.step(used, problem)
    assert counts == [True, False, False, True, False]


def test_a_graph_is_freed_with_its_loss() -> None:
    """No cycle through the autograd graph keeps activations until the garbage collector comes."""
    for criterion_called in (True, False):
        problem = BY_NAME["mlp-ce-mean"].make()
        used = KFAC(problem.model, loss=problem.criterion, **FIXED)
        probe = nn.Identity()
        freed: list[Any] = []
        probe.register_forward_hook(lambda module, args, output: freed.append(weakref.ref(output)))  # noqa: B023
        problem.model.insert(1, probe)
        gc.collect()
        gc.disable()
        try:
            out = problem.model(problem.inputs * 1)
            loss = (problem.criterion if criterion_called else F.cross_entropy)(out, problem.targets)
            loss.backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                used.step()
            del out, loss
            assert all(tensor() is None for tensor in freed) and freed
        finally:
            gc.enable()
