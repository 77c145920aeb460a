"""What a right second-order step is, from autograd alone: dense curvature, Kronecker factors, damped solves.

The one idea: the curvature of a batch is J^T H J with J the Jacobian of the model's output and H the Hessian of the
criterion, both taken by autograd. No distribution, no reduction and no layer geometry is written down a second time,
so nothing here can share a mistake with an implementation that draws vectors and unfolds patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from cases import Problem
from torch import Tensor, nn

# The configuration under which the first step is the bare preconditioned gradient.
BARE: dict[str, Any] = {
    "lr": 1.0,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "kl_clip": None,
    "factor_interval": 1,
    "inverse_interval": 1,
    "fisher": "exact",
}

_MODES = {"zeros": "constant", "circular": "circular", "reflect": "reflect", "replicate": "replicate"}


def layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers with a Kronecker block, by their names in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def parameters(layer: nn.Module) -> list[Tensor]:
    """Weight, then bias where there is one."""
    return [parameter for parameter in layer.parameters(recurse=False)]


def vector(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def jacobian(output: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
    """d output / d wrt, one tensor [output numbers, *shape] for each tensor of `wrt`."""
    numbers = output.reshape(-1)
    basis = torch.eye(len(numbers), dtype=output.dtype)
    return list(
        torch.autograd.grad(
            numbers, wrt, basis, retain_graph=True, is_grads_batched=True, allow_unused=True, materialize_grads=True
        )
    )


def loss_hessian(problem: Problem, output: Tensor) -> Tensor:
    """Hessian of the criterion as reduced, with respect to all output numbers of the batch: [O, O]."""
    hessian = torch.autograd.functional.hessian(lambda f: problem.criterion(f, problem.targets), output.detach())
    return hessian.reshape(output.numel(), output.numel())


def ggn(problem: Problem, wrt: Sequence[Tensor]) -> Tensor:
    """Exact generalised Gauss-Newton matrix of the loss as reduced, dense: [P, P]."""
    output = problem.model(problem.inputs)
    rows = torch.cat([block.flatten(1) for block in jacobian(output, wrt)], dim=1)
    return rows.T @ loss_hessian(problem, output) @ rows


def gradient(problem: Problem, wrt: Sequence[Tensor]) -> Tensor:
    return vector(torch.autograd.grad(problem.loss(), wrt))


def input_rows(layer: nn.Linear | nn.Conv2d, value: Tensor) -> Tensor:
    """What multiplies the weight: [groups, N, T, d_in], a one appended where the layer has a bias."""
    if isinstance(layer, nn.Linear):
        rows = value.reshape(1, value.shape[0], -1, value.shape[-1])
    else:
        if isinstance(layer.padding, str):
            total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            sides = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
        else:
            height, width = layer.padding
            sides = [width, width, height, height]
        padded = F.pad(value, sides, mode=_MODES[layer.padding_mode])
        # Convolving with the unit kernels reads off the patches: the layer's own geometry, no index arithmetic.
        channels = layer.in_channels // layer.groups
        taps = channels * layer.kernel_size[0] * layer.kernel_size[1]
        kernels = torch.eye(taps, dtype=value.dtype).reshape(taps, channels, *layer.kernel_size)
        patches = F.conv2d(
            padded, kernels.repeat(layer.groups, 1, 1, 1), None, layer.stride, 0, layer.dilation, layer.groups
        )
        rows = patches.reshape(value.shape[0], layer.groups, taps, -1).permute(1, 0, 3, 2)
    if layer.bias is not None:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
    return rows


def output_rows(layer: nn.Linear | nn.Conv2d, value: Tensor, lead: int = 0) -> Tensor:
    """A tensor shaped like `lead` dimensions and the layer's output, as [*lead, groups, N, T, d_out]."""
    if isinstance(layer, nn.Linear):
        return value.reshape(*value.shape[: lead + 1], -1, value.shape[-1]).unsqueeze(lead)
    split = value.unflatten(lead + 1, (layer.groups, -1)).flatten(lead + 3)
    return split.movedim(lead + 1, lead).transpose(-1, -2)


def capture(problem: Problem) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """One forward: the model's output, each layer's input, and a zero added to each layer's output."""
    inputs: dict[str, Tensor] = {}
    taps: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name] = args[0].detach()
            taps[name] = torch.zeros_like(output, requires_grad=True)
            return output + taps[name]

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers(problem.model).items()]
    try:
        output = problem.model(problem.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return output, inputs, taps


def input_factor(layer: nn.Linear | nn.Conv2d, value: Tensor) -> Tensor:
    """A = mean over examples and positions of a a^T: [groups, d_in, d_in]."""
    rows = input_rows(layer, value).flatten(1, 2)
    return rows.mT @ rows / rows.shape[1]


def factors(problem: Problem) -> dict[str, tuple[Tensor, Tensor]]:
    """A and G of every layer under the exact Fisher, expand setting: [groups, d, d] each.

    G is the sum over examples and positions of the curvature with respect to one layer output, J_nt^T H J_nt.
    """
    output, inputs, taps = capture(problem)
    hessian = loss_hessian(problem, output)
    found = layers(problem.model)
    result = {}
    for (name, layer), derivative in zip(found.items(), jacobian(output, [taps[name] for name in found]), strict=True):
        rows = output_rows(layer, derivative, lead=1)
        backward = torch.einsum("igntd,ij,jgnte->gde", rows, hessian, rows)
        result[name] = (input_factor(layer, inputs[name]), backward)
    return result


def empirical_factors(problem: Problem, weight: float) -> dict[str, tuple[Tensor, Tensor]]:
    """A and G with v = sqrt(c) * gradient of one example's own loss; `weight` is c, alike for all examples.

    The loss is the sum of c * l_n, so its gradient at a layer output is c * grad l_n: dividing by sqrt(c) gives v.
    """
    output, inputs, taps = capture(problem)
    found = layers(problem.model)
    loss = problem.criterion(output, problem.targets)
    result = {}
    for (name, layer), slope in zip(
        found.items(), torch.autograd.grad(loss, [taps[name] for name in found]), strict=True
    ):
        rows = output_rows(layer, slope).flatten(1, 2) / weight**0.5
        result[name] = (input_factor(layer, inputs[name]), rows.mT @ rows)
    return result


def matrix(layer: nn.Linear | nn.Conv2d, tensors: list[Tensor]) -> Tensor:
    """Weight (and bias as the last column) as [groups, d_out, d_in]."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    columns = [tensors[0].reshape(groups, tensors[0].shape[0] // groups, -1)]
    if len(tensors) > 1:
        columns.append(tensors[1].reshape(groups, -1, 1))
    return torch.cat(columns, dim=-1)


def flat(layer: nn.Linear | nn.Conv2d, value: Tensor) -> Tensor:
    """The inverse of `matrix`, as one vector: weight, then bias."""
    if layer.bias is None:
        return value.reshape(-1)
    return torch.cat([value[..., :-1].reshape(-1), value[..., -1].reshape(-1)])


def order(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Positions of the entries of `matrix`, row by row, in the vector (weight, bias): permutes a dense block."""
    count = sum(parameter.numel() for parameter in parameters(layer))
    numbers = torch.arange(count)
    shaped = [numbers[: layer.weight.numel()].reshape(layer.weight.shape)]
    if layer.bias is not None:
        shaped.append(numbers[layer.weight.numel() :])
    return matrix(layer, shaped).reshape(-1)


def kronecker(layer: nn.Linear | nn.Conv2d, a: Tensor, g: Tensor) -> Tensor:
    """The block G (x) A, dense, indexed like the vector (weight, bias); groups on the diagonal."""
    ordered = torch.block_diag(*[torch.kron(g_k, a_k) for a_k, g_k in zip(a, g, strict=True)])
    result = torch.zeros_like(ordered)
    index = order(layer)
    result[index.unsqueeze(1), index.unsqueeze(0)] = ordered
    return result


def mean_eigenvalue(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1).reshape(-1, 1, 1)


def factored_solve(a: Tensor, g: Tensor, value: Tensor, damping: float) -> Tensor:
    """(G + sqrt(damping)/pi)^-1 V (A + pi sqrt(damping))^-1 with pi of Martens and Grosse (1503.05671, section 6.3)."""
    pi = (mean_eigenvalue(a) / mean_eigenvalue(g)).sqrt()
    damped_a = a + pi * damping**0.5 * torch.eye(a.shape[-1], dtype=a.dtype)
    damped_g = g + damping**0.5 / pi * torch.eye(g.shape[-1], dtype=g.dtype)
    return torch.linalg.solve(damped_g, torch.linalg.solve(damped_a, value.mT).mT)


def start(optimizer_class: type[Any], problem: Problem, **options: Any) -> Any:
    """The optimizer on this problem under BARE, changed by `options`."""
    return optimizer_class(problem.model, loss=problem.criterion, **{**BARE, **options})


def step(optimizer: Any, problem: Problem, gradients: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """One turn of the plain loop; what each parameter moved by. `gradients` overwrite those of the backward."""
    before = {name: parameter.detach().clone() for name, parameter in problem.model.named_parameters()}
    optimizer.zero_grad()
    problem.loss().backward()
    for name, parameter in problem.model.named_parameters():
        if gradients is not None:
            parameter.grad = gradients[name].clone()
    optimizer.step()
    return {name: parameter.detach() - before[name] for name, parameter in problem.model.named_parameters()}


def first_step(
    optimizer_class: type[Any], problem: Problem, gradients: Mapping[str, Tensor] | None = None, **options: Any
) -> dict[str, Tensor]:
    """What the first step of a fresh optimizer moves each parameter by."""
    return step(start(optimizer_class, problem, **options), problem, gradients)


def block_move(moves: Mapping[str, Tensor], name: str) -> Tensor:
    """One layer's part of `moves` as the vector (weight, bias)."""
    prefix = f"{name}." if name else ""
    return vector(moves[prefix + part] for part in ("weight", "bias") if prefix + part in moves)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||; refuses a truth of zero, against which nothing could fail."""
    value, truth = value.detach(), truth.detach()
    size = truth.norm()
    assert size > 0 and torch.isfinite(size), "the truth is zero or not finite: this comparison would prove nothing"
    return float((value - truth).norm() / size)


def block_trace(layer: Any) -> float:
    """The trace of G (x) A, of factors or of diagonals."""

    def total(factor: Tensor) -> Tensor:
        return factor.sum() if factor.dim() == 1 else factor.diagonal(dim1=-2, dim2=-1).sum()

    return float(total(layer.A) * total(layer.G))
