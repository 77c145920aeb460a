"""Initial weights: drawn on the CPU from a seed of their own, so that every optimizer starts from the same ones."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

ACTIVATION: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


@contextmanager
def private_stream(seed: int) -> Iterator[None]:
    """Within, the CPU's global random stream starts at `seed`; afterwards it goes on where it was."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def initialised(make: Callable[[], nn.Module], init: str, gain: float, seed: int) -> nn.Module:
    """The module from `make`, weights of its Linear and Conv2d layers drawn by the scheme `init`, biases
    zero.

    `default` keeps what `make` draws: torch's own, or the family's, see `he_`.
    """
    draw: dict[str, Callable[[torch.Tensor], object]] = {
        "xavier_uniform": lambda w: nn.init.xavier_uniform_(w, gain),
        "xavier_normal": lambda w: nn.init.xavier_normal_(w, gain),
        "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
        "orthogonal": lambda w: nn.init.orthogonal_(w, gain),
    }
    with private_stream(seed):
        module = make()
        if init != "default":
            for layer in module.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    draw[init](layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
    return module


def he_(network: nn.Sequential) -> nn.Sequential:
    """`network` with convolutions drawn from N(0, 2 / fan_out), so that gradients keep their size on the way back
    through ReLUs, and biases zero (He et al. 2015, arXiv 1502.01852, eq. 14). The linear layer stays torch's own."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network
