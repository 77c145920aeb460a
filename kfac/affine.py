"""Parameters that add to or scale an activation: those of norm layers, and biases whose weight has no block.

Their gradient for an example is a sum over positions, so that their exact block is small: 2x2 (or 1x1) for each channel
of a norm layer, d x d for a bias. In the common format (layers.py) g is that gradient, [K, M, N, 1, d_out], and a is
the number 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import Block

CHANNELS_LAST = (nn.LayerNorm, nn.RMSNorm)


class UnitBlock(Block):
    """A block that is its factor G: a = 1, T = 1."""

    unit = True
    diagonal_a = False

    def inputs(self, x: Tensor, module: Any, context: Any) -> Tensor:
        return x

    def _ones(self, g: Tensor) -> Tensor:
        return g.new_ones(g.shape[0], g.shape[2], 1, 1)


class NormBlock(UnitBlock):
    """Scale and shift of BatchNorm, InstanceNorm, GroupNorm, LayerNorm, RMSNorm: K is the number of channels.

    Where a later BatchNorm mixes examples, an example is what arrived at its place, as in all other blocks.
    """

    kind = "norm"
    diagonal_g = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.parameters[0].numel(), len(self.parameters), 1

    def matrix(self, tensors: Sequence[Tensor | None]) -> Tensor:
        return torch.stack([x.reshape(-1) for x in self._filled(tensors)], dim=1)[..., None]

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        return [matrix[:, i, 0].reshape(p.shape) for i, p in enumerate(self.parameters)]

    def context(self, module: Any, output: Tensor) -> Any:
        """The statistics of a layer that normalises by running ones, which later batches change."""
        if module.training or not isinstance(module, nn.modules.batchnorm._NormBase) or module.running_mean is None:
            return None
        assert module.running_var is not None
        return module.running_mean.clone(), module.running_var.clone()

    def inputs(self, x: Tensor, module: Any, context: Any) -> Tensor:
        """The normalised input: [N, T, C]."""
        smallest = torch.finfo(x.dtype).eps  # RMSNorm's default, of the dtype that the call had
        x = x.to(self.dtype)
        mean, variance = context or (None, None)
        if isinstance(module, nn.LayerNorm):
            x = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        elif isinstance(module, nn.RMSNorm):
            x = F.rms_norm(x, module.normalized_shape, eps=smallest if module.eps is None else module.eps)
        elif isinstance(module, nn.GroupNorm):
            x = F.group_norm(x, module.num_groups, eps=module.eps)
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
            x = _with_batch(x, module)
            x = F.instance_norm(x, mean, variance, use_input_stats=context is None, eps=module.eps)
        else:
            x = F.batch_norm(x, mean, variance, training=context is None, eps=module.eps)
        return _positions(x, module)

    def rows(self, inputs: Tensor, gradients: Sequence[Tensor], module: Any) -> tuple[Tensor, Tensor]:
        sums = []
        for g in gradients:
            g = _positions(_with_batch(g.to(self.dtype), module), module)
            by_parameter = [
                (g * inputs).sum(1) if parameter is module._parameters.get("weight") else g.sum(1)
                for parameter in self.parameters
            ]
            sums.append(torch.stack(by_parameter, dim=-1))
        g = torch.stack(sums).permute(2, 0, 1, 3)[:, :, :, None]
        return self._ones(g), g


class BiasBlock(UnitBlock):
    """The bias of a Linear layer or a convolution whose weight is frozen, shared or trained otherwise."""

    kind = "bias"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, self.parameters[0].numel(), 1

    def matrix(self, tensors: Sequence[Tensor | None]) -> Tensor:
        return self._filled(tensors)[0][None, :, None]

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        return [matrix[0, :, 0]]

    def rows(self, inputs: Tensor, gradients: Sequence[Tensor], module: Any) -> tuple[Tensor, Tensor]:
        sums = []
        for g in gradients:
            g = g.to(self.dtype)
            if isinstance(module, nn.Linear):
                sums.append(g.reshape(g.shape[0] if g.dim() > 1 else 1, -1, g.shape[-1]).sum(1))
            else:
                g = g if g.dim() == len(module.kernel_size) + 2 else g[None]  # type: ignore[arg-type]
                sums.append(g.flatten(2).sum(2))
        g = torch.stack(sums)[None, :, :, None]
        return self._ones(g), g


def _with_batch(x: Tensor, module: Any) -> Tensor:
    """An unbatched input of an InstanceNorm as a batch of one."""
    if not isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return x
    return x[None] if x.dim() == module._get_no_batch_dim() else x


def _positions(x: Tensor, module: Any) -> Tensor:
    """Activations as [N, T, C]."""
    if isinstance(module, CHANNELS_LAST):
        channels = torch.Size(module.normalized_shape).numel()
        batched = x.dim() > len(module.normalized_shape)
        return x.reshape(x.shape[0] if batched else 1, -1, channels)
    return x.flatten(2).mT if x.dim() > 2 else x[:, None]
