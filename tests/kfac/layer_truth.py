"""The one exact step of each net of layer_cases.py, from autograd alone.

The one idea: what multiplies a weight is the derivative of the layer's own output by that weight, and the curvature of
a block is the dense Gauss-Newton matrix of the loss. So no patch is unfolded and no normalisation is written down a
second time here: whatever a library believes about strides, dilation, groups, tokens or statistics can fail.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import ground_truth as truth
import torch
from cases import Problem
from torch import Tensor, nn

NORMS = (
    nn.modules.batchnorm._NormBase,  # of BatchNorm and InstanceNorm in all dimensions
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def trained(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with trainable parameters of their own, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    }


def own(module: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of the module itself: weight, then bias."""
    return [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]


def is_unit(module: nn.Module) -> bool:
    """Whether the block has no input factor: affine parameters of a norm, or a bias alone."""
    weight = getattr(module, "weight", None)
    return isinstance(module, NORMS) or weight is None or not weight.requires_grad


def parts(module: nn.Module) -> Tensor:
    """Which entries of the vector (weight, bias) belong together: [K, d], one row a block."""
    count = sum(parameter.numel() for parameter in own(module))
    index = torch.arange(count)
    if isinstance(module, NORMS):
        return index.reshape(len(own(module)), -1).T
    if is_unit(module):
        return index[None]
    groups = getattr(module, "groups", 1)
    sizes = [parameter.numel() for parameter in own(module)]
    return torch.cat([piece.reshape(groups, -1) for piece in index.split(sizes)], dim=1)


def newton(problem: Problem, module: nn.Module, damping: float) -> Tensor:
    """-(F_block + damping I)^-1 g of each block of a module by dense autograd, as the vector (weight, bias)."""
    weights = own(module)
    curvature, slope = truth.ggn(problem, weights), truth.gradient(problem, weights)
    move = torch.zeros_like(slope)
    for index in parts(module):
        block = curvature[index][:, index].clone()
        block.diagonal().add_(damping)
        move[index] = -torch.linalg.solve(block, slope[index])
    return move


def moved(problem: Problem, module_name: str, moves: dict[str, Tensor]) -> Tensor:
    """What a module's trainable parameters moved by, as the vector (weight, bias)."""
    prefix = f"{module_name}." if module_name else ""
    module = problem.model.get_submodule(module_name)
    return truth.vector(moves[prefix + n] for n, p in module.named_parameters(recurse=False) if p.requires_grad)


def matrix(module: nn.Module, tensors: Sequence[Tensor]) -> Tensor:
    """(weight, bias) as [K, d_out, d_in] with the bias as the last column: rows of outputs whatever torch's layout."""
    weight, k = tensors[0], getattr(module, "groups", 1)
    if isinstance(module, TRANSPOSED):  # [in, out / groups, taps]
        shaped = weight.reshape(k, weight.shape[0] // k, weight.shape[1], -1).transpose(1, 2).flatten(2)
    elif isinstance(module, nn.Embedding):
        shaped = weight.T[None]
    else:
        shaped = weight.reshape(k, weight.shape[0] // k, -1)
    return shaped if len(tensors) == 1 else torch.cat([shaped, tensors[1].reshape(k, -1, 1)], dim=2)


def order(module: nn.Module) -> Tensor:
    """Positions of the entries of `matrix` in the vector (weight, bias): [K, d_out * d_in]."""
    sizes = [parameter.numel() for parameter in own(module)]
    index = torch.arange(sum(sizes)).split(sizes)
    shaped = [piece.reshape(parameter.shape) for piece, parameter in zip(index, own(module), strict=True)]
    return matrix(module, shaped).flatten(1)


def output_rows(module: nn.Module, value: Tensor, lead: int = 0) -> Tensor:
    """A tensor shaped like `lead` dimensions and the module's output, as [*lead, K, N, T, d_out]."""
    if not isinstance(module, (*CONVS, *TRANSPOSED)):
        return value.reshape(*value.shape[: lead + 1], -1, value.shape[-1]).unsqueeze(lead)
    split = value.unflatten(lead + 1, (module.groups, -1)).flatten(lead + 3)
    return split.movedim(lead + 1, lead).transpose(-1, -2)


def input_rows(module: nn.Module, value: Tensor) -> Tensor:
    """What multiplies the weight, as the derivative of the first output of each group by it: [K, N, T, d_in]."""
    module = copy.deepcopy(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Embedding):
        module.padding_idx = None  # torch drops the gradient of that row only
    first = output_rows(module, module(value))[..., 0]  # [K, N, T]
    (slopes,) = truth.jacobian(first, [weight])
    rows = []
    for group, slope in enumerate(slopes.unflatten(0, first.shape)):
        one = matrix(module, [torch.zeros_like(weight)])[group]
        per_row = torch.stack([matrix(module, [each])[group] for each in slope.flatten(0, 1)])
        assert not per_row[:, 1:].any() and per_row.shape[1:] == one.shape
        rows.append(per_row[:, 0].reshape(*first.shape[1:], -1))
    result = torch.stack(rows)
    bias = getattr(module, "bias", None)
    return (
        torch.cat([result, torch.ones_like(result[..., :1])], -1) if bias is not None and bias.requires_grad else result
    )


def captured(problem: Problem) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Rows of every layer and call: a [K, N, T, d_in], and derivatives of the output as [O, K, N, T, d_out]."""
    inputs: dict[str, list[Tensor]] = {}
    taps: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs.setdefault(name, []).append(args[0].detach())
            taps.setdefault(name, []).append(torch.zeros_like(output, requires_grad=True))
            return output + taps[name][-1]

        return hook

    layers = {name: module for name, module in trained(problem.model).items() if not is_unit(module)}
    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        output = problem.model(problem.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (
            [input_rows(module, value) for value in inputs[name]],
            [output_rows(module, d, lead=1) for d in truth.jacobian(output, taps[name])],
        )
        for name, module in layers.items()
    }


def factors(problem: Problem, sharing: str = "expand") -> dict[str, tuple[Tensor, Tensor]]:
    """A [K, d_in, d_in] and G [K, d_out, d_out] of every layer under the exact Fisher; further calls are positions."""
    found = captured(problem)
    hessian = truth.loss_hessian(problem, problem.model(problem.inputs))
    result = {}
    for name, (inputs, slopes) in found.items():
        a, g = torch.cat(inputs, dim=2), torch.cat(slopes, dim=3)
        if sharing == "reduce":
            a, g = a.mean(2, keepdim=True), g.sum(3, keepdim=True)
        flat = a.flatten(1, 2)
        result[name] = (flat.mT @ flat / flat.shape[1], torch.einsum("ikntd,ij,jknte->kde", g, hessian, g))
    return result


def factored_step(problem: Problem, name: str, a: Tensor, g: Tensor, damping: float) -> Tensor:
    """The factored-Tikhonov step of a layer as the vector (weight, bias)."""
    module = problem.model.get_submodule(name)
    slope = matrix(module, list(torch.autograd.grad(problem.loss(), own(module))))
    solved = -truth.factored_solve(a, g, slope, damping)
    result = slope.new_zeros(slope.numel())
    result[order(module).reshape(-1)] = solved.reshape(-1)
    return result


def kronecker_step(problem: Problem, name: str, a: Tensor, g: Tensor, damping: float) -> Tensor:
    """-(G (x) A + damping I)^-1 g of a layer as the vector (weight, bias)."""
    module = problem.model.get_submodule(name)
    slope = truth.gradient(problem, own(module))
    result = torch.zeros_like(slope)
    for index, a_k, g_k in zip(order(module), a, g, strict=True):
        block = torch.kron(g_k, a_k)
        block.diagonal().add_(damping)
        result[index] = -torch.linalg.solve(block, slope[index])
    return result


def diagonal(factor: Tensor) -> Tensor:
    """A factor without its off-diagonal entries."""
    return torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1))
