"""What a method has to say: how factors become a preconditioner, and what it does with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .layers import Block
from .parts import worth_joining
from .rows import Rows
from .stacks import Stack, Stacks
from .state import BlockState

if TYPE_CHECKING:
    from .curvature import Curvature


class Method:
    """Base of the preconditioners: `refresh` and `solve`, and `directions` where layers are not solved one by one."""

    name: str  # as states and messages have it
    keeps_rows = False  # whether rows of a statistics step are needed for more than the factors
    least_momentum = 0.3  # of the self-tuning rule: 0.4 and more is faster without noise, and stays high with it
    dtype: torch.dtype | None = None  # of the products that precondition, None for the parameters' own
    solves_with: tuple[str, ...] = ()  # the tensors of `BlockState.solver` that `solve` reads, [K, ...] each
    keeps: tuple[str, ...] = ()  # the tensors that every renewed `BlockState.solver` has

    def __init__(self) -> None:
        self.stacks = Stacks()

    def refresh(
        self, blocks: Sequence[Block], states: Sequence[BlockState], dampings: Sequence[Tensor]
    ) -> list[Tensor]:
        """Renew each `state.solver` from the averages; returns 1 where that failed, else 0 (0-dimensional)."""
        raise NotImplementedError

    def solve(self, block: Block, state: BlockState, matrix: Tensor) -> Tensor:
        """The preconditioner of one block times a matrix [K, d_out, d_in]."""
        raise NotImplementedError

    def directions(self, curvature: Curvature, blocks: list[Block], gradients: list[Tensor]) -> list[Tensor]:
        """The preconditioner times the gradients of some blocks."""
        found: dict[Block, Tensor] = {}
        given = dict(zip(blocks, gradients, strict=True))
        for stack in self._stacks(curvature, gradients):
            if all(block in given for block in stack.blocks):
                solved = self.solve(stack.blocks[0], stack.state, torch.cat([given[block] for block in stack.blocks]))
                found |= zip(stack.blocks, solved.split(stack.lengths), strict=True)
        return [found[b] if b in found else self.solve(b, curvature.states[b], g) for b, g in given.items()]

    def _stacks(self, curvature: Curvature, gradients: list[Tensor]) -> list[Stack]:
        """Layers that are solved in one call, where that is faster."""
        if not gradients or not worth_joining(gradients[0].device):
            return []
        return self.stacks.of(curvature.states, self.solves_with)

    def after_statistics(self, curvature: Curvature, rows: list[Rows], finite: Tensor) -> None:
        """Called with the rows of a statistics step and their weights, once the preconditioners are renewed."""

    def due_again(self) -> None:
        """Called when a step turns out to have been broken: what it renewed is due at the next statistics."""

    def save(self) -> dict[str, Any]:
        """What the method keeps beside the blocks' states: plain tensors and numbers."""
        return {}

    def check(self, saved: dict[str, Any], layers: dict[str, dict[str, Any]]) -> None:
        """Raise ValueError where what `save` gave, or the saved blocks' states, are of other arguments than these."""
        for name, layer in layers.items():
            kept = {key.removeprefix("solver.") for key in layer if key.startswith("solver.")}
            missing = [key for key in self.keeps if kept and key not in kept]
            if missing:
                raise ValueError(
                    f"state_dict: layer {name!r} has no {missing[0]!r}, which this solver or coarse space works with; "
                    "allowed: one saved with the same"
                )

    def load(self, saved: dict[str, Any], blocks: dict[str, Block], device: torch.device) -> None:
        """Take over what `save` gave, as copies on `device`."""
