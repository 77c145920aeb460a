"""Every family under every optimizer of the default study: three steps, all parameters move, all have their block.

A family's narrowest published size is trained by a slow test where that takes more than a few seconds, and a sibling
that is shallower or narrower, on fewer pixels, by a fast one. For AlexNet and VGG, whose width is fixed, that sibling
is `cnn`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC
from pipeline.models import build

DEFAULT = {"init": "default", "gain": 1.0}
PLAIN = {"activation": "tanh", "init": "xavier_normal", "gain": 1.0}
BATCH, STEPS = 8, 3

SIBLINGS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "depth": 4, "width": 12, "bias": True, "batch_norm": True, **PLAIN},
    "cnn": {"name": "cnn", "channels": [6, 8, 8, 12], "batch_norm": False, "activation": "relu", **DEFAULT},
    "cnn_batch_norm": {"name": "cnn", "channels": [6, 8, 8, 12], "batch_norm": True, "activation": "relu", **DEFAULT},
    "resnet": {"name": "resnet", "depth": 8, "shortcut": "pad", **DEFAULT},
    "resnet_projection": {"name": "resnet", "depth": 8, "shortcut": "projection", **DEFAULT},
    "preact_resnet": {"name": "preact_resnet", "depth": 8, "shortcut": "pad", **DEFAULT},
    "resnext": {"name": "resnext", "depth": 11, "cardinality": 4, "width": 2, **DEFAULT},
    "wide_resnet": {"name": "wide_resnet", "depth": 10, "widen": 2, "dropout": 0.3, **DEFAULT},
    "densenet": {"name": "densenet", "depth": 16, "growth": 6, "compression": 0.5, "dropout": 0.2, **DEFAULT},
}
NARROWEST: dict[str, dict[str, Any]] = {
    "alexnet": {"name": "alexnet", **DEFAULT},
    "vgg": {"name": "vgg", "depth": 11, "batch_norm": False, **DEFAULT},
    "vgg_batch_norm": {"name": "vgg", "depth": 11, "batch_norm": True, **DEFAULT},
    "resnet": {"name": "resnet", "depth": 20, "shortcut": "pad", **DEFAULT},
    "preact_resnet": {"name": "preact_resnet", "depth": 110, "shortcut": "pad", **DEFAULT},
    "resnext": {"name": "resnext", "depth": 29, "cardinality": 8, "width": 64, **DEFAULT},
    "wide_resnet": {"name": "wide_resnet", "depth": 40, "widen": 1, "dropout": 0.3, **DEFAULT},
    "densenet": {"name": "densenet", "depth": 100, "growth": 12, "compression": 0.5, "dropout": 0.2, **DEFAULT},
}
AUTOENCODER = {"name": "autoencoder", **PLAIN}

OPTIMIZERS: dict[str, Callable[[nn.Module, nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda network, criterion: torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9),
    "adam": lambda network, criterion: torch.optim.Adam(network.parameters(), lr=0.001),
    "kfac": lambda network, criterion: KFAC(network, loss=criterion, generator=torch.Generator().manual_seed(0)),
    "ekfac": lambda network, criterion: EKFAC(network, loss=criterion, generator=torch.Generator().manual_seed(0)),
    "gkfac": lambda network, criterion: GKFAC(network, loss=criterion, generator=torch.Generator().manual_seed(0)),
}

KRONECKER = ("kfac", "ekfac", "gkfac")


def trained(model: dict[str, Any], optimizer: str, inputs: Tensor, targets: Tensor, criterion: nn.Module) -> None:
    """Take the steps and check what this file claims."""
    outputs = targets.shape[1] if targets.is_floating_point() else 10
    network = build(model, tuple(inputs.shape[1:]), outputs, 0)
    stepping = OPTIMIZERS[optimizer](network, criterion)
    initial = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    torch.manual_seed(0)
    for _ in range(STEPS):
        loss = criterion(network(inputs), targets)
        loss.backward()
        stepping.step()
        stepping.zero_grad()
        assert torch.isfinite(loss.detach())
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter).all(), f"{name} is not finite"
        assert not torch.equal(parameter, initial[name]), f"{name} did not move"
    if optimizer in KRONECKER:
        every_parameter_has_its_line(network, stepping.summary())  # type: ignore[attr-defined]


def every_parameter_has_its_line(network: nn.Module, summary: str) -> None:
    """A layer has one line, its block's, or its parameters have one each, the first-order fallback's."""
    listed = {line.split()[0]: int(line.split()[-2].replace(",", "")) for line in summary.splitlines()[1:]}
    layers = {
        name: sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        for name, layer in network.named_modules()
    }
    assert listed == {name: count for name, count in layers.items() if count}


def images(pixels: int) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, 3, pixels, pixels, generator=stream)
    return inputs, torch.randint(10, (BATCH,), generator=stream)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", SIBLINGS)
def test_a_small_sibling_of_every_family_trains(family: str, optimizer: str) -> None:
    trained(SIBLINGS[family], optimizer, *images(8), nn.CrossEntropyLoss())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("family", ["alexnet", "vgg", "vgg_batch_norm"])
def test_the_families_of_one_width_train_by_first_order(family: str, optimizer: str) -> None:
    trained(NARROWEST[family], optimizer, *images(32), nn.CrossEntropyLoss())


@pytest.mark.slow
@pytest.mark.parametrize("family", NARROWEST)
def test_the_narrowest_published_network_of_every_family_trains(family: str) -> None:
    """One optimizer after the other, and ResNeXt on small images: on 32x32 pixels it would take up to 19 GiB."""
    for optimizer in OPTIMIZERS:
        trained(NARROWEST[family], optimizer, *images(8 if family == "resnext" else 32), nn.CrossEntropyLoss())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("widths", [[60, 30, 8], pytest.param([1000, 500, 250, 30], marks=pytest.mark.slow)], ids=str)
def test_a_deep_autoencoder_trains(widths: list[int], optimizer: str) -> None:
    pixels = torch.rand(BATCH, 784, generator=torch.Generator().manual_seed(0))
    trained({**AUTOENCODER, "widths": widths}, optimizer, pixels, pixels, nn.BCEWithLogitsLoss())
