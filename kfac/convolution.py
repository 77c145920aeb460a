"""Convolutions as matrices on patches (Grosse & Martens 2016, arXiv 1602.01407).

Positions are output pixels and a is the patch that each of them sees. A transposed convolution is one of stride 1 over
its input with zeros between the pixels, by the flipped kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layers import MatrixBlock
from .patches import Patches


class ConvBlock(MatrixBlock):
    """`nn.Conv1d`, `Conv2d`, `Conv3d` with stride, padding (also "same", "valid"), padding modes, dilation, groups."""

    kind = "conv"

    @property
    def groups(self) -> int:
        return self.modules[0].groups  # type: ignore[return-value]

    def inputs(self, x: Tensor, module: Any, context: Any) -> Patches:
        x = _batched(x.to(self.dtype), module)
        ends = module._reversed_padding_repeated_twice  # before and after, of the last dimension first
        padding = tuple(reversed(ends[::2]))
        if module.padding_mode != "zeros" or ends[::2] != ends[1::2]:
            x = F.pad(x, ends, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
            padding = (0,) * len(padding)
        return self._patches(x, module, module.stride, padding)

    def gradients(self, g: Tensor, module: Any) -> Tensor:
        g = _batched(g, module)
        n, channels = g.shape[:2]
        return g.reshape(n, self.groups, channels // self.groups, -1).permute(1, 0, 3, 2)

    def _patches(self, x: Tensor, module: Any, stride: tuple[int, ...], padding: tuple[int, ...]) -> Patches:
        return Patches(x, module.kernel_size, stride, padding, module.dilation, self.groups, self.has_bias)


class TransposedConvBlock(ConvBlock):
    """`nn.ConvTranspose1d`, `2d`, `3d`."""

    kind = "transposed conv"

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, per_group, *kernel = self.parameters[0].shape
        return self.groups, per_group, channels // self.groups * torch.Size(kernel).numel() + self.has_bias

    def context(self, module: Any, output: Tensor) -> Any:
        return output.shape  # `forward` may be given an output size

    def inputs(self, x: Tensor, module: Any, context: Any) -> Patches:
        x = _batched(x.to(self.dtype), module)
        n, channels, *sizes = x.shape
        ndim = len(sizes)
        spread = x.new_zeros(n, channels, *((size - 1) * s + 1 for size, s in zip(sizes, module.stride, strict=True)))
        pixels: Any = (..., *(slice(None, None, s) for s in module.stride))
        spread[pixels] = x
        padding: list[int] = []
        geometry = zip(
            spread.shape[2:], context[-ndim:], module.kernel_size, module.dilation, module.padding, strict=True
        )
        for size, out, k, d, p in geometry:
            reach = d * (k - 1)
            padding = [reach - p, out + reach - size - (reach - p), *padding]  # F.pad takes the last dimension first
        return self._patches(F.pad(spread, padding), module, (1,) * ndim, (0,) * ndim)

    def _to_matrix(self, weight: Tensor) -> Tensor:
        channels, per_group, *kernel = weight.shape
        split = weight.reshape(self.groups, channels // self.groups, per_group, *kernel)
        return split.flip(tuple(range(3, split.dim()))).transpose(1, 2).flatten(2)

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        weight = self.parameters[0]
        channels, per_group, *kernel = weight.shape
        split = matrix.reshape(self.groups, per_group, channels // self.groups, *kernel).transpose(1, 2)
        return split.flip(tuple(range(3, split.dim()))).reshape(weight.shape)


def _batched(x: Tensor, module: Any) -> Tensor:
    return x if x.dim() == len(module.kernel_size) + 2 else x[None]  # type: ignore[arg-type]
