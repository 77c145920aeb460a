"""DenseNet-BC (Huang et al. 2017, arXiv 1608.06993): every layer sees what all before it in its block have made.

DenseNet-BC-100-12 is depth 100, growth 12, compression 0.5. A layer is a 1x1 convolution to four times `growth`
channels and a 3x3 convolution to `growth`; between blocks a 1x1 convolution keeps the share `compression` of channels.
"""

import torch
from torch import Tensor, nn

from pipeline.models.initial import he_
from pipeline.models.residual import chain, classifier, conv


class Grow(nn.Module):
    """x -> x and, behind its channels, those of layers(x)"""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], dim=1)


def make(
    input_shape: tuple[int, ...], outputs: int, depth: int, growth: int, compression: float, dropout: float
) -> nn.Module:
    """[N, C, H, W] -> [N, outputs]; `depth` is 6 n + 4, with n layers in each of three blocks. Dropout follows every
    convolution within blocks; resolution is halved between them, down to one pixel."""
    _, height, width = input_shape
    channels = 2 * growth
    parts: dict[str, nn.Module] = {"stem": conv(input_shape[0], channels, 3)}
    for number in (1, 2, 3):
        layers: dict[str, nn.Module] = {}
        for k in range(1, (depth - 4) // 6 + 1):
            layers[f"layer{k}"] = Grow(_layer(channels, growth, dropout))
            channels += growth
        parts[f"block{number}"] = chain(**layers)
        if number < 3:
            kept = max(1, int(channels * compression))
            halving = nn.AvgPool2d(2) if min(height, width) > 1 else nn.Identity()
            parts[f"transition{number}"] = chain(
                norm=nn.BatchNorm2d(channels), relu=nn.ReLU(), conv=conv(channels, kept, 1), pool=halving
            )
            channels, height, width = kept, height // 2, width // 2
    return he_(chain(**parts, norm=nn.BatchNorm2d(channels), relu=nn.ReLU(), **classifier(channels, outputs)))


def _layer(channels: int, growth: int, dropout: float) -> nn.Module:
    layers: dict[str, nn.Module] = {}
    for k, (inputs, outputs, kernel) in enumerate(((channels, 4 * growth, 1), (4 * growth, growth, 3)), start=1):
        layers |= {f"norm{k}": nn.BatchNorm2d(inputs), f"relu{k}": nn.ReLU(), f"conv{k}": conv(inputs, outputs, kernel)}
        if dropout:
            layers[f"dropout{k}"] = nn.Dropout(dropout)
    return chain(**layers)
