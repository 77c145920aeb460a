"""VGG (Simonyan & Zisserman 2015, arXiv 1409.1556) for small images: 3x3 convolutions in five groups, and one linear
layer in place of three.

`depth` counts as in the paper, whose three linear layers are among the 11, 13, 16 or 19. With batch norm convolutions
have no bias.
"""

from torch import nn

from pipeline.models.initial import he_

_CHANNELS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # in each group


def make(input_shape: tuple[int, ...], outputs: int, depth: int, batch_norm: bool) -> nn.Module:
    """[N, C, H, W] -> [N, outputs]; every group halves the resolution, down to one pixel."""
    inputs, height, width = input_shape
    layers: list[nn.Module] = []
    for channels, count in zip(_CHANNELS, _CONVOLUTIONS[depth], strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(inputs, channels, 3, padding=1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(channels), nn.ReLU()] if batch_norm else [nn.ReLU()]
            inputs = channels
        if min(height, width) > 1:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
    return he_(nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * height * width, outputs)))
