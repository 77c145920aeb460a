"""Deep autoencoder: an encoder down to a linear code, a decoder that mirrors it, logits out."""

import math
from itertools import pairwise

from torch import nn

from pipeline.models.initial import ACTIVATION


def make(input_shape: tuple[int, ...], outputs: int, widths: list[int], activation: str) -> nn.Module:
    """[N, *input_shape] -> [N, outputs]; `widths` are those of the encoder, the last being the code's."""
    pixels = math.prod(input_shape)
    sizes = [pixels, *widths, *widths[-2::-1], outputs]
    linear = {len(widths) - 1, len(sizes) - 2}  # code and output
    layers: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    for k, (rows, columns) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(rows, columns))
        if k not in linear and activation != "none":
            layers.append(ACTIVATION[activation]())
    return nn.Sequential(*layers)
