"""Fully connected network of any depth; with activation `none` a deep linear one."""

import math
from itertools import pairwise

from torch import nn

from pipeline.models.initial import ACTIVATION


def make(input_shape: tuple[int, ...], outputs: int, depth: int, width: int, activation: str, bias: bool) -> nn.Module:
    """[N, *input_shape] -> [N, outputs] through `depth` linear layers, `depth - 1` of them of `width` units."""
    sizes = [math.prod(input_shape), *[width] * (depth - 1), outputs]
    layers: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    for k, (rows, columns) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(rows, columns, bias=bias))
        if activation != "none" and k < depth - 1:
            layers.append(ACTIVATION[activation]())
    return nn.Sequential(*layers)
