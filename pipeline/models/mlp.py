"""Fully connected network of any depth and widths; with activation `none` a deep linear one."""

import math
from itertools import pairwise

from torch import nn

from pipeline.models.initial import ACTIVATION


def make(
    input_shape: tuple[int, ...],
    outputs: int,
    depth: int,
    width: int | list[int],
    activation: str,
    bias: bool,
    batch_norm: bool,
) -> nn.Module:
    """[N, *input_shape] -> [N, outputs] through `depth` linear layers, `depth - 1` of them hidden, of `width` units.

    Batch norm stands between a hidden layer and its activation, and its shift in place of the layer's bias.
    """
    hidden = width if isinstance(width, list) else [width] * (depth - 1)
    layers: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    for rows, columns in pairwise([math.prod(input_shape), *hidden]):
        layers.append(nn.Linear(rows, columns, bias=bias and not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(columns))
        if activation != "none":
            layers.append(ACTIVATION[activation]())
    return nn.Sequential(*layers, nn.Linear([math.prod(input_shape), *hidden][-1], outputs, bias=bias))
