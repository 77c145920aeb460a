"""What residual networks share: the sum of a branch and a shortcut, three stages, and a classifier.

Layers have names, so that a curvature block is called `stage2.block3.branch.conv1`.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

Block = Callable[[int, int, int], nn.Module]
"""Input channels, output channels and stride -> a block."""


class Residual(nn.Module):
    """x -> after(branch(z) + shortcut(z)) with z = before(x); `before` and `after` are the identity unless given."""

    def __init__(
        self, branch: nn.Module, shortcut: nn.Module, before: nn.Module | None = None, after: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.before = nn.Identity() if before is None else before
        self.branch, self.shortcut = branch, shortcut
        self.after = nn.Identity() if after is None else after

    def forward(self, x: Tensor) -> Tensor:
        z = self.before(x)
        return self.after(self.branch(z) + self.shortcut(z))


class Pad(nn.Module):
    """Shortcut without parameters: every `stride`-th pixel, zeros for the channels that are new."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, stride={self.stride}"


def chain(**layers: nn.Module) -> nn.Sequential:
    """Layers one after the other, by name."""
    return nn.Sequential(OrderedDict(layers))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the resolution but for its stride; batch norm makes a bias needless."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def bypass(kind: str, inputs: int, outputs: int, stride: int) -> nn.Module:
    """The identity where it fits, else `pad` (option A of He et al.) or `projection` by 1x1 convolution (option B)."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    if kind == "pad":
        return Pad(outputs - inputs, stride)
    return chain(conv=conv(inputs, outputs, 1, stride), norm=nn.BatchNorm2d(outputs))


def stages(block: Block, inputs: int, widths: Sequence[int], count: int) -> dict[str, nn.Module]:
    """`stage1`, `stage2` ... of `count` blocks each; all but the first begin with a stride of 2."""
    made: dict[str, nn.Module] = {}
    for number, width in enumerate(widths, start=1):
        blocks: dict[str, nn.Module] = {}
        for k in range(1, count + 1):
            blocks[f"block{k}"] = block(inputs, width, 2 if number > 1 and k == 1 else 1)
            inputs = width
        made[f"stage{number}"] = chain(**blocks)
    return made


def classifier(channels: int, outputs: int) -> dict[str, nn.Module]:
    """The mean over all pixels and a linear layer."""
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(channels, outputs)}
