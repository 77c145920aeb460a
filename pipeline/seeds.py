"""Seeds of a run, one for each purpose, all from the seed that the user chose; and the states of all global random
streams, which a checkpoint keeps."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def number(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose: 32 bits, which is what torch's CPU generator makes use of."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=4).digest(), "big")


def random_states(device: torch.device) -> dict[str, Any]:
    """The global streams of Python, numpy, torch on the CPU and on the GPU in use, as plain values and tensors."""
    import numpy
    import torch

    name, keys, *rest = numpy.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(numpy.asarray(keys, dtype="int64")), *rest),
        "cpu": torch.get_rng_state(),
    }
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put back what ``random_states`` found."""
    import numpy
    import torch

    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
