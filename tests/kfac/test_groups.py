"""Parameter groups: each with its own rate, momentum, damping and weight decay, curvature or first order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ground_truth as truth
import layer_truth as layers
import pytest
import torch
from cases import BY_NAME, Problem
from layer_cases import LayerCase, Mean, tokens
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
LAYERWISE = pytest.mark.parametrize(  # methods in which no layer's step depends on another layer's
    ("optimizer", "options"),
    [(KFAC, {"solver": "cholesky"}), (KFAC, {"solver": "eigh"}), (EKFAC, {})],
    ids=["kfac-cholesky", "kfac-eigh", "ekfac"],
)
EXACT = pytest.mark.parametrize(
    ("optimizer", "options"), [(KFAC, {"solver": "eigh"}), (EKFAC, {})], ids=["kfac", "ekfac"]
)
TUNING = pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
FIXED: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "factor_interval": 1, "inverse_interval": 1, "kl_clip": None}


class Scaled(nn.Module):
    """Two layers and a parameter of no layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.second = nn.Linear(5, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(value)) * self.scale)


def make() -> Problem:
    problem = BY_NAME["mlp-ce-mean"].make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        problem.model = Scaled().double()
    return problem


def pick(problem: Problem, *names: str) -> list[nn.Parameter]:
    return [problem.model.get_parameter(name) for name in names]


FIRST, SECOND = ("first.weight", "first.bias"), ("second.weight", "second.bias")


def run(optimizer: Any, problem: Problem, steps: int = 1, **options: Any) -> list[dict[str, Tensor]]:
    used = truth.start(optimizer, problem, **{"damping": 0.1, "lr": 0.1, **options})
    return [truth.step(used, problem) for _ in range(steps)]


def same(one: dict[str, Tensor], other: dict[str, Tensor], names: Iterable[str], factor: float = 1.0) -> None:
    for name in names:
        assert truth.relative_error(other[name], factor * one[name]) < 1e-9, name


# What a group decides


@LAYERWISE
def test_each_group_has_its_own_learning_rate(optimizer: Any, options: Any) -> None:
    (plain,) = run(optimizer, make(), **options)
    problem = make()
    (found,) = run(optimizer, problem, groups=[{"params": pick(problem, *SECOND), "lr": 0.03}], **options)
    same(plain, found, FIRST)
    same(plain, found, SECOND, 0.3)


@LAYERWISE
def test_each_group_has_its_own_damping_in_number_and_as_a_function_of_the_step(optimizer: Any, options: Any) -> None:
    outer, inner = run(optimizer, make(), **options)[0], run(optimizer, make(), **options, damping=0.7)[0]
    assert truth.relative_error(inner["second.weight"], outer["second.weight"]) > 0.1
    for damping in (0.7, lambda step: 0.7 + step):
        problem = make()
        group = {"params": pick(problem, *SECOND), "damping": damping}
        (found,) = run(optimizer, problem, groups=[group], **options)
        same(outer, found, FIRST)
        same(inner, found, SECOND)


def test_a_damping_function_is_asked_again_at_each_step() -> None:
    problem, asked = make(), []

    def damping(step: int) -> float:
        asked.append(step)
        return 0.1

    run(KFAC, problem, steps=3, groups=[{"params": pick(problem, *SECOND), "damping": damping}])
    assert set(asked) == {0, 1, 2}


@LAYERWISE
def test_a_group_without_damping_of_its_own_follows_the_optimizer_s(optimizer: Any, options: Any) -> None:
    problem = make()
    plain = run(optimizer, make(), **options, damping=None, relative_damping=0.3)[0]
    group = {"params": pick(problem, *SECOND), "damping": None}
    (found,) = run(optimizer, problem, groups=[group], damping=None, relative_damping=0.3, **options)
    same(plain, found, (*FIRST, *SECOND))


@LAYERWISE
def test_each_group_has_its_own_momentum(optimizer: Any, options: Any) -> None:
    """One layer alone trains with momentum; the other's gradients are forced alike, so its step shows no trace."""
    problem, plain = make(), make()
    slopes = {n: torch.full_like(p, 0.1) for n, p in plain.model.named_parameters()}
    rare = {"factor_interval": 1000, "inverse_interval": 1000, "damping": 0.1, "lr": 0.01, **options}
    first = truth.start(optimizer, plain, **rare)
    second = truth.start(optimizer, problem, groups=[{"params": pick(problem, *SECOND), "momentum": 0.5}], **rare)
    for count in range(4):
        moves, found = truth.step(first, plain, slopes), truth.step(second, problem, slopes)
        same(moves, found, FIRST)
        same(moves, found, SECOND, sum(0.5**k for k in range(count + 1)))


@LAYERWISE
def test_a_bias_in_a_group_without_weight_decay_moves_with_its_layer_and_does_not_shrink(
    optimizer: Any, options: Any
) -> None:
    plain, problem = make(), make()
    (bare,) = run(optimizer, plain, **options)
    before = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    group = {"params": pick(problem, "first.bias", "second.bias"), "weight_decay": 0.0, "lr": 123.0, "momentum": 0.9}
    (found,) = run(optimizer, problem, groups=[group], weight_decay=0.4, **options)
    same(bare, found, ("first.bias", "second.bias"))
    for name in ("first.weight", "second.weight"):
        assert truth.relative_error(found[name] - bare[name], -0.1 * 0.4 * before[name]) < 1e-8, name


@LAYERWISE
def test_decoupled_weight_decay_is_each_group_s_own(optimizer: Any, options: Any) -> None:
    plain, problem = make(), make()
    (bare,) = run(optimizer, plain, **options)
    before = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    (found,) = run(optimizer, problem, groups=[{"params": pick(problem, *SECOND), "weight_decay": 0.5}], **options)
    same(bare, found, FIRST)
    for name in SECOND:
        assert truth.relative_error(found[name] - bare[name], -0.1 * 0.5 * before[name]) < 1e-8, name


@EXACT
def test_l2_weight_decay_of_a_group_is_in_the_gradient_and_the_damping_of_its_layers(
    optimizer: Any, options: Any
) -> None:
    """On a deep linear net the Kronecker form is exact, so the answer is a dense solve."""
    problem = BY_NAME["deep-mse-mean"].make()
    used = problem.copy()
    group = {"params": list(used.model.get_submodule("2").parameters()), "weight_decay": 0.2}
    moves = truth.first_step(
        optimizer, used, damping=0.03, groups=[group], decoupled_weight_decay=False, weight_decay=0.05, **options
    )
    for name, layer in truth.layers(problem.model).items():
        decay, weights = (0.2 if name == "2" else 0.05), truth.parameters(layer)
        block = truth.ggn(problem, weights)
        block.diagonal().add_(0.03 + decay)
        slope = truth.gradient(problem, weights) + decay * truth.vector(weights).detach()
        assert truth.relative_error(truth.block_move(moves, name), -torch.linalg.solve(block, slope)) < 1e-8, name


@OPTIMIZERS
def test_l2_weight_decay_of_a_bias_group_enters_the_bias_s_gradient_only(optimizer: Any) -> None:
    """A first step at an enormous damping is the gradient over the damping."""
    problem = make()
    names = [name for name, _ in problem.model.named_parameters()]
    slopes = dict(zip(names, torch.autograd.grad(problem.loss(), pick(problem, *names)), strict=True))
    used = problem.copy()
    options = {"damping": 1e9, "lr": 1e9, "weight_decay": 0.3, "decoupled_weight_decay": False}
    if optimizer is not EKFAC:
        options["solver"] = "eigh"
    group = {"params": pick(used, "first.bias", "second.bias"), "weight_decay": 0.0}
    (found,) = run(optimizer, used, groups=[group], **options)
    for name in (*FIRST, *SECOND):
        decay = 0.0 if name.endswith("bias") else 0.3
        expected = -(slopes[name] + decay * problem.model.get_parameter(name).detach())
        assert truth.relative_error(found[name], expected) < 1e-6, name


# First-order groups


@OPTIMIZERS
def test_a_group_marked_first_order_is_adamw(optimizer: Any) -> None:
    problem = make()
    group = {"params": pick(problem, *SECOND), "first_order": True, "lr": 0.02, "weight_decay": 0.1}
    used = truth.start(optimizer, problem, damping=0.1, lr=0.1, groups=[group])
    twins = [p.detach().clone().requires_grad_() for p in pick(problem, *SECOND)]
    adamw = torch.optim.AdamW(twins, lr=0.02, weight_decay=0.1)
    for count in range(4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(count)
            slopes = {n: torch.randn_like(p) for n, p in problem.model.named_parameters()}
        for twin, name in zip(twins, SECOND, strict=True):
            twin.grad = slopes[name].clone()
        adamw.step()
        truth.step(used, problem, slopes)
        for twin, parameter in zip(twins, pick(problem, *SECOND), strict=True):
            assert truth.relative_error(parameter, twin) < 1e-12
    assert set(used.curvature()) == {"first"}, "a first-order layer needs no statistics"
    assert "second" in str(used.summary())


@LAYERWISE
def test_a_first_order_group_leaves_the_other_layers_as_they_are(optimizer: Any, options: Any) -> None:
    (plain,) = run(optimizer, make(), **options)
    problem = make()
    (found,) = run(optimizer, problem, groups=[{"params": pick(problem, *SECOND), "first_order": True}], **options)
    same(plain, found, FIRST)
    assert found["second.weight"].abs().max() == pytest.approx(1e-3, rel=1e-3)  # AdamW's first step is its rate


@OPTIMIZERS
@TUNING
def test_a_model_all_first_order_is_adamw(optimizer: Any, tuned: bool) -> None:
    problem, twin = make(), make()
    group = {"params": list(problem.model.parameters()), "first_order": True, "lr": 0.01}
    used = optimizer(problem.model, loss=problem.criterion, groups=[group], **({} if tuned else FIXED))
    adamw = torch.optim.AdamW(twin.model.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        truth.step(used, problem)
        truth.step(adamw, twin)
    for one, other in zip(problem.model.parameters(), twin.model.parameters(), strict=True):
        assert truth.relative_error(one, other) < 1e-12


# The list of groups


@OPTIMIZERS
@TUNING
def test_first_is_a_kronecker_group_and_last_the_parameters_without_a_block_at_1e_3(
    optimizer: Any, tuned: bool
) -> None:
    problem = make()
    for given in (None, [{"params": pick(problem, *SECOND)}], [{"params": pick(problem, *FIRST), "first_order": True}]):
        used = optimizer(problem.model, loss=problem.criterion, groups=given, **({} if tuned else FIXED))
        assert not used.param_groups[0]["first_order"]
        assert used.param_groups[0]["lr"] == (1.0 if tuned else 0.1)
        assert [id(p) for p in used.param_groups[-1]["params"]] == [id(p) for p in pick(problem, "scale")]
        assert used.param_groups[-1]["lr"] == 1e-3 and used.param_groups[-1]["first_order"]
        held = [id(p) for group in used.param_groups for p in group["params"]]
        assert len(held) == len(set(held)) and set(held) == {id(p) for p in problem.model.parameters()}
        for group in used.param_groups:
            assert {"lr", "momentum", "weight_decay"} <= group.keys() or group["first_order"]


@OPTIMIZERS
def test_a_parameter_without_a_block_in_a_given_group_is_trained_by_adamw_at_1e_3_unless_told(optimizer: Any) -> None:
    problem = make()
    group = {"params": [*pick(problem, *SECOND), *pick(problem, "scale")], "lr": 0.5, "weight_decay": 0.0}
    (found,) = run(optimizer, problem, groups=[group])
    assert found["scale"].abs().max() == pytest.approx(1e-3, rel=1e-3)


@OPTIMIZERS
@TUNING
def test_rate_zero_everywhere_moves_nothing(optimizer: Any, tuned: bool) -> None:
    problem = make()
    options = {"weight_decay": 0.1, **({} if tuned else FIXED)}
    groups = [{"params": pick(problem, *SECOND), "weight_decay": 0.3}]
    used = optimizer(problem.model, loss=problem.criterion, groups=groups, **options)
    for group in used.param_groups:
        group["lr"] = 0.0
    for _ in range(3):
        assert not any(move.any() for move in truth.step(used, problem).values())
    used.param_groups[0]["lr"] = 0.1
    assert any(move.any() for move in truth.step(used, problem).values()), "nothing ever moves: the test shows nothing"


@OPTIMIZERS
@TUNING
def test_rate_zero_stops_one_group_and_no_other(optimizer: Any, tuned: bool) -> None:
    for names in (FIRST, SECOND, ("scale",)):
        problem = make()
        group = {"params": pick(problem, *names), "lr": 0.0, **({"first_order": True} if names == ("scale",) else {})}
        used = optimizer(problem.model, loss=problem.criterion, groups=[group], **({} if tuned else FIXED))
        moves = truth.step(used, problem)
        assert {name for name, move in moves.items() if not move.any()} == set(names)


SCHEDULES: dict[str, Any] = {
    "lambda": lambda used: torch.optim.lr_scheduler.LambdaLR(used, lambda step: 1 / (1 + step)),
    "step": lambda used: torch.optim.lr_scheduler.StepLR(used, 2, 0.5),
    "cosine": lambda used: torch.optim.lr_scheduler.CosineAnnealingLR(used, 5),
    "linear": lambda used: torch.optim.lr_scheduler.LinearLR(used, 0.1, total_iters=3),
    "one-cycle": lambda used: torch.optim.lr_scheduler.OneCycleLR(used, 0.1, total_steps=6),
    "plateau": lambda used: torch.optim.lr_scheduler.ReduceLROnPlateau(used, patience=0),
}


@TUNING
@pytest.mark.parametrize(
    ("optimizer", "schedule"), [*((KFAC, name) for name in SCHEDULES), (EKFAC, "lambda"), (GKFAC, "lambda")]
)
def test_schedulers_of_torch_drive_the_rates(optimizer: Any, tuned: bool, schedule: str) -> None:
    """The optimizer under a scheduler makes the steps of one whose rates are written by hand."""
    problem, twin = make(), make()
    used, other = (
        optimizer(
            p.model, loss=p.criterion, groups=[{"params": pick(p, *SECOND), "lr": 0.05}], **({} if tuned else FIXED)
        )
        for p in (problem, twin)
    )
    scheduler = SCHEDULES[schedule](used)
    rates = set()
    for _ in range(5):
        rates.add(used.param_groups[0]["lr"])
        for group, source in zip(other.param_groups, used.param_groups, strict=True):
            group["lr"] = source["lr"]
            if "momentum" in source:
                group["momentum"] = source["momentum"]
            if "betas" in source:
                group["betas"] = source["betas"]
        truth.step(used, problem)
        truth.step(other, twin)
        scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
    assert len(rates) > 1
    for one, two in zip(problem.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_rates_multiply_the_self_tuned_step() -> None:
    """1.0 is the whole step, a half is half of it."""
    whole, half, uneven = make(), make(), make()
    first = truth.step(KFAC(whole.model, loss=whole.criterion), whole)
    used = KFAC(half.model, loss=half.criterion)
    for group in used.param_groups:
        group["lr"] *= 0.5
    same(first, truth.step(used, half), (*FIRST, *SECOND), 0.5)
    groups = [{"params": pick(uneven, *SECOND), "lr": 0.25}]
    found = truth.step(KFAC(uneven.model, loss=uneven.criterion, groups=groups), uneven)
    same(first, found, FIRST)
    same(first, found, SECOND, 0.25)


def test_a_tensor_as_rate_is_read() -> None:
    """As schedulers under torch.compile write it."""
    problem = make()
    (plain,) = run(KFAC, make())
    used = truth.start(KFAC, problem, damping=0.1, lr=0.7)
    used.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
    same(plain, truth.step(used, problem), (*FIRST, *SECOND))


@OPTIMIZERS
@TUNING
def test_add_param_group_takes_blocks_to_groups_and_the_rest_to_adamw(optimizer: Any, tuned: bool) -> None:
    problem = make()
    for parameter in problem.model.get_submodule("second").parameters():
        parameter.requires_grad_(False)
    used = optimizer(problem.model, loss=problem.criterion, **({} if tuned else FIXED))
    moves = truth.step(used, problem)
    assert not any(moves[name].any() for name in SECOND)
    for parameter in problem.model.get_submodule("second").parameters():
        parameter.requires_grad_(True)
    used.add_param_group({"params": pick(problem, *SECOND)})
    start = problem.loss().item()
    for _ in range(12):
        moves = truth.step(used, problem)
        assert all(moves[name].any() for name in (*FIRST, *SECOND, "scale"))
    assert problem.loss().item() < start


@OPTIMIZERS
def test_groups_may_be_iterators_tensors_and_named_parameters(optimizer: Any) -> None:
    (plain,) = run(optimizer, make())
    for given in (
        lambda p: [{"params": p.model.get_submodule("second").parameters()}],
        lambda p: [{"params": p.model.get_submodule("second").named_parameters()}],
        lambda p: [{"params": p.model.get_parameter("second.weight")}, {"params": pick(p, "second.bias")}],
        lambda p: [{"params": list(p.model.parameters())}],
    ):
        problem = make()
        (found,) = run(optimizer, problem, groups=given(problem))
        same(plain, found, (*FIRST, *SECOND, "scale"))


def test_groups_of_norms_and_embeddings_too() -> None:
    """Each kind of block obeys its group."""
    case = LayerCase(
        "net",
        lambda: nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), Mean(), nn.Linear(5, 3)),
        tokens(6, 8, 3),
    )
    plain = truth.first_step(KFAC, case.make(), damping=0.1, lr=0.1, solver="eigh")
    problem = case.make()
    parts = {name: list(problem.model.get_submodule(name).parameters()) for name in ("0", "2")}
    groups = [{"params": parts["0"], "lr": 0.02}, {"params": parts["2"], "lr": 0.0}]
    found = truth.first_step(KFAC, problem, damping=0.1, lr=0.1, groups=groups, solver="eigh")
    same(plain, found, ("1.weight", "1.bias", "5.weight", "5.bias"))
    same(plain, found, ("0.weight",), 0.2)
    assert not found["2.weight"].any() and not found["2.bias"].any() and plain["2.weight"].any()
    problem = case.make()
    expected = layers.newton(problem, problem.model.get_submodule("2"), 0.1)
    assert truth.relative_error(truth.block_move(plain, "2"), 0.1 * expected) < 1e-8


# Errors


@OPTIMIZERS
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda p: {"params": list(p.model.parameters())}, ["groups"]),
        (lambda p: [list(p.model.parameters())], ["groups"]),
        (lambda p: [{"lr": 0.1}], ["groups", "params"]),
        (lambda p: [{"params": pick(p, *SECOND), "learning_rate": 0.1}], ["groups[0]", "learning_rate", "lr"]),
        (lambda p: [{"params": pick(p, *SECOND), "lr": -0.1}], ["groups[0]", "lr", "-0.1", ">= 0"]),
        (lambda p: [{"params": pick(p, *SECOND), "momentum": 1.0}], ["groups[0]", "momentum", "1.0"]),
        (lambda p: [{"params": pick(p, *SECOND), "damping": 0.0}], ["groups[0]", "damping", "0.0", "> 0"]),
        (lambda p: [{"params": pick(p, *SECOND), "weight_decay": -1}], ["groups[0]", "weight_decay", "-1"]),
        (lambda p: [{"params": pick(p, *FIRST)}, {"params": pick(p, *FIRST)}], ["groups[1]", "first.weight"]),
        (lambda p: [{"params": [nn.Parameter(torch.ones(2, 7))]}], ["groups[0]", "[2, 7]"]),
        (lambda p: [{"params": pick(p, *SECOND), "first_order": "yes"}], ["groups[0]", "first_order", "yes"]),
        (lambda p: [{"params": pick(p, *SECOND), "lr": None}], ["groups[0]", "lr", "None"]),
        (lambda p: [{"params": ["second.weight"]}], ["groups[0]", "second.weight"]),
    ],
    ids=[
        "dict", "no-dicts", "no-params", "unknown-key", "lr", "momentum", "damping", "decay", "twice", "foreign",
        "mark", "lr-none", "name",
    ],
)  # fmt: skip
def test_a_bad_group_is_refused_in_one_line_that_says_which(optimizer: Any, given: Any, words: list[str]) -> None:
    problem = make()
    with pytest.raises(ValueError) as caught:
        optimizer(problem.model, loss=problem.criterion, groups=given(problem), **FIXED)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@OPTIMIZERS
def test_add_param_group_refuses_what_it_does_not_know(optimizer: Any) -> None:
    problem = make()
    used = optimizer(problem.model, loss=problem.criterion, **FIXED)
    extra = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="learning_rate"):
        used.add_param_group({"params": [extra], "learning_rate": 0.1})
    with pytest.raises(ValueError):
        used.add_param_group({"params": pick(problem, *FIRST)})  # already in one


@OPTIMIZERS
@TUNING
@pytest.mark.parametrize("mark", [{}, {"first_order": True}], ids=["unmarked", "marked"])
def test_an_added_group_of_parameters_without_a_block_is_adamw_at_1e_3_unless_told(
    optimizer: Any, tuned: bool, mark: dict[str, Any]
) -> None:
    for settings in ({}, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9)}):
        problem = make()
        used = optimizer(problem.model, loss=problem.criterion, weight_decay=0.3, **({} if tuned else FIXED))
        extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
        twin = nn.Parameter(extra.detach().clone())
        used.add_param_group({"params": [extra], **mark, **settings})
        adamw = torch.optim.AdamW([twin], **{"lr": 1e-3, "weight_decay": 0.3, **settings})
        for slope in (1.0, -0.5, 2.0):
            extra.grad, twin.grad = torch.full_like(extra, slope), torch.full_like(twin, slope)
            adamw.step()
            problem.loss().backward()
            used.step()
            used.zero_grad()
        assert truth.relative_error(extra, twin) < 1e-12, settings


@OPTIMIZERS
def test_an_added_group_without_a_block_cannot_be_preconditioned(optimizer: Any) -> None:
    problem = make()
    used = optimizer(problem.model, loss=problem.criterion, **FIXED)
    groups = len(used.param_groups)
    with pytest.raises(ValueError) as caught:
        used.add_param_group({"params": [nn.Parameter(torch.ones(2, 7))], "first_order": False})
    message = str(caught.value)
    assert "\n" not in message and len(used.param_groups) == groups
    for word in ("param_group", "first_order=False", "[2, 7]", "allowed: True"):
        assert word in message, message


@TUNING
@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
def test_momentum_that_is_switched_off_is_forgotten(optimizer: Any, tuned: bool) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    used = optimizer(problem.model, loss=problem.criterion, **({} if tuned else {**FIXED, "momentum": 0.9}))
    truth.step(used, problem)
    assert any("momentum_buffer" in state for state in used.state.values())
    used.param_groups[0]["momentum"] = 0.0
    truth.step(used, problem)
    assert not any("momentum_buffer" in state for state in used.state.values())
