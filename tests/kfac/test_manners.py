"""What a guest in someone else's training loop owes: nothing touched, nothing drawn, nothing left behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import ground_truth as truth
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, Problem, mlp
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from kfac import EKFAC, GKFAC, KFAC

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
# Statistics at each step, so that whatever they touch is touched at each step.
MODES = pytest.mark.parametrize(
    "options",
    [
        {"factor_interval": 1, "inverse_interval": 1},
        {"lr": 0.05, "damping": 0.1, "factor_interval": 1, "inverse_interval": 1},
        {"lr": 0.05, "damping": 0.1, "factor_interval": 1, "inverse_interval": 1, "fisher": "sampled"},
    ],
    ids=["self-tuning", "fixed", "fixed-sampled"],
)


def build(problem: Problem, optimizer: Any, options: dict[str, Any]) -> Any:
    return optimizer(problem.model, loss=problem.criterion, **options)


def noisy_problem(inplace: bool = False) -> Problem:
    """Convolutions, batch norm, dropout: everything with a state or a draw in its forward."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=inplace),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(64, 6),
            nn.ReLU(inplace=inplace),
            nn.Dropout(0.5),
            nn.Linear(6, 3),
        )
        return Problem(model, nn.CrossEntropyLoss(), torch.randn(12, 2, 4, 4), torch.randint(3, (12,)))


def weights(problem: Problem) -> Tensor:
    return truth.vector(parameter.detach().clone() for parameter in problem.model.parameters())


# Nothing touched


@OPTIMIZERS
@MODES
def test_gradients_buffers_and_the_random_stream_are_as_without_the_optimizer(optimizer: Any, options: Any) -> None:
    alone, watched = noisy_problem(), noisy_problem()
    used = build(watched, optimizer, options)
    for _ in range(3):
        state = torch.get_rng_state()
        alone.model.zero_grad()
        alone.loss().backward()
        after = torch.get_rng_state()
        assert not torch.equal(state, after), "no dropout mask was drawn: the test shows nothing"
        torch.set_rng_state(state)
        used.zero_grad()
        watched.loss().backward()
        for (name, own), other in zip(watched.model.named_parameters(), alone.model.parameters(), strict=True):
            assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad), name
        grads = [parameter.grad.clone() for parameter in watched.model.parameters() if parameter.grad is not None]
        used.step()
        assert torch.equal(torch.get_rng_state(), after)
        for parameter, grad in zip(watched.model.parameters(), grads, strict=True):
            assert parameter.grad is not None and torch.equal(parameter.grad, grad)
        for (name, buffer), expected in zip(watched.model.named_buffers(), alone.model.buffers(), strict=True):
            assert torch.equal(buffer, expected), name
        with torch.no_grad():
            for target, moved in zip(alone.model.parameters(), watched.model.parameters(), strict=True):
                target.copy_(moved)
    assert used.curvature()


def test_constructing_draws_no_random_number() -> None:
    problem = noisy_problem()
    state = torch.get_rng_state()
    for optimizer in (KFAC, EKFAC, GKFAC):
        build(problem, optimizer, {})
    assert torch.equal(torch.get_rng_state(), state)


@OPTIMIZERS
@MODES
def test_two_optimizers_built_alike_make_the_same_steps(optimizer: Any, options: Any) -> None:
    problems = [BY_NAME["convnet-stride"].make() for _ in range(2)]
    used = [build(problem, optimizer, options) for problem in problems]
    for _ in range(7):
        for problem, each in zip(problems, used, strict=True):
            truth.step(each, problem)
        torch.rand(3)  # the global stream is nobody's concern
        assert torch.equal(weights(problems[0]), weights(problems[1]))


# Loops


@OPTIMIZERS
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("sizes", [(3, 3), (2, 2, 2), (1, 5), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("name", ["mlp-ce-mean", "mlp-mse-mean", "mlp-bce-sum", "mlp-mse-sum", "tokens-all"])
def test_micro_batches_make_the_step_of_the_whole_batch(
    optimizer: Any, fisher: str, sizes: tuple[int, ...], name: str
) -> None:
    problem = BY_NAME["mlp-ce-mean" if name == "tokens-all" else name].make()
    if name == "tokens-all":
        problem.inputs = problem.inputs.unsqueeze(1).repeat(1, 3, 1).cumsum(1)
        problem.criterion, problem.targets = nn.MSELoss(), problem.inputs[..., :3].sin()
    mean = problem.criterion.reduction == "mean"
    parts = problem.copy()
    whole = truth.start(optimizer, problem, damping=0.1, fisher=fisher)
    expected = truth.step(whole, problem)
    used = truth.start(optimizer, parts, damping=0.1, fisher=fisher)
    before = {name: parameter.detach().clone() for name, parameter in parts.model.named_parameters()}
    for inputs, targets in zip(parts.inputs.split(sizes), parts.targets.split(sizes), strict=True):
        share = len(inputs) / len(parts.inputs) if mean else 1.0
        (parts.criterion(parts.model(inputs), targets) * share).backward()
    used.step()
    for layer, curvature in whole.curvature().items():
        assert truth.relative_error(used.curvature()[layer].A, curvature.A) < 1e-8
        assert truth.relative_error(used.curvature()[layer].G, curvature.G) < 1e-8
    for key, parameter in parts.model.named_parameters():
        assert truth.relative_error(parameter.detach() - before[key], expected[key]) < 1e-8


@OPTIMIZERS
def test_forwards_first_and_one_backward_after_is_the_same_accumulation(optimizer: Any) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    parts = problem.copy()
    expected = truth.first_step(optimizer, problem, damping=0.1)
    used = truth.start(optimizer, parts, damping=0.1)
    before = weights(parts)
    losses = [
        parts.criterion(parts.model(inputs), targets) / 2
        for inputs, targets in zip(parts.inputs.split(3), parts.targets.split(3), strict=True)
    ]
    (losses[0] + losses[1]).backward()
    used.step()
    assert truth.relative_error(weights(parts) - before, truth.vector(expected.values())) < 1e-8


@OPTIMIZERS
@pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
def test_micro_batches_accumulate_when_self_tuning_and_when_not_due(optimizer: Any, tuned: bool) -> None:
    """Twelve accumulated steps train as twelve plain ones do: the loss falls, and to about the same."""
    problem = BY_NAME["mlp-ce-mean"].make()
    parts = problem.copy()
    options = {} if tuned else {"lr": 0.1, "damping": 0.1}
    whole, used = build(problem, optimizer, options), build(parts, optimizer, options)
    start = problem.loss().item()
    for _ in range(12):
        truth.step(whole, problem)
        used.zero_grad()
        for inputs, targets in zip(parts.inputs.split(3), parts.targets.split(3), strict=True):
            (parts.criterion(parts.model(inputs), targets) / 2).backward()
        used.step()
        assert float(used.stats["skipped"]) == 0
    fallen, expected = start - parts.loss().item(), start - problem.loss().item()
    assert expected > 0 and fallen == pytest.approx(expected, rel=0.3)


@OPTIMIZERS
@MODES
def test_a_loss_scale_drops_out(optimizer: Any, options: Any) -> None:
    """As with a gradient scaler: the loss times 1024, the gradients divided by it before the step."""
    plain, scaled = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    first, second = build(plain, optimizer, options), build(scaled, optimizer, options)
    for _ in range(3):
        truth.step(first, plain)
        second.zero_grad()
        (scaled.loss() * 1024).backward()
        for parameter in scaled.model.parameters():
            assert parameter.grad is not None
            parameter.grad /= 1024
        second.step()
        assert truth.relative_error(weights(scaled), weights(plain)) < 1e-10


@OPTIMIZERS
def test_closure_is_called_and_its_loss_returned(optimizer: Any) -> None:
    plain, closed = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    first, second = truth.start(optimizer, plain, damping=0.1), truth.start(optimizer, closed, damping=0.1)

    def closure() -> Tensor:
        second.zero_grad()
        loss = closed.loss()
        loss.backward()
        return loss

    start = plain.loss().item()
    truth.step(first, plain)
    assert float(second.step(closure)) == start
    assert torch.equal(weights(plain), weights(closed))


@OPTIMIZERS
@MODES
def test_in_place_activations_change_nothing(optimizer: Any, options: Any) -> None:
    plain, inplace = noisy_problem(), noisy_problem(inplace=True)
    first, second = build(plain, optimizer, options), build(inplace, optimizer, options)
    for _ in range(3):
        state = torch.get_rng_state()
        truth.step(first, plain)
        torch.set_rng_state(state)
        truth.step(second, inplace)
        assert torch.equal(weights(plain), weights(inplace))


@OPTIMIZERS
@pytest.mark.parametrize("criterion", ["functional", "another instance"])
def test_a_loss_not_called_through_its_object_uses_the_models_output_and_says_so_once(
    optimizer: Any, criterion: str
) -> None:
    plain, other = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    first, second = truth.start(optimizer, plain, damping=0.1), truth.start(optimizer, other, damping=0.1)
    called: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy if criterion == "functional" else nn.CrossEntropyLoss()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            truth.step(first, plain)
            second.zero_grad()
            called(other.model(other.inputs), other.targets).backward()
            second.step()
            assert truth.relative_error(weights(other), weights(plain)) < 1e-10
    assert len(caught) == 1 and "loss" in str(caught[0].message)


def test_no_warning_in_a_plain_loop() -> None:
    for optimizer in (KFAC, EKFAC, GKFAC):
        for options in ({}, {"lr": 0.1}):
            problem = noisy_problem()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                used = build(problem, optimizer, options)
                for _ in range(3):
                    truth.step(used, problem)


# Schedules


@OPTIMIZERS
@pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=4),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[g["lr"] for g in o.param_groups], total_steps=10),
    ],
    ids=["step", "cosine", "warm-up", "one-cycle"],
)
def test_schedulers_work(optimizer: Any, tuned: bool, schedule: Callable[[Any], Any]) -> None:
    problem = noisy_problem()
    used = build(problem, optimizer, {} if tuned else {"lr": 0.05})
    scheduler = schedule(used)
    start, rates = problem.loss().item(), []
    for _ in range(8):
        rates.append(used.param_groups[0]["lr"])
        truth.step(used, problem)
        scheduler.step()
    assert len(set(rates)) > 3
    problem.model.eval()
    assert problem.loss().item() < 1.5 * start


def test_a_scheduler_scales_the_self_tuned_step() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    used = KFAC(problem.model, loss=problem.criterion)
    scheduler = torch.optim.lr_scheduler.LambdaLR(used, lambda count: 1.0 if count < 2 else 0.0)
    moved = []
    for _ in range(4):
        moved.append(bool(truth.vector(truth.step(used, problem).values()).any()))
        scheduler.step()
    assert moved == [True, True, False, False]


@OPTIMIZERS
@pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
def test_lr_zero_everywhere_moves_nothing(optimizer: Any, tuned: bool) -> None:
    problem = noisy_problem()
    used = build(problem, optimizer, {"weight_decay": 0.1} | ({} if tuned else {"lr": 0.1}))
    before = weights(problem)
    for group in used.param_groups:
        group["lr"] = 0.0
    for _ in range(3):
        truth.step(used, problem)
    assert torch.equal(weights(problem), before)
    for group in used.param_groups:
        group["lr"] = 0.5
    truth.step(used, problem)
    assert not torch.equal(weights(problem), before)


# Models of every kind


class Reused(nn.Module):
    """One layer called twice, one never, one whose weight serves a second time as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.unused = nn.Linear(6, 6)

    def forward(self, value: Tensor) -> Tensor:
        value = torch.tanh(self.middle(torch.tanh(self.middle(torch.tanh(self.first(value))))))
        return self.last(value)


class Tied(nn.Module):
    """Two layers with one and the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.two.weight = self.one.weight

    def forward(self, value: Tensor) -> Tensor:
        return self.last(torch.tanh(self.two(torch.tanh(self.one(torch.tanh(self.first(value)))))))


class DeadBranch(nn.Module):
    """A layer that is called but whose output no loss sees, and a call by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.last = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, value: Tensor) -> Tensor:
        value = torch.tanh(self.first(input=value))
        self.side(value)
        return self.last(value)


def frozen(*names: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = mlp(4, 6, 6, 3)
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        return model

    return make


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    # name: (model, parameters that must not move)
    "reused": (Reused, {"unused.weight", "unused.bias"}),
    "tied": (Tied, set()),
    "dead branch": (DeadBranch, {"side.weight", "side.bias"}),
    "first layer frozen": (frozen("0.weight", "0.bias"), {"0.weight", "0.bias"}),
    "middle layer frozen": (frozen("2.weight", "2.bias"), {"2.weight", "2.bias"}),
    "weight frozen": (frozen("2.weight"), {"2.weight"}),
    "bias frozen": (frozen("2.bias"), {"2.bias"}),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)), set()),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), set()),
}  # fmt: skip


@OPTIMIZERS
@MODES
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.filterwarnings("ignore")
def test_frozen_unused_reused_and_tied_layers_train(optimizer: Any, options: Any, name: str) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    make, still = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        problem.model = make().double()
    before = {key: parameter.detach().clone() for key, parameter in problem.model.named_parameters()}
    start = problem.loss().item()
    used = build(problem, optimizer, options)
    for _ in range(12):
        truth.step(used, problem)
    moved = {key for key, parameter in problem.model.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved == before.keys() - still
    assert all(parameter.isfinite().all() for parameter in problem.model.parameters())
    assert problem.loss().item() < start


@OPTIMIZERS
def test_a_layer_frozen_and_thawed_in_training_stops_and_goes_on(optimizer: Any) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    used = build(problem, optimizer, {"lr": 0.05, "damping": 0.1, "factor_interval": 1, "inverse_interval": 1})
    layer = problem.model.get_submodule("0")
    moved = []
    for count in range(6):
        layer.requires_grad_(count not in (2, 3))
        moves = truth.step(used, problem)
        moved.append((bool(moves["0.weight"].any()), bool(moves["2.weight"].any())))
    assert moved == [(True, True)] * 2 + [(False, True)] * 2 + [(True, True)] * 2


# Copies and remains


def hooks(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


@OPTIMIZERS
@MODES
def test_hooks_go_with_the_optimizer(optimizer: Any, options: Any) -> None:
    problem = BY_NAME["convnet-stride"].make()
    used = build(problem, optimizer, options)
    truth.step(used, problem)
    problem.loss()  # a forward whose backward never comes
    del used
    gc.collect()
    assert hooks(problem.model) == 0 and hooks(problem.criterion) == 0
    assert not hasattr(problem.model, "kfac")


@OPTIMIZERS
def test_copies_and_pickles_of_the_model_are_plain_models(optimizer: Any) -> None:
    problem = BY_NAME["convnet-stride"].make()
    plain = len(pickle.dumps(problem.model))
    used = truth.start(optimizer, problem, damping=0.1)
    truth.step(used, problem)
    problem.loss().backward()
    for twin in (
        copy.deepcopy(problem.model),
        pickle.loads(pickle.dumps(problem.model)),
        torch.optim.swa_utils.AveragedModel(problem.model).module,
    ):
        assert torch.equal(twin(problem.inputs), problem.model(problem.inputs))
    assert len(pickle.dumps(problem.model)) < plain + 2000 * len(list(problem.model.modules()))
    stream = io.BytesIO()
    torch.save(problem.model, stream)
    used.step()


@OPTIMIZERS
@MODES
def test_training_a_copy_leaves_no_trace_in_the_original(optimizer: Any, options: Any) -> None:
    clean, busy = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    first, second = build(clean, optimizer, options), build(busy, optimizer, options)
    for _ in range(3):
        twin = busy.copy()
        twin.inputs = 5 * twin.inputs
        twin.loss().backward()
        truth.step(first, clean)
        truth.step(second, busy)
        assert torch.equal(weights(clean), weights(busy))


def test_importing_the_library_does_not_import_scipy() -> None:
    code = "import sys, kfac; sys.exit(int(any(name.split('.')[0] == 'scipy' for name in sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_optimizers_on_one_model_both_see_its_loss() -> None:
    """The vectors that one sends back are no training step to the other."""
    problem = BY_NAME["mlp-ce-mean"].make()
    alone = problem.copy()
    first = KFAC(problem.model, loss=problem.criterion)
    second = KFAC(problem.model, loss=problem.criterion, lr=0.1)
    only = KFAC(alone.model, loss=alone.criterion, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in (problem, alone):
            case.loss().backward()
        second.step()
        only.step()
        first.step()
    for name, layer in only.curvature().items():
        assert torch.equal(second.curvature()[name].G, layer.G)
