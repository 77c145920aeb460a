"""How a step must answer to a change of units: of the loss, of its reduction, of a layer, of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ground_truth as truth
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, LOSSES, Case, Problem, mlp
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC

FISHERS = pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
SOLVERS = pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (KFAC, {"solver": "cholesky"}),
        (KFAC, {"solver": "eigh"}),
        (EKFAC, {}),
        (GKFAC, {}),
        (GKFAC, {"coarse_space": "constant"}),
    ],
    ids=["kfac-cholesky", "kfac-eigh", "ekfac", "gkfac", "gkfac-constant"],
)


def gradient_factors(problem: Problem, **options: Any) -> dict[str, Tensor]:
    optimizer = truth.start(KFAC, problem, damping=1.0, lr=0.0, **options)
    truth.step(optimizer, problem)
    return {name: layer.G for name, layer in optimizer.curvature().items()}


def scaled(kind: str, scale: float) -> nn.Module:
    """Criterion times a number, in the only ways that torch's own losses offer."""
    if kind == "ce":
        return nn.CrossEntropyLoss(weight=torch.full((3,), scale, dtype=torch.float64), reduction="sum")
    return nn.BCEWithLogitsLoss(weight=torch.tensor(scale, dtype=torch.float64))


@FISHERS
@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_curvature_scales_with_the_loss(kind: str, fisher: str) -> None:
    problem = BY_NAME["mlp-ce-sum" if kind == "ce" else "mlp-bce-mean"].make()
    larger = problem.copy()
    larger.criterion = scaled(kind, 3.0)
    plain, found = gradient_factors(problem, fisher=fisher), gradient_factors(larger, fisher=fisher)
    for name, g in plain.items():
        assert truth.relative_error(found[name], 3.0 * g) < 1e-8


@FISHERS
@pytest.mark.parametrize(("kind", "count"), [("ce", 6), ("bce", 18), ("mse", 18)])
def test_sum_is_the_mean_times_the_count(kind: str, count: int, fisher: str) -> None:
    mean = gradient_factors(BY_NAME[f"mlp-{kind}-mean"].make(), fisher=fisher)
    total = gradient_factors(BY_NAME[f"mlp-{kind}-sum"].make(), fisher=fisher)
    for name, g in mean.items():
        assert truth.relative_error(total[name], count * g) < 1e-8


@FISHERS
@SOLVERS
@pytest.mark.parametrize(("kind", "count"), [("ce", 6.0), ("mse", 18.0)])
def test_step_is_the_same_under_mean_and_sum_when_damping_scales_along(
    kind: str, count: float, optimizer: Any, options: Any, fisher: str
) -> None:
    mean = truth.first_step(optimizer, BY_NAME[f"mlp-{kind}-mean"].make(), damping=0.02, fisher=fisher, **options)
    total = truth.first_step(
        optimizer, BY_NAME[f"mlp-{kind}-sum"].make(), damping=0.02 * count, fisher=fisher, **options
    )
    for name, move in mean.items():
        assert truth.relative_error(total[name], move) < 1e-8


@SOLVERS
def test_relative_damping_makes_the_step_blind_to_the_unit_of_the_loss(optimizer: Any, options: Any) -> None:
    plain = truth.first_step(optimizer, BY_NAME["mlp-ce-sum"].make(), relative_damping=0.5, **options)
    for scale in (1e-10, 1e6):
        problem = BY_NAME["mlp-ce-sum"].make()
        problem.criterion = scaled("ce", scale)
        for name, move in truth.first_step(optimizer, problem, relative_damping=0.5, **options).items():
            assert truth.relative_error(move, plain[name]) < 1e-6, (scale, name)


@SOLVERS
def test_no_absolute_threshold_hides_in_the_inverse(optimizer: Any, options: Any) -> None:
    """A loss of tiny unit with damping in that unit: the same step, though every eigenvalue is far below 1e-10."""
    plain = truth.first_step(optimizer, BY_NAME["mlp-ce-sum"].make(), damping=0.05, **options)
    tiny = BY_NAME["mlp-ce-sum"].make()
    tiny.criterion = scaled("ce", 1e-14)
    for name, move in truth.first_step(optimizer, tiny, damping=0.05e-14, **options).items():
        assert truth.relative_error(move, plain[name]) < 1e-6, name


@SOLVERS
@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_pi_makes_the_damped_inverse_blind_to_a_unit_moved_from_one_factor_to_the_other(
    optimizer: Any, options: Any, scale: float
) -> None:
    """Inputs times s, weights over s, loss over s^2: A grows by s^2, G falls by s^2, so the step falls by s."""
    if optimizer is GKFAC:
        options = {**options, "coarse_space": "constant"}
    plain = Case("single", lambda: nn.Linear(4, 3, bias=False), LOSSES["ce-sum"], (6, 4)).make()
    changed = plain.copy()
    changed.inputs = plain.inputs * scale
    with torch.no_grad():
        next(changed.model.parameters()).div_(scale)
    changed.criterion = scaled("ce", scale**-2)
    move = truth.first_step(optimizer, plain, damping=0.04, **options)["weight"]
    other = truth.first_step(optimizer, changed, damping=0.04, **options)["weight"]
    assert truth.relative_error(other * scale, move) < 1e-6


class Between(nn.Module):
    """A linear layer with a fixed invertible map before and after: the same function in other coordinates."""

    def __init__(self, layer: nn.Linear, before: Tensor, shift: Tensor, after: Tensor) -> None:
        super().__init__()
        self.register_buffer("before", before)
        self.register_buffer("shift", shift)
        self.register_buffer("after", after)
        self.layer = nn.Linear(layer.in_features, layer.out_features).double()
        with torch.no_grad():
            weight = torch.linalg.solve(after, layer.weight) @ torch.linalg.inv(before)
            self.layer.weight.copy_(weight)
            self.layer.bias.copy_(torch.linalg.solve(after, layer.bias) - weight @ shift)

    def forward(self, value: Tensor) -> Tensor:
        return F.linear(self.layer(F.linear(value, self.before, self.shift)), self.after)  # type: ignore[arg-type]


def in_other_coordinates(model: nn.Sequential, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)

        def invertible(size: int) -> Tensor:
            return torch.eye(size, dtype=torch.float64) + 0.5 * torch.randn(size, size, dtype=torch.float64)

        return nn.Sequential(
            *[
                Between(
                    module,
                    invertible(module.in_features),
                    torch.randn(module.in_features, dtype=torch.float64),
                    invertible(module.out_features),
                )
                if isinstance(module, nn.Linear)
                else module
                for module in model
            ]
        )


@pytest.mark.parametrize("options", [{"solver": "cholesky"}, {"solver": "eigh"}], ids=["cholesky", "eigh"])
@pytest.mark.parametrize("loss", ["mse-mean", "ce-mean", "bce-mean"])
def test_update_is_blind_to_invertible_maps_of_inputs_and_hidden_units(loss: str, options: Any) -> None:
    """As damping vanishes; plain gradient descent, for comparison, moves the two nets apart at once."""
    plain = Case("net", lambda: mlp(3, 3, 4), LOSSES[loss], (60, 3)).make()  # well-conditioned factors
    assert isinstance(plain.model, nn.Sequential)
    changed = Problem(in_other_coordinates(plain.model, seed=1), plain.criterion, plain.inputs, plain.targets)
    start = plain.model(plain.inputs).detach()
    assert truth.relative_error(changed.model(plain.inputs), start) < 1e-10

    def reached(problem: Problem, move: Callable[[Problem], Any]) -> Tensor:
        problem = problem.copy()
        move(problem)
        return problem.model(problem.inputs).detach() - start

    def natural(problem: Problem) -> None:
        truth.first_step(KFAC, problem, damping=1e-16, lr=0.1, **options)

    def descend(problem: Problem) -> None:
        problem.loss().backward()
        torch.optim.SGD(problem.model.parameters(), lr=0.1).step()

    first, second = reached(plain, natural), reached(changed, natural)
    if loss.startswith("ce"):  # a shift of all logits has no curvature, so only damping decides about it
        first, second = ((start + change).log_softmax(1) - start.log_softmax(1) for change in (first, second))
    assert truth.relative_error(second, first) < 1e-4
    assert truth.relative_error(reached(changed, descend), reached(plain, descend)) > 0.1


@OPTIMIZERS
def test_one_and_the_same_step_whatever_the_order_of_the_examples(optimizer: Any) -> None:
    problem = BY_NAME["convnet-stride"].make()
    turned = problem.copy()
    turned.inputs, turned.targets = problem.inputs.flip(0), problem.targets.flip(0)
    moves = truth.first_step(optimizer, problem, damping=0.1)
    for name, move in truth.first_step(optimizer, turned, damping=0.1).items():
        assert truth.relative_error(move, moves[name]) < 1e-8, name
