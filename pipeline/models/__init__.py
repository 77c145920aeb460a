"""The networks of the benchmarks, each described by plain fields so that a bad one is refused before torch is
imported.

`FIELDS` has the fields and the rule of each; `build` makes the network, with weights that depend on the seed
alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.checks import COUNT, POSITIVE, Choice, Flag, ListOf, Rule

if TYPE_CHECKING:
    from torch import nn

ACTIVATIONS = ("none", "relu", "tanh")
INITIALISATIONS = ("default", "xavier_uniform", "xavier_normal", "kaiming_normal", "orthogonal")

_COMMON: dict[str, Rule] = {
    "activation": Choice(ACTIVATIONS),
    "init": Choice(INITIALISATIONS),  # of weights; biases start at zero, unless it is torch's default
    "gain": POSITIVE,  # factor on the initial weights; without meaning for default and kaiming_normal
}

FIELDS: dict[str, dict[str, Rule]] = {
    "mlp": {"depth": COUNT, "width": COUNT, "bias": Flag(), **_COMMON},
    "autoencoder": {"widths": ListOf(COUNT), **_COMMON},
    "cnn": {"channels": ListOf(COUNT), "batch_norm": Flag(), **_COMMON},
}


def build(model: dict[str, Any], input_shape: tuple[int, ...], outputs: int, seed: int) -> "nn.Module":
    """The network `model` (its `name` and the fields of FIELDS) on the CPU, with weights drawn from `seed`.

    `input_shape` is that of one example, `outputs` the number of output numbers of one example. The global
    random stream is left as it was.
    """
    from pipeline.models.initial import initialised

    fields = {key: value for key, value in model.items() if key not in ("name", "init", "gain")}
    make = importlib.import_module(f"pipeline.models.{model['name']}").make
    return initialised(lambda: make(input_shape, outputs, **fields), model["init"], model["gain"], seed)
