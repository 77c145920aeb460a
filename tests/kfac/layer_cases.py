"""Nets for every kind of layer, each with a batch and a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import LOSSES, Flat, Problem, draw_targets
from layer_truth import NORMS
from torch import Tensor, nn


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, dtype=torch.float64)


def tokens(vocabulary: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(vocabulary, shape)


@dataclass(frozen=True)
class LayerCase:
    """A recipe for a Problem; `make()` gives the same numbers each time and leaves the global stream alone."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    criterion: Callable[[], nn.Module] = LOSSES["mse-mean"]
    seed: int = 0

    def make(self) -> Problem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.model().double()
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, NORMS):  # ones and zeros would hide mistakes
                        for parameter in module.parameters(recurse=False):
                            parameter.add_(0.3 * torch.randn_like(parameter))
            inputs, criterion = self.inputs(), self.criterion().double()
            with torch.no_grad():
                shape = copy.deepcopy(model)(inputs).shape
            return Problem(model, criterion, inputs, draw_targets(criterion, shape))

    def __str__(self) -> str:
        return self.name


class Mean(nn.Module):
    """The mean over one dimension, or its sum."""

    def __init__(self, dim: int | tuple[int, ...] = 1, total: bool = False) -> None:
        super().__init__()
        self.dim, self.total = dim, total

    def forward(self, value: Tensor) -> Tensor:
        return value.sum(self.dim) if self.total else value.mean(self.dim)


class ChannelsLast(nn.Module):
    """[N, C, ...] -> [N, ..., C]."""

    def forward(self, value: Tensor) -> Tensor:
        return value.movedim(1, -1)


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def flat_head(body: nn.Module, inputs: Callable[[], Tensor], outputs: int = 3) -> nn.Sequential:
    """body -> Tanh -> all positions into one Linear: nothing is exact, every formula counts."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        size = Flat()(body.double()(inputs())).shape[1]
    return nn.Sequential(body, nn.Tanh(), Flat(), nn.Linear(size, outputs))


Geometry = tuple[Callable[[], nn.Module], tuple[int, ...]]

# Each convolution alone under squared error is exact at any number of positions (maths.md h, "expand").
GEOMETRIES: dict[str, Geometry] = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (3, 2, 6)),
    "conv1d-all": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (3, 4, 7)),
    "conv1d-no-bias-circular": (
        lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular", bias=False),
        (3, 2, 5),
    ),
    "conv1d-reflect": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect", stride=2), (3, 2, 5)),
    "conv1d-same": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (3, 2, 5)),
    "conv1d-replicate": (lambda: nn.Conv1d(2, 3, 2, padding=1, padding_mode="replicate", dilation=3), (3, 2, 5)),
    "conv1d-valid": (lambda: nn.Conv1d(2, 3, 2, padding="valid", stride=3), (3, 2, 6)),
    "conv1d-depthwise": (lambda: nn.Conv1d(3, 6, 3, padding=1, groups=3), (3, 3, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "conv3d-all": (
        lambda: nn.Conv3d(4, 4, (2, 1, 3), stride=(2, 1, 1), padding=(1, 0, 2), dilation=(1, 1, 2), groups=2),
        (2, 4, 3, 2, 4),
    ),
    "conv3d-same-replicate": (
        lambda: nn.Conv3d(1, 2, (1, 2, 3), padding="same", padding_mode="replicate"),
        (2, 1, 2, 3, 3),
    ),
    "conv3d-circular-no-bias": (
        lambda: nn.Conv3d(1, 2, 3, padding=1, padding_mode="circular", bias=False),
        (2, 1, 3, 3, 2),
    ),
    "conv2d-depthwise-multiplied": (lambda: nn.Conv2d(2, 6, 3, padding=1, groups=2, stride=2), (2, 2, 5, 4)),
    "conv2d-uneven-kernel": (lambda: nn.Conv2d(2, 3, (1, 4), padding=(0, 3), dilation=(1, 2)), (2, 2, 3, 5)),
}
TRANSPOSED_GEOMETRIES: dict[str, Geometry] = {
    "transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3), (3, 2, 4)),
    "transpose1d-stride-apart": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=2, bias=False), (3, 2, 4)),
    "transpose1d-all": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, groups=2),
        (3, 4, 4),
    ),
    "transpose2d": (lambda: nn.ConvTranspose2d(2, 3, 3, padding=1), (2, 2, 3, 4)),
    "transpose2d-no-bias": (lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=(1, 2), bias=False), (2, 2, 3, 3)),
    "transpose2d-all": (
        lambda: nn.ConvTranspose2d(
            4, 2, (2, 3), stride=(3, 2), padding=(1, 0), output_padding=(0, 1), dilation=(1, 2), groups=2
        ),
        (2, 4, 3, 2),
    ),
    "transpose2d-output-padding-dilated": (
        lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1),
        (2, 2, 3, 3),
    ),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=2, padding=1), (2, 2, 2, 3, 2)),
    "transpose3d-groups": (lambda: nn.ConvTranspose3d(2, 2, (1, 2, 3), groups=2, dilation=(1, 2, 1)), (2, 2, 2, 2, 2)),
}

SINGLE = [
    LayerCase(name, build, numbers(*shape)) for name, (build, shape) in {**GEOMETRIES, **TRANSPOSED_GEOMETRIES}.items()
] + [
    LayerCase("conv1d-sum", lambda: nn.Conv1d(2, 3, 2), numbers(3, 2, 4), LOSSES["mse-sum"]),
    LayerCase("linear-5d", lambda: nn.Linear(3, 2), numbers(2, 2, 1, 3, 3)),
    LayerCase("linear-1d-out", lambda: nn.Linear(3, 1), numbers(5, 3)),
    LayerCase("linear-frozen-bias", lambda: frozen(nn.Linear(3, 2), "bias"), numbers(5, 3)),
    LayerCase("conv1d-frozen-bias", lambda: frozen(nn.Conv1d(2, 3, 2), "bias"), numbers(3, 2, 4)),
    LayerCase("embedding", lambda: nn.Embedding(5, 3), tokens(5, 4, 3)),
    LayerCase("embedding-rare", lambda: nn.Embedding(9, 3), tokens(9, 4)),  # some tokens never come
    LayerCase("embedding-4d", lambda: nn.Embedding(5, 2), tokens(5, 2, 3, 2)),
    LayerCase("embedding-padding", lambda: nn.Embedding(5, 3, padding_idx=1), tokens(5, 4, 3)),
]

# Linear nets under squared error, loss per position or T = 1: G is the same at every position of every example.
DEEP = [
    LayerCase(
        "embedding-linear", lambda: nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3, bias=False)), tokens(6, 4, 3)
    ),
    LayerCase(
        "embedding-two-linear",
        lambda: nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5), nn.Linear(5, 2)),
        tokens(6, 7),
    ),
    LayerCase(
        "conv1d-whole-then-linear",
        lambda: nn.Sequential(nn.Conv1d(2, 4, 5), nn.Flatten(), nn.Linear(4, 3)),
        numbers(6, 2, 5),
    ),
    LayerCase(
        "conv3d-whole-then-1x1x1",
        lambda: nn.Sequential(nn.Conv3d(2, 4, (2, 1, 2)), nn.Conv3d(4, 3, 1)),
        numbers(5, 2, 2, 1, 2),
    ),
    LayerCase(
        "conv1d-then-1x1", lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 2, 1)), numbers(3, 2, 5)
    ),
    LayerCase(
        "transpose2d-then-1x1",
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Conv2d(3, 2, 1)),
        numbers(2, 2, 2, 2),
    ),
    LayerCase(
        "transpose1d-1x1",
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 1), nn.ConvTranspose1d(4, 2, 1)),
        numbers(3, 3, 4),
    ),
]

# One example at one position: exact whatever follows.
ONE = [
    LayerCase(f"{name}-{loss}", build, inputs, LOSSES[loss])
    for loss in ("ce-mean", "bce-sum", "mse-mean")
    for name, build, inputs in [
        (
            "one-conv1d",
            lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)),
            numbers(1, 2, 3),
        ),
        (
            "one-conv3d-groups",
            lambda: nn.Sequential(nn.Conv3d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)),
            numbers(1, 2, 2, 2, 2),
        ),
        (
            "one-transpose2d",  # one input position and, by the padding, one output position
            lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)),
            numbers(1, 3, 1, 1),
        ),
        ("one-token", lambda: nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 3)), tokens(5, 1)),
        (
            "one-normed",
            lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)),
            numbers(1, 4),
        ),
    ]
]


def _between(norm: Callable[[], nn.Module], d: int = 4) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(3, d), norm(), nn.Tanh(), nn.Linear(d, 3))


def _image(norm: Callable[[], nn.Module], size: int = 36) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(2, 4, 2), norm(), nn.ReLU(), Flat(), nn.Linear(size, 3))


def _evaluated(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.running_mean.add_(torch.randn_like(norm.running_mean))  # type: ignore[union-attr, operator, arg-type]
        norm.running_var.mul_(1.7)  # type: ignore[union-attr, operator]
    return norm.eval()


# Unit blocks: exact for any N, any loss and any activation, because nothing behind them mixes examples.
NORMED = [
    LayerCase("batchnorm1d", _between(lambda: nn.BatchNorm1d(4)), numbers(6, 3), LOSSES["ce-mean"]),
    LayerCase("batchnorm1d-mse", _between(lambda: nn.BatchNorm1d(4)), numbers(6, 3), LOSSES["mse-sum"]),
    LayerCase("batchnorm1d-eval", _between(lambda: _evaluated(nn.BatchNorm1d(4))), numbers(6, 3), LOSSES["bce-mean"]),
    LayerCase(
        "batchnorm1d-no-tracking",
        _between(lambda: nn.BatchNorm1d(4, track_running_stats=False, eps=0.1)),
        numbers(6, 3),
        LOSSES["bce-mean"],
    ),
    LayerCase("batchnorm2d", _image(lambda: nn.BatchNorm2d(4)), numbers(5, 2, 4, 4), LOSSES["ce-mean"]),
    LayerCase(
        "batchnorm1d-sequence",
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4), nn.Tanh(), Flat(), nn.Linear(12, 3)),
        numbers(5, 2, 4),
        LOSSES["ce-sum"],
    ),
    LayerCase(
        "batchnorm3d",
        lambda: nn.Sequential(nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.Tanh(), Flat(), nn.Linear(6, 3)),
        numbers(5, 1, 2, 2, 3),
        LOSSES["ce-mean"],
    ),
    LayerCase("layernorm", _between(lambda: nn.LayerNorm(4)), numbers(6, 3), LOSSES["ce-mean"]),
    LayerCase("layernorm-no-bias", _between(lambda: nn.LayerNorm(4, bias=False)), numbers(6, 3), LOSSES["bce-mean"]),
    LayerCase("layernorm-eps", _between(lambda: nn.LayerNorm(4, eps=0.3)), numbers(6, 3), LOSSES["bce-mean"]),
    LayerCase(
        "layernorm-tokens",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), Flat(), nn.Linear(12, 3)),
        numbers(5, 3, 3),
        LOSSES["ce-mean"],
    ),
    LayerCase("layernorm-per-token", _between(lambda: nn.LayerNorm(4)), numbers(3, 2, 3), LOSSES["mse-mean"]),
    LayerCase("layernorm-2d", _image(lambda: nn.LayerNorm((3, 3))), numbers(5, 2, 4, 4), LOSSES["ce-mean"]),
    LayerCase("groupnorm", _image(lambda: nn.GroupNorm(2, 4)), numbers(5, 2, 4, 4), LOSSES["ce-mean"]),
    LayerCase("groupnorm-flat", _between(lambda: nn.GroupNorm(2, 4)), numbers(6, 3), LOSSES["bce-sum"]),
    LayerCase("rmsnorm", _between(lambda: nn.RMSNorm(4)), numbers(6, 3), LOSSES["ce-mean"]),
    LayerCase("rmsnorm-eps", _between(lambda: nn.RMSNorm(4, eps=0.5)), numbers(6, 3), LOSSES["bce-mean"]),
    LayerCase("rmsnorm-tokens", _between(lambda: nn.RMSNorm(4)), numbers(3, 2, 3), LOSSES["mse-mean"]),
    LayerCase(
        "instancenorm2d", _image(lambda: nn.InstanceNorm2d(4, affine=True)), numbers(5, 2, 4, 4), LOSSES["ce-mean"]
    ),
    LayerCase(
        "instancenorm1d-eval",
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 1),
            _evaluated(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
            nn.Tanh(),
            Flat(),
            nn.Linear(12, 3),
        ),
        numbers(5, 2, 4),
        LOSSES["ce-mean"],
    ),
    LayerCase("frozen-scale", _between(lambda: frozen(nn.LayerNorm(4), "weight")), numbers(6, 3), LOSSES["ce-mean"]),
    LayerCase("frozen-shift", _between(lambda: frozen(nn.BatchNorm1d(4), "bias")), numbers(6, 3), LOSSES["ce-mean"]),
    LayerCase(
        "bias-only-linear",
        lambda: nn.Sequential(frozen(nn.Linear(3, 4), "weight"), nn.Tanh(), nn.Linear(4, 3)),
        numbers(6, 3),
        LOSSES["ce-mean"],
    ),
    LayerCase(
        "bias-only-tokens",
        lambda: nn.Sequential(frozen(nn.Linear(3, 4), "weight"), nn.Tanh(), Flat(), nn.Linear(12, 3)),
        numbers(6, 3, 3),
        LOSSES["bce-mean"],
    ),
    LayerCase(
        "bias-only-conv",
        lambda: nn.Sequential(frozen(nn.Conv2d(2, 4, 2, groups=2), "weight"), nn.Tanh(), Flat(), nn.Linear(36, 3)),
        numbers(5, 2, 4, 4),
        LOSSES["ce-mean"],
    ),
    LayerCase(
        "bias-only-transpose",
        lambda: nn.Sequential(frozen(nn.ConvTranspose1d(2, 4, 2), "weight"), nn.Tanh(), Flat(), nn.Linear(16, 3)),
        numbers(5, 2, 3),
        LOSSES["ce-mean"],
    ),
]

# Kronecker blocks that are approximations: here A, G and the factored damping themselves are the claim.
GENERAL_LAYERS = [
    LayerCase(
        f"general-{name}",
        lambda build=build, shape=shape: flat_head(build(), numbers(*shape)),  # type: ignore[misc]
        numbers(*shape),
        LOSSES["ce-mean"],
    )
    for name, (build, shape) in {**GEOMETRIES, **TRANSPOSED_GEOMETRIES}.items()
] + [
    LayerCase(
        "general-embedding", lambda: flat_head(nn.Embedding(5, 3), tokens(5, 4, 3)), tokens(5, 4, 3), LOSSES["ce-mean"]
    ),
    LayerCase(
        "general-tokens",
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.GELU(), Mean(), nn.Linear(5, 3)),
        tokens(7, 6, 3),
        LOSSES["bce-mean"],
    ),
]
