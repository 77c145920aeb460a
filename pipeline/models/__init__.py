"""The networks of the benchmarks, each described by plain fields so that a bad one is refused before torch is
imported.

One file a family, named as the family: its `make` builds the network from the fields that `FIELDS` lists with their
rules. `build` calls it, with weights that depend on the seed alone. docs/networks.md is the table of the published
ones.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.checks import COUNT, POSITIVE, Choice, ConfigError, Flag, ListOf, Number, OneOf, Rule, Series, show

if TYPE_CHECKING:
    from torch import nn

ACTIVATIONS = ("none", "relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "sigmoid", "tanh")
INITIALISATIONS = ("default", "xavier_uniform", "xavier_normal", "kaiming_normal", "orthogonal")
SHORTCUTS = ("pad", "projection")


@dataclass(frozen=True)
class Width:
    """Units of hidden layers: one number for all, or a list of one for each."""

    allowed: str = "an integer >= 1, or a list of them, one for each of the depth - 1 hidden layers"

    def accepts(self, value: Any) -> bool:
        return COUNT.accepts(value) or ListOf(COUNT).accepts(value)


_COMMON: dict[str, Rule] = {
    "init": Choice(INITIALISATIONS),  # of weights; `default` is the family's own, with others biases start at zero
    "gain": POSITIVE,  # factor on the initial weights; without meaning for default and kaiming_normal
}
_ACTIVATION: dict[str, Rule] = {"activation": Choice(ACTIVATIONS)}
_DROPOUT = Number(0, 1, open_high=True)  # the share of activations that is dropped

FIELDS: dict[str, dict[str, Rule]] = {
    "mlp": {"depth": COUNT, "width": Width(), "bias": Flag(), "batch_norm": Flag(), **_ACTIVATION, **_COMMON},
    "autoencoder": {"widths": ListOf(COUNT), **_ACTIVATION, **_COMMON},
    "cnn": {"channels": ListOf(COUNT), "batch_norm": Flag(), **_ACTIVATION, **_COMMON},
    "alexnet": _COMMON,
    "vgg": {"depth": OneOf((11, 13, 16, 19)), "batch_norm": Flag(), **_COMMON},
    "resnet": {"depth": Series(6, 2), "shortcut": Choice(SHORTCUTS), **_COMMON},
    "preact_resnet": {"depth": Series(6, 2), "shortcut": Choice(SHORTCUTS), **_COMMON},
    "resnext": {"depth": Series(9, 2), "cardinality": COUNT, "width": COUNT, **_COMMON},
    "wide_resnet": {"depth": Series(6, 4), "widen": COUNT, "dropout": _DROPOUT, **_COMMON},
    "densenet": {
        "depth": Series(6, 4),
        "growth": COUNT,
        "compression": Number(0, 1, open_low=True),
        "dropout": _DROPOUT,
        **_COMMON,
    },
}
FLAT = ("mlp", "autoencoder")  # these take examples of any shape, all others images


def check_agreement(field: str, model: dict[str, Any], *, images: bool) -> None:
    """Refuse a model whose fields are allowed one by one but not together, or not for examples of this kind."""
    name = model["name"]
    if not images and name not in FLAT:
        raise ConfigError(f"{field}.name: {name!r} needs images; expected {' or '.join(FLAT)}")
    if name == "mlp" and isinstance(model["width"], list) and len(model["width"]) != model["depth"] - 1:
        expected = f"an integer >= 1, or a list of {model['depth'] - 1}, one for each hidden layer of depth"
        raise ConfigError(f"{field}.width: {show(model['width'])} is not allowed; expected {expected} {model['depth']}")


def build(model: dict[str, Any], input_shape: tuple[int, ...], outputs: int, seed: int) -> "nn.Module":
    """The network `model` (its `name` and the fields of FIELDS) on the CPU, with weights drawn from `seed`.

    `input_shape` is that of one example, `outputs` the number of output numbers of one example. The global
    random stream is left as it was.
    """
    from pipeline.models.initial import initialised

    fields = {key: value for key, value in model.items() if key not in ("name", "init", "gain")}
    make = importlib.import_module(f"pipeline.models.{model['name']}").make
    return initialised(lambda: make(input_shape, outputs, **fields), model["init"], model["gain"], seed)
