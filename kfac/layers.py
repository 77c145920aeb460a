"""How a layer's weights, inputs and output gradients become matrices: after this file no maths knows about layers.

Every layer is brought to one format, with a leading dimension K for the groups of a convolution (K = 1 elsewhere):

    inputs     a: [K, N, T, d_in]     N examples, T positions that share the weights; a last 1 where there is a bias
    gradients  g: [K, N, T, d_out]    the gradient at the layer's output
    weights    V: [K, d_out, d_in]    the bias is the last column

so that the gradient of the weights is sum_{n,t} g a^T. A convolution's positions are its output pixels and a is the
patch that each of them sees (Grosse & Martens 2016, arXiv 1602.01407).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearBlock:
    """`nn.Linear` on any number of leading dimensions; dimension 0 is the batch."""

    kind = "linear"

    def __init__(self, name: str, module: nn.Module):
        self.name = name
        self.module, self.modules = module, [module]
        self.weight: nn.Parameter = module.weight  # type: ignore[assignment]
        bias = module._parameters.get("bias")
        self.bias = bias if bias is not None and bias.requires_grad else None
        self.groups = getattr(module, "groups", 1)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def shape(self) -> tuple[int, int, int]:
        """[K, d_out, d_in] of the weight matrix."""
        d_out = self.weight.shape[0] // self.groups
        return self.groups, d_out, self.weight[0].numel() + (self.bias is not None)

    def inputs(self, x: Tensor) -> Tensor:
        """The layer's input as rows a: [K, N, T, d_in], in the dtype of the weights."""
        x = x.to(self.weight.dtype)
        rows = x.reshape(1, x.shape[0] if x.dim() > 1 else 1, -1, x.shape[-1])
        return self._with_ones(rows)

    def gradients(self, g: Tensor) -> Tensor:
        """The gradient at the layer's output as rows g: [K, N, T, d_out]."""
        g = g.to(self.weight.dtype)
        return g.reshape(1, g.shape[0] if g.dim() > 1 else 1, -1, g.shape[-1])

    def matrix(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Tensors shaped as `parameters` (None for zeros) as one matrix [K, d_out, d_in]."""
        groups, d_out, _ = self.shape
        full = [torch.zeros_like(p) if x is None else x for x, p in zip(tensors, self.parameters, strict=True)]
        matrix = full[0].reshape(groups, d_out, -1)
        return matrix if len(full) == 1 else torch.cat([matrix, full[1].reshape(groups, d_out, 1)], dim=2)

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of `matrix`: tensors shaped as `parameters`."""
        if self.bias is None:
            return [matrix.reshape(self.weight.shape)]
        return [matrix[:, :, :-1].reshape(self.weight.shape), matrix[:, :, -1].reshape(self.bias.shape)]

    def _with_ones(self, rows: Tensor) -> Tensor:
        return rows if self.bias is None else F.pad(rows, (0, 1), value=1.0)


class Conv2dBlock(LinearBlock):
    """`nn.Conv2d` with stride, padding (numbers, "same", "valid"), padding modes, dilation and groups."""

    kind = "conv2d"

    def inputs(self, x: Tensor) -> Tensor:
        conv: nn.Conv2d = self.module  # type: ignore[assignment]
        x = x.to(self.weight.dtype)
        x = x if x.dim() == 4 else x[None]
        left_right_top_bottom = conv._reversed_padding_repeated_twice
        if any(left_right_top_bottom):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = F.pad(x, left_right_top_bottom, mode=mode)
        n, channels, height, width = x.shape
        (kernel_y, kernel_x), (dilation_y, dilation_x) = conv.kernel_size, conv.dilation
        (stride_y, stride_x) = conv.stride
        rows = (height - dilation_y * (kernel_y - 1) - 1) // stride_y + 1
        columns = (width - dilation_x * (kernel_x - 1) - 1) // stride_x + 1
        s_n, s_c, s_y, s_x = x.stride()
        per_group = channels // self.groups
        patches = x.as_strided(
            (self.groups, n, rows, columns, per_group, kernel_y, kernel_x),
            (per_group * s_c, s_n, stride_y * s_y, stride_x * s_x, s_c, dilation_y * s_y, dilation_x * s_x),
            x.storage_offset(),
        )
        # One copy: the patches are written beside the ones of the bias.
        size = per_group * kernel_y * kernel_x
        a = x.new_ones(self.groups, n, rows, columns, size + (self.bias is not None))
        a[..., :size].view(patches.shape).copy_(patches)
        return a.flatten(2, 3)

    def gradients(self, g: Tensor) -> Tensor:
        g = g.to(self.weight.dtype)
        g = g if g.dim() == 4 else g[None]
        n, channels = g.shape[:2]
        return g.reshape(n, self.groups, channels // self.groups, -1).permute(1, 0, 3, 2)


def find_blocks(model: nn.Module) -> Iterator[LinearBlock]:
    """The layers of `model` whose weights have a Kronecker block, in the order of `named_modules`.

    A layer has one if it computes what its class says (subclasses that override `forward` do not), its weight is a
    parameter of its own that requires a gradient, and nobody else owns that parameter.
    """
    owners: dict[int, set[int]] = defaultdict(set)
    hidden: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)].add(id(module))
        if isinstance(module, nn.MultiheadAttention):  # calls its projections as functions: no hook sees them
            hidden.update(id(child) for child in module.modules())
    for name, module in model.named_modules():
        for base, block in ((nn.Linear, LinearBlock), (nn.Conv2d, Conv2dBlock)):
            if not isinstance(module, base) or type(module).forward is not base.forward or id(module) in hidden:
                continue
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            shared = any(p is not None and len(owners[id(p)]) > 1 for p in (weight, bias))
            if weight is not None and weight.requires_grad and not shared:
                yield block(name, module)
