"""k micro-batches are one batch: gradients, statistics and quadratic model, for all Fishers and all optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, LOSSES, Problem
from layer_cases import LayerCase, Mean, flat_head, numbers, tokens
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
FISHERS = pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
MODES: dict[str, dict[str, Any]] = {
    "fixed": {"lr": 0.1, "damping": 0.1, "factor_interval": 2, "inverse_interval": 2, "kl_clip": 1e-2},
    "self-tuning": {},
}
EVERY = pytest.mark.parametrize("mode", list(MODES))
SPLITS = pytest.mark.parametrize("sizes", [(4, 4), (1, 5, 2)], ids=["equal", "unequal"])


class KnownDraws(nn.Module):
    """Squared error whose "random" vectors travel with the targets: a split of the batch splits them too.

    Targets are [N, 2C]: what to reach, then the standard normal numbers of the sampled Fisher.
    """

    floor = 0.0

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def _c(self, output: Tensor) -> float:
        return 1 / output.numel() if self.reduction == "mean" else 1.0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target[:, : output.shape[1]]).square().sum() * self._c(output)

    def outputs(self, output: Tensor) -> int:
        return output[0].numel()

    def terms(self, output: Tensor) -> int:
        return output.numel()

    def exact(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        for column in torch.eye(output.shape[1], dtype=output.dtype):
            yield (2 * self._c(output)) ** 0.5 * column.expand_as(output)

    def sampled(self, output: Tensor, target: Tensor, samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        for _ in range(samples):
            yield (2 * self._c(output) / samples) ** 0.5 * target[:, output.shape[1] :]

    def empirical(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        yield 2 * (output - target[:, : output.shape[1]]) * self._c(output) ** 0.5

    def mask(self, output: Tensor, target: Tensor) -> None:
        return None


NETS = {
    "tokens": LayerCase(
        "tokens",
        lambda: nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), Mean(), nn.Linear(5, 3)),
        tokens(6, 8, 3),
    ),
    "conv": LayerCase(
        "conv",
        lambda: flat_head(nn.Conv2d(2, 4, 3, padding=1, groups=2), numbers(8, 2, 3, 3)),
        numbers(8, 2, 3, 3),
    ),
}


def make(net: str, reduction: str = "mean") -> Problem:
    problem = NETS[net].make()
    problem.criterion = KnownDraws(reduction)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        problem.targets = torch.randn(8, 6, dtype=torch.float64)
    return problem


def another_batch(problem: Problem, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(problem.inputs))
        problem.inputs = problem.inputs[order]
        problem.targets = torch.randn_like(problem.targets)


def micro_losses(problem: Problem, sizes: Sequence[int], mean: bool = True) -> Iterator[Tensor]:
    """The micro-batches' losses weighed so that they add up to that of the whole batch; lazily, one forward each."""
    for inputs, targets in zip(problem.inputs.split(list(sizes)), problem.targets.split(list(sizes)), strict=True):
        yield problem.criterion(problem.model(inputs), targets) * (len(inputs) / sum(sizes) if mean else 1)


def one_by_one(problem: Problem, sizes: Sequence[int]) -> None:
    for loss in micro_losses(problem, sizes):
        loss.backward()


def all_at_once(problem: Problem, sizes: Sequence[int]) -> None:
    torch.stack(list(micro_losses(problem, sizes))).sum().backward()


def backwards_in_reverse(problem: Problem, sizes: Sequence[int]) -> None:
    for loss in reversed(list(micro_losses(problem, sizes))):
        loss.backward()


def with_evaluation_between(problem: Problem, sizes: Sequence[int]) -> None:
    for loss in micro_losses(problem, sizes):
        look_around(problem)
        loss.backward()
        look_around(problem)


def look_around(problem: Problem) -> None:
    """An evaluation of other data, in every manner."""
    inputs, targets = problem.inputs.flip(0), problem.targets * 3
    with torch.no_grad():
        problem.criterion(problem.model(inputs), targets)
    with torch.inference_mode():
        problem.model(inputs)
    problem.model.eval()
    problem.criterion(problem.model(inputs), targets)  # with gradients, but no backward
    problem.model.train()


def assert_alike(whole: Problem, parts: Problem, when: Any, tolerance: float = 1e-9) -> None:
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert truth.relative_error(other, one) < tolerance, (when, name)


def compare(
    optimizer: Any,
    whole: Problem,
    parts: Problem,
    run: Callable[[Problem], None],
    steps: int = 4,
    **options: Any,
) -> None:
    """Train one on whole batches and the other by `run`, and compare weights and factors after every step."""
    first, second = (optimizer(problem.model, loss=problem.criterion, **options) for problem in (whole, parts))
    for count in range(steps):
        for problem in (whole, parts):
            another_batch(problem, seed=count)
        before = truth.vector(whole.model.parameters()).detach().clone()
        truth.step(first, whole)
        assert not torch.equal(truth.vector(whole.model.parameters()), before)
        second.zero_grad()
        run(parts)
        second.step()
        assert_alike(whole, parts, count)
        assert first.curvature().keys() == second.curvature().keys() and first.curvature()
        for name, layer in first.curvature().items():
            assert truth.relative_error(second.curvature()[name].A, layer.A) < 1e-9, (count, name)
            assert truth.relative_error(second.curvature()[name].G, layer.G) < 1e-9, (count, name)
        for key in ("damping", "alpha", "momentum", "kl_clip", "loss", "mean_curvature"):
            if key in first.stats:
                assert float(second.stats[key]) == pytest.approx(float(first.stats[key]), rel=1e-8, abs=1e-12), key


@OPTIMIZERS
@EVERY
@FISHERS
@SPLITS
@pytest.mark.parametrize("net", list(NETS))
def test_micro_batches_are_one_batch(optimizer: Any, mode: str, fisher: str, sizes: tuple[int, ...], net: str) -> None:
    whole, parts = make(net), make(net)
    compare(optimizer, whole, parts, lambda problem: one_by_one(problem, sizes), fisher=fisher, **MODES[mode])


@OPTIMIZERS
@EVERY
@pytest.mark.parametrize("run", [all_at_once, backwards_in_reverse, with_evaluation_between])
def test_the_order_of_forwards_and_backwards_and_what_comes_between_do_not_matter(
    optimizer: Any, mode: str, run: Callable[[Problem, Sequence[int]], None]
) -> None:
    compare(optimizer, make("tokens"), make("tokens"), lambda problem: run(problem, (3, 4, 1)), **MODES[mode])


@OPTIMIZERS
@EVERY
@FISHERS
def test_a_summed_loss_adds_up_without_weights(optimizer: Any, mode: str, fisher: str) -> None:
    def run(problem: Problem) -> None:
        for loss in micro_losses(problem, (3, 4, 1), mean=False):
            loss.backward()

    options = {"fisher": fisher, **MODES[mode]}
    compare(optimizer, make("tokens", "sum"), make("tokens", "sum"), run, **options)


@OPTIMIZERS
@EVERY
@FISHERS
@pytest.mark.parametrize("scale", [2.0**16])
def test_a_loss_scale_drops_out(optimizer: Any, mode: str, fisher: str, scale: float) -> None:
    """As a GradScaler does it: the loss is scaled before the backward and gradients are unscaled before the step."""
    parts = make("tokens")

    def run(problem: Problem) -> None:
        for loss in micro_losses(problem, (5, 3)):
            (loss * scale).backward()
        for parameter in problem.model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(scale)

    compare(optimizer, make("tokens"), parts, run, fisher=fisher, **MODES[mode])


@OPTIMIZERS
@EVERY
def test_evaluation_between_steps_changes_nothing(optimizer: Any, mode: str) -> None:
    """Bit for bit, sampled vectors and all."""
    clean, busy = (BY_NAME["convnet-groups"].make() for _ in range(2))
    used = [
        optimizer(problem.model, loss=problem.criterion, fisher="sampled", **MODES[mode]) for problem in (clean, busy)
    ]
    for _ in range(5):
        truth.step(used[0], clean)
        look_at = busy.inputs.flip(0)
        with torch.no_grad():
            busy.criterion(busy.model(look_at), busy.targets)
        busy.criterion(busy.model(look_at), busy.targets)
        truth.step(used[1], busy)
        for one, other in zip(clean.model.parameters(), busy.model.parameters(), strict=True):
            assert torch.equal(one, other)


@OPTIMIZERS
@EVERY
@pytest.mark.parametrize("kind", ["ce", "bce", "mse"])
def test_micro_batches_of_the_built_in_losses_with_exact_vectors(optimizer: Any, mode: str, kind: str) -> None:
    """The quadratic model of a self-tuned step samples: there only the statistics can be compared."""
    whole, parts = (BY_NAME[f"mlp-{kind}-mean"].make() for _ in range(2))
    first, second = (
        optimizer(problem.model, loss=problem.criterion, fisher="exact", **MODES[mode]) for problem in (whole, parts)
    )
    truth.step(first, whole)
    second.zero_grad()
    one_by_one(parts, (1, 3, 2))
    second.step()
    if mode == "fixed":
        assert_alike(whole, parts, kind)
    for name, layer in first.curvature().items():
        assert truth.relative_error(second.curvature()[name].A, layer.A) < 1e-9, name
        assert truth.relative_error(second.curvature()[name].G, layer.G) < 1e-9, name


@OPTIMIZERS
def test_ignored_targets_may_fall_unevenly_on_micro_batches(optimizer: Any) -> None:
    """Weights are then the shares of the targets that count, since those are what the mean divides by."""
    options = {"damping": 0.1, "fisher": "exact"}
    problems = [BY_NAME["pixelwise-classes"].make() for _ in range(2)]
    for problem in problems:
        problem.inputs = torch.cat([problem.inputs, 0.5 * problem.inputs.flip(1)])
        problem.targets = torch.cat([problem.targets, problem.targets.flip(1)])
        problem.targets[1] = -100
        problem.targets[3, :, 0] = -100
    whole, parts = problems
    counted = (whole.targets != -100).sum()
    first, second = truth.start(optimizer, whole, **options), truth.start(optimizer, parts, **options)
    truth.step(first, whole)
    second.zero_grad()
    for inputs, targets in zip(parts.inputs.split([2, 2]), parts.targets.split([2, 2]), strict=True):
        share = (targets != -100).sum() / counted
        (parts.criterion(parts.model(inputs), targets) * share).backward()
    second.step()
    assert_alike(whole, parts, "ignored")


def test_the_known_draws_are_a_loss_like_torch_s() -> None:
    """The criterion of these tests against MSELoss: value and exact factors."""
    ours = make("tokens")
    theirs = ours.copy()
    theirs.criterion, theirs.targets = LOSSES["mse-mean"](), ours.targets[:, :3]
    assert ours.loss().item() == pytest.approx(theirs.loss().item(), rel=1e-12)
    first = truth.first_step(KFAC, ours, damping=0.1)
    for name, move in truth.first_step(KFAC, theirs, damping=0.1).items():
        assert truth.relative_error(first[name], move) < 1e-10


def test_a_split_that_weighs_wrongly_would_be_seen() -> None:
    """Unequal micro-batches with equal weights are another loss: the comparison above can tell."""
    whole, parts = make("conv"), make("conv")

    def run(problem: Problem) -> None:
        for inputs, targets in zip(problem.inputs.split([6, 2]), problem.targets.split([6, 2]), strict=True):
            (problem.criterion(problem.model(inputs), targets) / 2).backward()

    with pytest.raises(AssertionError):
        compare(KFAC, whole, parts, run, **MODES["fixed"])
