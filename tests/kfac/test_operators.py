"""Curvature operators equal dense float64 matrices made by autograd, and a probe leaves no trace."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import pytest
import torch
from dense_curvature import LOSSES, NETS, Case, case, close, dense_ggn, gradient
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from kfac import EKFAC, GKFAC, KFAC, diagnostics
from kfac.diagnostics import GGN, Fisher

# ---- operators


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("net", NETS)
def test_ggn_is_jacobian_hessian_jacobian_of_the_loss_as_reduced(net: str, loss: str, reduction: str) -> None:
    c = case(net, loss, reduction)
    operator, expected = GGN(*c), dense_ggn(c)
    close(operator.dense(), expected)
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(1)).double()
    product = operator.matvec(operator.unflatten(v))
    assert [t.shape for t in product] == [p.shape for p in c.model.parameters()]
    close(operator.flatten(product), expected @ v)
    close(operator.dot(product, operator.unflatten(v)), v @ expected @ expected @ v)
    for mine, theirs in zip(operator.gradient, gradient(c), strict=True):
        close(mine, theirs)
    close(operator.loss, c.criterion(copy.deepcopy(c.model)(c.inputs), c.targets).detach())


def test_several_products_at_once_equal_single_ones() -> None:
    operator = GGN(*case("conv"))
    rows = torch.randn(5, operator.size, generator=torch.Generator().manual_seed(1)).double()
    close(operator.apply(rows), torch.stack([operator.apply(row) for row in rows]))


def test_frozen_parameters_are_left_out() -> None:
    c = case("tanh mlp")
    assert isinstance(c.model, nn.Sequential)
    c.model[0].requires_grad_(False)
    assert GGN(*c).size == 18
    close(GGN(*c).dense(), dense_ggn(c))


def test_chosen_parameters_give_their_block_in_the_order_given() -> None:
    c = case("tanh mlp")
    weight, bias = list(c.model.parameters())[:2]
    full = GGN(*c).dense()
    block = GGN(*c, [bias, weight]).dense()
    order = torch.cat([torch.arange(20, 25), torch.arange(20)])
    close(block, full[order][:, order])


def test_a_frozen_parameter_may_be_chosen() -> None:
    c = case("tanh mlp")
    full = dense_ggn(c)
    c.model.requires_grad_(False)
    chosen = next(c.model.parameters())
    close(GGN(*c, [chosen]).dense(), full[:20, :20])
    assert not chosen.requires_grad


def test_an_unused_parameter_has_zero_rows_and_zero_gradient() -> None:
    c = case("tanh mlp")
    used = GGN(*c).dense()
    c.model.register_parameter("spare", nn.Parameter(torch.ones(2, 2).double()))
    operator = GGN(*c)
    assert operator.parameters[0].shape == (2, 2)  # a module's own parameters come before its children's
    close(operator.dense(), torch.block_diag(torch.zeros(4, 4).double(), used))
    assert not operator.gradient[0].any()
    assert diagnostics.damped_natural_gradient(operator, operator.gradient, 0.1).residual < 1e-4


def test_a_loss_without_curvature_or_without_dependence_gives_zero() -> None:
    c = case("tanh mlp", "mse")
    linear = GGN(c.model, lambda output, _: output.sum(), c.inputs, c.targets)
    assert not linear.dense().any() and any(g.any() for g in linear.gradient)
    close(diagnostics.largest_eigenvalues(linear, 2), torch.zeros(2).double())
    constant = GGN(c.model, lambda output, _: torch.zeros(()), c.inputs, c.targets)
    assert not constant.dense().any() and not any(g.any() for g in constant.gradient)


def test_outputs_may_be_nested_and_only_in_part_used() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> dict[str, object]:
            h = self.body(x).tanh()
            return {"pair": (self.left(h), self.right(h)), "count": len(x), "unused": h.sum()}

    class Sum(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(self.model(x)["pair"])

    c = case("tanh mlp", "mse")
    two = Two().double()

    def product(output: dict[str, tuple[Tensor, Tensor]], targets: Tensor) -> Tensor:
        left, right = output["pair"]
        return ((left * right.exp() - targets) ** 2).mean()

    def flat(output: Tensor, targets: Tensor) -> Tensor:
        return product({"pair": (output[:6], output[6:])}, targets)

    close(GGN(two, product, c.inputs, c.targets).dense(), dense_ggn(Case(Sum(two), flat, c.inputs, c.targets)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.unflatten(1, (1, -1)).expand(-1, 3, -1))[0][:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.stack([x, x.flip(1)], 1)
        return self.head(self.attention(rows, rows, rows, need_weights=False)[0].mean(1))


class Recomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda t: self.body(t).tanh(), x, use_reentrant=False))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


def shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(inplace=True), layer, nn.Linear(4, 3))


@pytest.mark.parametrize(
    "build",
    [
        Recurrent,
        Attending,
        Recomputing,
        old_weight_norm,
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
        lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(4, 5), "weight", 5), nn.Linear(5, 3)),
        shared,
    ],
    ids=["lstm", "attention", "checkpoint", "old weight norm", "weight norm", "pruned", "shared, in place"],
)
def test_modules_of_every_kind_have_products(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    c = case()._replace(model=build().double())
    c.model(c.inputs)  # modules may keep results, with their graph
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = rows_of_gradients(c)
    close(GGN(*c).dense(), expected)


def rows_of_gradients(c: Case) -> Tensor:
    """Jᵀ H J with one ordinary backward for each output number."""
    z = c.model(c.inputs)
    parameters = list(c.model.parameters())
    rows = [torch.autograd.grad(number, parameters, retain_graph=True) for number in z.flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    flat = z.detach().flatten()
    hessian = torch.autograd.functional.hessian(lambda o: c.criterion(o.view_as(z), c.targets), flat)
    return jacobian.T @ hessian @ jacobian


def root_of_cross_entropy(z: Tensor) -> Tensor:
    """Columns [C, N, C] of a root of the mean cross-entropy's Hessian."""
    p = z.softmax(1)
    return torch.stack([(p[:, k, None] / len(z)).sqrt() * (torch.eye(3).double()[k] - p) for k in range(3)])


def test_fisher_of_all_columns_is_the_ggn() -> None:
    c = case("conv")
    close(Fisher(c.model, root_of_cross_entropy, c.inputs).dense(), GGN(*c).dense())


def test_fisher_of_log_probabilities_is_the_ggn_of_the_logits() -> None:
    c = case("tanh mlp")
    log_model = nn.Sequential(c.model, nn.LogSoftmax(1))

    def columns(log_p: Tensor) -> Tensor:
        return torch.diag_embed((log_p / 2).exp() / len(log_p) ** 0.5).movedim(1, 0)

    close(Fisher(log_model, columns, c.inputs).dense(), GGN(*c).dense())
    assert not GGN(log_model, nn.NLLLoss(), c.inputs, c.targets).dense().any()


def test_empirical_fisher_is_the_sum_of_outer_products_of_example_gradients() -> None:
    c = case("tanh mlp", "mse")

    def vectors(z: Tensor) -> Tensor:
        return (z - c.targets)[None]

    expected = torch.zeros(())
    for x, y in zip(c.inputs, c.targets, strict=True):
        one = gradient(Case(c.model, lambda o, t: 0.5 * ((o - t) ** 2).sum(), x[None], y[None]))
        flat = torch.cat([g.flatten() for g in one])
        expected = expected + flat.outer(flat)
    close(Fisher(c.model, vectors, c.inputs).dense(), expected)


# ---- isolation


@contextmanager
def nothing_moves(c: Case) -> Iterator[None]:
    """Everything that a probe could disturb is bit-equal afterwards, and no hook has run."""
    parts = [*c.model.modules(), *([c.criterion] if isinstance(c.criterion, nn.Module) else [])]
    calls: list[nn.Module] = []
    handles = []
    for part in parts:
        handles.append(part.register_forward_hook(lambda m, *_: calls.append(m)))
        handles.append(part.register_forward_pre_hook(lambda m, *_: calls.append(m)))
        handles.append(part.register_full_backward_hook(lambda m, *_: calls.append(m)))
    for p in c.model.parameters():
        p.grad = torch.full_like(p, 0.5)
        p.register_hook(lambda g: calls.append(c.model))
    before = {k: v.clone() for k, v in c.model.state_dict().items()}
    versions = [t._version for t in (*c.model.parameters(), *c.model.buffers())]
    random, modes = torch.get_rng_state(), [m.training for m in parts]
    wanted = [p.requires_grad for p in c.model.parameters()]
    yield
    assert not calls
    assert all(torch.equal(before[k], v) for k, v in c.model.state_dict().items())
    assert versions == [t._version for t in (*c.model.parameters(), *c.model.buffers())]
    assert all(p.grad is not None and (p.grad == 0.5).all() for p in c.model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in parts]
    assert wanted == [p.requires_grad for p in c.model.parameters()]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("training", [True, False])
def test_a_probe_leaves_no_trace(training: bool) -> None:
    c = case("batch norm")
    c = c._replace(model=nn.Sequential(c.model, nn.Dropout(0.5)).train(training))
    with nothing_moves(c):
        operator = GGN(*c)
        top = diagnostics.largest_eigenvalues(operator, 2)
        diagnostics.trace(operator, 3)
        diagnostics.diagonal(operator, 3)
        diagnostics.fidelity(operator, operator.gradient, operator.gradient, 0.1)
    assert torch.equal(top, diagnostics.largest_eigenvalues(GGN(*c), 2))


@pytest.mark.parametrize("optimizer_class", [KFAC, EKFAC, GKFAC])
def test_probes_at_any_moment_of_a_step_leave_an_optimizer_on_its_path(optimizer_class: type[KFAC]) -> None:
    def train(probed: bool) -> Case:
        c = case("batch norm", n=12)
        assert isinstance(c.criterion, nn.Module)
        optimizer = optimizer_class(c.model, loss=c.criterion)
        for _ in range(6):
            optimizer.zero_grad()
            loss = c.criterion(c.model(c.inputs), c.targets)
            if probed:
                GGN(*c).apply(torch.ones(GGN(*c).size).double())
            loss.backward()
            if probed:
                diagnostics.trace(GGN(*c), 2)
            optimizer.step()
        return c

    alone, watched = train(False).model.state_dict(), train(True).model.state_dict()
    assert all(torch.equal(alone[name], watched[name]) for name in alone)


def test_the_mode_of_the_model_decides_which_network_is_measured() -> None:
    c = case("batch norm")
    training = GGN(*c).dense()
    c.model.eval()
    evaluated = GGN(*c).dense()
    close(evaluated, dense_ggn(c))
    assert not torch.allclose(training, evaluated)


def test_the_operator_stays_at_the_point_where_it_was_made() -> None:
    c = case("tanh mlp")
    operator, expected = GGN(*c), dense_ggn(c)
    with torch.no_grad():
        for p in c.model.parameters():
            p.mul_(3)
    close(operator.dense(), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_probe_works_where_gradients_are_off(context: Callable[[], torch.no_grad]) -> None:
    c = case("batch norm")
    expected = GGN(*c).dense()
    with context():
        operator = GGN(c.model, c.criterion, c.inputs.clone(), c.targets.clone())
        close(
            operator.matvec(operator.gradient)[0].flatten(),
            (expected @ operator.flatten(operator.gradient))[:54],
        )


def test_a_compiled_model_is_measured_as_the_plain_one() -> None:
    c = case("tanh mlp")
    expected = GGN(*c).dense()
    compiled = cast(nn.Module, torch.compile(c.model, backend="aot_eager"))
    compiled(c.inputs)
    close(GGN(compiled, *c[1:]).dense(), expected)
    close(GGN(nn.Sequential(compiled), *c[1:]).dense(), expected)


def test_importing_the_diagnostics_does_not_import_scipy() -> None:
    code = "import sys, kfac.diagnostics; sys.exit('scipy' in sys.modules or 'torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
