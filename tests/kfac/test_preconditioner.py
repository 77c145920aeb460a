"""The curvature in front of any torch optimizer: `.grad` becomes (F + damping)^-1 grad, and nothing else changes."""

from __future__ import annotations

import io
from typing import Any

import ground_truth as truth
import layer_truth as layers
import pytest
import torch
from cases import BY_NAME, DEEP_LINEAR, ONE_EXAMPLE, Case, Problem
from layer_cases import NORMED, SINGLE, LayerCase, Mean, numbers
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC, Preconditioner

DAMPING = 0.03
METHODS = pytest.mark.parametrize("method", ["kfac", "ekfac", "gkfac"])
OPTIMIZER = {"kfac": KFAC, "ekfac": EKFAC, "gkfac": GKFAC}
EVERY_STEP: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1, "fisher": "exact"}
EXACT = pytest.mark.parametrize(
    ("method", "options"), [("kfac", {"solver": "eigh"}), ("ekfac", {})], ids=["kfac-eigh", "ekfac"]
)


def build(problem: Problem, method: str = "kfac", **options: Any) -> Preconditioner:
    return Preconditioner(
        problem.model, loss=problem.criterion, method=method, **{"damping": DAMPING, **EVERY_STEP, **options}
    )


def precondition(used: Any, problem: Problem) -> dict[str, Tensor]:
    problem.model.zero_grad()
    problem.loss().backward()
    used.step()
    return {name: p.grad.clone() for name, p in problem.model.named_parameters() if p.grad is not None}


def train(used: Any, optimizer: torch.optim.Optimizer, problem: Problem) -> None:
    precondition(used, problem)
    optimizer.step()


@EXACT
@pytest.mark.parametrize("case", [*ONE_EXAMPLE[::4], *DEEP_LINEAR], ids=str)
def test_gradients_become_damped_newton_directions(case: Case, method: str, options: Any) -> None:
    problem = case.make()
    found = precondition(build(used := problem.copy(), method, **options), used)
    for name, layer in truth.layers(problem.model).items():
        weights = truth.parameters(layer)
        block = truth.ggn(problem, weights)
        block.diagonal().add_(DAMPING)
        direction = torch.linalg.solve(block, truth.gradient(problem, weights))
        assert truth.relative_error(truth.block_move(found, name), direction) < 1e-8, name


@EXACT
@pytest.mark.parametrize(
    "case",
    [c for c in SINGLE + NORMED if c.name in ("conv1d-all", "transpose2d-all", "embedding", "batchnorm2d", "rmsnorm")],
    ids=str,
)
def test_gradients_of_every_kind_of_layer_become_damped_newton_directions(
    case: LayerCase, method: str, options: Any
) -> None:
    problem = case.make()
    found = precondition(build(used := problem.copy(), method, **options), used)
    compared = 0
    for name, module in layers.trained(problem.model).items():
        if layers.is_unit(module) or case in SINGLE:
            expected = -layers.newton(problem, module, DAMPING)
            assert truth.relative_error(layers.moved(problem, name, found), expected) < 1e-8, name
            compared += 1
    assert compared


@METHODS
@pytest.mark.parametrize("name", ["mlp-ce-mean", "convnet-stride", "tokens-mixed"])
def test_in_front_of_plain_sgd_it_is_the_fixed_rule_without_momentum_and_clip(method: str, name: str) -> None:
    """Over several steps, with intervals, sampled vectors and relative damping."""
    options: dict[str, Any] = {"damping": None, "fisher": "sampled", "factor_interval": 2, "inverse_interval": 3}
    one, two = BY_NAME[name].make(), BY_NAME[name].make()
    used = build(one, method, **options)
    sgd = torch.optim.SGD(one.model.parameters(), lr=1.0)
    other = OPTIMIZER[method](two.model, loss=two.criterion, lr=1.0, momentum=0.0, kl_clip=None, **options)
    for count in range(5):
        train(used, sgd, one)
        truth.step(other, two)
        for (key, p), q in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
            assert truth.relative_error(p, q) < 1e-10, (count, key)
    assert used.stats["damping"] == other.stats["damping"]


@METHODS
def test_it_works_in_front_of_optimizers_of_torch(method: str) -> None:
    for make in (
        lambda ps: torch.optim.AdamW(ps, lr=0.02),
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.RMSprop(ps, lr=0.01),
    ):
        problem = BY_NAME["convnet-groups"].make()
        used, optimizer = build(problem, method, damping=0.5), make(problem.model.parameters())
        start = problem.loss().item()
        for _ in range(25):
            train(used, optimizer, problem)
        assert problem.loss().item() < 0.5 * start


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.second = nn.Linear(4, 5), nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(value)) * self.scale)


@METHODS
def test_parameters_without_a_block_keep_their_gradient_and_the_frozen_have_none(method: str) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    problem.model = Scaled().double()
    problem.model.get_submodule("second").requires_grad_(False)
    raw = torch.autograd.grad(problem.loss(), problem.model.get_parameter("scale"))[0]
    found = precondition(build(problem, method), problem)
    assert torch.equal(found["scale"], raw)
    assert set(found) == {"first.weight", "first.bias", "scale"}


@METHODS
def test_parameters_weights_buffers_and_the_random_stream_stay(method: str) -> None:
    problem = BY_NAME["convnet-stride"].make()
    before = truth.vector(p.detach().clone() for p in problem.model.parameters())
    used = build(problem, method, fisher="sampled")
    state = torch.get_rng_state()
    raw = torch.autograd.grad(problem.loss(), list(problem.model.parameters()))
    found = precondition(used, problem)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(truth.vector(problem.model.parameters()), before)
    assert all(truth.relative_error(g, r) > 0.05 for g, r in zip(found.values(), raw, strict=True))


@METHODS
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_saved_and_loaded_it_goes_on_bit_for_bit(method: str, steps: int) -> None:
    options: dict[str, Any] = {"fisher": "sampled", "factor_interval": 2, "inverse_interval": 3, "damping": None}

    def make() -> tuple[Problem, Preconditioner, torch.optim.Optimizer]:
        problem = BY_NAME["convnet-groups"].make()
        return problem, build(problem, method, **options), torch.optim.Adam(problem.model.parameters(), lr=1e-2)

    straight, used, adam = make()
    for count in range(2 * steps):
        if count == steps:
            saved = through_a_file([straight.model.state_dict(), used.state_dict(), adam.state_dict()])
        train(used, adam, straight)
    resumed, other, second = make()
    resumed.model.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    for _ in range(steps):
        train(other, second, resumed)
    for one, two in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)
    for name, layer in used.curvature().items():
        assert torch.equal(other.curvature()[name].A, layer.A) and torch.equal(other.curvature()[name].G, layer.G)


def through_a_file(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def test_state_of_another_model_is_refused_in_one_line() -> None:
    problem, other = BY_NAME["mlp-ce-mean"].make(), BY_NAME["convnet-plain"].make()
    saved = build(problem).state_dict()
    with pytest.raises(ValueError) as caught:
        build(other).load_state_dict(saved)
    assert "\n" not in str(caught.value)


@METHODS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_batch_leaves_gradients_and_factors_as_they_are(method: str, value: float) -> None:
    problem = BY_NAME["mlp-bce-mean"].make()
    used = build(problem, method)
    precondition(used, problem)
    factors = {name: (layer.A.clone(), layer.G.clone()) for name, layer in used.curvature().items()}
    good, problem.inputs = problem.inputs, problem.inputs.clone()
    problem.inputs[1, 1] = value
    precondition(used, problem)
    assert float(used.stats["skipped"]) == 1
    for name, (a, g) in factors.items():
        assert torch.equal(used.curvature()[name].A, a) and torch.equal(used.curvature()[name].G, g)
    problem.inputs = good
    assert all(g.isfinite().all() and g.any() for g in precondition(used, problem).values())
    assert float(used.stats["skipped"]) == 0


@METHODS
@pytest.mark.parametrize("name", ["0.bias", "2.weight"])
def test_one_broken_gradient_anywhere_is_enough(method: str, name: str) -> None:
    """As an overflow under a gradient scaler leaves it: all others stay raw, for the optimizer behind to see."""
    problem = BY_NAME["mlp-bce-mean"].make()
    used = build(problem, method)
    problem.loss().backward()
    gradients = dict(problem.model.named_parameters())
    assert gradients[name].grad is not None
    gradients[name].grad.view(-1)[-1] = float("inf")
    raw = {key: p.grad.clone() for key, p in gradients.items() if p.grad is not None}
    used.step()
    assert float(used.stats["skipped"]) == 1
    assert all(torch.equal(p.grad, raw[key]) for key, p in gradients.items() if p.grad is not None)


@METHODS
def test_micro_batches_are_one_batch(method: str) -> None:
    whole, parts = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    expected = precondition(build(whole, method), whole)
    used = build(parts, method)
    parts.model.zero_grad()
    for inputs, targets in zip(parts.inputs.split([1, 3, 2]), parts.targets.split([1, 3, 2]), strict=True):
        (parts.criterion(parts.model(inputs), targets) * (len(inputs) / 6)).backward()
    used.step()
    for name, parameter in parts.model.named_parameters():
        assert parameter.grad is not None
        assert truth.relative_error(parameter.grad, expected[name]) < 1e-9, name


@METHODS
def test_a_second_step_without_a_backward_of_its_own_says_nothing_wrong(method: str) -> None:
    """Between statistics steps the old preconditioner serves: twice the gradient gives twice the direction."""
    problem = BY_NAME["mlp-ce-mean"].make()
    used = build(problem, method, factor_interval=100, inverse_interval=100)
    first = precondition(used, problem)
    problem.model.zero_grad()
    (2 * problem.loss()).backward()
    used.step()
    for name, parameter in problem.model.named_parameters():
        assert parameter.grad is not None
        assert truth.relative_error(parameter.grad, 2 * first[name]) < 1e-9, name


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
def test_sharing_is_an_option_here_too(sharing: str, solver: str) -> None:
    case = LayerCase("pooled", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Mean(), nn.Linear(5, 3)),
                     numbers(6, 3, 4))  # fmt: skip
    problem = case.make()
    found = precondition(build(used := problem.copy(), solver=solver, sharing=sharing), used)
    step = layers.factored_step if solver == "cholesky" else layers.kronecker_step
    for name, (a, g) in layers.factors(problem, sharing).items():
        assert truth.relative_error(truth.block_move(found, name), -step(problem, name, a, g, DAMPING)) < 1e-8, name


def test_summary_and_curvature_name_every_layer() -> None:
    problem = BY_NAME["convnet-groups"].make()
    used = build(problem)
    precondition(used, problem)
    assert set(used.curvature()) == {"0", "3"}
    assert all(any(line.startswith(name) for line in str(used.summary()).splitlines()) for name in ("0", "3"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "sgd"}, ["method", "sgd", "kfac"]),
        ({"damping": -1.0}, ["damping", "-1.0"]),
        ({"fisher": "true"}, ["fisher", "true", "exact"]),
        ({"sharing": "both"}, ["sharing", "both", "reduce"]),
        ({"factor_interval": 0}, ["factor_interval", "0"]),
        ({"method": "ekfac", "solver": "eigh"}, ["ekfac", "solver"]),
        ({"method": "kfac", "scale_interval": 3}, ["kfac", "scale_interval"]),
        ({"solver": "qr"}, ["solver", "qr", "cholesky"]),
        ({"max_factor_size": 0}, ["max_factor_size", "0"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_bad_argument_is_refused_in_one_line(options: dict[str, Any], words: list[str]) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    with pytest.raises(ValueError) as caught:
        Preconditioner(problem.model, loss=problem.criterion, **options)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not any(module._forward_hooks for module in problem.model.modules()), "a refused one left its hooks"


def test_renewals_are_gradual_at_first_as_in_the_fixed_rule() -> None:
    """Ages of inverses, and counts of statistics."""
    one, two = BY_NAME["mlp-ce-mean"].make(), BY_NAME["mlp-ce-mean"].make()
    used = Preconditioner(one.model, loss=one.criterion)
    fixed = KFAC(two.model, loss=two.criterion, lr=0.0)
    for _ in range(40):
        precondition(used, one)
        truth.step(fixed, two)
        for name, layer in fixed.curvature().items():
            assert used.curvature()[name].age == layer.age
    counts = [int(state.count) for c in (used, fixed) for state in c._curvature.states.values()]
    assert set(counts) == {8 + 4 + 3 + 2 + 1}
