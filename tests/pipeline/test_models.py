"""Claims about the networks: published sizes, shapes, seeds, and that building one disturbs nobody's random numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.checks import ConfigError, Text, check_fields
from pipeline.models import ACTIVATIONS, FIELDS, INITIALISATIONS, build, check_agreement
from pipeline.models.initial import ACTIVATION

PLAIN = {"activation": "tanh", "init": "xavier_normal", "gain": 1.0}
MLP = {"name": "mlp", "depth": 4, "width": 5, "bias": True, "batch_norm": False, **PLAIN}
AUTOENCODER = {"name": "autoencoder", "widths": [128, 64, 32, 8], **PLAIN}
CNN = {"name": "cnn", "channels": [4, 6, 6], "batch_norm": False, **PLAIN}
DEFAULT = {"init": "default", "gain": 1.0}
CASES: list[tuple[dict[str, Any], tuple[int, ...], int]] = [
    (MLP, (7,), 3),
    (MLP, (1, 2, 3), 2),
    ({**MLP, "depth": 1}, (7,), 3),
    ({**MLP, "depth": 64, "activation": "relu", "batch_norm": True}, (7,), 3),
    ({**MLP, "width": [9, 8, 7], "batch_norm": True}, (7,), 3),
    (AUTOENCODER, (64,), 64),
    (AUTOENCODER, (1, 8, 8), 64),
    (CNN, (1, 8, 8), 10),
    ({**CNN, "channels": [4] * 6}, (3, 8, 8), 10),
    ({**CNN, "batch_norm": True, "activation": "relu"}, (3, 9, 8), 10),
]
FAMILIES: list[dict[str, Any]] = [
    {"name": "alexnet", **DEFAULT},
    {"name": "vgg", "depth": 11, "batch_norm": False, **DEFAULT},
    {"name": "vgg", "depth": 13, "batch_norm": True, **DEFAULT},
    {"name": "resnet", "depth": 8, "shortcut": "pad", **DEFAULT},
    {"name": "resnet", "depth": 8, "shortcut": "projection", **DEFAULT},
    {"name": "preact_resnet", "depth": 8, "shortcut": "pad", **DEFAULT},
    {"name": "preact_resnet", "depth": 8, "shortcut": "projection", **DEFAULT},
    {"name": "resnext", "depth": 11, "cardinality": 4, "width": 2, **DEFAULT},
    {"name": "wide_resnet", "depth": 10, "widen": 2, "dropout": 0.3, **DEFAULT},
    {"name": "densenet", "depth": 10, "growth": 3, "compression": 0.5, "dropout": 0.2, **DEFAULT},
]

# 32x32 pixels, 3 channels, 10 classes. Millions are those of bearpaw/pytorch-classification, whose ResNet-110 and
# PreResNet-110 are of other blocks and the same size, and of He et al. for the other depths of ResNet.
PUBLISHED: list[tuple[dict[str, Any], int, str | None]] = [
    ({"name": "alexnet"}, 2_472_266, "2.47"),
    ({"name": "vgg", "depth": 11, "batch_norm": False}, 9_225_610, None),
    ({"name": "vgg", "depth": 11, "batch_norm": True}, 9_228_362, None),
    ({"name": "vgg", "depth": 13, "batch_norm": False}, 9_410_122, None),
    ({"name": "vgg", "depth": 13, "batch_norm": True}, 9_413_066, None),
    ({"name": "vgg", "depth": 16, "batch_norm": False}, 14_719_818, None),
    ({"name": "vgg", "depth": 16, "batch_norm": True}, 14_724_042, None),
    ({"name": "vgg", "depth": 19, "batch_norm": False}, 20_029_514, None),
    ({"name": "vgg", "depth": 19, "batch_norm": True}, 20_035_018, "20.04"),
    ({"name": "resnet", "depth": 20, "shortcut": "pad"}, 269_722, "0.27"),
    ({"name": "resnet", "depth": 32, "shortcut": "pad"}, 464_154, "0.46"),
    ({"name": "resnet", "depth": 44, "shortcut": "pad"}, 658_586, "0.66"),
    ({"name": "resnet", "depth": 56, "shortcut": "pad"}, 853_018, "0.85"),
    ({"name": "resnet", "depth": 110, "shortcut": "pad"}, 1_727_962, "1.7"),
    ({"name": "preact_resnet", "depth": 110, "shortcut": "pad"}, 1_727_962, "1.7"),
    ({"name": "resnext", "depth": 29, "cardinality": 8, "width": 64}, 34_426_698, "34.43"),
    ({"name": "resnext", "depth": 29, "cardinality": 16, "width": 64}, 68_155_210, "68.16"),
    ({"name": "wide_resnet", "depth": 28, "widen": 10, "dropout": 0.3}, 36_479_194, "36.48"),
    ({"name": "densenet", "depth": 100, "growth": 12, "compression": 0.5, "dropout": 0.0}, 769_162, "0.77"),
    ({"name": "densenet", "depth": 190, "growth": 40, "compression": 0.5, "dropout": 0.0}, 25_624_430, "25.62"),
]


LARGE = ("alexnet", "vgg")
ROOT = Path(__file__).parents[2]


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.flatten() for p in module.parameters()])


@pytest.mark.parametrize(("model", "count", "millions"), PUBLISHED, ids=lambda value: str(value).replace("'", ""))
def test_a_network_has_the_published_number_of_parameters(
    model: dict[str, Any], count: int, millions: str | None
) -> None:
    model = {**model, **DEFAULT}
    check_fields("model", model, {"name": Text(), **FIELDS[model["name"]]})
    with torch.device("meta"):
        network = build(model, (3, 32, 32), 10, 0)
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in network.parameters()) == count
    if millions is not None:
        assert f"{count / 1e6:.{len(millions.partition('.')[2])}f}" == millions


def test_the_table_of_networks_has_the_counts_that_are_tested() -> None:
    table = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    for model, count, millions in PUBLISHED:
        fields = ", ".join(f"{key}: {str(value).lower()}" for key, value in model.items())
        assert f"| `{{{fields}}}` | {count:,} | {millions or 'none'} |" in table


@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: model["name"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 8, 8), (1, 5, 1)])
def test_every_family_takes_images_of_any_size(model: dict[str, Any], shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        assert build(model, shape, 7, 0)(torch.empty(2, *shape)).shape == (2, 7)


def test_there_is_a_file_and_a_case_for_every_family() -> None:
    cases = [model for model, _, _ in CASES] + FAMILIES
    assert {model["name"] for model in cases} == set(FIELDS)
    assert set(ACTIVATION) == set(ACTIVATIONS)


@pytest.mark.parametrize(("model", "shape", "outputs"), CASES)
def test_a_network_takes_examples_of_its_shape_and_gives_its_outputs(
    model: dict[str, Any], shape: tuple[int, ...], outputs: int
) -> None:
    assert build(model, shape, outputs, 0)(torch.zeros(3, *shape)).shape == (3, outputs)


@pytest.mark.parametrize("init", INITIALISATIONS)
@pytest.mark.parametrize(
    ("model", "shape", "outputs"),
    [CASES[0], CASES[4], CASES[6], *((model, (3, 8, 8), 10) for model in FAMILIES if model["name"] not in LARGE)],
)
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


def test_batch_norm_of_an_mlp_stands_before_each_activation_and_replaces_the_hidden_biases() -> None:
    network = build({**MLP, "depth": 3, "batch_norm": True}, (7,), 3, 0)
    assert [type(layer).__name__ for layer in network] == ["Linear", "BatchNorm1d", "Tanh"] * 2 + ["Linear"]
    assert [layer.bias is None for layer in network if isinstance(layer, nn.Linear)] == [True, True, False]


def test_convolutions_of_the_families_start_with_gradients_of_the_size_that_he_et_al_keep() -> None:
    network = build({"name": "resnet", "depth": 20, "shortcut": "pad", **DEFAULT}, (3, 32, 32), 10, 0)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 1000:
            spread = float(layer.weight.detach().std()) * (9 * layer.out_channels / 2) ** 0.5
            assert 0.93 < spread < 1.07


def test_a_padding_shortcut_has_no_parameters_and_passes_every_second_pixel_on() -> None:
    network = build({"name": "resnet", "depth": 8, "shortcut": "pad", **DEFAULT}, (3, 8, 8), 10, 0)
    shortcut = network.get_submodule("stage2.block1.shortcut")
    x = torch.randn(2, 16, 8, 8)
    assert not list(shortcut.parameters())
    assert torch.equal(shortcut(x), torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 16, 4, 4)], dim=1))


def test_what_a_dense_layer_has_seen_is_passed_on_unchanged() -> None:
    model = {"name": "densenet", "depth": 10, "growth": 3, "compression": 0.5, "dropout": 0.0, **DEFAULT}
    layer = build(model, (3, 8, 8), 10, 0).get_submodule("block1.layer1")
    x = torch.randn(2, 6, 8, 8)
    assert layer(x).shape == (2, 9, 8, 8) and torch.equal(layer(x)[:, :6], x)


@pytest.mark.parametrize("model", FAMILIES[8:], ids=lambda model: model["name"])
def test_dropout_follows_the_global_stream_while_training_and_is_off_in_evaluation(model: dict[str, Any]) -> None:
    network, x = build(model, (3, 8, 8), 10, 0), torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    first = network(x)
    assert not torch.equal(network(x), first)
    torch.manual_seed(1)
    assert torch.equal(network(x), first)
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("model", [CASES[3][0], CASES[8][0], *FAMILIES], ids=lambda model: model["name"])
def test_no_layer_writes_over_what_another_has_made(model: dict[str, Any]) -> None:
    """Curvature is read from inputs of layers after the step's backward: in-place activations would change them."""
    assert not any(getattr(layer, "inplace", False) for layer in build(model, (3, 8, 8), 10, 0).modules())


@pytest.mark.parametrize(
    ("model", "field", "allowed"),
    [
        ({"name": "resnet", "depth": 21, "shortcut": "pad", **DEFAULT}, "model.depth: 21", "8, 14, 20"),
        ({"name": "resnet", "depth": 2, "shortcut": "pad", **DEFAULT}, "model.depth: 2", "6 n + 2 with n >= 1"),
        ({"name": "resnet", "depth": 20, "shortcut": "pat", **DEFAULT}, "model.shortcut: 'pat'", "nearest: pad"),
        ({"name": "vgg", "depth": 12, "batch_norm": True, **DEFAULT}, "model.depth: 12", "one of 11, 13, 16, 19"),
        ({"name": "vgg", "depth": True, "batch_norm": True, **DEFAULT}, "model.depth: true", "one of 11"),
        ({"name": "resnext", "depth": 28, "cardinality": 8, "width": 64, **DEFAULT}, "model.depth: 28", "9 n + 2"),
        ({"name": "resnext", "depth": 29, "cardinality": 0, "width": 64, **DEFAULT}, "model.cardinality: 0", ">= 1"),
        ({"name": "wide_resnet", "depth": 28, "widen": 10, "dropout": 1.0, **DEFAULT}, "model.dropout: 1.0", "< 1"),
        ({**FAMILIES[-1], "compression": 0}, "model.compression: 0", "> 0 and <= 1"),
        ({**MLP, "width": [5, 5]}, "model.width: [5, 5]", "a list of 3, one for each hidden layer of depth 4"),
        ({**MLP, "width": [5, 0, 5]}, "model.width: [5, 0, 5]", "an integer >= 1, or a list"),
        ({**MLP, "activation": "rellu"}, "model.activation: 'rellu'", "nearest: relu"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_refused_with_what_is_allowed(model: dict[str, Any], field: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_fields("model", model, {"name": Text(), **FIELDS[model["name"]]})
        check_agreement("model", model, images=True)
    assert str(refusal.value).startswith(field) and allowed in str(refusal.value) and "\n" not in str(refusal.value)


def test_networks_of_convolutions_are_refused_where_examples_are_no_images() -> None:
    for name in set(FIELDS) - {"mlp", "autoencoder"}:
        with pytest.raises(ConfigError, match=f"{name}.* needs images; expected mlp or autoencoder"):
            check_agreement("model", {"name": name}, images=False)
