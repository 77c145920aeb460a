"""Compiled models: the steps of eager ones where statistics are due, compiled code everywhere else, nothing left."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, Problem
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from kfac import EKFAC, GKFAC, KFAC, Preconditioner, compiling

FIXED: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "factor_interval": 3, "inverse_interval": 3}


class Counted:
    """A backend that counts what it compiles and how often that runs."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        compiled = aot_eager(graph, inputs)

        def run(*args: Any) -> Any:
            self.runs += 1
            return compiled(*args)

        return run


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    gc.collect()
    torch._dynamo.reset()
    yield
    gc.collect()
    assert stance() == "default", "a stance was left behind"


class Net(nn.Module):
    """A class of its own, with a buffer and a layer in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.rest = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))

    def forward(self, value: Tensor) -> Tensor:
        return self.rest(self.norm(self.first(value)))


def net_problem() -> Problem:
    problem = BY_NAME["mlp-ce-mean"].make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        problem.model = Net().double()
    return problem


Step = Callable[[], Tensor]


def compiled_outer(p: Problem, build: Callable[[nn.Module], Any], **how: Any) -> tuple[Any, Step]:
    model = torch.compile(p.model, **how)
    return build(model), lambda: p.criterion(model(p.inputs), p.targets)


def optimizer_first(p: Problem, build: Callable[[nn.Module], Any], **how: Any) -> tuple[Any, Step]:
    used = build(p.model)
    model = torch.compile(p.model, **how)
    return used, lambda: p.criterion(model(p.inputs), p.targets)


def compiled_inner(p: Problem, build: Callable[[nn.Module], Any], **how: Any) -> tuple[Any, Step]:
    model = torch.compile(p.model, **how)
    return build(p.model), lambda: p.criterion(model(p.inputs), p.targets)


def in_place_before(p: Problem, build: Callable[[nn.Module], Any], **how: Any) -> tuple[Any, Step]:
    p.model.compile(**how)
    return build(p.model), p.loss


def in_place_after(p: Problem, build: Callable[[nn.Module], Any], **how: Any) -> tuple[Any, Step]:
    used = build(p.model)
    p.model.compile(**how)
    return used, p.loss


def block_by_block(p: Problem, build: Callable[[nn.Module], Any], **how: Any) -> tuple[Any, Step]:
    used = build(p.model)
    for child in p.model.children():
        child.compile(**how)
    return used, p.loss


def children_replaced(p: Problem, build: Callable[[nn.Module], Any], **how: Any) -> tuple[Any, Step]:
    for name, child in list(p.model.named_children()):
        setattr(p.model, name, torch.compile(child, **how))
    return build(p.model), p.loss


def criterion_too(p: Problem, build: Callable[[nn.Module], Any], **how: Any) -> tuple[Any, Step]:
    p.criterion = torch.compile(p.criterion, backend="eager")
    return optimizer_first(p, build, **how)


def whole_loss(p: Problem, build: Callable[[nn.Module], Any], **how: Any) -> tuple[Any, Step]:
    used = build(p.model)
    return used, torch.compile(lambda: p.criterion(p.model(p.inputs), p.targets), **how)


def run_before(p: Problem, build: Callable[[nn.Module], Any], **how: Any) -> tuple[Any, Step]:
    """Compiled and used before there was any optimizer: the graph knows of no hook."""
    model = torch.compile(p.model, **how)
    kept = [buffer.clone() for buffer in p.model.buffers()]
    p.criterion(model(p.inputs), p.targets).backward()
    with torch.no_grad():
        for buffer, value in zip(p.model.buffers(), kept, strict=True):
            buffer.copy_(value)
    return build(model), lambda: p.criterion(model(p.inputs), p.targets)


WAYS = [
    compiled_outer,
    optimizer_first,
    compiled_inner,
    in_place_before,
    in_place_after,
    block_by_block,
    children_replaced,
    criterion_too,
    whole_loss,
    run_before,
]


def train(used: Any, loss: Step, steps: int) -> list[float]:
    values = []
    for _ in range(steps):
        used.zero_grad()
        value = loss()
        value.backward()
        used.step()
        values.append(value.item())
    return values


def weights(problem: Problem) -> Tensor:
    return truth.vector(x.detach().double() for x in problem.model.state_dict().values())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("make", [lambda: BY_NAME["mlp-ce-mean"].make(), net_problem], ids=["sequential", "class"])
def test_a_compiled_model_makes_the_eager_steps_and_runs_compiled_where_nothing_is_due(way: Any, make: Any) -> None:
    eager, compiled, backend = make(), make(), Counted()
    reference = KFAC(eager.model, loss=eager.criterion, **FIXED)
    expected = train(reference, eager.loss, 7)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="KFAC")  # torch has warnings of its own while it compiles
        used, loss = way(compiled, lambda m: KFAC(m, loss=compiled.criterion, **FIXED), backend=backend, fullgraph=True)
        backend.runs = 0
        values = train(used, loss, 7)
    parts = len(list(compiled.model.children())) if way in (block_by_block, children_replaced) else 1
    # Statistics are due at steps 0, 3 and 6; one graph serves the other four.
    assert (backend.graphs, backend.runs) == (parts, 4 * parts)
    assert values == pytest.approx(expected, rel=1e-9)
    assert truth.relative_error(weights(compiled), weights(eager)) < 1e-9
    assert list(used.curvature()) == list(reference.curvature())
    assert used.summary() == reference.summary()


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
@pytest.mark.parametrize("options", [{}, FIXED], ids=["self-tuning", "fixed"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_all_optimizers_train_a_compiled_model(optimizer: Any, options: Any, fullgraph: bool) -> None:
    eager, compiled, backend = net_problem(), net_problem(), Counted()
    reference = optimizer(eager.model, loss=eager.criterion, **options)
    model = torch.compile(compiled.model, backend=backend, fullgraph=fullgraph)
    used = optimizer(model, loss=compiled.criterion, **options)
    train(reference, eager.loss, 5)
    train(used, lambda: compiled.criterion(model(compiled.inputs), compiled.targets), 5)
    assert truth.relative_error(weights(compiled), weights(eager)) < 1e-9
    assert backend.runs == (3 if options else 0)  # the self-tuning step samples at each step


def test_states_of_compiled_and_plain_models_are_exchanged() -> None:
    plain, compiled = net_problem(), net_problem()
    first = KFAC(plain.model, loss=plain.criterion, **FIXED)
    train(first, plain.loss, 2)
    model = torch.compile(compiled.model, backend="aot_eager")
    second = KFAC(model, loss=compiled.criterion, **FIXED)
    compiled.model.load_state_dict(plain.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(first, plain.loss, 3)
    train(second, lambda: compiled.criterion(model(compiled.inputs), compiled.targets), 3)
    assert truth.relative_error(weights(compiled), weights(plain)) < 1e-9


def test_a_preconditioner_in_front_of_another_optimizer() -> None:
    problem, backend = net_problem(), Counted()
    model = torch.compile(problem.model, backend=backend)
    preconditioner = Preconditioner(model, loss=problem.criterion, factor_interval=2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        sgd.zero_grad()
        problem.criterion(model(problem.inputs), problem.targets).backward()
        preconditioner.step()
        sgd.step()
    assert backend.runs == 2 and len(preconditioner.curvature()) == 3


@pytest.mark.filterwarnings("ignore:KFAC. statistics were due")
def test_a_due_step_that_is_compiled_all_the_same_goes_without_statistics() -> None:
    """Where the user insists on compiled code, hooks fold to nothing: no break of a full graph, no error."""
    problem, backend = net_problem(), Counted()
    model = torch.compile(problem.model, backend=backend, fullgraph=True)
    used = KFAC(model, loss=problem.criterion, **FIXED)
    for compiled in (True, False, False):
        used.zero_grad()
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            problem.criterion(model(problem.inputs), problem.targets).backward()
        used.step()
        assert bool(used.curvature()) != compiled
    assert (backend.graphs, backend.runs) == (1, 1)


# The stance


def test_overlapping_optimizers_share_the_stance_in_any_order() -> None:
    first, second, third = (BY_NAME["mlp-ce-mean"].make() for _ in range(3))
    tuned = KFAC(first.model, loss=first.criterion)
    fixed = KFAC(second.model, loss=second.criterion, **FIXED)
    also = KFAC(third.model, loss=third.criterion)
    assert stance() == "force_eager"
    train(fixed, second.loss, 1)
    del tuned
    gc.collect()
    assert stance() == "force_eager"  # of the third
    del also
    gc.collect()
    assert stance() == "default"
    train(fixed, second.loss, 2)
    assert stance() == "force_eager"  # due at step 3
    train(fixed, second.loss, 1)
    assert stance() == "default"
    del fixed
    gc.collect()
    assert stance() == "default"


def test_a_stance_of_the_user_is_put_back() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    with torch.compiler.set_stance("eager_on_recompile"):
        used = KFAC(problem.model, loss=problem.criterion, **FIXED)
        assert stance() == "force_eager"
        train(used, problem.loss, 1)
        assert stance() == "eager_on_recompile"
        train(used, problem.loss, 2)
        assert stance() == "force_eager"
        train(used, problem.loss, 1)
        assert stance() == "eager_on_recompile"


def test_a_stance_that_the_user_changes_while_one_is_armed_stays_the_users() -> None:
    with torch.compiler.set_stance("eager_on_recompile"):
        problem = BY_NAME["mlp-ce-mean"].make()
        used = KFAC(problem.model, loss=problem.criterion)
    assert stance() == "default"
    train(used, problem.loss, 1)
    assert stance() == "force_eager"
    del used
    gc.collect()
    assert stance() == "default"


def test_arming_twice_and_disarming_a_stranger_are_harmless() -> None:
    class Owner:
        pass

    one, two = Owner(), Owner()
    compiling.disarm(one)
    assert stance() == "default"
    compiling.arm(one)
    compiling.arm(one)
    compiling.arm(two)
    compiling.disarm(one)
    assert stance() == "force_eager"
    del two
    gc.collect()
    assert stance() == "default"


@pytest.mark.slow
@pytest.mark.parametrize("way", [compiled_outer, in_place_after, whole_loss], ids=lambda way: way.__name__)
def test_inductor(way: Any) -> None:
    eager, compiled = net_problem(), net_problem()
    reference = KFAC(eager.model, loss=eager.criterion, **FIXED)
    expected = train(reference, eager.loss, 7)
    used, loss = way(compiled, lambda m: KFAC(m, loss=compiled.criterion, **FIXED), fullgraph=True)
    values = train(used, loss, 7)
    assert values == pytest.approx(expected, rel=1e-9)
    assert truth.relative_error(weights(compiled), weights(eager)) < 1e-8
