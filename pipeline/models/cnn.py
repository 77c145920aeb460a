"""Small convolutional classifier: 3x3 convolutions, each but the last followed by halving the resolution."""

from torch import nn

from pipeline.models.initial import ACTIVATION


def make(
    input_shape: tuple[int, ...], outputs: int, channels: list[int], activation: str, batch_norm: bool
) -> nn.Module:
    """[N, C, H, W] -> [N, outputs], one convolution for each of `channels`; pooling stops at one pixel."""
    depth, height, width = input_shape
    layers: list[nn.Module] = []
    for k, count in enumerate(channels):
        layers.append(nn.Conv2d(depth, count, 3, padding=1, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(count))
        if activation != "none":
            layers.append(ACTIVATION[activation]())
        if k < len(channels) - 1 and min(height, width) > 1:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        depth = count
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(depth * height * width, outputs))
