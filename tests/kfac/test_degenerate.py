"""Batches and nets at the edge: no crash, no jump of the loss, and a broken batch leaves no trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import ground_truth as truth
import layer_truth as layers
import pytest
import torch
from cases import BY_NAME, LOSSES, Problem
from layer_cases import LayerCase, Mean, numbers, tokens
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC, Preconditioner

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
METHODS = pytest.mark.parametrize(
    "optimizer", [KFAC, partial(KFAC, solver="eigh"), EKFAC, GKFAC], ids=["KFAC", "KFAC-eigh", "EKFAC", "GKFAC"]
)
SETTINGS: dict[str, dict[str, Any]] = {
    "self-tuning": {},
    "self-tuning-sampled": {"fisher": "sampled"},
    "fixed": {"lr": 0.05, "factor_interval": 1, "inverse_interval": 2},
    "fixed-absolute": {"lr": 0.05, "damping": 0.1, "factor_interval": 1, "inverse_interval": 2, "momentum": 0.5},
}
EVERY = pytest.mark.parametrize("setting", list(SETTINGS))

NETS = {
    "tokens": LayerCase(
        "tokens",
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.ReLU(), Mean(), nn.Linear(5, 3)),
        tokens(7, 8, 3),
        LOSSES["ce-mean"],
    ),
    "conv": LayerCase(
        "conv",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 2, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 3),
        ),
        numbers(8, 2, 3, 3),
        LOSSES["ce-mean"],
    ),
}


def weights(problem: Problem) -> Tensor:
    return truth.vector(p.detach().clone() for p in problem.model.parameters())


def build(optimizer: Any, problem: Problem, setting: str, **options: Any) -> Any:
    return optimizer(problem.model, loss=problem.criterion, **{**SETTINGS[setting], **options})


def train(used: Any, problem: Problem, steps: int, jump: float = 3.0) -> None:
    """Every weight stays finite, and the loss never rises to more than `jump` times where it began, plus a bit."""
    start = problem.loss().item()
    for count in range(steps):
        truth.step(used, problem)
        assert weights(problem).isfinite().all(), f"weights broke at step {count}"
        loss = problem.loss().item()
        assert loss <= jump * start + 0.3, f"the loss went from {start} to {loss} at step {count}"


# A batch that is not finite


@OPTIMIZERS
@EVERY
@pytest.mark.parametrize("net", ["conv", "tokens"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_batch_is_a_skipped_step_for_every_kind_of_layer(
    optimizer: Any, setting: str, net: str, value: float
) -> None:
    problem = NETS[net].make()
    used = build(optimizer, problem, setting, weight_decay=0.01)
    for _ in range(3):
        truth.step(used, problem)
        assert float(used.stats["skipped"]) == 0
    before = weights(problem)
    kept = tensors_of(used)
    assert kept
    used.zero_grad()
    loss = problem.criterion(spoiled(problem, value), problem.targets)
    loss.backward()
    used.step()
    assert float(used.stats["skipped"]) == 1
    assert torch.equal(weights(problem), before), "parameters moved"
    after = tensors_of(used)
    for key, old in kept.items():
        assert torch.equal(after[key], old), f"{key} changed in a skipped step"
    for _ in range(5):
        truth.step(used, problem)
        assert float(used.stats["skipped"]) == 0 and weights(problem).isfinite().all()
    assert not torch.equal(weights(problem), before)


def spoiled(problem: Problem, value: float) -> Tensor:
    """The output with one broken activation in the middle of the net, where one example passes."""
    children = list(problem.model.children())
    x = problem.inputs
    hooks = [children[1].register_forward_hook(lambda module, args, out: spoil(out, value))]
    try:
        return problem.model(x)
    finally:
        for hook in hooks:
            hook.remove()


def spoil(output: Tensor, value: float) -> Tensor:
    mask = torch.zeros_like(output)
    mask.view(-1)[1] = value
    return output + mask if not math.isinf(value) else output + mask.nan_to_num(posinf=math.inf)


def tensors_of(used: Any) -> dict[str, Tensor]:
    """Momentum, AdamW's moments and every factor, as copies."""
    names = {}
    for number, state in enumerate(used.state.values()):
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":
                names[f"state {number} {key}"] = value.clone()
    for name, layer in used.curvature().items():
        names[f"A of {name}"], names[f"G of {name}"] = layer.A.clone(), layer.G.clone()
    return names


@OPTIMIZERS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("joined", [False, True], ids=["one-by-one", "joined"])
@pytest.mark.parametrize("broken", [False, True], ids=["finite", "broken"])
def test_half_precision_gradients_whose_sum_overflows_are_finite(
    optimizer: Any, dtype: torch.dtype, joined: bool, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if joined:
        monkeypatch.setattr("kfac.parts.ONE_BY_ONE", set())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        problem = Problem(nn.Linear(40, 60).to(dtype), nn.MSELoss(), torch.randn(8, 40), torch.randn(8, 60))
    problem.inputs, problem.targets = problem.inputs.to(dtype), problem.targets.to(dtype)
    used = build(optimizer, problem, "fixed")
    before = weights(problem)
    problem.loss().backward()
    gradient = problem.model.weight.grad.fill_(100.0)
    assert gradient.float().sum() > torch.finfo(torch.float16).max
    if broken:
        gradient[3, 5] = math.inf
    used.step()
    assert float(used.stats["skipped"]) == broken
    assert weights(problem).isfinite().all() and torch.equal(weights(problem), before) == broken


@OPTIMIZERS
@EVERY
def test_one_broken_micro_batch_spoils_its_step_and_no_other(optimizer: Any, setting: str) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    used = build(optimizer, problem, setting)
    truth.step(used, problem)
    before, factors = weights(problem), tensors_of(used)
    used.zero_grad()
    (problem.loss() / 2).backward()
    good, problem.inputs = problem.inputs, problem.inputs * math.nan
    (problem.loss() / 2).backward()
    problem.inputs = good
    used.step()
    assert float(used.stats["skipped"]) == 1 and torch.equal(weights(problem), before)
    assert all(torch.equal(tensors_of(used)[key], old) for key, old in factors.items())
    truth.step(used, problem)
    assert float(used.stats["skipped"]) == 0 and not torch.equal(weights(problem), before)


@OPTIMIZERS
@EVERY
def test_ten_broken_batches_in_a_row_at_the_very_start_do_no_harm(optimizer: Any, setting: str) -> None:
    problem, twin = NETS["tokens"].make(), NETS["tokens"].make()
    used, other = build(optimizer, problem, setting), build(optimizer, twin, setting)
    with torch.no_grad():
        problem.model.get_parameter("1.weight").fill_(math.nan)
    for _ in range(10):
        truth.step(used, problem)
        assert float(used.stats["skipped"]) == 1
    problem.model.load_state_dict(twin.model.state_dict())
    for _ in range(3):
        truth.step(used, problem)
        truth.step(other, twin)
        assert weights(problem).isfinite().all()
    assert not torch.equal(weights(problem), weights(NETS["tokens"].make()))


# Dead, constant, huge, tiny, single


def dead_units(problem: Problem) -> None:
    """No example reaches the last layer's inputs: rows and columns of zeros in both factors."""
    for name, parameter in problem.model.named_parameters():
        if parameter.dim() == 1 and name in ("2.bias", "1.bias"):
            parameter.sub_(100)


def zero_last_layer(problem: Problem) -> None:
    """Nothing comes back to the layers before: G = 0 and gradients of zero there."""
    list(problem.model.children())[-1].weight.zero_()  # type: ignore[operator, union-attr]


def constant_inputs(problem: Problem) -> None:
    problem.inputs = torch.full_like(problem.inputs, 1)


def one_example(problem: Problem) -> None:
    problem.inputs, problem.targets = problem.inputs[:1], problem.targets[:1]


def the_same_example_eight_times(problem: Problem) -> None:
    problem.inputs = problem.inputs[:1].expand_as(problem.inputs).clone()
    problem.targets = problem.targets[:1].expand_as(problem.targets).clone()


def sure(problem: Problem) -> None:
    """All probabilities are 0 or 1 to the last bit and right, so sampled and exact vectors are all zero."""
    last = list(problem.model.children())[-1]
    last.weight.mul_(1e9)  # type: ignore[operator, union-attr]
    last.bias.mul_(1e9)  # type: ignore[operator, union-attr]
    problem.targets = problem.model(problem.inputs).argmax(1)


def sure_and_wrong(problem: Problem) -> None:
    last = list(problem.model.children())[-1]
    last.weight.mul_(300)  # type: ignore[operator, union-attr]
    problem.targets = problem.model(problem.inputs).argmin(1)


EDGES: list[Callable[[Problem], None]] = [
    dead_units, zero_last_layer, constant_inputs, one_example, the_same_example_eight_times, sure, sure_and_wrong,
]  # fmt: skip


@METHODS
@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("net", "setting"), [*(("tokens", setting) for setting in SETTINGS), ("conv", "self-tuning"), ("conv", "fixed")]
)
def test_training_at_the_edge_neither_breaks_nor_jumps(
    optimizer: Any, setting: str, edge: Callable[[Problem], None], net: str
) -> None:
    problem = NETS[net].make()
    with torch.no_grad():
        edge(problem)
    if edge is sure:
        probability = problem.model(problem.inputs).softmax(1)
        assert ((probability == 0) | (probability == 1)).all(), "not sure enough to make the Fisher vanish"
    train(build(optimizer, problem, setting), problem, 6)


@METHODS
@pytest.mark.parametrize("setting", [name for name, options in SETTINGS.items() if "damping" not in options])
@pytest.mark.parametrize("scale", [1e12, 1e-12])
@pytest.mark.parametrize("what", ["inputs", "loss", "last layer"])
def test_huge_and_tiny_scales(optimizer: Any, setting: str, scale: float, what: str) -> None:
    """With damping by the mean curvature; an absolute one means another thing in each unit."""
    problem = BY_NAME["mlp-mse-mean"].make()
    with torch.no_grad():
        match what:
            case "inputs":
                problem.inputs.mul_(scale)
            case "loss":
                problem.targets.mul_(scale)
            case "last layer":
                problem.model.get_parameter("2.weight").mul_(scale)
                problem.targets.mul_(scale)
    start = problem.loss().item()
    used = build(optimizer, problem, setting)
    for _ in range(7):
        truth.step(used, problem)
        assert weights(problem).isfinite().all()
        assert problem.loss().item() <= 3 * start
    assert problem.loss().item() <= start


@OPTIMIZERS
@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_zero_moves_nothing(optimizer: Any, setting: str, dtype: torch.dtype) -> None:
    problem = BY_NAME["mlp-mse-mean"].make()
    problem.model, problem.inputs = problem.model.to(dtype), problem.inputs.to(dtype)
    problem.targets = problem.model(problem.inputs).detach()
    used = build(optimizer, problem, setting)
    for _ in range(3):
        assert not any(move.any() for move in truth.step(used, problem).values())


@OPTIMIZERS
@EVERY
@pytest.mark.parametrize("net", ["conv", "tokens"])
def test_a_model_of_zeros_trains_or_stays(optimizer: Any, setting: str, net: str) -> None:
    problem = NETS[net].make()
    with torch.no_grad():
        for parameter in problem.model.parameters():
            parameter.zero_()
    train(build(optimizer, problem, setting), problem, 6)


@METHODS
@EVERY
def test_a_sure_classifier_that_meets_a_new_batch_does_not_explode(optimizer: Any, setting: str) -> None:
    """Its sampled Fisher was next to nothing, so an undamped inverse would send it anywhere."""
    problem = NETS["tokens"].make()
    used = build(optimizer, problem, setting)
    with torch.no_grad():
        sure(problem)
    for _ in range(6):
        truth.step(used, problem)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        problem.targets = torch.randint(3, problem.targets.shape)
    start = problem.loss().item()
    for _ in range(6):
        truth.step(used, problem)
        assert weights(problem).isfinite().all() and problem.loss().item() <= 3 * start


# The retry ladder


def hopeless(dtype: torch.dtype = torch.float32) -> Problem:
    """Factors of rank 1 whose Cholesky factorisation fails at a damping of nothing."""
    problem = BY_NAME["mlp-mse-mean"].make()
    problem.model, problem.targets = problem.model.to(dtype), problem.targets.to(dtype)
    problem.inputs = torch.tensor([[1.1e4, -3.3e4, 7.7e3, 1.9e4]], dtype=dtype).expand(6, 4).clone()
    return problem


def test_a_failed_inverse_is_counted_named_once_and_tried_again() -> None:
    problem = hopeless()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        used = truth.start(KFAC, problem, damping=1e-22, lr=1e-6, solver="cholesky")
        start, failures = problem.loss().item(), []
        for _ in range(30):
            truth.step(used, problem)
            failures.append(float(used.stats["failed_inverses"]))
            assert weights(problem).isfinite().all()
            assert problem.loss().item() <= 3 * start
    assert sum(failures) > 0, "no inverse failed: the test shows nothing"
    assert failures[-1] < max(failures) or min(failures[:20]) < max(failures), "no next rung was tried"
    about = [str(w.message) for w in caught if "inverse" in str(w.message)]
    assert len(about) == 1, about
    assert "0" in about[0] and "\n" not in about[0]


def test_a_failed_inverse_leaves_the_last_one() -> None:
    """A good inverse, then a hopeless batch that replaces the averages: the next steps use what was good."""
    problem = hopeless()
    bad = problem.inputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        problem.inputs = torch.randn(6, 4)
    used = truth.start(KFAC, problem, damping=1e-22, lr=1e-9, solver="cholesky", stat_decay=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        slopes = {n: torch.randn_like(p) for n, p in problem.model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for damping in (1e-2,):
            used.param_groups[0]["damping"] = damping
            good = truth.step(used, problem, slopes)
        used.param_groups[0]["damping"] = 1e-22
        problem.inputs = bad
        after = truth.step(used, problem, slopes)
    assert float(used.stats["failed_inverses"]) > 0, "no inverse failed: the test shows nothing"
    assert truth.relative_error(after["0.weight"], good["0.weight"]) < 1e-2


@pytest.mark.parametrize("method", ["kfac", "ekfac", "gkfac"])
@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
def test_the_preconditioner_gives_finite_directions_at_the_edge(method: str, edge: Callable[[Problem], None]) -> None:
    problem = NETS["tokens"].make()
    with torch.no_grad():
        edge(problem)
    used = Preconditioner(problem.model, loss=problem.criterion, method=method, factor_interval=1, inverse_interval=1)
    for _ in range(3):
        problem.model.zero_grad()
        problem.loss().backward()
        used.step()
        for name, parameter in problem.model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC])
def test_a_factor_of_rank_one_is_damped_exactly_where_it_is_zero(optimizer: Any) -> None:
    """One example: every factor has rank 1, and the damped solve is still the dense one."""
    case = LayerCase("one", lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.Flatten(), nn.Linear(5, 3)), numbers(1, 2, 3))
    problem = case.make()
    options: dict[str, Any] = {"solver": "eigh"} if optimizer is KFAC else {}
    moves = truth.first_step(optimizer, problem.copy(), damping=1e-6, **options)
    for name, module in layers.trained(problem.model).items():
        expected = layers.newton(problem, module, 1e-6)
        assert truth.relative_error(layers.moved(problem, name, moves), expected) < 1e-7, name


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_the_fixed_rule_outlives_an_initialisation_whose_curvature_grows_a_thousandfold(optimizer, lr):
    """A tanh autoencoder as torch draws it: nothing gets through at first, and the first inverses know of nothing."""
    torch.manual_seed(0)
    sizes = [64, 96, 48, 24, 6, 24, 48, 96, 64]
    layers = [layer for i in range(8) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.Tanh())][:-1]
    model, criterion, x = nn.Sequential(*layers), nn.BCEWithLogitsLoss(), torch.rand(200, 64).pow(4)
    tuned = optimizer(model, loss=criterion, lr=lr)
    values = []
    for _ in range(60):
        loss = criterion(model(x), x)
        loss.backward()
        tuned.step()
        tuned.zero_grad()
        values.append(loss.item())
    assert max(values) < 10 * values[0] and values[-1] < values[0]
