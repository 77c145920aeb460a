"""AlexNet for small images: five convolutions and one linear layer.

The layers of Krizhevsky (2014, arXiv 1404.5997) as bearpaw/pytorch-classification cut them down for 32x32 pixels: the
first convolution pads so that 8x8 are left, poolings do not overlap, two of three linear layers are gone. Default
weights are torch's own, as there.
"""

from torch import nn

# channels, kernel, stride, padding, and whether the resolution is halved behind it
_LAYERS = (
    (64, 11, 4, 5, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)


def make(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """[N, C, H, W] -> [N, outputs]; pooling stops at one pixel."""
    depth, height, width = input_shape
    layers: list[nn.Module] = []
    for channels, kernel, stride, padding, halve in _LAYERS:
        layers += [nn.Conv2d(depth, channels, kernel, stride, padding), nn.ReLU()]
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        if halve and min(height, width) > 1:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        depth = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(depth * height * width, outputs))
