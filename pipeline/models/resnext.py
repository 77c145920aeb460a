"""ResNeXt for small images (Xie et al. 2017, arXiv 1611.05431, section 5.3): the middle convolution of a bottleneck is
grouped. ResNeXt-29 8x64d is depth 29, cardinality 8, width 64.
"""

from torch import nn

from pipeline.models.initial import he_
from pipeline.models.residual import Residual, bypass, chain, classifier, conv, stages

_CHANNELS = (256, 512, 1024)  # of a stage's output


def make(input_shape: tuple[int, ...], outputs: int, depth: int, cardinality: int, width: int) -> nn.Module:
    """[N, C, H, W] -> [N, outputs]; `depth` is 9 n + 2, with n blocks in each of three stages.

    `cardinality` is the number of groups, `width` the channels of one in the first stage; each stage doubles them.
    """

    def block(inputs: int, channels: int, stride: int) -> nn.Module:
        inner = cardinality * width * channels // _CHANNELS[0]
        branch = chain(
            reduce=conv(inputs, inner, 1),
            norm1=nn.BatchNorm2d(inner),
            relu1=nn.ReLU(),
            grouped=conv(inner, inner, 3, stride, groups=cardinality),
            norm2=nn.BatchNorm2d(inner),
            relu2=nn.ReLU(),
            expand=conv(inner, channels, 1),
            norm3=nn.BatchNorm2d(channels),
        )
        return Residual(branch, bypass("projection", inputs, channels, stride), after=nn.ReLU())

    stem = chain(conv=conv(input_shape[0], 64, 3), norm=nn.BatchNorm2d(64), relu=nn.ReLU())
    return he_(chain(stem=stem, **stages(block, 64, _CHANNELS, (depth - 2) // 9), **classifier(1024, outputs)))
