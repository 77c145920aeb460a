"""Residual network for small images (He et al. 2016, arXiv 1512.03385, section 4.2): blocks of two 3x3 convolutions.

At every depth blocks are the paper's basic ones, also at 110, where some collections take bottlenecks. `shortcut: pad`
is the paper's choice for CIFAR.
"""

from torch import nn

from pipeline.models.initial import he_
from pipeline.models.residual import Residual, bypass, chain, classifier, conv, stages


def make(input_shape: tuple[int, ...], outputs: int, depth: int, shortcut: str) -> nn.Module:
    """[N, C, H, W] -> [N, outputs]; `depth` is 6 n + 2, with n blocks in each of three stages."""

    def block(inputs: int, channels: int, stride: int) -> nn.Module:
        branch = chain(
            conv1=conv(inputs, channels, 3, stride),
            norm1=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            conv2=conv(channels, channels, 3),
            norm2=nn.BatchNorm2d(channels),
        )
        return Residual(branch, bypass(shortcut, inputs, channels, stride), after=nn.ReLU())

    stem = chain(conv=conv(input_shape[0], 16, 3), norm=nn.BatchNorm2d(16), relu=nn.ReLU())
    return he_(chain(stem=stem, **stages(block, 16, (16, 32, 64), (depth - 2) // 6), **classifier(64, outputs)))
