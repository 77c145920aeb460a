"""Residual network with activation before convolution (He et al. 2016, arXiv 1603.05027): nothing stands on the way of
the sums.

Blocks have two 3x3 convolutions at every depth. Padding and identity shortcuts carry on what no activation has
touched; a projection sees the activated input.
"""

from torch import nn

from pipeline.models.initial import he_
from pipeline.models.residual import Block, Residual, bypass, chain, classifier, conv, stages


def make(input_shape: tuple[int, ...], outputs: int, depth: int, shortcut: str) -> nn.Module:
    """[N, C, H, W] -> [N, outputs]; `depth` is 6 n + 2, with n blocks in each of three stages."""
    return network(input_shape[0], outputs, block(shortcut), (16, 32, 64), (depth - 2) // 6)


def network(inputs: int, outputs: int, make_block: Block, widths: tuple[int, ...], count: int) -> nn.Module:
    """A convolution to 16 channels, stages of `count` blocks, and the activation that no block follows."""
    last = {"norm": nn.BatchNorm2d(widths[-1]), "relu": nn.ReLU()}
    middle = stages(make_block, 16, widths, count)
    return he_(chain(stem=conv(inputs, 16, 3), **middle, **last, **classifier(widths[-1], outputs)))


def block(shortcut: str, dropout: float = 0.0) -> Block:
    """Norm, ReLU, convolution, twice; dropout before the second convolution."""

    def make_block(inputs: int, channels: int, stride: int) -> nn.Module:
        first: dict[str, nn.Module] = {"norm1": nn.BatchNorm2d(inputs), "relu1": nn.ReLU()}
        rest: dict[str, nn.Module] = {"conv1": conv(inputs, channels, 3, stride), "norm2": nn.BatchNorm2d(channels)}
        rest["relu2"] = nn.ReLU()
        if dropout:
            rest["dropout"] = nn.Dropout(dropout)
        rest["conv2"] = conv(channels, channels, 3)
        if shortcut == "projection" and (inputs, stride) != (channels, 1):
            return Residual(chain(**rest), conv(inputs, channels, 1, stride), before=chain(**first))
        return Residual(chain(**first, **rest), bypass(shortcut, inputs, channels, stride))

    return make_block
