"""Sampled, exact and empirical Fisher: each is what it says, and the sampled one tends to the exact one."""

from __future__ import annotations

from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, LOSSES, WEIGHTED_LOSSES, Case, Problem
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC, curvature
from kfac.losses import curvature_of

SAMPLED = [f"mlp-{loss}" for loss in (*LOSSES, *WEIGHTED_LOSSES)] + [
    "convnet-stride",
    "tokens-mse",
    "pixelwise-classes",
]


@pytest.fixture(autouse=True)
def whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws of every example count here; batches in parts have a test of their own."""
    monkeypatch.setattr(curvature, "AVERAGED_EXAMPLES", 10**9)


def repeated(problem: Problem, times: int) -> Problem:
    """The same examples many times over: the exact factors stay put (up to the reduction), the draws multiply."""
    copies = problem.copy()
    copies.inputs = problem.inputs.repeat(times, *[1] * (problem.inputs.dim() - 1))
    copies.targets = problem.targets.repeat(times, *[1] * (problem.targets.dim() - 1))
    return copies


def gradient_factors(problem: Problem, **options: Any) -> dict[str, Tensor]:
    """G of each layer after one step of K-FAC that moves nothing."""
    optimizer = truth.start(KFAC, problem, damping=1.0, lr=0.0, **options)
    truth.step(optimizer, problem)
    return {name: layer.G for name, layer in optimizer.curvature().items()}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_factors_tend_to_the_exact_ones(name: str) -> None:
    """One row, many times: 4,000 independent draws must agree with the exact G within their own scatter."""
    problem = BY_NAME[name].make()
    problem.inputs, problem.targets = problem.inputs[:2], problem.targets[:2]
    many = repeated(problem, 2000)
    sampled = gradient_factors(many, fisher="sampled")
    times = 2000 if many.criterion.reduction == "sum" else 1
    for layer, (_, exact) in truth.factors(problem).items():
        error = truth.relative_error(sampled[layer] / times, exact.reshape(sampled[layer].shape))
        assert 0 < error < 0.1, layer


@pytest.mark.parametrize("name", ["mlp-mse-mean", "mlp-bce-mean", "mlp-ce-mean"])
def test_sampling_error_falls_with_the_square_root_of_the_draws(name: str) -> None:
    problem = BY_NAME[name].make()
    exact = truth.factors(problem)

    def error(times: int) -> float:
        total = 0.0
        for seed in range(20):
            found = gradient_factors(repeated(problem, times), fisher="sampled", generator=generator(seed))
            total += sum(truth.relative_error(found[layer], g[0]) ** 2 for layer, (_, g) in exact.items())
        return total**0.5

    assert 5 < error(4) / error(400) < 20  # 10 in expectation


def test_more_samples_a_step_scatter_less_about_the_same_mean() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    exact = truth.factors(problem)["2"][1][0]

    def draws(samples: int) -> Tensor:
        return torch.stack(
            [
                gradient_factors(problem.copy(), fisher="sampled", fisher_samples=samples, generator=generator(seed))[
                    "2"
                ]
                for seed in range(60)
            ]
        )

    few, many = draws(1), draws(16)
    assert 2 < (few - exact).norm() / (many - exact).norm() < 8  # 4 in expectation
    assert truth.relative_error(many.mean(0), exact) < 0.1


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
@pytest.mark.parametrize("name", ["mlp-mse-mean", "mlp-bce-sum", "mlp-ce-mean", "tokens-mse", "convnet-stride"])
def test_sampled_step_tends_to_the_exact_step(name: str, optimizer: Any) -> None:
    problem = BY_NAME[name].make()
    problem.inputs, problem.targets = problem.inputs[:2], problem.targets[:2]
    problem = repeated(problem, 1500)
    damping = 3.0 if problem.criterion.reduction == "mean" else 3000.0
    exact = truth.first_step(optimizer, problem.copy(), damping=damping * 0.03)
    sampled = truth.first_step(optimizer, problem, damping=damping * 0.03, fisher="sampled")
    every = truth.relative_error(truth.vector(sampled.values()), truth.vector(exact.values()))
    # The coarse curvature is of an eighth of the examples.
    assert 0 < every < (0.2 if optimizer is GKFAC else 0.1)


@pytest.mark.parametrize(
    "name", ["mlp-ce-mean", "mlp-ce-sum", "mlp-bce-mean", "mlp-bce-sum", "mlp-mse-mean", "mlp-mse-sum"]
)
def test_empirical_factors_follow_their_definition(name: str) -> None:
    problem = BY_NAME[name].make()
    count = len(problem.targets) if isinstance(problem.criterion, nn.CrossEntropyLoss) else problem.targets.numel()
    weight = 1.0 if problem.criterion.reduction == "sum" else 1.0 / count
    found = gradient_factors(problem.copy(), fisher="empirical")
    for layer, (_, expected) in truth.empirical_factors(problem, weight).items():
        assert truth.relative_error(found[layer], expected[0]) < 1e-8


def test_empirical_factors_depend_on_the_targets_and_the_others_do_not() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    other = problem.copy()
    other.targets = (other.targets + 1) % 3
    for fisher in ("exact", "sampled"):
        first, second = (gradient_factors(p.copy(), fisher=fisher) for p in (problem, other))
        assert all(torch.equal(first[name], second[name]) for name in first), fisher
    first, second = (gradient_factors(p.copy(), fisher="empirical") for p in (problem, other))
    assert truth.relative_error(first["0"], second["0"]) > 0.05


@pytest.mark.parametrize("outputs", [16, 17])
def test_auto_is_exact_up_to_sixteen_outputs_and_sampled_beyond(outputs: int) -> None:
    build = Case("wide", lambda: nn.Linear(3, outputs), LOSSES["ce-mean"], (5, 3))
    exact = truth.factors(build.make())[""][1][0]
    error = truth.relative_error(gradient_factors(build.make(), fisher="auto")[""], exact)
    assert error < 1e-8 if outputs <= 16 else error > 1e-2


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
def test_generator_decides_the_draws(optimizer: Any) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()

    def move(**options: Any) -> Tensor:
        return truth.vector(
            truth.first_step(optimizer, problem.copy(), damping=0.1, fisher="sampled", **options).values()
        )

    assert torch.equal(move(generator=generator(1)), move(generator=generator(1)))
    assert truth.relative_error(move(generator=generator(1)), move(generator=generator(2))) > 1e-3
    assert torch.equal(move(), move(generator=generator(0)))


def test_a_generator_of_another_device_gives_its_seed_to_the_device_s_own() -> None:
    """`cpu:0` stands for a device that is not the generator's."""

    def draws(given: torch.Generator | None, device: torch.device) -> Tensor:
        problem = BY_NAME["mlp-ce-mean"].make()
        used = KFAC(problem.model, loss=problem.criterion, generator=given)
        return torch.rand(5, generator=used._curvature.collector.generator(device))

    own, other = torch.device("cpu"), torch.device("cpu", 0)
    given = generator(1)
    torch.rand(3, generator=given)
    state = given.get_state()
    assert torch.equal(draws(given, other), torch.rand(5, generator=generator(1)))
    assert torch.equal(given.get_state(), state), "asking for a seed is no draw"
    assert torch.equal(draws(None, other), torch.rand(5, generator=generator(0)))
    assert torch.equal(draws(generator(1), own), torch.rand(5, generator=generator(1)))


def test_draws_differ_from_step_to_step() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    optimizer = truth.start(KFAC, problem, damping=1.0, lr=0.0, fisher="sampled", stat_decay=0.0)
    truth.step(optimizer, problem)
    first = optimizer.curvature()["2"].G.clone()
    truth.step(optimizer, problem)
    assert truth.relative_error(optimizer.curvature()["2"].G, first) > 1e-3


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
def test_ignored_rows_count_as_absent(optimizer: Any, fisher: str) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    problem.criterion = nn.CrossEntropyLoss(ignore_index=7)
    kept = problem.copy()
    kept.inputs, kept.targets = kept.inputs[:4], kept.targets[:4]
    problem.targets[4:] = 7
    # One fixed label for every class that a draw could give: compare the sampled form by its scale only.
    moves = truth.vector(truth.first_step(optimizer, problem, damping=0.1, fisher=fisher).values())
    expected = truth.vector(truth.first_step(optimizer, kept, damping=0.1, fisher=fisher).values())
    assert truth.relative_error(moves, expected) < (1.0 if fisher == "sampled" else 1e-8)


def test_ignored_rows_leave_the_input_factor_too() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    problem.criterion = nn.CrossEntropyLoss(ignore_index=-100)
    problem.targets[4:] = -100
    optimizer = truth.start(KFAC, problem, damping=0.1, lr=0.0)
    truth.step(optimizer, problem)
    first = problem.model.get_submodule("0")
    assert isinstance(first, nn.Linear)
    expected = truth.input_factor(first, problem.inputs[:4])[0]
    assert truth.relative_error(optimizer.curvature()["0"].A, expected) < 1e-8


def undrawn(criterion: nn.Module) -> nn.Module:
    """A criterion whose "sampled" vectors are its exact ones, so that no draw hides what else differs."""
    kind = curvature_of(criterion)
    for member in ("floor", "outputs", "exact", "empirical", "terms", "mask"):
        if hasattr(kind, member):
            setattr(criterion, member, getattr(kind, member))
    criterion.sampled = lambda output, target, samples, generator: kind.exact(output, target)  # type: ignore[assignment]
    return criterion


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC])
@pytest.mark.parametrize("name", ["mlp-mse-sum", "mlp-ce-mean", "convnet-plain", "tokens-mse", "pixelwise-classes"])
def test_many_examples_are_stood_for_by_one_of_every_few(
    name: str, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every example three times in a row, of which one makes the factors: they are those of all."""
    problem = BY_NAME[name].make()
    problem.inputs, problem.targets = (x.repeat_interleave(3, 0) for x in (problem.inputs, problem.targets))
    problem.criterion = undrawn(problem.criterion)
    count = len(problem.inputs)
    steps = []
    for enough in (10**9, count // 3):
        monkeypatch.setattr(curvature, "AVERAGED_EXAMPLES", 20 * enough)  # an average of decay 0.95 holds 20 batches
        monkeypatch.setattr(curvature, "MODEL_ROWS", 1)
        used = truth.start(optimizer, copy := problem.copy(), damping=0.1, fisher="sampled", stat_decay=0.95)
        assert used._curvature.collector.enough == enough
        steps.append(truth.vector(truth.step(used, copy).values()))
    assert truth.relative_error(*steps) < 1e-10


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC])
@pytest.mark.parametrize("name", ["mlp-mse-mean", "convnet-plain"])
def test_a_micro_batch_of_which_a_part_serves_counts_as_all_of_it(
    name: str, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that is too small for that, and of other inputs."""
    problem = BY_NAME[name].make()
    problem.criterion = undrawn(problem.criterion)
    inputs, targets, count = problem.inputs, problem.targets, len(problem.inputs)
    found = []
    for enough in (10**9, count):
        monkeypatch.setattr(curvature, "AVERAGED_EXAMPLES", 20 * enough)
        monkeypatch.setattr(curvature, "MODEL_ROWS", 1)
        used = truth.start(optimizer, copy := problem.copy(), damping=0.1, fisher="sampled", stat_decay=0.95)
        for part, share in ((slice(None), 3), (slice(None), 1)):
            x, y = (z[part].repeat_interleave(share, 0) for z in (inputs if share == 3 else -2 * inputs, targets))
            (copy.criterion(copy.model(x), y) * share / 4).backward()
        used.step()
        found.append([layer for state in used.curvature().values() for layer in (state.A, state.G)])
    for whole, part in zip(*found, strict=True):
        assert truth.relative_error(part, whole) < 1e-10


def test_a_part_of_the_examples_has_no_period_and_no_order_in_common_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six examples over and over, then sorted: a part of them has nearly equal numbers of each."""
    monkeypatch.setattr(curvature, "AVERAGED_EXAMPLES", 20 * 100)
    problem = BY_NAME["mlp-mse-mean"].make()
    exact = truth.factors(problem)
    orders = [
        repeated(problem, 100),
        Problem(
            problem.model, problem.criterion, *(x.repeat_interleave(100, 0) for x in (problem.inputs, problem.targets))
        ),
    ]
    for many in orders:
        many.criterion = undrawn(many.criterion)
        used = truth.start(KFAC, many, damping=1.0, lr=0.0, fisher="sampled", stat_decay=0.95)
        truth.step(used, many)
        for layer, (a, g) in exact.items():
            assert truth.relative_error(used.curvature()[layer].A, a.reshape(used.curvature()[layer].A.shape)) < 0.1
            assert truth.relative_error(used.curvature()[layer].G, g.reshape(used.curvature()[layer].G.shape)) < 0.1
