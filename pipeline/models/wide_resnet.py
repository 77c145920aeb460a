"""Wide residual network (Zagoruyko & Komodakis 2016, arXiv 1605.07146): few blocks, `widen` times as many channels,
dropout between the two convolutions of a block. WRN-28-10 is depth 28, widen 10.
"""

from torch import nn

from pipeline.models.preact_resnet import block, network


def make(input_shape: tuple[int, ...], outputs: int, depth: int, widen: int, dropout: float) -> nn.Module:
    """[N, C, H, W] -> [N, outputs]; `depth` is 6 n + 4, for three projections count as layers."""
    widths = (16 * widen, 32 * widen, 64 * widen)
    return network(input_shape[0], outputs, block("projection", dropout), widths, (depth - 4) // 6)
