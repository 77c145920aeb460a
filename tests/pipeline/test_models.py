"""Claims about the networks: shapes, seeds, and that building one disturbs nobody's random numbers."""

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.models import INITIALISATIONS, build

PLAIN = {"activation": "tanh", "init": "xavier_normal", "gain": 1.0}
MLP = {"name": "mlp", "depth": 4, "width": 5, "bias": True, "batch_norm": False, **PLAIN}
AUTOENCODER = {"name": "autoencoder", "widths": [128, 64, 32, 8], **PLAIN}
CNN = {"name": "cnn", "channels": [4, 6, 6], "batch_norm": False, **PLAIN}
CASES: list[tuple[dict[str, Any], tuple[int, ...], int]] = [
    (MLP, (7,), 3),
    (MLP, (1, 2, 3), 2),
    ({**MLP, "depth": 1}, (7,), 3),
    (AUTOENCODER, (64,), 64),
    (AUTOENCODER, (1, 8, 8), 64),
    (CNN, (1, 8, 8), 10),
    ({**CNN, "channels": [4] * 6}, (3, 8, 8), 10),
    ({**CNN, "batch_norm": True, "activation": "relu"}, (3, 9, 8), 10),
]


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.flatten() for p in module.parameters()])


@pytest.mark.parametrize(("model", "shape", "outputs"), CASES)
def test_a_network_takes_examples_of_its_shape_and_gives_its_outputs(
    model: dict[str, Any], shape: tuple[int, ...], outputs: int
) -> None:
    assert build(model, shape, outputs, 0)(torch.zeros(3, *shape)).shape == (3, outputs)


@pytest.mark.parametrize("init", INITIALISATIONS)
@pytest.mark.parametrize(("model", "shape", "outputs"), [CASES[0], CASES[3], CASES[5]])
def test_weights_depend_on_the_seed_alone(
    model: dict[str, Any], shape: tuple[int, ...], outputs: int, init: str
) -> None:
    model = {**model, "init": init}
    first = weights(build(model, shape, outputs, 0))
    torch.rand(5)
    assert torch.equal(first, weights(build(model, shape, outputs, 0)))
    assert not torch.equal(first, weights(build(model, shape, outputs, 1)))


def test_building_leaves_the_global_random_stream_where_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build(MLP, (7,), 3, 0)
    assert torch.equal(torch.rand(4), expected)


def test_the_autoencoder_mirrors_its_encoder_around_a_linear_code() -> None:
    layers = [module for module in build(AUTOENCODER, (64,), 64, 0).modules() if not list(module.children())]
    widths = [layer.out_features if isinstance(layer, nn.Linear) else "tanh" for layer in layers]
    assert widths == [128, "tanh", 64, "tanh", 32, "tanh", 8, 32, "tanh", 64, "tanh", 128, "tanh", 64]


def test_an_mlp_without_activation_and_bias_is_linear() -> None:
    network = build({**MLP, "activation": "none", "bias": False}, (7,), 3, 0)
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    assert torch.allclose(network(2 * a - b), 2 * network(a) - network(b), atol=1e-6)


def test_gain_scales_the_initial_weights() -> None:
    one, two = (build({**MLP, "gain": gain}, (7,), 3, 0) for gain in (1.0, 2.0))
    assert torch.allclose(2 * weights(one), weights(two))


def test_batch_norm_follows_every_convolution() -> None:
    layers = build({**CNN, "batch_norm": True}, (1, 8, 8), 10, 0).modules()
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in layers) == 3
