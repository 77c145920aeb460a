"""Weights that serve many times: over positions, over calls, over modules; and weights that no hook can see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ground_truth as truth
import layer_truth as layers
import pytest
import torch
from cases import LOSSES, Case, Problem, mlp
from layer_cases import LayerCase, Mean, flat_head, numbers, tokens
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC

DAMPING = 0.03
OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
TUNING = pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
SOLVERS = pytest.mark.parametrize(
    ("solver", "expected_step"),
    [("cholesky", layers.factored_step), ("eigh", layers.kronecker_step)],
    ids=["cholesky", "eigh"],
)
EXACT = pytest.mark.parametrize(
    ("optimizer", "options"), [(KFAC, {"solver": "eigh"}), (EKFAC, {})], ids=["kfac-eigh", "ekfac"]
)
FIXED: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "factor_interval": 1, "inverse_interval": 1}


def named(cases: list[LayerCase]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


# Linear nets that pool their positions before squared error: reduce is exact there (2311.00636, section 3.2).
POOLED = [
    LayerCase("mean", lambda: nn.Sequential(nn.Linear(4, 5), Mean(), nn.Linear(5, 3)), numbers(6, 4, 4)),
    LayerCase("sum", lambda: nn.Sequential(nn.Linear(4, 5), Mean(total=True), nn.Linear(5, 3)), numbers(6, 4, 4)),
    LayerCase(
        "mean-deep",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4, bias=False), Mean(), nn.Linear(4, 2)),
        numbers(5, 3, 4),
        LOSSES["mse-sum"],
    ),
    LayerCase("mean-4d", lambda: nn.Sequential(nn.Linear(4, 5), Mean((1, 2)), nn.Linear(5, 3)), numbers(5, 2, 3, 4)),
    LayerCase(
        "conv2d",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Mean((2, 3)), nn.Linear(4, 3)),
        numbers(5, 2, 4, 3),
    ),
    LayerCase(
        "conv1d-stride-circular",
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, padding=1, stride=2, padding_mode="circular"), nn.AdaptiveAvgPool1d(1), nn.Flatten()
        ),
        numbers(5, 2, 6),
    ),
    LayerCase(
        "transpose2d",
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), Mean((2, 3)), nn.Linear(3, 2)),
        numbers(5, 2, 2, 3),
    ),
]

# Nothing is exact here: the formulas are the claim.
GENERAL = [
    LayerCase(
        "tokens",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4), nn.Tanh(), Mean(), nn.Linear(4, 3)),
        numbers(6, 3, 4),
        LOSSES["ce-mean"],
    ),
    LayerCase(
        "images",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2, stride=2),
            nn.Tanh(),
            nn.Conv2d(4, 4, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4 * 1 * 2, 3),
        ),
        numbers(5, 2, 4, 5),
        LOSSES["ce-mean"],
    ),
    LayerCase(
        "transposed",
        lambda: flat_head(nn.ConvTranspose1d(2, 3, 3, stride=2), numbers(5, 2, 3)),
        numbers(5, 2, 3),
        LOSSES["bce-mean"],
    ),
]


# Positions


@named(POOLED)
def test_ground_truth_reduce_is_the_ggn_block_and_expand_is_not(case: LayerCase) -> None:
    problem = case.make()
    worst = 0.0
    for name, (a, g) in layers.factors(problem, "reduce").items():
        module = problem.model.get_submodule(name)
        exact = truth.ggn(problem, layers.own(module))
        for index, a_k, g_k in zip(layers.order(module), a, g, strict=True):
            assert truth.relative_error(torch.kron(g_k, a_k), exact[index][:, index]) < 1e-12, name
        a, g = layers.factors(problem, "expand")[name]
        index = layers.order(module)[0]
        worst = max(worst, truth.relative_error(torch.kron(g[0], a[0]), exact[index][:, index]))
    assert worst > 0.05


@EXACT
@named(POOLED)
def test_reduce_makes_the_damped_newton_step_of_a_pooled_linear_net(
    case: LayerCase, optimizer: Any, options: Any
) -> None:
    problem = case.make()
    moves = truth.first_step(optimizer, problem.copy(), damping=DAMPING, sharing="reduce", **options)
    for name, module in layers.trained(problem.model).items():
        expected = layers.newton(problem, module, DAMPING)
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < 1e-8, name


@SOLVERS
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@named(GENERAL)
def test_steps_follow_the_formula_of_each_sharing(
    case: LayerCase, sharing: str, solver: str, expected_step: Callable[..., Tensor]
) -> None:
    problem = case.make()
    moves = truth.first_step(KFAC, problem.copy(), damping=DAMPING, sharing=sharing, solver=solver)
    for name, (a, g) in layers.factors(problem, sharing).items():
        expected = expected_step(problem, name, a, g, DAMPING)
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < 1e-8, name


@pytest.mark.parametrize(
    ("sharing", "reduced"),
    [
        ({"0": "reduce"}, ["0"]),
        ({"*": "reduce"}, ["0", "2", "5"]),
        ({"[02]": "reduce"}, ["0", "2"]),
        ({"2": "expand", "*": "reduce"}, ["0", "5"]),
        ({"0": "reduce", "2": "expand"}, ["0"]),
        ({}, []),
    ],
    ids=str,
)
def test_sharing_is_chosen_layer_by_layer_by_globs_the_first_that_fits(
    sharing: dict[str, str], reduced: list[str]
) -> None:
    problem = GENERAL[0].make()
    moves = truth.first_step(KFAC, problem.copy(), damping=DAMPING, sharing=sharing, solver="cholesky")
    for name in ("0", "2", "5"):
        a, g = layers.factors(problem, "reduce" if name in reduced else "expand")[name]
        expected = layers.factored_step(problem, name, a, g, DAMPING)
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < 1e-8, name


@OPTIMIZERS
def test_without_shared_positions_both_are_the_same(optimizer: Any) -> None:
    problem = Case("plain", lambda: mlp(4, 5, 3), LOSSES["ce-mean"], (6, 4)).make()
    expanded = truth.first_step(optimizer, problem.copy(), damping=DAMPING, sharing="expand")
    reduced = truth.first_step(optimizer, problem.copy(), damping=DAMPING, sharing="reduce")
    for name, move in expanded.items():
        assert truth.relative_error(reduced[name], move) < 1e-12


@OPTIMIZERS
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_summary_says_how_each_layer_shares(optimizer: Any, sharing: str) -> None:
    problem = GENERAL[0].make()
    used = truth.start(optimizer, problem, damping=0.1, sharing={"0": sharing})
    truth.step(used, problem)
    line = next(line for line in str(used.summary()).splitlines() if line.strip().startswith("0"))
    assert sharing in line, line


@pytest.mark.parametrize("sharing", ["both", None, {"0": "both"}, {"0": 3}, ["reduce"]], ids=repr)
def test_an_unknown_sharing_is_refused_in_one_line(sharing: Any) -> None:
    problem = GENERAL[0].make()
    with pytest.raises(ValueError) as caught:
        KFAC(problem.model, loss=problem.criterion, sharing=sharing)
    message = str(caught.value)
    assert "sharing" in message and "reduce" in message and "\n" not in message


# Calls


class Recurrent(nn.Module):
    """One layer called three times in a row, and another one on each result."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, value: Tensor) -> Tensor:
        outputs = []
        for _ in range(3):
            value = torch.tanh(self.cell(value))
            outputs.append(self.head(value))
        return torch.cat(outputs, dim=1)


class Split(nn.Module):
    """A layer called once for each position of [N, T, d]: another way to write one call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: Tensor) -> Tensor:
        return torch.stack([self.layer(part) for part in value.unbind(1)], dim=1)


RECURRENT = LayerCase("recurrent", Recurrent, numbers(6, 4), LOSSES["bce-mean"])


@SOLVERS
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_further_calls_of_a_layer_are_further_positions(
    sharing: str, solver: str, expected_step: Callable[..., Tensor]
) -> None:
    problem = RECURRENT.make()
    moves = truth.first_step(KFAC, problem.copy(), damping=DAMPING, sharing=sharing, solver=solver)
    for name, (a, g) in layers.factors(problem, sharing).items():
        expected = expected_step(problem, name, a, g, DAMPING)
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < 1e-8, name


@OPTIMIZERS
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["linear", "norm", "embedding"])
def test_calls_one_by_one_are_one_call_on_all_positions(optimizer: Any, sharing: str, kind: str) -> None:
    build, inputs = {
        "linear": (lambda: nn.Linear(4, 5), numbers(6, 3, 4)),
        "norm": (lambda: nn.LayerNorm(5), numbers(6, 3, 5)),
        "embedding": (lambda: nn.Embedding(7, 5), tokens(7, 6, 3)),
    }[kind]
    case = LayerCase("net", lambda: nn.Sequential(build(), nn.Tanh(), Mean(), nn.Linear(5, 3)), inputs)  # type: ignore[operator]
    whole, split = case.make(), case.make()
    assert isinstance(split.model, nn.Sequential)
    split.model[0] = Split(split.model[0])
    moves = truth.first_step(optimizer, whole, damping=DAMPING, sharing=sharing)
    found = truth.first_step(optimizer, split, damping=DAMPING, sharing=sharing)
    for (name, move), other in zip(moves.items(), found.values(), strict=True):
        assert truth.relative_error(other, move) < 1e-9, name


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC])
def test_a_norm_called_twice_moves_by_its_exact_blocks(optimizer: Any) -> None:
    """All calls of an example are summed before squaring, so the cross terms are in."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, value: Tensor) -> Tensor:
            return self.head(torch.tanh(self.norm(torch.tanh(self.norm(value)))))

    problem = LayerCase("twice", Twice, numbers(6, 4), LOSSES["ce-mean"]).make()
    moves = truth.first_step(optimizer, problem.copy(), damping=DAMPING)
    expected = layers.newton(problem, problem.model.get_submodule("norm"), DAMPING)
    assert truth.relative_error(truth.block_move(moves, "norm"), expected) < 1e-8


# Ties


class Tied(nn.Module):
    """Two modules with one weight, in a row."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=bias), nn.Linear(4, 4, bias=bias)
        self.second.weight = self.first.weight

    def forward(self, value: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(value)))


class Untied(nn.Module):
    """The same function by two calls of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        return self.first(torch.tanh(self.first(value)))


@OPTIMIZERS
@TUNING
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_weight_tied_between_two_layers_is_one_layer_called_twice(optimizer: Any, tuned: bool, sharing: str) -> None:
    tied = LayerCase("tied", Tied, numbers(6, 4)).make()
    twice = LayerCase("twice", Untied, numbers(6, 4)).make()
    with torch.no_grad():
        twice.model.get_parameter("first.weight").copy_(tied.model.get_parameter("first.weight"))
    twice.inputs, twice.targets = tied.inputs, tied.targets
    options = {"sharing": sharing, "fisher": "exact", **({} if tuned else FIXED)}
    first, second = (optimizer(p.model, loss=p.criterion, **options) for p in (tied, twice))
    for _ in range(4):
        move, other = truth.step(first, tied), truth.step(second, twice)
        assert truth.relative_error(move["first.weight"], other["first.weight"]) < 1e-8
    assert len(first.curvature()) == 1


@OPTIMIZERS
@TUNING
def test_a_tied_weight_with_two_biases_trains_every_parameter_once(optimizer: Any, tuned: bool) -> None:
    problem = LayerCase("tied", lambda: Tied(bias=True), numbers(12, 4)).make()
    used = optimizer(problem.model, loss=problem.criterion, **({} if tuned else FIXED))
    held = [id(p) for group in used.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == 3
    start = problem.loss().item()
    for _ in range(15):
        moves = truth.step(used, problem)
        assert all(move.any() and move.isfinite().all() for move in moves.values())
    assert problem.loss().item() < start


class Language(nn.Module):
    """Tokens to logits with one table at both ends."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.decode = nn.Linear(5, 7, bias=False)
        if tied:
            self.decode.weight = self.embed.weight

    def forward(self, value: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.mix(self.embed(value)))).movedim(-1, 1)


def language(*shape: int) -> Problem:
    return LayerCase("language", Language, tokens(7, *shape), LOSSES["ce-mean"]).make()


@OPTIMIZERS
@TUNING
def test_an_embedding_tied_to_the_decoder_trains(optimizer: Any, tuned: bool) -> None:
    problem = language(8, 4)
    problem.targets = (problem.inputs + 1) % 7  # a rule to learn
    used = optimizer(problem.model, loss=problem.criterion, **({} if tuned else FIXED))
    held = [id(p) for group in used.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == 3
    start = problem.loss().item()
    for _ in range(60):
        truth.step(used, problem)
    assert problem.loss().item() < 0.6 * start
    assert used.param_groups[0]["params"][0] is problem.model.get_parameter("embed.weight"), "it has no block"


def own_trace(problem: Problem) -> float:
    """Trace of the curvature of the table's two uses, each by itself, from dense matrices of an untied copy."""
    untied = problem.copy()
    untied.model = Language(tied=False).double()
    with torch.no_grad():
        state = problem.model.state_dict()
        untied.model.load_state_dict(state)
    uses = [untied.model.get_parameter(name) for name in ("embed.weight", "decode.weight")]
    return sum(float(truth.ggn(untied, [weight]).trace()) for weight in uses)


def test_the_block_of_a_tied_embedding_has_the_trace_of_both_uses() -> None:
    """One example and one token: nothing is averaged that could hide a wrong scale of one use against the other."""
    problem = language(1, 1)
    used = truth.start(KFAC, trained := problem.copy(), damping=DAMPING)
    truth.step(used, trained)
    tied = next(layer for name, layer in used.curvature().items() if "mix" not in name)
    assert truth.block_trace(tied) == pytest.approx(own_trace(problem), rel=1e-8)


@OPTIMIZERS
def test_micro_batches_are_one_batch_for_a_tied_embedding_too(optimizer: Any) -> None:
    whole, parts = language(6, 3), language(6, 3)
    first, second = (truth.start(optimizer, problem, damping=DAMPING) for problem in (whole, parts))
    truth.step(first, whole)
    second.zero_grad()
    for inputs, targets in zip(parts.inputs.split([1, 3, 2]), parts.targets.split([1, 3, 2]), strict=True):
        (parts.criterion(parts.model(inputs), targets) * (len(inputs) / 6)).backward()
    second.step()
    for name, layer in first.curvature().items():
        assert truth.relative_error(second.curvature()[name].A, layer.A) < 1e-9, name
        assert truth.relative_error(second.curvature()[name].G, layer.G) < 1e-9, name


# Drawn vectors


@pytest.mark.parametrize(
    "case",
    [
        GENERAL[1],
        LayerCase(
            "tokens",
            lambda: nn.Sequential(
                nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 4), nn.Tanh(), Mean(), nn.Linear(4, 3)
            ),
            tokens(5, 6, 3),
            LOSSES["ce-mean"],
        ),
        LayerCase("tied", Language, tokens(7, 4, 2), LOSSES["ce-mean"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_many_drawn_vectors_come_to_those_of_exact_ones(case: LayerCase, sharing: str) -> None:
    """The error falls as one over the root of the number drawn, for every kind of block."""
    exact = truth.start(KFAC, problem := case.make(), damping=1.0, lr=0.0, sharing=sharing)
    truth.step(exact, problem)
    errors = []
    for samples in (25, 2500):
        other = case.make()
        drawn = truth.start(KFAC, other, damping=1.0, lr=0.0, sharing=sharing, fisher="sampled", fisher_samples=samples)
        truth.step(drawn, other)
        errors.append(
            [
                truth.relative_error(drawn.curvature()[name].G, layer.G)
                for name, layer in exact.curvature().items()
                if not name.startswith("embed")  # its sides trade a scale with the draw: below
            ]
        )
    assert all(many < 0.12 for many in errors[1]), errors
    assert sum(errors[1]) < 0.3 * sum(errors[0])
    for name, layer in exact.curvature().items():
        assert truth.block_trace(drawn.curvature()[name]) == pytest.approx(truth.block_trace(layer), rel=0.1), name
