"""Training loops of every shape: gradients that are dropped, derivatives of the user's own, hooks of others."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import ground_truth as truth
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, Problem
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from kfac import EKFAC, GKFAC, KFAC, rows

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
EVERY: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1}
FIXED: dict[str, Any] = {"lr": 0.05, "damping": 0.1, **EVERY}
RULES = pytest.mark.parametrize("options", [EVERY, FIXED], ids=["self-tuning", "fixed"])


def weights(model: nn.Module) -> Tensor:
    return truth.vector(parameter.detach().clone() for parameter in model.parameters())


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
@pytest.mark.parametrize("name", ["mlp-ce-mean", "mlp-ce-weighted"])
@pytest.mark.parametrize("of", ["loss", "output"])
def test_a_gradient_penalty_is_differentiated_through(optimizer: Any, options: Any, name: str, of: str) -> None:
    """Double backward: gradients are those without the optimizer, and the batch counts once, as the criterion's.

    The penalty on a slope of the loss, or on one of the output that is taken before the criterion is called.
    """
    alone, watched, plain = (BY_NAME[name].make() for _ in range(3))
    used = optimizer(watched.model, loss=watched.criterion, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for problem in (alone, watched):
            inputs = problem.inputs.clone().requires_grad_()
            output = problem.model(inputs)
            if of == "loss":
                loss = problem.criterion(output, problem.targets)
                (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
            else:
                (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
                loss = problem.criterion(output, problem.targets)
            (loss + slope.square().sum()).backward()
        for own, other in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
            assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad)
        used.step()
    reference = optimizer(plain.model, loss=plain.criterion, **options)
    truth.step(reference, plain)
    for layer, expected in reference.curvature().items():
        assert truth.relative_error(used.curvature()[layer].G, expected.G) < 1e-12
        assert truth.relative_error(used.curvature()[layer].A, expected.A) < 1e-12


@pytest.mark.parametrize("criterion_called", [True, False], ids=["criterion", "functional"])
def test_inputs_of_layers_are_free_after_a_backward_that_frees_the_graph(criterion_called: bool) -> None:
    """Before the step, and although the network's output lives on."""
    problem = BY_NAME["mlp-ce-mean"].make()
    used = KFAC(problem.model, loss=problem.criterion, **FIXED)
    hidden: list[StorageWeakRef] = []
    last = problem.model.get_submodule("2")
    last.register_forward_pre_hook(lambda module, args: hidden.append(StorageWeakRef(args[0].untyped_storage())))
    output = problem.model(problem.inputs)
    loss = (problem.criterion if criterion_called else F.cross_entropy)(output, problem.targets)
    assert not hidden[0].expired()
    loss.backward()
    assert hidden[0].expired()
    del used


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


class Less(nn.Module):
    """The identity, of whose gradient a tenth goes back: by a hook on a view, or by operations."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.hooked = hooked

    def forward(self, value: Tensor) -> Tensor:
        if not self.hooked:
            return value.detach() + 0.1 * (value - value.detach())
        view = value.view_as(value)
        view.register_hook(lambda gradient: 0.1 * gradient)
        return view


@OPTIMIZERS
@pytest.mark.parametrize("options", [EVERY, FIXED, {**FIXED, "fisher": "sampled"}], ids=["tuned", "exact", "sampled"])
def test_a_hook_on_a_view_of_an_output_changes_curvature_as_an_operation_does(optimizer: Any, options: Any) -> None:
    moved = []
    for hooked in (False, True):
        problem = BY_NAME["mlp-ce-mean"].make()
        problem.model.insert(1, Less(hooked))
        problem.model.insert(0, nn.Linear(4, 4, dtype=torch.float64))  # a layer before the one with the hook
        with torch.no_grad():
            problem.model[0].weight.copy_(torch.eye(4) + 0.1)
            problem.model[0].bias.zero_()
        used = optimizer(problem.model, loss=problem.criterion, **options)
        for _ in range(3):
            truth.step(used, problem)
        moved.append(weights(problem.model))
    assert truth.relative_error(moved[1], moved[0]) < 1e-10


@OPTIMIZERS
@RULES
def test_the_last_gradient_that_a_hook_sees_is_the_losss(optimizer: Any, options: Any) -> None:
    alone, watched = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    used = optimizer(watched.model, loss=watched.criterion, **options)
    seen: list[list[Tensor]] = []
    for problem in (alone, watched):
        seen.append([])
        hidden = problem.model[1](problem.model[0](problem.inputs))
        hidden.register_hook(seen[-1].append)
        problem.criterion(problem.model[2](hidden), problem.targets).backward()
    used.step()
    assert len(seen[0]) == 1 < len(seen[1]) and torch.equal(seen[1][-1], seen[0][-1])


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


def net_of(first: nn.Module, *shape: int) -> tuple[Callable[[], nn.Module], Tensor]:
    """A net of which this is the first layer, and its input."""
    inputs = torch.arange(torch.Size(shape).numel()).reshape(shape)
    inputs = inputs % 7 if isinstance(first, nn.Embedding) else inputs.double().sin()
    with torch.no_grad():
        size = first.double()(inputs).flatten(1).shape[1]
    return lambda: nn.Sequential(copy.deepcopy(first), nn.Tanh(), nn.Flatten(), nn.Linear(size, 20).double()), inputs


FIRST = {
    "linear": (lambda: nn.Linear(6, 5), (8, 6)),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), (8, 6)),
    "tokens": (lambda: nn.Linear(6, 5, bias=False), (8, 3, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), (8, 3)),
    "conv": (lambda: nn.Conv2d(2, 3, 2), (8, 2, 4, 4)),
    "conv padded": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False, padding_mode="circular"), (8, 2, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2), (8, 2, 3, 3)),
    "norm": (lambda: nn.LayerNorm(6), (8, 6)),
}


def evaluate(used: Any, problem: Problem, inputs: Tensor, overwrite: bool) -> Tensor:
    used.zero_grad()
    problem.inputs = inputs.clone()
    loss = problem.loss()
    loss.backward()
    if overwrite:
        problem.inputs.fill_(3)
    return loss


@OPTIMIZERS
@pytest.mark.parametrize("options", [{}, {"lr": 0.05}, {"adapt_damping": True}], ids=["tuned", "fixed", "adapted"])
@pytest.mark.parametrize("first", list(FIRST))
def test_a_loop_may_write_the_next_batch_into_its_input_before_the_step(
    optimizer: Any, options: Any, first: str
) -> None:
    moved = []
    for overwrite in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer, shape = FIRST[first]
            make, inputs = net_of(layer(), *shape)
            problem = Problem(make(), nn.CrossEntropyLoss(), inputs, torch.arange(8))
        used = optimizer(problem.model, loss=problem.criterion, **options)

        for _ in range(3):
            used.step(partial(evaluate, used, problem, inputs, overwrite))
        moved.append(truth.vector(p.detach().clone() for p in problem.model.parameters()))
    assert torch.equal(*moved)


def test_images_that_are_kept_for_the_step_are_copied_in_the_layout_that_they_have() -> None:
    """And what all examples share is not written out for each."""
    images = torch.randn(6, 2, 4, 4).to(memory_format=torch.channels_last)
    shared = torch.randn(1, 1, 3, 5).expand(1, 6, 3, 5)
    for x in (images, shared):
        kept = rows.copied(x)
        assert torch.equal(kept, x) and kept.data_ptr() != x.data_ptr() and kept.stride() == x.stride()
    assert rows.copied(shared).untyped_storage().nbytes() == 15 * 4
