"""Small float64 problems for the proofs: nets x losses x reductions x data, all seeded.

The one idea: a problem is (model, criterion, inputs, targets), made anew at every call from a name, so that two tests
(or two optimizers in one test) never share a tensor. Each list below holds the problems to which one exact statement
applies.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Problem:
    """One batch of one task: everything that a first step is a function of."""

    model: nn.Module
    criterion: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self) -> Tensor:
        return self.criterion(self.model(self.inputs), self.targets)

    def copy(self) -> Problem:
        """The same problem on tensors and modules of its own."""
        return copy.deepcopy(self)


@dataclass(frozen=True)
class Case:
    """A recipe for a Problem; `make()` gives the same numbers each time and leaves the global stream alone."""

    name: str
    model: Callable[[], nn.Module]
    criterion: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    seed: int = 0

    def make(self) -> Problem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.model().double()
            criterion = self.criterion().double()
            inputs = torch.randn(self.input_shape, dtype=torch.float64)
            with torch.no_grad():
                shape = copy.deepcopy(model)(inputs).shape
            return Problem(model, criterion, inputs, draw_targets(criterion, shape))

    def __str__(self) -> str:
        return self.name


def draw_targets(criterion: nn.Module, shape: torch.Size) -> Tensor:
    """Targets that suit the criterion for an output of this shape (classes along dimension 1)."""
    if isinstance(criterion, nn.CrossEntropyLoss):
        return torch.randint(shape[1], (shape[0], *shape[2:]))
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        return torch.rand(shape, dtype=torch.float64).round()
    return torch.randn(shape, dtype=torch.float64)


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    """Linear layers with an activation between them and none at the end."""
    layers: list[nn.Module] = []
    for index, (width, following) in enumerate(itertools.pairwise(widths)):
        if index:
            layers.append(activation())
        layers.append(nn.Linear(width, following, bias=bias))
    return nn.Sequential(*layers)


class Unfolded(nn.Module):
    """A convolution written as a Linear on patches: output [N, T, out], one row a patch (no groups)."""

    def __init__(self, conv: nn.Conv2d, **unfold: int | tuple[int, int]) -> None:
        super().__init__()
        self.unfold = nn.Unfold(conv.kernel_size, **unfold)  # type: ignore[arg-type]
        self.linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=conv.bias is not None)
        with torch.no_grad():
            self.linear.weight.copy_(conv.weight.flatten(1))
            if conv.bias is not None:
                self.linear.bias.copy_(conv.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.unfold(images).mT)


class Flat(nn.Module):
    """All leading dimensions but the batch into one: [N, T, S, d] -> [N, T*S*d]."""

    def forward(self, value: Tensor) -> Tensor:
        return value.flatten(1)


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mse-mean": lambda: nn.MSELoss(),
    "mse-sum": lambda: nn.MSELoss(reduction="sum"),
    "bce-mean": lambda: nn.BCEWithLogitsLoss(),
    "bce-sum": lambda: nn.BCEWithLogitsLoss(reduction="sum"),
    "ce-mean": lambda: nn.CrossEntropyLoss(),
    "ce-sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
}

WEIGHTED_LOSSES: dict[str, Callable[[], nn.Module]] = {
    "ce-weighted": lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.5])),
    "ce-weighted-sum": lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.5]), reduction="sum"),
    "ce-smoothed": lambda: nn.CrossEntropyLoss(label_smoothing=0.2),
    "bce-positive-weight": lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.3, 1.0, 2.5])),
    "bce-weighted": lambda: nn.BCEWithLogitsLoss(weight=torch.tensor([0.3, 1.0, 2.5])),
}

# Conv2d of 4 input channels in every geometry; 6 output channels so that groups 2 divides both.
CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "no-bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "padding": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "padding-no-bias": lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False),
    "padding-same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "padding-same-dilated": lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)),
    "stride": lambda: nn.Conv2d(4, 6, 3, stride=2),
    "stride-padding": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "uneven": lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1)),
    "dilation": lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=2),
    "dilation-stride": lambda: nn.Conv2d(4, 6, (2, 3), stride=2, padding=2, dilation=(2, 1)),
    "groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "groups-stride-dilation": lambda: nn.Conv2d(4, 6, 3, padding=2, stride=2, dilation=2, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect", stride=2),
    "replicate": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate", dilation=2),
    "five": lambda: nn.Conv2d(4, 6, 5, padding=2),
    "one-by-one": lambda: nn.Conv2d(4, 6, 1),
}


def _relu_net() -> nn.Module:
    return mlp(4, 6, 5, 3, activation=nn.ReLU)


def _no_bias_net() -> nn.Module:
    return mlp(4, 5, 3, bias=False)


# One example, T = 1: the Kronecker form is the GGN block, whatever the activation and the loss.
ONE_EXAMPLE = [
    Case(f"{net}-{loss}", build, LOSSES[loss], (1, 4))
    for net, build in {"tanh": lambda: mlp(4, 5, 3), "relu": _relu_net, "no-bias": _no_bias_net}.items()
    for loss in LOSSES
] + [Case(f"tanh-{loss}", lambda: mlp(4, 5, 3), build, (1, 4)) for loss, build in WEIGHTED_LOSSES.items()]

# Linear nets under squared error: G is the same for every example.
DEEP_LINEAR = [
    Case(f"deep-{loss}", lambda: mlp(4, 6, 5, 3, activation=nn.Identity), LOSSES[loss], (7, 4))
    for loss in ("mse-mean", "mse-sum")
] + [Case("deep-no-bias", lambda: mlp(4, 6, 3, activation=nn.Identity, bias=False), LOSSES["mse-mean"], (9, 4))]

# Linear nets with a loss per position: G is the same at every position.
EXPAND = [
    Case("linear-3d", lambda: mlp(4, 6, 3, activation=nn.Identity), LOSSES["mse-mean"], (3, 5, 4)),
    Case("linear-3d-sum", lambda: mlp(4, 6, 3, activation=nn.Identity), LOSSES["mse-sum"], (3, 5, 4)),
    Case("linear-4d", lambda: mlp(4, 6, 3, activation=nn.Identity), LOSSES["mse-mean"], (2, 3, 2, 4)),
    Case("linear-3d-no-bias", lambda: mlp(4, 3, bias=False), LOSSES["mse-mean"], (3, 5, 4)),
    Case(
        "conv-then-1x1",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1)),
        LOSSES["mse-mean"],
        (2, 2, 4, 3),
    ),
]

# Every geometry of a convolution, alone under squared error: exact by autograd, no formula of ours in between.
CONV = [Case(f"conv-{name}", build, LOSSES["mse-mean"], (2, 4, 5, 6)) for name, build in CONVOLUTIONS.items()]

EXACT = ONE_EXAMPLE + DEEP_LINEAR + EXPAND + CONV


def _convnet(convolution: Callable[[], nn.Conv2d]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        conv = convolution()
        with torch.no_grad():
            size = Flat()(conv(torch.zeros(1, 4, 5, 6))).shape[1]
        return nn.Sequential(conv, nn.Tanh(), Flat(), nn.Linear(size, 3))

    return build


# Nets for which the Kronecker form is an approximation: here the formulas themselves are the claim.
GENERAL = (
    [Case(f"mlp-{loss}", lambda: mlp(4, 5, 3), LOSSES[loss], (6, 4)) for loss in LOSSES]
    + [Case(f"mlp-{loss}", lambda: mlp(4, 5, 3), build, (6, 4)) for loss, build in WEIGHTED_LOSSES.items()]
    + [
        Case(f"convnet-{name}", _convnet(build), LOSSES["ce-mean"], (3, 4, 5, 6))
        for name, build in CONVOLUTIONS.items()
    ]
    + [
        Case("convnet-mse", _convnet(CONVOLUTIONS["stride"]), LOSSES["mse-sum"], (3, 4, 5, 6)),
        Case("convnet-bce", _convnet(CONVOLUTIONS["groups"]), LOSSES["bce-mean"], (3, 4, 5, 6)),
        Case("tokens-mse", lambda: mlp(4, 5, 3), LOSSES["mse-mean"], (3, 4, 4)),
        Case("tokens-bce", lambda: mlp(4, 5, 3), LOSSES["bce-mean"], (3, 4, 4)),
        Case(
            "tokens-mixed",
            lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Flat(), nn.Linear(20, 3)),
            LOSSES["ce-mean"],
            (5, 4, 4),
        ),
        Case(
            "pixelwise-classes",
            lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)),
            LOSSES["ce-mean"],
            (2, 2, 3, 3),
        ),
        Case(
            "pixelwise-mixing",  # the second convolution mixes positions below a per-position loss
            lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1)),
            LOSSES["mse-mean"],
            (2, 2, 3, 3),
        ),
    ]
)

BY_NAME: dict[str, Case] = {case.name: case for case in EXACT + GENERAL}
