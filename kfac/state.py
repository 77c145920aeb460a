"""What an optimizer keeps for one layer, and what it shows of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layers import Block

_TENSORS = ("A", "G", "count", "damping_a", "damping_g", "pi", "jitter")


@dataclass
class BlockState:
    """The running averages of one block and the solver's tensors; K is the number of groups or channels.

    A: [K, d_in, d_in] and G: [K, d_out, d_out], or [K, d] where only a diagonal is kept; `count` statistics steps went
    into them. `damping_a`, `damping_g` and `pi` are [K]. `jitter` is the number of powers of ten that failed inverses
    have added to the damping, `rung` how many failures the host has learnt of. `age` is the number of steps since the
    solver was renewed.
    """

    A: Tensor
    G: Tensor
    count: Tensor
    damping_a: Tensor
    damping_g: Tensor
    pi: Tensor
    jitter: Tensor
    solver: dict[str, Tensor] = field(default_factory=dict)
    rung: int = 0
    age: int = 0

    @classmethod
    def of(cls, block: Block) -> BlockState:
        k = block.shape[0]
        like = block.parameters[0].new_empty(0, dtype=block.dtype)
        shape_a, shape_g = cls.shapes(block)
        return cls(
            A=like.new_zeros(shape_a),
            G=like.new_zeros(shape_g),
            count=like.new_zeros(()),
            damping_a=like.new_zeros(k),
            damping_g=like.new_zeros(k),
            pi=like.new_ones(k),
            jitter=like.new_zeros(()),
        )

    @staticmethod
    def shapes(block: Block) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and G."""
        k, d_out, d_in = block.shape
        shape_a = (k, d_in) if block.diagonal_a else (k, d_in, d_in)
        return shape_a, (k, d_out) if block.diagonal_g else (k, d_out, d_out)

    def save(self) -> dict[str, Tensor | int]:
        """Plain tensors and numbers; the solver's tensors under "solver.<name>"."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return tensors | {f"solver.{k}": v for k, v in self.solver.items()} | {"rung": self.rung, "age": self.age}

    def load(self, saved: dict[str, Tensor | int], device: torch.device) -> None:
        """Take over what `save` gave, as copies on `device`."""
        self.solver = {}
        for name, value in saved.items():
            if isinstance(value, Tensor):
                value = value.to(device, copy=True)
            if name.startswith("solver."):
                self.solver[name.removeprefix("solver.")] = value  # type: ignore[assignment]
            else:
                setattr(self, name, value)

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.save().values() if isinstance(t, Tensor))


@dataclass
class LayerCurvature:
    """The curvature of one layer, as `KroneckerOptimizer.curvature` shows it.

    A [d_in, d_in] and G [d_out, d_out] are the running averages ([d] where only a diagonal is kept; with a leading
    dimension for the groups of a convolution or the channels of a norm layer); `damping_a` and `damping_g` are what the
    inverses in use were damped with, `age` the steps since those were made.
    """

    A: Tensor
    G: Tensor
    pi: Tensor
    damping_a: Tensor
    damping_g: Tensor
    age: int

    @classmethod
    def of(cls, state: BlockState) -> LayerCurvature:
        shown = (state.A, state.G, state.pi, state.damping_a, state.damping_g)
        a, g, pi, damping_a, damping_g = (x[0] if x.shape[0] == 1 else x for x in shown)
        return cls(a, g, pi, damping_a, damping_g, state.age)
